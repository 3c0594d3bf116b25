"""What a LossSpec refuses, and that it survives being taken apart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vrlt_kernels import KernelInputError, LossSpec
from vrlt_kernels.loss_spec import CORRECTIONS, KL_WEIGHTS, KLS, POLICIES, REDUCTIONS


@pytest.mark.parametrize("name", ["policy", "reduction", "kl", "kl_weight", "correction", "correction_level"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(KernelInputError, match=rf"^{name}: got 'gspoo', needs one of '\w+', '\w+'"):
        LossSpec(**{name: "gspoo"})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_low": math.nan}, "clip_low"),
        ({"clip_high": -0.3}, "clip_high"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 2.0, "policy": "sapo"}, "delta"),
        ({"log_ratio_clamp": -1.0}, "log_ratio_clamp"),
        ({"tau_neg": 0.0}, "tau_neg"),
        ({"reg_eps": math.inf}, "reg_eps"),
        ({"kl": "k3", "beta": math.nan}, "beta"),
        ({"beta": 0.1}, "kl"),
        ({"kl_weight": "token"}, "kl"),
        ({"kl_clamp_in": 0.0}, "kl_clamp_in"),
        ({"kl_clamp_out": math.nan}, "kl_clamp_out"),
        ({"correction_low": 3.0}, "correction_high"),
        ({"correction": "icepop", "correction_level": "sequence"}, "correction_level"),
        ({"entropy_coef": math.inf}, "entropy_coef"),
        ({"gate_delta": math.nan}, "gate_delta"),
    ],
)
def test_a_value_out_of_range_is_named(options, name):
    with pytest.raises(KernelInputError, match=rf"^{name}: got .*, needs "):
        LossSpec(**options)


def test_unbounded_below_and_raw_upper_bounds_are_possible():
    spec = LossSpec(policy="cispo", clip_low=1.0, clip_high=-0.8)
    assert (1 - spec.clip_low, 1 + spec.clip_high) == pytest.approx((0.0, 0.2))


def test_names_and_numbers_give_the_spec_back():
    spec = LossSpec("gspo", "dapo", delta=3.0, kl="k3+", beta=0.04, kl_clamp_in=20.0, correction="mis", gate_delta=0.1)
    again = LossSpec.unpack(spec.names, spec.numbers)
    assert again == spec
    assert hash(again) == hash(spec)
    assert spec.numbers.dtype == torch.float64
    assert spec.numbers.isnan().sum() == 2
    assert replace(spec, beta=0.5).numbers.tolist() != spec.numbers.tolist()


def test_every_name_makes_a_spec():
    for field, names in {"policy": POLICIES, "reduction": REDUCTIONS, "correction": CORRECTIONS}.items():
        assert [getattr(LossSpec(**{field: name}), field) for name in names] == list(names)
    made = [LossSpec(kl=kl, kl_weight=weight) for kl in KLS[1:] for weight in KL_WEIGHTS]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("name", ["tau_pos", "reg_eps", "entropy_coef", "beta", "clip_low", "correction_high"])
def test_what_is_no_number_is_named(name):
    for value in (None, "0.2"):
        with pytest.raises(KernelInputError, match=rf"^{name}: got .*, needs a number$"):
            LossSpec(kl="k3", **{name: value})
    with pytest.raises(KernelInputError, match="delta: got '3', needs a number or None"):
        LossSpec(delta="3")
