"""EasyR1's policy loss, against its formulas written out in fp64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from vrlt_kernels import KernelInputError
from vrlt_kernels.compat import easyr1

B, T = 4, 5
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
OPTIONS: dict[str, Any] = {
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.3,
    "clip_ratio_dual": 1.5,
    "tau_positive": 0.8,
    "tau_negative": 1.2,
}
LOSS_TYPES = ("default", "gspo", "gspo_token", "cispo", "sapo")


def mean(values: torch.Tensor, mode: str) -> torch.Tensor:
    if mode == "token":
        return (values * MASK).sum() / (MASK.sum() + 1e-8)
    return ((values * MASK).sum(-1) / (MASK.sum(-1) + 1e-8)).mean()


def expected(
    logp: torch.Tensor, old: torch.Tensor, a: torch.Tensor, kind: str, mode: str
) -> tuple[torch.Tensor, dict[str, float]]:
    gap = logp - old
    if kind.startswith("gspo"):
        shared = ((gap * MASK).sum(-1) / (MASK.sum(-1) + 1e-8))[:, None]
        gap = shared.detach() + logp - logp.detach() if kind == "gspo_token" else shared * MASK
    ratio = gap.clamp(-20, 20).exp()
    clipped = gap.clamp(math.log(0.8), math.log(1.3)).exp()
    metrics = {"ppo_kl": mean(old - logp, "token"), "entropy_loss": mean(-logp, mode)}
    if kind == "cispo":
        loss = -a * logp * clipped.detach()
    elif kind == "sapo":
        tau = torch.where(a >= 0, 0.8, 1.2)
        loss = -a * 4 / tau * torch.sigmoid(tau * (ratio - 1))
    else:
        upper = torch.maximum(-a * ratio, -a * clipped)
        loss = torch.where(a < 0, torch.minimum(upper, -a * 1.5), upper)
        metrics["pg_clipfrac_higher"] = mean((-a * ratio < -a * clipped).double(), "token")
        metrics["pg_clipfrac_lower"] = mean(((upper > -a * 1.5) & (a < 0)).double(), "token")
    return mean(loss, mode), {name: float(value.detach()) for name, value in metrics.items()}


def problem(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    logp, noise, a = torch.randn(3, B, T, generator=generator, dtype=torch.float64)
    return (logp - 5).requires_grad_(), logp - 5 + 0.4 * noise, a


@pytest.mark.parametrize(("kind", "mode"), [*itertools.product(LOSS_TYPES, ("token", "seq"))])
def test_policy_loss(generator: torch.Generator, kind: Any, mode: Any) -> None:
    logp, old, a = problem(generator)
    mine, metrics = easyr1.compute_policy_loss(old, logp, a, MASK, **OPTIONS, loss_type=kind, loss_avg_mode=mode)
    loss, values = expected(logp, old, a, kind, mode)
    torch.testing.assert_close(mine, loss)
    for x, y in zip(torch.autograd.grad(mine * 3, logp), torch.autograd.grad(loss * 3, logp), strict=True):
        torch.testing.assert_close(x, y)
    assert metrics == pytest.approx(values)


def test_log_ratios_beyond_the_clamp(generator: torch.Generator) -> None:
    logp, old, a = problem(generator)
    old[0, 0] += 30
    old[1, 1] -= 30
    mine, _ = easyr1.compute_policy_loss(old, logp, a, MASK, **OPTIONS, loss_type="sapo", loss_avg_mode="token")
    loss, _ = expected(logp, old, a, "sapo", "token")
    torch.testing.assert_close(mine, loss)
    torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (mine, loss)))


def test_what_is_refused(generator: torch.Generator) -> None:
    logp, old, a = problem(generator)
    good: dict[str, Any] = OPTIONS | {"loss_type": "default", "loss_avg_mode": "token"}
    for name, value in (("loss_type", "ppo"), ("loss_avg_mode", "sum"), ("clip_ratio_dual", 1.2), ("kwargs", 0)):
        with pytest.raises(KernelInputError, match=name):
            easyr1.compute_policy_loss(old, logp, a, MASK, **(good | {name: value}))
    with pytest.raises(KernelInputError, match="advantages"):
        easyr1.compute_policy_loss(old, logp, a[:, 0], MASK, **good)
