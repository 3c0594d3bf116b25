"""Triton kernels of group_advantage: a program a group, and one program over the batch for the modes that need it.

Sums run in ACC (fp32, fp64 for fp64 rewards). Offsets are clamped to the responses: wrong ones can't read beyond them.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any, Optional

import torch
import triton
import triton.language as tl

from ._checks import compute_dtype
from ._launch import hyper

# Places in group_advantage.SCALES.
GROUP = tl.constexpr(0)
RLOO = tl.constexpr(2)
PASS_AT_K = tl.constexpr(3)
OPO = tl.constexpr(4)
BATCH = tl.constexpr(5)
GPG = tl.constexpr(6)
WHITEN = tl.constexpr(7)
BLOCK = 128
_POINTERS = ["rewards", "offsets", "lengths", "hypers", "out"]


@triton.jit
def group_bounds(group, offsets, size, total):
    """First response of a group and the one behind its last, int64."""
    if offsets is None:
        begin = group.to(tl.int64) * size
        end = begin + size
    else:
        begin = tl.load(offsets + group).to(tl.int64)
        end = tl.load(offsets + group + 1).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), total)
    return begin, tl.minimum(tl.maximum(end, begin), total)


@triton.jit
def _runner_up(rewards, begin, end, best, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The place of the first reward that equals ``best``, and the largest of the others."""
    first = end
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        r = tl.load(rewards + at, mask=at < end, other=float("nan")).to(ACC)
        first = tl.minimum(first, tl.min(tl.where(r == best, at, end), 0))
    second = tl.full((), float("-inf"), ACC)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        r = tl.load(rewards + at, mask=at < end, other=float("nan")).to(ACC)
        other = (tl.abs(r) < float("inf")) & (at != first)
        second = tl.maximum(second, tl.max(tl.where(other, r, float("-inf")), 0))
    return first, second


@triton.jit
def group_frame(
    rewards,
    lengths,
    begin,
    end,
    eps,
    ddof,
    MODE: tl.constexpr,
    RAW: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What turns a reward r into its advantage: (r - centre) / divisor, or 0 for all but the response ``best``."""
    zero = tl.zeros([BLOCK], ACC)
    number, total, weight, weighted = zero, zero, zero, zero
    low, high = zero + float("inf"), zero - float("inf")
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        r = tl.load(rewards + at, mask=at < end, other=float("nan")).to(ACC)
        finite = tl.abs(r) < float("inf")
        number += finite.to(ACC)
        total += tl.where(finite, r, 0.0)
        low = tl.minimum(low, tl.where(finite, r, float("inf")))
        high = tl.maximum(high, tl.where(finite, r, float("-inf")))
        if MODE == OPO:
            length = tl.load(lengths + at, mask=finite, other=0).to(ACC)
            weight += length
            weighted += tl.where(finite, length * r, 0.0)
    n = tl.sum(number, 0)
    mean = tl.sum(total, 0) / tl.maximum(n, 1.0)
    top = tl.max(high, 0)
    equal = tl.min(low, 0) == top
    centre = mean
    divisor = tl.full((), 1.0, ACC)
    best = begin - 1
    if MODE == GROUP:
        squares = zero
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            r = tl.load(rewards + at, mask=at < end, other=float("nan")).to(ACC)
            gap = tl.where(tl.abs(r) < float("inf"), r - mean, 0.0)
            squares += gap * gap
        divisor = tl.sqrt(tl.sum(squares, 0) / tl.maximum(n - ddof, 1.0)) + eps
    elif MODE == RLOO:
        divisor = (n - 1.0) / tl.maximum(n, 1.0)
    elif MODE == PASS_AT_K:
        best, second = _runner_up(rewards, begin, end, top, ACC, BLOCK)
        centre = tl.where(second == float("-inf"), 0.0, second)
    elif MODE == OPO:
        sum_weight = tl.sum(weight, 0)
        centre = tl.where(sum_weight > 0, tl.sum(weighted, 0) / tl.where(sum_weight > 0, sum_weight, 1.0), mean)
    elif MODE == WHITEN:
        centre = centre * 0.0
    if MODE != WHITEN:
        # A division by infinity gives exactly 0, whatever the mean's rounding.
        divisor = tl.where(equal, float("inf"), divisor)
        if RAW:
            centre = tl.where(n == 1.0, 0.0, centre)
            alone = eps + 1.0 if MODE == GROUP else 1.0
            divisor = tl.where(n == 1.0, alone, divisor)
    return centre, divisor, best


@triton.jit
def advantage_of(r, at, centre, divisor, best, MODE: tl.constexpr):
    """The advantage of finite rewards r at responses ``at``."""
    out = (r - centre) / divisor
    if MODE == PASS_AT_K:
        out = tl.where(at == best, out, 0.0)
    return tl.where(tl.abs(r) < float("inf"), out, 0.0)


@triton.jit(do_not_specialize=["size", "total"], do_not_specialize_on_alignment=_POINTERS)
def group_kernel(
    rewards, offsets, lengths, hypers, out, size, total,
    MODE: tl.constexpr, RAW: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a group: its advantages, or what the batch's program goes on with."""
    begin, end = group_bounds(tl.program_id(0), offsets, size, total)
    eps = tl.load(hypers)
    ddof = tl.load(hypers + 1)
    centre, divisor, best = group_frame(rewards, lengths, begin, end, eps, ddof, MODE, RAW, ACC, BLOCK)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        r = tl.load(rewards + at, mask=at < end, other=float("nan")).to(ACC)
        tl.store(out + at, advantage_of(r, at, centre, divisor, best, MODE), mask=at < end)


@triton.jit(do_not_specialize=["total"], do_not_specialize_on_alignment=_POINTERS)
def batch_kernel(rewards, lengths, hypers, out, total, MODE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """One program: scale ``out`` [R] in place by a statistic of the batch, and centre it where it is whitened."""
    eps = tl.load(hypers)
    ddof = tl.load(hypers + 1)
    zero = tl.zeros([BLOCK], ACC)
    number, weight, weighted, nonzero = zero, zero, zero, zero
    low, high = zero + float("inf"), zero - float("inf")
    for start in range(0, total, BLOCK):
        at = start + tl.arange(0, BLOCK)
        r = tl.load(rewards + at, mask=at < total, other=float("nan")).to(ACC)
        finite = tl.abs(r) < float("inf")
        x = r
        if MODE >= WHITEN:
            x = tl.load(out + at, mask=finite, other=0.0)
        w = finite.to(ACC)
        if lengths is not None and MODE >= WHITEN:
            w = tl.load(lengths + at, mask=finite, other=0).to(ACC)
        number += finite.to(ACC)
        weight += w
        weighted += tl.where(finite, w * x, 0.0)
        nonzero += (finite & (r != 0)).to(ACC)
        low = tl.minimum(low, tl.where(finite, x, float("inf")))
        high = tl.maximum(high, tl.where(finite, x, float("-inf")))
    mass = tl.sum(weight, 0)
    mean = tl.sum(weighted, 0) / tl.maximum(mass, 1.0)
    squares = zero
    for start in range(0, total, BLOCK):
        at = start + tl.arange(0, BLOCK)
        r = tl.load(rewards + at, mask=at < total, other=float("nan")).to(ACC)
        finite = tl.abs(r) < float("inf")
        x = r
        if MODE >= WHITEN:
            x = tl.load(out + at, mask=finite, other=0.0)
        w = finite.to(ACC)
        if lengths is not None and MODE >= WHITEN:
            w = tl.load(lengths + at, mask=finite, other=0).to(ACC)
        squares += tl.where(finite, w * (x - mean) * (x - mean), 0.0)
    divisor = tl.sqrt(tl.sum(squares, 0) / tl.maximum(mass - ddof, 1.0)) + eps
    divisor = tl.where(tl.min(low, 0) == tl.max(high, 0), float("inf"), divisor)
    if MODE == GPG:
        divisor = tl.maximum(tl.sum(nonzero, 0), 1.0) / tl.maximum(tl.sum(number, 0), 1.0)
    if MODE < WHITEN:
        mean = mean * 0.0
    for start in range(0, total, BLOCK):
        at = start + tl.arange(0, BLOCK)
        r = tl.load(rewards + at, mask=at < total, other=float("nan")).to(ACC)
        x = tl.load(out + at, mask=at < total, other=0.0)
        tl.store(out + at, tl.where(tl.abs(r) < float("inf"), (x - mean) / divisor, 0.0), mask=at < total)


def advantages_triton(
    rewards: torch.Tensor,
    size: int,
    offsets: Optional[torch.Tensor],
    lengths: Optional[torch.Tensor],
    mode: int,
    eps: float,
    ddof: int,
    raw: bool,
) -> torch.Tensor:
    """Advantages [R] of rewards [R], in groups of ``size`` or between the offsets where it is 0."""
    dtype = compute_dtype(rewards)
    total = rewards.shape[0]
    out = torch.empty(total, dtype=dtype, device=rewards.device)
    groups = total // size if offsets is None else offsets.shape[0] - 1
    if total == 0 or groups == 0:
        return out
    rewards = rewards.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    hypers = hyper((eps, ddof), dtype, rewards.device)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    options: Any = {"ACC": acc, "BLOCK": BLOCK, "num_warps": 4, "enable_fp_fusion": False}
    inner = mode if mode != WHITEN.value + 1 else 1  # the baseline of "reinforce++_baseline" is the group's mean
    group_kernel[(groups,)](rewards, offsets, lengths, hypers, out, size, total, MODE=inner, RAW=raw, **options)
    if mode >= BATCH.value:
        batch_kernel[(1,)](rewards, lengths, hypers, out, total, MODE=mode, **options)
    return out


__all__ = ["BLOCK", "advantage_of", "advantages_triton", "group_bounds", "group_frame"]
