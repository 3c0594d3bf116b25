"""What the Triton kernel of policy_coef does with a block of tokens: L and KL, with their derivatives by the log-prob.

Imported only where Triton is installed. ``hypers``: see `policy_triton`.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

# Places in loss_spec.POLICIES.
CISPO = tl.constexpr(1)
SAPO = tl.constexpr(2)
GSPO = tl.constexpr(3)
GSPO_TOKEN = tl.constexpr(4)
GMPO = tl.constexpr(5)
LUSPO = tl.constexpr(6)
REINFORCE = tl.constexpr(7)
REG = tl.constexpr(8)


@triton.jit
def clamp_to(x, bound):
    """x within +-bound."""
    return tl.minimum(tl.maximum(x, -bound), bound)


@triton.jit
def ratio_of(x, ACC: tl.constexpr):
    """exp(x), which saturates instead of overflowing."""
    limit = 350.0 if ACC == tl.float64 else 40.0  # noqa: SIM300
    return tl.exp(tl.minimum(x, limit))


@triton.jit
def bounded_log_ratio(x, advantage, hypers, POLICY: tl.constexpr):
    """What "gmpo" and "reg" sum over a sequence: the log-ratio within its bounds."""
    x = clamp_to(x, tl.load(hypers + 3))
    if POLICY == GMPO:
        upper = tl.minimum(x, tl.load(hypers + 1))
        lower = tl.maximum(x, -tl.load(hypers))
        x = tl.where(advantage > 0, upper, tl.where(advantage < 0, lower, 0.0))
    return x


@triton.jit
def gmpo_is_free(x, advantage, hypers):
    """Whether a token's log-ratio is within the bounds of "gmpo", so that it has a gradient."""
    rising = (advantage > 0) & (clamp_to(x, tl.load(hypers + 3)) <= tl.load(hypers + 1))
    falling = (advantage < 0) & (clamp_to(x, tl.load(hypers + 3)) >= -tl.load(hypers))
    return (rising | falling) & (tl.abs(x) <= tl.load(hypers + 3))


@triton.jit
def _surrogate(ratio, advantage, hypers):
    """PPO's clipped surrogate, its derivative by the ratio's logarithm, and where the lower and upper bounds act."""
    low = 1.0 - tl.load(hypers)
    high = 1.0 + tl.load(hypers + 1)
    delta = tl.load(hypers + 2)
    first = tl.minimum(ratio, delta) * advantage
    second = tl.minimum(tl.maximum(ratio, low), high) * advantage
    takes_first = first <= second
    free = (takes_first & (ratio <= delta)) | ((first > second) & (ratio >= low) & (ratio <= high))
    value = -tl.where(takes_first, first, second)
    over = ((advantage > 0) & (ratio > high)) | ((advantage != 0) & (ratio > delta))
    return value, tl.where(free, -ratio * advantage, 0.0), (advantage < 0) & (ratio < low), over


@triton.jit
def policy_term(now, x, advantage, of_sequence, inside, count, hypers, POLICY: tl.constexpr, ACC: tl.constexpr):
    """L, its derivative, where the lower and upper bounds act, and the ratio, of tokens with log-ratio x.

    The derivative is by the token's own log-prob; under "gspo", "luspo" and "gmpo" by the mean of the sequence's.
    ``of_sequence`` is the ratio of the sequence, ``inside`` whether its logarithm was within the clamp.
    """
    bound = tl.load(hypers + 3)
    keep = tl.abs(x) <= bound
    ratio = ratio_of(clamp_to(x, bound), ACC)
    low = ratio < 0  # never
    high = low
    if POLICY == GSPO or POLICY == GSPO_TOKEN or POLICY == LUSPO:  # noqa: SIM109
        ratio = tl.zeros_like(x) + of_sequence
        value, slope, low, high = _surrogate(ratio, advantage, hypers)
        slope = tl.where(inside, slope, 0.0)
        if POLICY == LUSPO:
            value = value * count
            slope = slope * count
    elif POLICY == GMPO:
        ratio = tl.zeros_like(x) + of_sequence
        value = -advantage * ratio
        slope = value
        low = (advantage < 0) & (clamp_to(x, bound) < -tl.load(hypers))
        high = (advantage > 0) & (clamp_to(x, bound) > tl.load(hypers + 1))
    elif POLICY == CISPO:
        floor = 1.0 - tl.load(hypers)
        ceiling = 1.0 + tl.load(hypers + 1)
        slope = -tl.minimum(tl.maximum(ratio, floor), ceiling) * advantage
        value = slope * now
        low = ratio < floor
        high = ratio > ceiling
    elif POLICY == SAPO:
        tau = tl.where(advantage > 0, tl.load(hypers + 4), tl.load(hypers + 5))
        power = tl.exp(-tau * (ratio - 1.0))
        gate = 1.0 / (1.0 + power)
        value = -4.0 / tau * gate * advantage
        slope = tl.where(keep, -4.0 * gate * (power * gate) * ratio * advantage, 0.0)
    elif POLICY == REINFORCE or POLICY == REG:  # noqa: SIM109
        slope = -advantage
        value = slope * now
    else:
        value, slope, low, high = _surrogate(ratio, advantage, hypers)
        slope = tl.where(keep, slope, 0.0)
    return value, slope, low, high, ratio


@triton.jit
def kl_term(gap, x, of_sequence, hypers, KL: tl.constexpr, KL_WEIGHT: tl.constexpr, ACC: tl.constexpr):
    """KL, its weight k, and the derivative of k KL by the token's log-prob, from gap = ref - logp.

    The part that goes through the sequence's ratio, of kl_weight "sequence", is not in the derivative.
    """
    bound = tl.load(hypers + 7)
    limit = tl.load(hypers + 8)
    u = clamp_to(gap, bound)
    if KL == 1 or KL == 5:
        raw = -u
        slope = tl.zeros_like(u) + 1.0
    elif KL == 2:
        raw = tl.abs(u)
        slope = tl.where(u > 0, -1.0, tl.where(u < 0, 1.0, 0.0)).to(ACC)
    elif KL == 3:
        raw = u * u * 0.5
        slope = -u
    else:
        power = ratio_of(u, ACC)
        raw = power - u - 1.0
        slope = 1.0 - power
    value = clamp_to(raw, limit)
    slope = tl.where((tl.abs(gap) <= bound) & (tl.abs(raw) <= limit), slope, 0.0)
    if KL >= 5:
        slope = -gap
    weight = tl.zeros_like(u) + 1.0
    if KL_WEIGHT == 1:
        most = tl.load(hypers + 3)
        weight = ratio_of(clamp_to(x, most), ACC)
        both = slope + tl.where(tl.abs(x) <= most, value, 0.0)
        if KL == 4:
            # k3 and its derivative cancel to -u, which their sum would lose for a large u.
            free = (tl.abs(gap) <= bound) & (tl.abs(raw) <= limit) & (tl.abs(x) <= most)
            both = tl.where(free, -u, both)
        slope = both
    elif KL_WEIGHT == 2:
        weight = weight * of_sequence
    return value, weight, weight * slope


@triton.jit
def regression_term(sums, advantages, sequence, begin, end, hypers, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """(A - z)^2 of a sequence and the derivative of the group's loss by its rho; see policy_torch.

    ``sums`` [B, 3]: rho, sum of weights and number of tokens of every sequence.
    """
    zero = tl.zeros([BLOCK], ACC)
    number, total = zero, zero
    low, high = zero + float("inf"), zero - float("inf")
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        rho = tl.load(sums + at * 3, mask=at < end, other=0.0)
        target = tl.load(advantages + at, mask=at < end, other=float("nan")).to(ACC)
        live = (target == target) & (tl.load(sums + at * 3 + 2, mask=at < end, other=0.0) > 0)
        number += live.to(ACC)
        total += tl.where(live, rho, 0.0)
        low = tl.minimum(low, tl.where(live, rho, float("inf")))
        high = tl.maximum(high, tl.where(live, rho, float("-inf")))
    n = tl.sum(number, 0)
    mean = tl.sum(total, 0) / tl.maximum(n, 1.0)
    squares = zero
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        rho = tl.load(sums + at * 3, mask=at < end, other=0.0)
        target = tl.load(advantages + at, mask=at < end, other=float("nan")).to(ACC)
        live = (target == target) & (tl.load(sums + at * 3 + 2, mask=at < end, other=0.0) > 0)
        squares += tl.where(live, (rho - mean) * (rho - mean), 0.0)
    equal = tl.min(low, 0) >= tl.max(high, 0)
    std = tl.where(equal, 0.0, tl.sqrt(tl.sum(squares, 0) / tl.maximum(n - 1.0, 1.0)))
    divisor = std + tl.load(hypers + 12)
    pulls, moments = zero, zero
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        rho = tl.load(sums + at * 3, mask=at < end, other=0.0)
        target = tl.load(advantages + at, mask=at < end, other=float("nan")).to(ACC)
        live = (target == target) & (tl.load(sums + at * 3 + 2, mask=at < end, other=0.0) > 0)
        z = tl.where(equal, 0.0, (rho - mean) / divisor)
        pull = tl.load(sums + at * 3 + 1, mask=at < end, other=0.0) * (z - target)
        pulls += tl.where(live, pull, 0.0)
        moments += tl.where(live, pull * z, 0.0)
    rho = tl.load(sums + sequence * 3)
    target = tl.load(advantages + sequence).to(ACC)
    z = tl.where(equal, 0.0, (rho - mean) / divisor)
    slope = tl.load(sums + sequence * 3 + 1) * (z - target) - tl.sum(pulls, 0) / tl.maximum(n, 1.0)
    bend = (rho - mean) / (tl.maximum(n - 1.0, 1.0) * tl.where(equal, 1.0, std)) * tl.sum(moments, 0)
    slope = 2.0 / divisor * tl.where(equal, slope, slope - bend)
    live = (target == target) & (tl.load(sums + sequence * 3 + 2) > 0)
    return tl.where(live, (z - target) * (z - target), 0.0), tl.where(live, slope, 0.0)


__all__ = [
    "CISPO",
    "GMPO",
    "GSPO",
    "GSPO_TOKEN",
    "LUSPO",
    "REG",
    "REINFORCE",
    "SAPO",
    "bounded_log_ratio",
    "clamp_to",
    "gmpo_is_free",
    "kl_term",
    "policy_term",
    "ratio_of",
    "regression_term",
]
