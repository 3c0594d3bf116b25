"""The closed form of policy_coef in plain PyTorch, for the CPU: what the Triton kernel computes, vectorised.

Shapes as in policy_coef. The values come from the reference without autograd; the derivatives are written out here.
"""

from __future__ import annotations

from typing import Optional

import torch

from ._checks import compute_dtype
from .group_advantage_ref import group_bounds
from .loss_spec import LossSpec
from .policy_inputs import Inputs
from .policy_ref import Outputs, Sequences, clamp, correction, exp, parts_ref, token_advantages, weights


def _within(x: torch.Tensor, bound: Optional[float]) -> torch.Tensor:
    return torch.ones_like(x, dtype=torch.bool) if bound is None else x.abs() <= bound


def _slope(spec: LossSpec, ratio: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """Derivative of the clipped surrogate by the logarithm of the ratio."""
    low, high = 1.0 - spec.clip_low, 1.0 + spec.clip_high
    delta = float("inf") if spec.delta is None else spec.delta
    first = ratio.clamp(max=delta) * advantage <= ratio.clamp(low, high) * advantage
    live = torch.where(first, ratio <= delta, (ratio >= low) & (ratio <= high))
    return -ratio * advantage * live


def _policy_gradient(
    spec: LossSpec, log_ratio: torch.Tensor, advantage: torch.Tensor, weight: torch.Tensor, seq: Sequences
) -> torch.Tensor:
    """Derivative [N] of sum weight L by logp; every policy but "reg"."""
    if spec.policy in ("gspo", "gspo_token", "luspo"):
        mean = seq.mean(log_ratio)
        slope = weight * _slope(spec, seq.spread(exp(clamp(mean, spec.log_ratio_clamp))), advantage)
        slope = slope * seq.spread(_within(mean, spec.log_ratio_clamp))
        if spec.policy == "gspo_token":
            return slope
        return seq.spread(seq.mean(slope) * (seq.tokens if spec.policy == "luspo" else 1.0))
    keep = _within(log_ratio, spec.log_ratio_clamp)
    log_ratio = clamp(log_ratio, spec.log_ratio_clamp)
    ratio = exp(log_ratio)
    if spec.policy == "clip":
        return weight * _slope(spec, ratio, advantage) * keep
    if spec.policy == "gmpo":
        rising, falling = advantage > 0, advantage < 0
        upper, lower = log_ratio.clamp(max=spec.clip_high), log_ratio.clamp(min=-spec.clip_low)
        bounded = torch.where(rising, upper, torch.where(falling, lower, 0.0))
        scale = exp(seq.mean(torch.where(seq.mask, bounded, 0.0)))
        free = (rising & (log_ratio <= spec.clip_high)) | (falling & (log_ratio >= -spec.clip_low))
        return seq.spread(seq.mean(-weight * advantage) * scale) * (free & keep)
    if spec.policy == "cispo":
        return -weight * ratio.clamp(1.0 - spec.clip_low, 1.0 + spec.clip_high) * advantage
    if spec.policy == "sapo":
        x = torch.where(advantage > 0, torch.full_like(ratio, spec.tau_pos), spec.tau_neg) * (ratio - 1.0)
        return -4.0 * weight * torch.sigmoid(x) * torch.sigmoid(-x) * ratio * advantage * keep
    return -weight * advantage


def _regression_gradient(
    spec: LossSpec, inputs: Inputs, log_ratio: torch.Tensor, weight: torch.Tensor, seq: Sequences
) -> torch.Tensor:
    """Derivative [N] of sum weight (A - z)^2 by logp.

    With e = z - A and Q_i the sum of a sequence's weights, over the n sequences of a group:
    dL / drho_j = 2 / (std + eps) [Q_j e_j - mean_i(Q_i e_i) - (rho_j - mean) / ((n - 1) std) sum_i Q_i e_i z_i]
    """
    target = inputs.logp.new_zeros(0) if inputs.advantages is None else inputs.advantages.to(log_ratio.dtype)
    rho, mass = seq.sum(clamp(log_ratio, spec.log_ratio_clamp)), seq.sum(weight)
    live = (seq.tokens > 0) & ~target.isnan()
    out = torch.zeros_like(rho)
    for begin, end in group_bounds(inputs.group_size, inputs.offsets, seq.count):
        at = torch.arange(begin, end, device=rho.device)[live[begin:end]]
        if len(at) == 0:
            continue
        centred = rho[at] - rho[at].mean()
        spread = bool((rho[at] != rho[at][0]).any())
        std = rho[at].std() if spread else torch.zeros_like(centred[0])
        z = centred / (std + spec.reg_eps) if spread else torch.zeros_like(centred)
        pull = mass[at] * (z - target[at])
        slope = pull - pull.mean()
        if spread:
            slope = slope - centred / ((len(at) - 1) * std) * (pull * z).sum()
        out[at] = 2.0 / (std + spec.reg_eps) * slope
    return seq.spread(out) * _within(log_ratio, spec.log_ratio_clamp)


def _kl_gradient(
    spec: LossSpec,
    gap: torch.Tensor,
    log_ratio: torch.Tensor,
    seq: Sequences,
    weight: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """Derivative [N] of sum weight k KL by logp, from gap = ref - logp and the KL [N]."""
    u = clamp(gap, spec.kl_clamp_in)
    raw = value
    if spec.kl.endswith("+"):
        slope = -gap
    else:
        if spec.kl == "k1":
            raw, slope = -u, torch.ones_like(u)
        elif spec.kl == "abs":
            raw, slope = u.abs(), -torch.sign(u)
        elif spec.kl == "k2":
            raw, slope = u**2 / 2, -u
        else:
            raw, slope = exp(u) - u - 1.0, 1.0 - exp(u)
        slope = slope * (_within(gap, spec.kl_clamp_in) & _within(raw, spec.kl_clamp_out))
    if spec.kl_weight == "token":
        keep = _within(log_ratio, spec.log_ratio_clamp)
        both = slope + value * keep
        if spec.kl == "k3":  # the two cancel to -u, which their sum would lose for a large u
            free = _within(gap, spec.kl_clamp_in) & _within(raw, spec.kl_clamp_out) & keep
            both = torch.where(free, -u, both)
        return weight * exp(clamp(log_ratio, spec.log_ratio_clamp)) * both
    if spec.kl_weight == "sequence":
        mean = seq.mean(log_ratio)
        ratio, keep = exp(clamp(mean, spec.log_ratio_clamp)), _within(mean, spec.log_ratio_clamp)
        return seq.spread(ratio) * weight * slope + seq.spread(ratio * keep * seq.mean(weight * value))
    return weight * slope


def coef_torch(inputs: Inputs, spec: LossSpec) -> Outputs:
    """loss, a, e, kl [N] in the compute dtype, clipped bool [N], partial sums [B, 9]."""
    dtype = compute_dtype(inputs.logp)
    parts = parts_ref(inputs, spec, inputs.logp, inputs.entropy)
    seq = Sequences(inputs, dtype)

    def clean(x: torch.Tensor) -> torch.Tensor:
        return torch.where(seq.mask, x.to(dtype), 0.0)

    logp = clean(inputs.logp)
    old = logp if inputs.old_logp is None else clean(inputs.old_logp)
    rollout = old if inputs.rollout_logp is None else clean(inputs.rollout_logp)
    log_ratio, advantage = logp - old, clean(token_advantages(inputs, seq, dtype))
    weight = clean(seq.spread(weights(inputs, spec, seq)))
    if inputs.token_weight is not None:
        weight = weight * clean(inputs.token_weight)
    nu = torch.ones_like(weight) if spec.correction == "none" else correction(spec, old - rollout, seq)
    if spec.gate_delta is not None:
        nu = nu * (seq.spread(seq.mean(rollout - logp) <= spec.gate_delta) | (advantage >= 0))
    if spec.policy == "reg":
        a = _regression_gradient(spec, inputs, log_ratio, weight * nu, seq)
    else:
        a = _policy_gradient(spec, log_ratio, advantage, weight * nu, seq)
    if inputs.ref_logp is not None and spec.kl != "none":
        a = a + spec.beta * _kl_gradient(spec, clean(inputs.ref_logp) - logp, log_ratio, seq, weight, parts.kl)
    e = -spec.entropy_coef * weight
    return parts.loss.detach(), torch.where(seq.mask, a, 0.0), e, parts.kl, parts.clipped, parts.partial


__all__ = ["coef_torch"]
