"""The loss family written out sequence by sequence and token by token, as the papers have it, for autograd.

Nothing of this is shared with the package: it is what test_policy_coef holds the kernels against.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch

CU = torch.tensor([0, 4, 4, 9, 10, 13, 20])
N, B = 20, 6


def draw(generator, dtype=torch.float64, n=N):
    """Log-probs of the policies and what else a token may have."""
    names = ("logp", "old_logp", "ref_logp", "rollout_logp")
    out = {name: (torch.randn(n, generator=generator) * 0.4 - 1).to(dtype) for name in names}
    out["entropy"] = torch.rand(n, generator=generator).to(dtype)
    out["token_weight"] = torch.rand(n, generator=generator).to(dtype) + 0.5
    out["mask"] = torch.rand(n, generator=generator) > 0.3
    return out


def clamp(x, bound):
    return x if bound is None else x.clamp(-bound, bound)


def surrogate(ratio, advantage, spec):
    """PPO's, one value at a time."""
    first = ratio if spec.delta is None or ratio <= spec.delta else torch.full_like(ratio, spec.delta)
    low, high = 1 - spec.clip_low, 1 + spec.clip_high
    second = torch.full_like(ratio, low) if ratio < low else torch.full_like(ratio, high) if ratio > high else ratio
    return -(first * advantage if first * advantage <= second * advantage else second * advantage)


def token_terms(logp, old, advantage, spec):
    """L of each token of a sequence; every policy but "reg"."""
    n = len(logp)
    x = clamp(logp - old, spec.log_ratio_clamp)
    if spec.policy in ("gspo", "gspo_token", "luspo"):
        mean = (logp - old).mean()
        if spec.policy == "gspo_token":
            ratios = clamp(mean.detach() + logp - logp.detach(), spec.log_ratio_clamp).exp()
        else:
            ratios = clamp(mean, spec.log_ratio_clamp).exp().expand(n)
        values = torch.stack([surrogate(r, a, spec) for r, a in zip(ratios, advantage, strict=True)])
        return values * n if spec.policy == "luspo" else values
    if spec.policy == "clip":
        return torch.stack([surrogate(r, a, spec) for r, a in zip(x.exp(), advantage, strict=True)])
    if spec.policy == "gmpo":
        sign = advantage.sign()
        bounded = torch.minimum(sign * x, sign * x.clamp(-spec.clip_low, spec.clip_high)) * sign
        return -advantage * bounded.mean().exp()
    if spec.policy == "cispo":
        return -x.exp().clamp(1 - spec.clip_low, 1 + spec.clip_high).detach() * advantage * logp
    if spec.policy == "sapo":
        tau = torch.tensor([spec.tau_pos if a > 0 else spec.tau_neg for a in advantage], dtype=logp.dtype)
        return -(4 / tau) / (1 + (-tau * (x.exp() - 1)).exp()) * advantage
    return -advantage * logp


def kl_terms(logp, ref, spec):
    u = clamp(ref - logp, spec.kl_clamp_in)
    kind = spec.kl.rstrip("+")
    value = {"k1": -u, "abs": u.abs(), "k2": u * u / 2, "k3": u.exp() - u - 1}[kind]
    value = clamp(value, spec.kl_clamp_out)
    if spec.kl.endswith("+"):
        square = (logp - ref) ** 2 / 2
        value = value.detach() + square - square.detach()
    return value


def constants(logp, old, rollout, advantage, spec):
    """Rollout correction and gate of each token of a sequence."""
    with torch.no_grad():
        gap = old - rollout
        if spec.correction_level == "sequence":
            gap = gap.sum().expand_as(gap)
        elif spec.correction_level == "geometric":
            gap = gap.mean().expand_as(gap)
        rho = gap.exp()
        inside = ((spec.correction_low <= rho) & (rho <= spec.correction_high)).double()
        nu = {
            "none": torch.ones_like(rho),
            "tis": rho.clamp(max=spec.correction_high),
            "mis": rho * inside,
            "icepop": rho * inside,
            "reject": inside,
        }[spec.correction]
        if spec.gate_delta is not None and (rollout - logp).mean() > spec.gate_delta:
            nu = nu * (advantage >= 0)
        return nu


def regression_terms(rhos, targets, ends, spec):
    """(A - z)^2 of each sequence."""
    out = []
    for begin, end in ends:
        live = [i for i in range(begin, end) if rhos[i] is not None]
        group = torch.stack([rhos[i] for i in live]) if live else None
        mean, std = (group.mean(), group.std()) if len(live) > 1 else (sum(rhos[i] for i in live), 0.0)
        out += [None if rhos[i] is None else (targets[i] - (rhos[i] - mean) / (std + spec.reg_eps)) ** 2
                for i in range(begin, end)]  # fmt: skip
    return out


def formula(logp, ends, spec, *, advantages, old, ref, rollout, entropy, token_weight, mask, normalizer, groups):
    """The loss, 0-d, of log-probs [N]; advantages [N]; all others [N] too."""
    spans = [torch.arange(b, e)[mask[b:e]] for b, e in pairwise(ends)]
    count = {"grpo": len(spans), "bnpo": int(mask.sum()), "seq_sum": sum(len(s) > 0 for s in spans), "sum": 1}
    divide = count[spec.reduction] if normalizer is None else normalizer
    if spec.policy == "reg":
        rhos = [clamp(logp[s] - old[s], spec.log_ratio_clamp).sum() if len(s) else None for s in spans]
        targets = [advantages[s[0]] if len(s) else None for s in spans]
        bounds = [(i, i + groups) for i in range(0, len(spans), groups)]
        errors = regression_terms(rhos, targets, bounds, spec)
    total = logp.sum() * 0
    for i, s in enumerate(spans):
        if len(s) == 0:
            continue
        now, before, advantage = logp[s], old[s], advantages[s]
        value = errors[i].expand(len(s)) if spec.policy == "reg" else token_terms(now, before, advantage, spec)
        value = value * constants(now, before, rollout[s], advantage, spec)
        if spec.kl != "none":
            weight = 1.0
            if spec.kl_weight == "token":
                weight = clamp(now - before, spec.log_ratio_clamp).exp()
            elif spec.kl_weight == "sequence":
                weight = clamp((now - before).mean(), spec.log_ratio_clamp).exp()
            value = value + spec.beta * weight * kl_terms(now, ref[s], spec)
        value = value - spec.entropy_coef * entropy[s]
        per_token = {"grpo": divide * len(s), "dr_grpo": divide * len(spans)}.get(spec.reduction, divide)
        total = total + (value * token_weight[s]).sum() / per_token
    assert math.isfinite(total.detach())
    return total
