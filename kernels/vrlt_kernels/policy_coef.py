"""policy_coef: the clipped policy loss with k3 KL on per-token log-probs.

Shapes: N response tokens in flat order; logp, old_logp, ref_logp, advantage, weight [N].
    ratio = exp(logp - old_logp)
    l     = -min(ratio A, clip(ratio, 1 - low, 1 + high) A)          PPO clip, asymmetric as in DAPO
    k3    = exp(ref - logp) - (ref - logp) - 1                       Schulman's estimator, >= 0
    loss  = sum weight (l + beta k3)
The weights are the reduction: 1 / (tokens of the step) for the token mean, 1 / (responses * tokens of the response)
for the
sequence mean. The log-ratio of k3 is clamped to +-10 as verl does, so that one token can't overflow the sum.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch


class PolicyLoss(NamedTuple):
    """``loss`` scalar with gradient; ``kl`` [N] per token (0 without reference) and ``clipped`` bool [N], detached."""

    loss: torch.Tensor
    kl: torch.Tensor
    clipped: torch.Tensor


def policy_loss_ref(
    logp: torch.Tensor,
    advantage: torch.Tensor,
    weight: torch.Tensor,
    *,
    old_logp: Optional[torch.Tensor] = None,
    ref_logp: Optional[torch.Tensor] = None,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> PolicyLoss:
    """The loss in closed form. Without ``old_logp`` the current policy is the old one (ratio 1 with its gradient)."""
    old = logp.detach() if old_logp is None else old_logp
    ratio = (logp - old).exp()
    unclipped, clipped = ratio * advantage, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage
    per_token = -torch.minimum(unclipped, clipped)
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        gap = (ref_logp - logp).clamp(-10.0, 10.0)
        kl = gap.exp() - gap - 1.0
        per_token = per_token + beta * kl
    return PolicyLoss((per_token * weight).sum(), kl.detach(), (clipped < unclipped).detach())


__all__ = ["PolicyLoss", "policy_loss_ref"]
