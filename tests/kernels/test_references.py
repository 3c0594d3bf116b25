"""The reference mathematics against hand-computed values, finite differences and the published formulas."""

from __future__ import annotations

import math

import pytest
import torch

from vrlt_kernels import group_advantages_ref, policy_loss_ref, token_logprob_ref


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 2.0, 5.0, 5.0, 3.0])
    out = group_advantages_ref(rewards, [3, 2, 1], eps=0.0)
    assert out.tolist() == pytest.approx([0.0, -1.0, 1.0, 0.0, 0.0, 0.0])
    assert group_advantages_ref(rewards, [3, 2, 1], scale="none").tolist() == [0.0, -1.0, 1.0, 0.0, 0.0, 0.0]
    assert group_advantages_ref(torch.tensor([0.1] * 7), [7]).tolist() == [0.0] * 7
    assert group_advantages_ref(torch.zeros(0), []).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "sizes", "scale"),
    [([1.0, 2.0], [3], "std"), ([1.0, 2.0], [2, 0], "std"), ([1.0, math.nan], [2], "std"), ([1.0], [1], "other")],
)
def test_advantages_refuse(rewards, sizes, scale):
    with pytest.raises(ValueError, match=r"sizes|finite|scale"):
        group_advantages_ref(torch.tensor(rewards), sizes, scale=scale)


def test_logprob_and_entropy(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(11, 23, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(23, (11,), generator=generator)
    for temperature in (0.3, 1.0, 2.5):
        logp, entropy = token_logprob_ref(logits, target, temperature)
        p = (logits / temperature).softmax(-1)
        torch.testing.assert_close(logp, p[torch.arange(11), target].log())
        torch.testing.assert_close(entropy, -(p * p.log()).sum(-1).detach())
        assert torch.autograd.gradcheck(lambda x, t=temperature: token_logprob_ref(x, target, t)[0], logits)
    cut = torch.tensor([[0.0, -math.inf, 0.0]])
    logp, entropy = token_logprob_ref(cut, torch.tensor([0]))
    assert logp.item() == pytest.approx(-math.log(2))
    assert entropy.item() == pytest.approx(math.log(2))


def test_policy_loss_by_hand():
    logp = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1], dtype=torch.float64)
    old = torch.zeros(5, dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    weight = torch.full((5,), 0.2, dtype=torch.float64)
    out = policy_loss_ref(logp, advantage, weight, old_logp=old, clip_low=0.2, clip_high=0.28)
    up, down = math.exp(0.5), math.exp(-0.5)
    expected = -(1.28 - up + down - 0.8 + 2 * math.exp(0.1)) / 5
    assert out.loss.item() == pytest.approx(expected)
    assert out.clipped.tolist() == [True, False, False, True, False]


def test_policy_gradient_of_the_first_update_is_reinforce():
    logp = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    weight = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    policy_loss_ref(logp, advantage, weight).loss.backward()
    torch.testing.assert_close(logp.grad, -(weight * advantage))


def test_k3_and_its_gradient(seed):
    generator = torch.Generator().manual_seed(seed)
    logp = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(9, generator=generator, dtype=torch.float64)
    weight, zero = torch.rand(9, generator=generator, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    out = policy_loss_ref(logp, zero, weight, ref_logp=ref, beta=0.7)
    gap = ref - logp.detach()
    torch.testing.assert_close(out.kl, gap.exp() - gap - 1)
    assert bool((out.kl >= 0).all())
    out.loss.backward()
    torch.testing.assert_close(logp.grad, 0.7 * weight * (1 - gap.exp()))
    far = policy_loss_ref(
        torch.zeros(2), torch.zeros(2), torch.ones(2), ref_logp=torch.tensor([100.0, -100.0]), beta=1.0
    )
    assert torch.isfinite(far.loss)
