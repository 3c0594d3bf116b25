"""The reference of policy_coef: every loss as a formula of plain PyTorch that autograd differentiates."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Tuple

import torch

from ._checks import compute_dtype
from .group_advantage_ref import advantages_ref, group_bounds
from .loss_spec import LossSpec
from .policy_inputs import Inputs

METRICS = ("tokens", "low", "high", "ratio", "kl", "entropy", "correction", "ratio_min", "ratio_max")
"""Columns of the partial sums [B, 9] that a backend hands back; the last two are extrema."""


class Parts(NamedTuple):
    """Weighted loss per token [N], KL [N], clipped [N], partial sums [B, 9]."""

    loss: torch.Tensor
    kl: torch.Tensor
    clipped: torch.Tensor
    partial: torch.Tensor


Outputs = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""loss, a, e, kl, clipped [N] and partial sums [B, 9]."""


class Sequences:
    """Sums and means over the unmasked tokens of each sequence, and back."""

    def __init__(self, inputs: Inputs, dtype: torch.dtype) -> None:
        lengths = inputs.cu_seqlens.diff().long()
        self.count = len(lengths)
        self.of_token = torch.repeat_interleave(torch.arange(self.count, device=lengths.device), lengths)
        n = inputs.logp.shape[0]
        self.mask = torch.ones(n, dtype=torch.bool, device=lengths.device) if inputs.mask is None else inputs.mask
        self.tokens = self.sum(self.mask.to(dtype))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(self.count).index_add(0, self.of_token, x)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return self.sum(x) / self.tokens.clamp(min=1)

    def spread(self, per_sequence: torch.Tensor) -> torch.Tensor:
        return per_sequence[self.of_token]


def exp(x: torch.Tensor) -> torch.Tensor:
    """exp that saturates at e^40 (fp64: e^350) instead of overflowing, with the saturated value as its derivative."""
    limit = 350.0 if x.dtype == torch.float64 else 40.0
    return (x + (x.clamp(max=limit) - x).detach()).exp()


def clamp(x: torch.Tensor, bound: Optional[float]) -> torch.Tensor:
    return x if bound is None else x.clamp(-bound, bound)


def token_advantages(inputs: Inputs, seq: Sequences, dtype: torch.dtype) -> torch.Tensor:
    """Advantages [N] of the tokens."""
    if inputs.rewards is not None:
        options: Any = {
            "scale": inputs.adv_scale,
            "eps": inputs.adv_eps.item(),
            "ddof": inputs.adv_ddof,
            "singleton": "zero",
        }
        per_sequence = advantages_ref(inputs.rewards, inputs.group_size, inputs.offsets, None, **options)
        return seq.spread(per_sequence.to(dtype))
    given = torch.empty(0) if inputs.advantages is None else inputs.advantages.to(dtype)
    return seq.spread(given) if given.shape[0] == seq.count else given


def weights(inputs: Inputs, spec: LossSpec, seq: Sequences) -> torch.Tensor:
    """The reduction's weight [B] of a token of each sequence."""
    one, given = torch.ones_like(seq.tokens), inputs.normalizer
    if given is None:
        local = {"grpo": one.sum(), "bnpo": seq.tokens.sum(), "seq_sum": (seq.tokens > 0).sum()}
        given = local.get(spec.reduction, one.new_ones(())).clamp(min=1)
    if spec.reduction == "grpo":
        return one / (given * seq.tokens.clamp(min=1))
    return one / (seq.count * given) if spec.reduction == "dr_grpo" else one / given


def correction(spec: LossSpec, gap: torch.Tensor, seq: Sequences) -> torch.Tensor:
    """The rollout correction [N] from gap = old - rollout [N]."""
    if spec.correction_level != "token":
        gap = seq.spread(seq.sum(gap) if spec.correction_level == "sequence" else seq.mean(gap))
    rho = exp(gap)
    if spec.correction == "tis":
        return rho.clamp(max=spec.correction_high)
    inside = (rho >= spec.correction_low) & (rho <= spec.correction_high)
    return inside.to(rho) if spec.correction == "reject" else rho * inside


def _surrogate(spec: LossSpec, ratio: torch.Tensor, advantage: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """PPO's clipped surrogate of a ratio, and where its lower and upper bounds act."""
    low, high = 1.0 - spec.clip_low, 1.0 + spec.clip_high
    bounded = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
    value = -torch.minimum(bounded * advantage, ratio.clamp(low, high) * advantage)
    over = (advantage > 0) & (ratio > high)
    if spec.delta is not None:
        over = over | ((advantage != 0) & (ratio > spec.delta))
    return value, (advantage < 0) & (ratio < low), over


def _policy(
    spec: LossSpec, logp: torch.Tensor, log_ratio: torch.Tensor, advantage: torch.Tensor, seq: Sequences
) -> Tuple[torch.Tensor, ...]:
    """L_t, where the lower and upper bounds act, and the ratio the policy uses, all [N]; every policy but "reg"."""
    never = torch.zeros_like(seq.mask)
    if spec.policy in ("gspo", "gspo_token", "luspo"):
        mean = seq.spread(clamp(seq.mean(log_ratio), spec.log_ratio_clamp))
        if spec.policy == "gspo_token":
            mean = seq.spread(seq.mean(log_ratio)).detach() + log_ratio - log_ratio.detach()
            mean = clamp(mean, spec.log_ratio_clamp)
        ratio = exp(mean)
        value, low, high = _surrogate(spec, ratio, advantage)
        return (value * seq.spread(seq.tokens) if spec.policy == "luspo" else value), low, high, ratio
    log_ratio = clamp(log_ratio, spec.log_ratio_clamp)
    ratio = exp(log_ratio)
    if spec.policy == "clip":
        return (*_surrogate(spec, ratio, advantage), ratio)
    if spec.policy == "gmpo":
        upper, lower = log_ratio.clamp(max=spec.clip_high), log_ratio.clamp(min=-spec.clip_low)
        bounded = torch.where(advantage > 0, upper, torch.where(advantage < 0, lower, 0.0))
        ratio = seq.spread(exp(seq.mean(torch.where(seq.mask, bounded, 0.0))))
        low = (advantage < 0) & (log_ratio < -spec.clip_low)
        return -advantage * ratio, low, (advantage > 0) & (log_ratio > spec.clip_high), ratio
    if spec.policy == "cispo":
        low_bound, high_bound = 1.0 - spec.clip_low, 1.0 + spec.clip_high
        value = -ratio.clamp(low_bound, high_bound).detach() * advantage * logp
        return value, ratio < low_bound, ratio > high_bound, ratio
    if spec.policy == "sapo":
        tau = torch.where(advantage > 0, torch.full_like(ratio, spec.tau_pos), spec.tau_neg)
        return -4.0 / tau * torch.sigmoid(tau * (ratio - 1.0)) * advantage, never, never, ratio
    return -advantage * logp, never, never, ratio


def _regression(
    spec: LossSpec, inputs: Inputs, log_ratio: torch.Tensor, target: torch.Tensor, seq: Sequences
) -> torch.Tensor:
    """(target - z)^2 [N]; 0 for sequences without tokens or with a NaN target [B], which the statistics leave out."""
    rho = seq.sum(clamp(log_ratio, spec.log_ratio_clamp))
    live = (seq.tokens > 0) & ~target.isnan()
    out = rho * 0.0  # so that it can be differentiated where no sequence takes part
    for begin, end in group_bounds(inputs.group_size, inputs.offsets, seq.count):
        at = torch.arange(begin, end, device=rho.device)[live[begin:end]]
        if len(at) == 0:
            continue
        group = rho[at]
        spread = bool((group != group[0]).any())
        std = group.std() if spread else torch.zeros_like(group[0])
        error = target[at] - (group - group.mean()) / (std + spec.reg_eps)
        out = out.index_copy(0, at, error**2)
    return seq.spread(out)


def _kl(spec: LossSpec, gap: torch.Tensor) -> torch.Tensor:
    """KL [N] from gap = ref - logp."""
    u = clamp(gap, spec.kl_clamp_in)
    kind = spec.kl.removesuffix("+")
    if kind == "k1":
        value = -u
    elif kind == "abs":
        value = u.abs()
    elif kind == "k2":
        value = u**2 / 2
    else:
        value = exp(u) - u - 1.0
    value = clamp(value, spec.kl_clamp_out)
    if spec.kl.endswith("+"):
        value = value.detach() + gap**2 / 2 - (gap**2 / 2).detach()
    return value


def parts_ref(inputs: Inputs, spec: LossSpec, logp: torch.Tensor, entropy: Optional[torch.Tensor]) -> Parts:
    """The loss of every token, differentiable in ``logp`` and ``entropy``; the rest of ``inputs`` are constants."""
    dtype = compute_dtype(inputs.logp)
    seq = Sequences(inputs, dtype)

    def clean(x: torch.Tensor) -> torch.Tensor:
        return torch.where(seq.mask, x.to(dtype), 0.0)

    logp = clean(logp)
    old = logp.detach() if inputs.old_logp is None else clean(inputs.old_logp)
    rollout = old if inputs.rollout_logp is None else clean(inputs.rollout_logp)
    log_ratio, advantage = logp - old, clean(token_advantages(inputs, seq, dtype))
    if spec.policy == "reg":
        target = logp.new_zeros(0) if inputs.advantages is None else inputs.advantages.to(dtype)
        value = _regression(spec, inputs, log_ratio, target, seq)
        low = high = torch.zeros_like(seq.mask)
        ratio = exp(clamp(log_ratio, spec.log_ratio_clamp))
    else:
        value, low, high, ratio = _policy(spec, logp, log_ratio, advantage, seq)
    nu = torch.ones_like(value) if spec.correction == "none" else correction(spec, old - rollout, seq).detach()
    if spec.gate_delta is not None:
        near = seq.spread(seq.mean((rollout - logp).detach())) <= spec.gate_delta
        nu = nu * (near | (advantage >= 0))
    loss = nu * value
    kl = torch.zeros_like(logp)
    if inputs.ref_logp is not None and spec.kl != "none":
        kl = _kl(spec, clean(inputs.ref_logp) - logp)
        weight = torch.ones_like(kl)
        if spec.kl_weight == "token":
            weight = exp(clamp(log_ratio, spec.log_ratio_clamp))
        elif spec.kl_weight == "sequence":
            weight = seq.spread(exp(clamp(seq.mean(log_ratio), spec.log_ratio_clamp)))
        loss = loss + spec.beta * weight * kl
    entropy = torch.zeros_like(logp) if entropy is None else clean(entropy)
    if spec.entropy_coef != 0:
        loss = loss - spec.entropy_coef * entropy
    token_weight = seq.spread(weights(inputs, spec, seq))
    if inputs.token_weight is not None:
        token_weight = token_weight * clean(inputs.token_weight)
    loss = torch.where(seq.mask, loss * token_weight, 0.0)
    low, high = low & seq.mask, high & seq.mask
    sums = [seq.tokens, *(seq.sum(clean(x).detach()) for x in (low, high, ratio, kl, entropy, nu))]
    return Parts(loss, clean(kl).detach(), low | high, torch.stack([*sums, *_extrema(ratio.detach(), seq)], 1))


def _extrema(ratio: torch.Tensor, seq: Sequences) -> Tuple[torch.Tensor, torch.Tensor]:
    out = []
    for reduce, fill in (("amin", float("inf")), ("amax", float("-inf"))):
        masked = torch.where(seq.mask, ratio, fill)
        start = torch.full_like(seq.tokens, fill)
        out.append(start.scatter_reduce(0, seq.of_token, masked, reduce))
    return out[0], out[1]


__all__ = [
    "METRICS",
    "Outputs",
    "Parts",
    "Sequences",
    "clamp",
    "correction",
    "exp",
    "parts_ref",
    "token_advantages",
    "weights",
]
