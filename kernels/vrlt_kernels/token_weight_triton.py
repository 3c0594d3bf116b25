"""The Triton kernel of ``token_weight``; imported only where triton is installed."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Tuple

import torch
import triton
import triton.language as tl

_RUNTIME = ["inv_stride"]
# Read one element at a time, from slices that start anywhere.
_PER_ROW = ["lse", "inverse", "cu_seqlens", "offsets", "sequence_of", "group_of", "clamp", "out"]
# Terms of the series of (e^d - 1 - d) / (d^2 / 2) that reach the precision of the accumulator for |d| < 1/4.
_TERMS = {tl.float32: 5, tl.float64: 11}


@triton.jit
def _log_probs(logits, row, stride, cols, valid, inverse, inv_stride, lse, ACC: tl.constexpr):
    """log p of a block of a row; -inf where the logit is -inf, also in a row that holds nothing else."""
    x = tl.load(logits + row * stride + cols, mask=valid, other=float("-inf")).to(ACC)
    log_p = x * tl.load(inverse + row * inv_stride) - tl.load(lse + row)
    return tl.where(x == float("-inf"), float("-inf"), log_p)


@triton.jit
def _gap(d, bound, TERMS: tl.constexpr):
    """e^d - 1 - d with d clamped to +-bound; NaN stays. Near 0 by its series: a difference would be all rounding."""
    d = tl.where(d > bound, bound, tl.where(d < -bound, -bound, d))
    series = tl.full(d.shape, 1.0, d.dtype)
    for i in tl.static_range(TERMS):
        series = 1.0 + series * d * (1.0 / (TERMS + 2 - i))
    return tl.where(tl.abs(d) < 0.25, 0.5 * d * d * series, tl.exp(d) - 1.0 - d)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_PER_ROW)
def group_divergence_kernel(
    logits, lse, inverse, cu_seqlens, offsets, sequence_of, group_of, clamp, out, vocab, stride, inv_stride,
    TERMS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row; those of the group's longest response work, each for all rows of its group and position."""
    row = tl.program_id(0).to(tl.int64)
    sequence = tl.load(sequence_of + row)
    group = tl.load(group_of + sequence)
    first = tl.load(offsets + group)
    last = tl.load(offsets + group + 1)
    begin = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - begin
    position = row - begin
    # The longest response (the first of them) has a row at every position of the group. So the grid is the number of
    # rows, which is known without waiting for the device.
    leads = (position >= 0) & (position < length)
    for other in range(first, last):
        rival = tl.load(cu_seqlens + other + 1) - tl.load(cu_seqlens + other)
        leads = leads & ((rival < length) | ((rival == length) & (other >= sequence)))
    if leads:
        bound = tl.load(clamp)
        size = (last - first).to(ACC)
        uniform = -tl.log(tl.full((), vocab, ACC))
        total = tl.zeros([BLOCK], ACC)
        for start in range(0, vocab, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            valid = cols < vocab
            mean = tl.zeros([BLOCK], ACC)
            none_infinite = valid
            any_finite = cols < 0
            live = tl.full((), 0.0, ACC)
            # A running mean: of equal rows it is the row itself, bit for bit, so their divergence is exactly 0.
            for other in range(first, last):
                at = tl.load(cu_seqlens + other) + position
                if at < tl.load(cu_seqlens + other + 1):
                    log_p = _log_probs(logits, at, stride, cols, valid, inverse, inv_stride, lse, ACC)
                    live += 1.0
                    finite = log_p != float("-inf")
                    mean += tl.where(finite, (log_p - mean) * (1.0 / live), 0.0)
                    none_infinite = none_infinite & finite
                    any_finite = any_finite | finite
            mean += (uniform - mean) * ((size - live) / size)
            mean = tl.where(none_infinite, mean, float("-inf"))
            for other in range(first, last):
                at = tl.load(cu_seqlens + other) + position
                if at < tl.load(cu_seqlens + other + 1):
                    # The block was read a moment ago: it comes from L1 or L2.
                    log_p = _log_probs(logits, at, stride, cols, valid, inverse, inv_stride, lse, ACC)
                    d = tl.where(log_p == float("-inf"), bound, mean - log_p)
                    total += tl.where(any_finite, _gap(d, bound, TERMS), 0.0)
            total += tl.where(any_finite, (size - live) * _gap(mean - uniform, bound, TERMS), 0.0)
        divergence = tl.sum(total, 0) / size
        for other in range(first, last):
            at = tl.load(cu_seqlens + other) + position
            if at < tl.load(cu_seqlens + other + 1):
                tl.store(out + at, divergence)


def launch_config(dtype: torch.dtype) -> dict[str, int]:
    """Block and warps. Depends on the dtype alone, so the bits of a group don't depend on what else is in the batch."""
    return {"BLOCK": 1024, "num_warps": 8 if dtype == torch.float64 else 4}


def group_divergence(
    logits: torch.Tensor,
    lse: torch.Tensor,
    inverse: torch.Tensor,
    layout: Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    clamp: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """``layout`` as in token_weight, int64; the rest in the computing dtype; ``clamp`` [1], ``out`` [N]."""
    rows, vocab = logits.shape
    acc = tl.float64 if logits.dtype == torch.float64 else tl.float32
    group_divergence_kernel[(rows,)](
        logits, lse, inverse, *layout, clamp, out,
        vocab, logits.stride(0), 0 if inverse.numel() == 1 else 1,
        TERMS=_TERMS[acc], ACC=acc, enable_fp_fusion=True, **launch_config(logits.dtype),
    )  # fmt: skip
