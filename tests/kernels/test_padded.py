"""The padded wrappers give the packed results."""

from __future__ import annotations

import math

import pytest
import torch

from vrlt_kernels import (
    KernelInputError,
    LossSpec,
    grpo_loss,
    linear_grpo_loss,
    padded_grpo_loss,
    padded_linear_grpo_loss,
)

B, T, V, K = 4, 7, 33, 5
LENGTHS = (7, 3, 0, 5)
PER_TOKEN = ("old_logp", "ref_logp", "token_weight")
SPECS = [LossSpec(), LossSpec(policy="gspo", reduction="bnpo", kl="k3", beta=0.1, entropy_coef=0.02)]


@pytest.fixture
def batch(generator):
    """A right-padded batch with NaN and impossible targets behind the mask, and a hole in it."""
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    mask[0, 2] = False
    values = {
        "logits": torch.randn(B, T, V, generator=generator),
        "hidden": torch.randn(B, T, K, generator=generator),
        "target": torch.randint(V, (B, T), generator=generator),
        "old_logp": -3 + torch.rand(B, T, generator=generator),
        "ref_logp": -3 + torch.rand(B, T, generator=generator),
        "token_weight": torch.rand(B, T, generator=generator),
    }
    for name, value in values.items():
        value[~mask] = -100 if name == "target" else math.nan
    values["weight"] = torch.randn(V, K, generator=generator)
    return {**values, "mask": mask, "advantages": torch.tensor([0.5, -1.0, 2.0, 0.0])}


def packed(batch):
    """Offsets, and [B, T] tensors as [N]."""
    mask = batch["mask"]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return cu_seqlens, {name: batch[name][mask] for name in ("logits", "hidden", "target", *PER_TOKEN)}


def inputs(source, batch, **change):
    return {**{name: source[name] for name in PER_TOKEN}, "advantages": batch["advantages"], **change}


def same(out, expected, mask, equal):
    for got, value in zip(out[1:6], expected[1:6], strict=True):
        assert got.shape == (B, T)
        assert not got[~mask].any()
        assert equal(got[mask], value)
    assert equal(out.loss, expected.loss)
    assert all(equal(out.metrics[k], v) for k, v in expected.metrics.items())


def close(a, b):
    torch.testing.assert_close(a, b)
    return True


@pytest.mark.parametrize("spec", SPECS, ids=["clip", "gspo"])
@pytest.mark.parametrize("packing", [True, False])
def test_logits(batch, spec, packing, monkeypatch):
    mask = batch["mask"]
    cu_seqlens, flat = packed(batch)
    leaf, twin = batch["logits"].requires_grad_(), flat["logits"].detach().requires_grad_()
    expected = grpo_loss(twin, flat["target"], cu_seqlens, spec, temperature=0.9, **inputs(flat, batch))
    if not packing:  # as under torch.compile, or with the mask on a GPU
        monkeypatch.setattr("vrlt_kernels.padded.torch.compiler.is_compiling", lambda: True)
    out = padded_grpo_loss(leaf, batch["target"], mask, spec, temperature=0.9, **inputs(batch, batch))
    same(out, expected, mask, torch.equal if packing else close)
    (out.loss * 3).backward()
    (expected.loss * 3).backward()
    assert not leaf.grad[~mask].any()
    (torch.testing.assert_close if not packing else assert_equal)(leaf.grad[mask], twin.grad)


def assert_equal(a, b):
    assert torch.equal(a, b)


@pytest.mark.parametrize("spec", SPECS, ids=["clip", "gspo"])
@pytest.mark.parametrize("packing", [True, False])
def test_linear(batch, spec, packing, monkeypatch):
    mask = batch["mask"]
    cu_seqlens, flat = packed(batch)
    results = []
    for padded in (False, True):
        source = (batch if padded else flat)["hidden"]
        hidden, weight = source.detach().clone().requires_grad_(), batch["weight"].clone().requires_grad_()
        if padded:
            with monkeypatch.context() as patch:
                if not packing:
                    patch.setattr("vrlt_kernels.padded.torch.compiler.is_compiling", lambda: True)
                more = inputs(batch, batch)
                out = padded_linear_grpo_loss(hidden, weight, batch["target"], mask, spec, temperature=0.9, **more)
        else:
            more = inputs(flat, batch)
            out = linear_grpo_loss(hidden, weight, flat["target"], cu_seqlens, spec, temperature=0.9, **more)
        out.loss.backward()
        results.append((out, hidden.grad[mask] if padded else hidden.grad, weight.grad))
        if padded:
            assert not hidden.grad[~mask].any()
    same(results[1][0], results[0][0], mask, torch.equal if packing else close)
    torch.testing.assert_close(results[1][1:], results[0][1:])


def test_advantages_and_temperatures_of_tokens(batch):
    mask = batch["mask"]
    cu_seqlens, flat = packed(batch)
    advantages, heat = torch.randn(B, T), torch.rand(B, T) + 0.5
    for temperature in (heat, heat[:, 0], torch.tensor(0.7)):
        spread = temperature[:, None].expand(B, T) if temperature.dim() == 1 else temperature.expand(B, T)
        change = {"advantages": advantages}
        more = inputs(batch, batch, **change)
        out = padded_grpo_loss(batch["logits"], batch["target"], mask, SPECS[0], temperature=temperature, **more)
        more = inputs(flat, batch, advantages=advantages[mask])
        expected = grpo_loss(flat["logits"], flat["target"], cu_seqlens, SPECS[0], temperature=spread[mask], **more)
        same(out, expected, mask, torch.equal)
        more = inputs(batch, batch, **change)
        linear = padded_linear_grpo_loss(
            batch["hidden"], batch["weight"], batch["target"], mask, SPECS[0], temperature=temperature, **more
        )
        more = inputs(flat, batch, advantages=advantages[mask])
        expected = linear_grpo_loss(
            flat["hidden"], batch["weight"], flat["target"], cu_seqlens, SPECS[0], temperature=spread[mask], **more
        )
        same(linear, expected, mask, close)


def test_as_many_tokens_as_sequences(batch):
    """Advantages of the tokens aren't mistaken for those of the sequences."""
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, :3] = mask[1, 0] = True
    logits, target = torch.randn(B, T, V), torch.zeros(B, T, dtype=torch.int64)
    advantages = torch.arange(1.0, B * T + 1).view(B, T)
    spec = LossSpec(policy="reinforce", reduction="sum")
    out = padded_grpo_loss(logits, target, mask, spec, advantages=advantages)
    torch.testing.assert_close(out.loss, -(advantages * logits.log_softmax(-1)[..., 0])[mask].sum())


def test_nothing_left(batch):
    mask = torch.zeros(B, T, dtype=torch.bool)
    leaf = batch["logits"].requires_grad_()
    out = padded_grpo_loss(leaf, batch["target"], mask, SPECS[1], **inputs(batch, batch))
    out.loss.backward()
    assert out.loss == 0
    assert not leaf.grad.any()
    hidden, weight = batch["hidden"].requires_grad_(), batch["weight"].requires_grad_()
    padded_linear_grpo_loss(hidden, weight, batch["target"], mask, SPECS[1], **inputs(batch, batch)).loss.backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(B, V)}, "logits: got"),
        ({"target": torch.zeros(B, 3, dtype=torch.int64)}, r"target: got .*shape \[4, 7\]"),
        ({"mask": torch.ones(B, T)}, "mask: got float32"),
        ({"old_logp": torch.zeros(B)}, r"old_logp: got .*shape \[4, 7\]"),
        ({"advantages": torch.zeros(B, 2)}, r"advantages: got .*shape \[4, 7\]"),
        ({"temperature": torch.ones(T)}, r"temperature: got .*shape \[\], \[4\] or \[4, 7\]"),
    ],
)
def test_errors(batch, change, message):
    arguments = {"logits": batch["logits"], "target": batch["target"], "mask": batch["mask"], "spec": SPECS[0]}
    with pytest.raises(KernelInputError, match=message):
        padded_grpo_loss(**{**arguments, **inputs(batch, batch), **change})


def test_temperatures_behind_the_mask_count_nowhere(batch):
    heat = torch.where(batch["mask"], 0.7, math.nan)
    for function, names in ((padded_grpo_loss, ("logits",)), (padded_linear_grpo_loss, ("hidden", "weight"))):
        given = [batch[name] for name in (*names, "target", "mask")]
        losses = [function(*given, SPECS[0], temperature=t, **inputs(batch, batch)).loss for t in (heat, 0.7)]
        torch.testing.assert_close(*losses)


def test_another_default_device(batch):
    """The host's own tensors stay on the host under torch.set_default_device."""
    given = {"spec": SPECS[0], **inputs(batch, batch)}
    rows = [batch[name] for name in ("target", "mask")]
    with torch.device("meta"):
        ours = padded_grpo_loss(batch["logits"], *rows, **given).loss
        padded_linear_grpo_loss(batch["hidden"], batch["weight"], *rows, **given)
    assert torch.equal(ours, padded_grpo_loss(batch["logits"], *rows, **given).loss)
