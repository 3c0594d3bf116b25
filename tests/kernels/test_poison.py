"""Operators write all of what they return: NaN is in everything they allocate. The policies: test_policy_edges.py."""

from __future__ import annotations

import pytest
import torch

import vrlt_kernels as vk
from vrlt_kernels import _native
from vrlt_kernels.group_advantage import SCALES

N, K, V = 13, 5, 41
CU, GROUPS = torch.tensor([0, 4, 4, 9, 13]), torch.tensor([0, 2, 4])
D = torch.float64


@pytest.fixture(params=["reference", "triton", "native"])
def backend(request):
    """The backend; with NaN (and the largest integers) in every tensor that is allocated without a value."""
    if request.param == "native" and not _native.available():
        pytest.skip(_native.reason())
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.empty(1).isnan() & torch.zeros(1).new_empty(1).isnan())
        with vk.use_backend(request.param):
            yield request.param
    finally:
        torch.use_deterministic_algorithms(before)


def head(generator):
    return [torch.randn(s, generator=generator, dtype=D).requires_grad_() for s in ((N, K), (V, K), V)]


def gradients(outputs, leaves):
    total = sum((i + 1) * x.square().sum() for i, x in enumerate(outputs))
    return torch.autograd.grad(total, leaves, retain_graph=True)


@pytest.mark.parametrize("budget", [N, 6, 1])
def test_linear_logprob(backend, generator, budget):
    """Everything that decides which rows are kept, computed again, or left out."""
    hidden, weight, bias = leaves = head(generator)
    target = torch.randint(V, (N,), generator=generator)
    heat = torch.rand(N, generator=generator, dtype=D) + 0.5
    expected = vk.linear_logprob_ref(hidden, weight, target, heat, bias=bias, want_sum_p2=True)
    live = torch.arange(N) % 3 > 0
    for options in ({"want_sum_p2": True}, {"live": live}, {"live": live & False}):
        out = vk.linear_logprob(hidden, weight, target, heat, bias=bias, budget_bytes=budget * V * 8, **options)
        for got, exact in zip(out, expected, strict=True):
            if got is not None:
                torch.testing.assert_close(got, exact)
        if not out.logp.requires_grad:
            continue
        kept = options.get("live", live | True)
        for last in (1, 2):  # with and without a gradient of the entropy
            wanted = gradients([torch.where(kept, x, 0.0) for x in expected[:last]], leaves)
            torch.testing.assert_close(gradients(out[:last], leaves), wanted)


@pytest.mark.parametrize("budget", [N, 6, 1])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
def test_linear_grpo_loss(backend, generator, budget, entropy_coef):
    hidden, weight, bias = leaves = head(generator)
    target = torch.randint(V, (N,), generator=generator)
    spec = vk.LossSpec(entropy_coef=entropy_coef, kl="k3", beta=0.1)
    mask = torch.arange(N) % 4 > 0
    old = vk.linear_logprob_ref(hidden, weight, target, bias=bias).logp.detach() + 0.1
    given = {"advantages": torch.tensor([1.0, 0.5, 0.0, -1.0], dtype=D), "old_logp": old, "ref_logp": old, "mask": mask}
    expected = vk.linear_grpo_loss_ref(hidden, weight, target, CU, spec, bias=bias, **given)
    out = vk.linear_grpo_loss(hidden, weight, target, CU, spec, bias=bias, budget_bytes=budget * V * 8, **given)
    for got, exact in zip(out[:6], expected[:6], strict=True):
        torch.testing.assert_close(got, exact)
    torch.testing.assert_close(gradients([out.loss], leaves), gradients([expected.loss], leaves))


def test_token_weight(backend, generator):
    hidden, weight, bias = leaves = head(generator)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    heat = torch.rand(N, generator=generator, dtype=D) + 0.5
    for released in (False, True):
        expected = vk.token_weight_ref(logits, CU, GROUPS, temperature=heat, released=released)
        ours = [vk.token_weight(logits, CU, GROUPS, temperature=heat, released=released)]
        for budget in (N, 4):
            options = {"bias": bias, "temperature": heat, "released": released, "budget_bytes": budget * V * 8}
            ours.append(vk.linear_token_weight(hidden, weight, CU, GROUPS, **options))
        for out in ours:
            torch.testing.assert_close(out, expected)
            if released:
                torch.testing.assert_close(gradients([out], leaves), gradients([expected], leaves))


@pytest.mark.parametrize("scale", SCALES)
def test_group_advantages(backend, generator, scale):
    rewards = torch.randn(6, 2, generator=generator, dtype=D)
    rewards[4] = torch.nan
    lengths = torch.randint(1, 9, (6,), generator=generator)
    for given, combine in ((rewards[:, 0], "sum_then_normalize"), (rewards, "normalize_then_sum_then_whiten")):
        for groups in (3, torch.tensor([0, 1, 1, 6])):
            options = {"scale": scale, "combine": combine, "lengths": lengths, "weights": None}
            out = vk.group_advantages(given, groups, **options)
            torch.testing.assert_close(out, vk.group_advantages_ref(given, groups, **options))
