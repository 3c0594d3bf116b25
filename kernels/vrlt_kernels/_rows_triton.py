"""Triton kernels over the rows of logits [n, V]; imported by ``_rows`` only where triton is installed.

Every kernel takes row strides, so that rows may be slices of something wider, and works in ACC (fp32, or fp64 for fp64
logits). A row belongs to one program (or, elementwise, to several), so its result never depends on its neighbours. How
many rows there are is the grid and no argument: a new length compiles nothing. Vocabulary and row strides stay
specialised, because the width of a memory access follows from what they are divisible by, as do the addresses of [n, V]
(of rows that aren't a multiple of 16 bytes, a slice may start on such a multiple or not: two compilations at most).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import math
from typing import Optional, Sequence

import torch
import triton
import triton.language as tl

from ._rows import COARSE_LSE, lse_rounding

_RUNTIME = ["inv_stride"]
# What is [n] may be a slice that starts anywhere, and is read and written one element at a time.
_PER_ROW = [
    "target", "inverse", "lse_in", "entropy_in", "logp_in", "a_in", "e_in", "base_in", "size_in",
    "logp_out", "entropy_out", "lse_out", "p2_out", "base_out", "size_out",
]  # fmt: skip
_COARSE = tl.constexpr(COARSE_LSE)
_LOG2E, _LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))


@triton.jit
def _piece(row, start, vocab, ACC: tl.constexpr, BLOCK: tl.constexpr):
    cols = start + tl.arange(0, BLOCK)
    return tl.load(row + cols, mask=cols < vocab, other=float("-inf")).to(ACC)


@triton.jit
def _power(x, base, inv2):
    """d = inv (x - base) in bits and e^d. Bounded, so that e^d d is 0 and not NaN where x is -inf; a NaN stays one."""
    gap = tl.maximum((x - base) * inv2, -2000.0, propagate_nan=tl.PropagateNan.ALL)
    return gap, tl.exp2(gap)


@triton.jit
def _fold(row, inv, vocab, WANT_P2: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """max m of x; with d = inv (x - m) the sums of e^d, of e^d d and of e^2d. One read of the row.

    Each of BLOCK lanes keeps a maximum and sums of its own, so that nothing is exchanged before the end; four elements
    a turn share a rescaling. The difference is taken before it is scaled: inv x and inv m would each be rounded.
    """
    inv2 = inv * _LOG2E
    top = tl.full([BLOCK], float("-inf"), ACC)
    total = tl.zeros([BLOCK], ACC)
    moment = tl.zeros([BLOCK], ACC)
    squares = tl.zeros([BLOCK], ACC)
    for start in range(0, vocab, 4 * BLOCK):
        x0 = _piece(row, start, vocab, ACC, BLOCK)
        x1 = _piece(row, start + BLOCK, vocab, ACC, BLOCK)
        x2 = _piece(row, start + 2 * BLOCK, vocab, ACC, BLOCK)
        x3 = _piece(row, start + 3 * BLOCK, vocab, ACC, BLOCK)
        higher = tl.maximum(top, tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)))
        # While all logits are -inf, 0 stands in for the maximum: -inf - -inf would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shift, rescale = _power(tl.where(top == float("-inf"), base, top), base, inv2)
        d0, p0 = _power(x0, base, inv2)
        d1, p1 = _power(x1, base, inv2)
        d2, p2 = _power(x2, base, inv2)
        d3, p3 = _power(x3, base, inv2)
        moment = tl.fma(rescale, tl.fma(shift, total, moment), tl.fma(p0, d0, p1 * d1)) + tl.fma(p2, d2, p3 * d3)
        total = tl.fma(rescale, total, p0 + p1) + (p2 + p3)
        if WANT_P2:
            squares = tl.fma(rescale * rescale, squares, tl.fma(p0, p0, p1 * p1)) + tl.fma(p2, p2, p3 * p3)
        top = higher
    most = tl.max(top, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    shift, rescale = _power(tl.where(top == float("-inf"), base, top), base, inv2)
    moment = tl.sum(rescale * tl.fma(shift, total, moment), 0) * _LN2
    return most, tl.sum(rescale * total, 0), moment, tl.sum(rescale * rescale * squares, 0)


@triton.jit
def _finish(top, total, moment, x_target, inside, inv):
    """log p(target), entropy, logsumexp. A row of -inf alone: -inf, 0, -inf. A target outside the vocabulary: NaN."""
    empty = total == 0
    base = tl.where(empty, 0.0, top)
    size = tl.log(tl.where(empty, 1.0, total))
    logp = tl.where(empty, float("-inf"), (x_target - base) * inv - size)
    logp = tl.where(inside, logp, float("nan"))
    entropy = tl.where(empty, 0.0, size - moment / tl.where(empty, 1.0, total))
    return logp, entropy, tl.where(empty, float("-inf"), base * inv + size)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_PER_ROW)
def row_stats_kernel(
    logits, target, inverse, logp_out, entropy_out, lse_out, p2_out, vocab, stride, inv_stride,
    WANT_P2: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: log p(target), entropy, logsumexp and, asked for, sum p^2."""
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    inv = tl.load(inverse + n * inv_stride)
    goal = tl.load(target + n).to(tl.int64)
    inside = (goal >= 0) & (goal < vocab)
    x_target = tl.load(row + tl.where(inside, goal, 0)).to(ACC)
    top, total, moment, squares = _fold(row, inv, vocab, WANT_P2, ACC, BLOCK)
    logp, entropy, lse = _finish(top, total, moment, x_target, inside, inv)
    tl.store(logp_out + n, logp)
    tl.store(entropy_out + n, entropy)
    tl.store(lse_out + n, lse)
    if WANT_P2:
        tl.store(p2_out + n, tl.where(total == 0, 0.0, squares / tl.where(total == 0, 1.0, total * total)))


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_PER_ROW)
def row_fused_kernel(
    logits, target, inverse, logp_out, entropy_out, lse_out, vocab, stride, inv_stride,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: the statistics, then onehot - p written over the row, last block first (L2 may have it)."""
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    inv = tl.load(inverse + n * inv_stride)
    goal = tl.load(target + n).to(tl.int64)
    inside = (goal >= 0) & (goal < vocab)
    x_target = tl.load(row + tl.where(inside, goal, 0)).to(ACC)
    top, total, moment, _ = _fold(row, inv, vocab, False, ACC, BLOCK)
    logp, entropy, lse = _finish(top, total, moment, x_target, inside, inv)
    tl.store(logp_out + n, logp)
    tl.store(entropy_out + n, entropy)
    tl.store(lse_out + n, lse)
    empty = total == 0
    base = tl.where(empty, 0.0, top)
    bits = tl.where(empty, float("inf"), tl.log2(tl.where(empty, 1.0, total)))  # in an empty row every p is 0
    inv2 = inv * _LOG2E
    WIDE: tl.constexpr = 4 * BLOCK
    blocks = tl.cdiv(vocab, WIDE)
    # The target logit was read before anything was written; here every thread reads only what it writes itself.
    for step in range(0, blocks):
        cols = (blocks - 1 - step) * WIDE + tl.arange(0, WIDE)
        x = tl.load(row + cols, mask=cols < vocab, other=float("-inf")).to(ACC)
        left = 0.0 - tl.exp2((x - base) * inv2 - bits)
        tl.store(row + cols, left.to(logits.dtype.element_ty), mask=cols < vocab)
    tl.debug_barrier()  # the target's element has been written as every other one
    rest = 1.0 - tl.exp2((x_target - base) * inv2 - bits)
    tl.store(row + goal, rest.to(logits.dtype.element_ty), mask=inside & (total != 0))


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_PER_ROW)
def row_restore_kernel(
    logits, inverse, lse_in, a_in, e_in, base_out, size_out, vocab, stride, inv_stride,
    HAS_E: tl.constexpr, ROUNDING: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: base and size with log p = inv (x - base) - size.

    0 and lse where lse is small enough to be exact, and the row is not read. Else the digits that rounding took from
    lse are restored from the row: its maximum and the log of its sum, unless lse is of more than this row.
    """
    n = tl.program_id(0).to(tl.int64)
    inv = tl.load(inverse + n * inv_stride)
    lse = tl.load(lse_in + n)
    alive = tl.load(a_in + n) != 0
    if HAS_E:
        alive = alive | (tl.load(e_in + n) != 0)
    base = tl.full((), 0.0, ACC)
    size = lse
    if alive & (tl.abs(lse) >= _COARSE) & (lse != float("-inf")):
        top, total, _, _ = _fold(logits + n * stride, inv, vocab, False, ACC, BLOCK)
        of_row = tl.log(total)
        restored = (tl.abs(top * inv + of_row - lse) <= tl.abs(lse) * ROUNDING) | (lse == float("inf"))
        base = tl.where(restored, top, 0.0)
        size = tl.where(restored, of_row, lse)
    tl.store(base_out + n, base)
    tl.store(size_out + n, size)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_PER_ROW)
def row_grad_kernel(
    out, logits, target, inverse, base_in, size_in, entropy_in, a_in, e_in, vocab, stride, out_stride, inv_stride,
    HAS_E: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a row and block: inv (a (onehot - p) - e p (log p + H)); exact zeros, and no read, where a = e = 0."""
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inv = tl.load(inverse + n * inv_stride)
    goal = tl.load(target + n)
    base = tl.load(base_in + n)
    size = tl.load(size_in + n)
    a = tl.load(a_in + n)
    alive = a != 0
    if HAS_E:
        e = tl.load(e_in + n)
        alive = alive | (e != 0)
    alive = alive & (size != float("-inf"))
    x = tl.load(logits + n * stride + cols, mask=cols < tl.where(alive, vocab, 0), other=float("-inf")).to(ACC)
    log_p = (x - base) * inv - tl.where(alive, size, 0.0)
    p = tl.exp(log_p)
    grad = a * (tl.where(cols == goal, 1.0, 0.0) - p)
    if HAS_E:
        grad -= e * p * tl.where(p == 0, 0.0, log_p + tl.load(entropy_in + n))
    grad = tl.where(alive, grad * inv, 0.0)
    tl.store(out + n * out_stride + cols, grad.to(out.dtype.element_ty), mask=cols < vocab)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_PER_ROW)
def row_mix_kernel(
    out, rest, target, inverse, logp_in, entropy_in, a_in, e_in, vocab, stride, out_stride, inv_stride,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same gradient from D = onehot - p instead of logits: p = -D off the target, e^logp on it."""
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inv = tl.load(inverse + n * inv_stride)
    hit = cols == tl.load(target + n)
    a = tl.load(a_in + n)
    e = tl.load(e_in + n)
    alive = (a != 0) | (e != 0)
    left = tl.load(rest + n * stride + cols, mask=cols < tl.where(alive, vocab, 0), other=0.0).to(ACC)
    logp = tl.load(logp_in + n)
    p = tl.where(hit, tl.exp(logp), -left)
    log_p = tl.where(hit, logp, tl.log(tl.where(p > 0, p, 1.0)))
    slope = p * tl.where(p == 0, 0.0, log_p + tl.load(entropy_in + n))
    grad = tl.where(alive, (a * left - e * slope) * inv, 0.0)
    tl.store(out + n * out_stride + cols, grad.to(out.dtype.element_ty), mask=cols < vocab)


def launch_config(kernel: str, dtype: torch.dtype) -> dict[str, int]:
    """Block and warps of a row kernel. The dtype alone decides, so that a row's bits don't depend on the others."""
    wide = {torch.float64: 2048, torch.float32: 4096}.get(dtype, 8192)
    if kernel in ("row_fused", "row_stats", "row_restore"):
        wide //= 4  # lanes of `_fold`, each of which reads 16 bytes at a time
    return {"BLOCK": wide, "num_warps": 8}


def _acc(x: torch.Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _options(kernel: str, x: torch.Tensor) -> dict[str, object]:
    # Without fusion into fma every kernel rounds (x - base) inv alike.
    return {**launch_config(kernel, x.dtype), "ACC": _acc(x), "enable_fp_fusion": False}


def _step(inverse: torch.Tensor) -> int:
    return 0 if inverse.numel() == 1 else 1


def row_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    inverse: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    want_p2: bool,
) -> None:
    """``outputs``: logp, entropy, lse [n] and sum_p2 ([n], or anything where it isn't wanted)."""
    rows, vocab = logits.shape
    row_stats_kernel[(rows,)](
        logits, target, inverse, *outputs, vocab, logits.stride(0), _step(inverse),
        WANT_P2=want_p2, **_options("row_stats", logits),
    )  # fmt: skip


def row_fused_(
    logits: torch.Tensor, target: torch.Tensor, inverse: torch.Tensor, outputs: Sequence[torch.Tensor]
) -> None:
    """``outputs``: logp, entropy, lse [n]."""
    rows, vocab = logits.shape
    row_fused_kernel[(rows,)](
        logits, target, inverse, *outputs, vocab, logits.stride(0), _step(inverse), **_options("row_fused", logits)
    )


def row_grad_(
    out: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    inverse: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    *,
    a: torch.Tensor,
    e: Optional[torch.Tensor],
) -> None:
    """``e`` None: no gradient of the entropy."""
    rows, vocab = logits.shape
    # Before anything is written: ``out`` may be the logits.
    base, size = torch.empty((2, rows), dtype=lse.dtype, device=lse.device)
    row_restore_kernel[(rows,)](
        logits, inverse, lse, a, a if e is None else e, base, size, vocab, logits.stride(0), _step(inverse),
        HAS_E=e is not None, ROUNDING=lse_rounding(lse.dtype), **_options("row_restore", logits),
    )  # fmt: skip
    options = _options("row_grad", logits)
    row_grad_kernel[(rows, triton.cdiv(vocab, options["BLOCK"]))](
        out, logits, target, inverse, base, size, entropy, a, a if e is None else e,
        vocab, logits.stride(0), out.stride(0), _step(inverse), HAS_E=e is not None, **options,
    )  # fmt: skip


def row_mix_(
    out: torch.Tensor,
    rest: torch.Tensor,
    target: torch.Tensor,
    inverse: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    *,
    a: torch.Tensor,
    e: torch.Tensor,
) -> None:
    """``rest``: onehot - p [n, V] as ``row_fused_`` leaves it."""
    rows, vocab = rest.shape
    options = _options("row_mix", rest)
    row_mix_kernel[(rows, triton.cdiv(vocab, options["BLOCK"]))](
        out, rest, target, inverse, logp, entropy, a, e,
        vocab, rest.stride(0), out.stride(0), _step(inverse), **options,
    )  # fmt: skip
