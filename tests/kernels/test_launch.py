"""The choice of a backend: forced, automatic, said once, refused with a reason."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from vrlt_kernels import KernelInputError, _launch, _native, availability, group_advantages, report, use_backend
from vrlt_kernels._checks import offsets, tensor, values_in_range

REWARDS = torch.tensor([1.0, 2.0])


def test_said_once_and_reported(caplog, monkeypatch):
    monkeypatch.setattr(_launch, "_said", {})
    with caplog.at_level(logging.INFO, "vrlt_kernels"):
        with use_backend("triton"):
            group_advantages(REWARDS, 2)
            group_advantages(REWARDS, 2)
        with use_backend("reference"):
            group_advantages(REWARDS, 2)
    assert [r.getMessage() for r in caplog.records] == [
        "group_advantages: triton (as asked)",
        "group_advantages: reference (as asked)",
    ]
    assert report() == {"group_advantages": "reference (as asked)"}


def test_the_automatic_choice_on_a_cpu_has_a_reason(monkeypatch):
    monkeypatch.setattr(_launch, "_said", {})
    monkeypatch.delenv(_launch.ENVIRONMENT, raising=False)
    group_advantages(REWARDS, 2)
    assert report() == {"group_advantages": "reference (group_advantages has no native backend)"}


def test_the_innermost_choice_holds(monkeypatch):
    monkeypatch.setenv(_launch.ENVIRONMENT, "triton")
    assert _launch.choose("x", REWARDS) == "triton"
    with use_backend("reference"):
        assert _launch.choose("x", REWARDS) == "reference"
        with use_backend(None):
            assert _launch.choose("x", REWARDS, has=("triton", "reference")) == "reference"
    monkeypatch.setenv(_launch.ENVIRONMENT, "cuda")
    with pytest.raises(KernelInputError, match="VRLT_KERNELS_BACKEND: got 'cuda', needs one of 'triton', 'native'"):
        _launch.choose("x", REWARDS)


@pytest.mark.parametrize("reason", ["triton is not installed", "needs a CUDA device"])
def test_a_forced_backend_that_cannot_run_says_why(monkeypatch, reason):
    monkeypatch.setattr(_launch, "has_triton", lambda: "CUDA" in reason)
    monkeypatch.setattr(_launch, "interpreting", lambda: False)
    with use_backend("triton"), pytest.raises(KernelInputError, match=rf"^backend: got 'triton' for .*{reason}"):
        group_advantages(REWARDS, 2)


def test_unknown_backend():
    with pytest.raises(KernelInputError, match=r"^backend: got 'cpu', needs one of"), use_backend("cpu"):
        raise AssertionError


def test_hyper_parameters_are_kept_by_value():
    device = torch.device("cpu")
    first = _launch.hyper((0.5, 1), torch.float32, device)
    assert _launch.hyper((0.5, 1.0), torch.float32, device) is first
    assert _launch.hyper((0.5, 1.0), torch.float64, device).dtype == torch.float64


def test_the_package_works_without_triton_and_imports_none():
    code = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch, vrlt_kernels as v
loss = v.policy_loss(torch.zeros(3, requires_grad=True), torch.tensor([0, 3]), v.LossSpec(), advantages=torch.ones(1))
loss.loss.backward()
assert "triton" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=100)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: tensor("x", 3), "x: got int, needs a tensor"),
        (lambda: tensor("x", torch.zeros(2), shape=[3]), r"x: got float32 \[2\] on cpu, needs shape \[3\]"),
        (lambda: tensor("x", torch.zeros(2), dtypes=[torch.int64]), r"x: got float32 \[2\] on cpu, needs int64"),
        (lambda: tensor("x", torch.zeros(2), like=torch.zeros(1, device="meta")), "x: got .*, needs a tensor on meta"),
        (lambda: offsets("c", torch.tensor([0.0]), None, REWARDS), r"c: got float32 .*, needs int32 or int64"),
        (lambda: offsets("c", torch.tensor([], dtype=torch.int64), 0, REWARDS), "c: got .*, needs at least one offset"),
        (lambda: offsets("c", torch.tensor([0, 3, 2]), 2, REWARDS), r"c: got \[0, 3, 2\], needs .* never decrease"),
        (lambda: offsets("c", torch.tensor([1, 2]), 2, REWARDS), r"c: got \[1, 2\], needs offsets that begin at 0"),
        (lambda: offsets("c", torch.tensor([0, 3]), 2, REWARDS), "c: got offsets that end at 3, needs 2"),
        (lambda: values_in_range("t", torch.tensor([0, 7]), 0, 7), r"t: got 7, needs values in \[0, 7\)"),
        (lambda: values_in_range("t", torch.tensor([-1, 7]), 0, 9), r"t: got -1, needs values in \[0, 9\)"),
    ],
)
def test_errors_name_the_argument(check, message):
    with pytest.raises(KernelInputError, match=f"^{message}"):
        check()


@pytest.mark.skipif(not _native.available(), reason="the compiled operators aren't built")
def test_a_device_that_the_compiled_operators_do_not_run_on():
    with use_backend("native"), pytest.raises(KernelInputError, match="run on CPUs and CUDA devices"):
        _launch.choose("row_fused", torch.zeros(1, device="meta"))
    assert _native.obstacle(torch.device("cpu")) == ""
    if torch.version.cuda is None:
        assert "built without CUDA" in _native.obstacle(torch.device("cuda"))


def test_availability_is_what_forcing_says(monkeypatch):
    monkeypatch.setattr(_launch, "interpreting", lambda: False)
    obstacles = availability("cpu")
    assert "needs a CUDA device" in obstacles["triton"]
    assert (obstacles["native"], obstacles["reference"]) == (_native.reason(), "")
    monkeypatch.setattr(_launch, "interpreting", lambda: True)
    assert availability()["triton"] == ""
