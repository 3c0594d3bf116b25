"""The Triton kernels of ``group_attention``; imported only where triton is installed.

They read the packed sequence as it stands: no keys are gathered, repeated or copied. A tile is up to BLOCK tokens of
one prefix or of the rows of one group, in which it may span several rows; ``GroupSpans.tiles`` says what it meets.
Forward: a program a tile of queries and query head; keys of the prefix need no mask, own ones do near the diagonal
or where rows meet. Backward: a small launch for dout . out, then one launch in which a program is either a tile of
keys and KV head, which sums over the queries of all its heads, or a tile of queries and query head. Nothing is
added up by atomics, so results don't depend on the order in which programs run.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import math
from typing import Any, Dict, NamedTuple, Tuple

import torch
import triton
import triton.language as tl

from .group_attention_flash import Packed

_LOG2E = math.log2(math.e)
_COLUMNS = tl.constexpr(5)


@triton.jit
def _tile(tiles, index):
    """First token and end of a tile; the end of own tokens that it meets on the other side; the others it meets."""
    row = tiles + index * _COLUMNS
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def _rows_of(
    base, first, end, stride, BOUND: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Vectors of tokens first..first + BLOCK; where BOUND, zeros from ``end`` on. Only the first offset is 64 bits."""
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    at = base + tl.full((), first, tl.int64) * stride
    offsets = rows[:, None] * stride + dims[None, :]
    if BOUND:
        return tl.load(at + offsets, mask=(first + rows < end)[:, None] & (dims < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(at + offsets)
    else:
        return tl.load(at + offsets, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def _put(base, values, first, end, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    inside = (first + rows < end)[:, None] & (dims < D)[None, :]
    at = base + tl.full((), first, tl.int64) * stride
    tl.store(at + (rows[:, None] * stride + dims[None, :]), values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _numbers(base, first, end, stride, other, BLOCK: tl.constexpr):
    """One number of each token, as lse."""
    rows = tl.arange(0, BLOCK)
    at = base + tl.full((), first, tl.int64) * stride
    return tl.load(at + rows * stride, mask=first + rows < end, other=other)


@triton.jit
def _plan(floors, first, end, low, begin, stop, INNER: tl.constexpr):
    """Blocks of keys that every query of a tile sees: of others, and own ones from ``low`` on; then those with a mask:
    1 if others are left, and own ones.
    """
    others = (stop - begin) // INNER
    single = tl.load(floors + end - 1) == low
    clear = tl.where(single, (first - low) // INNER, 0)
    rest = tl.where(begin + others * INNER < stop, 1, 0)
    return others, clear, rest, (end - low - clear * INNER + INNER - 1) // INNER


@triton.jit
def _scores(
    q, key, value, low, high, start, end, key_stride, value_stride, scale,
    MASKED: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of keys and values and the scores of queries; where MASKED up to ``end``, and a query sees low..high."""
    k = _rows_of(key, start, end, key_stride, MASKED, INNER, D, BLOCK_D)
    v = _rows_of(value, start, end, value_stride, MASKED, INNER, D, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        at = start + tl.arange(0, INNER)
        s = tl.where((at[None, :] >= low[:, None]) & (at[None, :] <= high[:, None]), s, float("-inf"))
    return k, v, s


@triton.jit
def _read(
    q, key, value, acc, top, total, low, high, start, end, key_stride, value_stride, scale,
    MASKED: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax over a block of keys, as `_scores` has it."""
    _, v, s = _scores(
        q, key, value, low, high, start, end, key_stride, value_stride, scale, MASKED, D, INNER, BLOCK_D
    )  # fmt: skip
    higher = tl.maximum(top, tl.max(s, 1))
    base = higher
    if MASKED:  # a query that has seen nothing yet
        base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, total


@triton.jit
def _before(base, skip, stride):
    """Where token 0 would stand, of which the first ``skip`` aren't in memory."""
    return base - tl.full((), skip, tl.int64) * stride


@triton.jit(do_not_specialize=["scale", "skip"])
def forward_kernel(
    query, key, value, out, lse, tiles, floors, skip, scale,
    query_stride, query_head, key_stride, key_head, value_stride, value_head,
    HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [N, HEADS, D] and lse fp32 [N, HEADS], natural, of one tile and head. ``scale`` is of base 2."""
    first, end, low, begin, stop = _tile(tiles, tl.program_id(0))
    head = tl.program_id(1).to(tl.int64)
    query = _before(query + head * query_head, skip, query_stride)
    out = _before(out + head * D, skip, HEADS * D)
    lse = _before(lse + head, skip, HEADS)
    key += head // RATIO * key_head
    value += head // RATIO * value_head
    q = _rows_of(query, first, end, query_stride, True, BLOCK, D, BLOCK_D)
    token = first + tl.arange(0, BLOCK)
    floor = tl.load(floors + token, mask=token < end, other=0)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    others, clear, rest, own = _plan(floors, first, end, low, begin, stop, INNER)
    for j in range(0, others + clear):
        start = tl.where(j < others, begin + j * INNER, low + (j - others) * INNER)
        acc, top, total = _read(
            q, key, value, acc, top, total, floor, token, start, end, key_stride, value_stride, scale,
            False, D, INNER, BLOCK_D,
        )  # fmt: skip
    for j in range(0, rest + own):
        start = tl.where(j < rest, begin + others * INNER, low + (clear + j - rest) * INNER)
        acc, top, total = _read(
            q, key, value, acc, top, total, tl.where(j < rest, 0, floor), tl.where(j < rest, stop - 1, token), start,
            tl.where(j < rest, stop, end), key_stride, value_stride, scale, True, D, INNER, BLOCK_D,
        )  # fmt: skip
    _put(out, acc / total[:, None], first, end, HEADS * D, BLOCK, D, BLOCK_D)
    tl.store(lse + token.to(tl.int64) * HEADS, (top + tl.log2(total)) * 0.6931471805599453, mask=token < end)


@triton.jit(do_not_specialize=["tokens"])
def delta_kernel(
    grad, out, delta, tokens, grad_stride, grad_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta fp32 [N, HEADS]: dout . out of BLOCK tokens and a head."""
    first = tl.program_id(0) * BLOCK
    head = tl.program_id(1).to(tl.int64)
    g = _rows_of(grad + head * grad_head, first, tokens, grad_stride, True, BLOCK, D, BLOCK_D)
    o = _rows_of(out + head * D, first, tokens, HEADS * D, True, BLOCK, D, BLOCK_D)
    token = first + tl.arange(0, BLOCK)
    at = token.to(tl.int64) * HEADS + head
    tl.store(delta + at, tl.sum(g.to(tl.float32) * o.to(tl.float32), 1), mask=token < tokens)


@triton.jit
def _into_keys(
    k, v, dk, dv, query, grad, lse, delta, floors, first, start, end, query_stride, grad_stride, scale,
    MASKED: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a block of queries of one head adds to the keys ``first``..; where MASKED they see floor..self only."""
    q = _rows_of(query, start, end, query_stride, True, INNER, D, BLOCK_D)
    g = _rows_of(grad, start, end, grad_stride, True, INNER, D, BLOCK_D)
    # beyond the end p is 0, as of a query with an infinite sum
    sums = _numbers(lse, start, end, HEADS, float("inf"), INNER) * 1.4426950408889634
    inner = _numbers(delta, start, end, HEADS, 0.0, INNER)
    s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
    if MASKED:
        token = start + tl.arange(0, INNER)
        floor = tl.load(floors + token, mask=token < end, other=0)
        at = first + tl.arange(0, BLOCK)
        s = tl.where((at[:, None] >= floor[None, :]) & (at[:, None] <= token[None, :]), s, float("-inf"))
    p = tl.exp2(s - sums[None, :])
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(g), input_precision="ieee")
    ds = p * (dp - inner[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _keys_backward(
    query, key, value, grad, lse, delta, into_key, into_value, tiles, floors, tile, shared, scale, base,
    query_stride, query_head, key_stride, key_head, value_stride, value_head, grad_stride, grad_head,
    HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys of one KV head."""
    first, end, high, begin, stop = _tile(tiles, tile)
    k = _rows_of(key + shared * key_head, first, end, key_stride, True, BLOCK, D, BLOCK_D)
    v = _rows_of(value + shared * value_head, first, end, value_stride, True, BLOCK, D, BLOCK_D)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    single = tl.load(floors + end - 1) == tl.load(floors + first)
    near = tl.where(single, tl.minimum(first + (end - first + INNER - 1) // INNER * INNER, high), high)
    far = (high - near + INNER - 1) // INNER
    others = (stop - begin + INNER - 1) // INNER
    for index in range(RATIO):
        head = shared * RATIO + index
        q = query + head * query_head
        g = grad + head * grad_head
        for start in range(first, near, INNER):
            dk, dv = _into_keys(
                k, v, dk, dv, q, g, lse + head, delta + head, floors, first, start, near, query_stride, grad_stride,
                base, True, HEADS, D, BLOCK, INNER, BLOCK_D,
            )  # fmt: skip
        for j in range(0, far + others):
            dk, dv = _into_keys(
                k, v, dk, dv, q, g, lse + head, delta + head, floors, first,
                tl.where(j < far, near + j * INNER, begin + (j - far) * INNER), tl.where(j < far, high, stop),
                query_stride, grad_stride, base, False, HEADS, D, BLOCK, INNER, BLOCK_D,
            )  # fmt: skip
    shape: tl.constexpr = HEADS // RATIO * D
    _put(into_key + shared * D, dk * scale, first, end, shape, BLOCK, D, BLOCK_D)
    _put(into_value + shared * D, dv, first, end, shape, BLOCK, D, BLOCK_D)


@triton.jit
def _into_queries(
    q, g, dq, sums, inner, key, value, low, high, start, end, key_stride, value_stride, scale,
    MASKED: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a block of keys, as `_scores` has it, adds to queries."""
    k, v, s = _scores(
        q, key, value, low, high, start, end, key_stride, value_stride, scale, MASKED, D, INNER, BLOCK_D
    )  # fmt: skip
    p = tl.exp2(s - sums[:, None])
    dp = tl.dot(g, tl.trans(v), input_precision="ieee")
    ds = p * (dp - inner[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _queries_backward(
    query, key, value, grad, lse, delta, into_query, tiles, floors, tile, head, scale, base,
    query_stride, query_head, key_stride, key_head, value_stride, value_head, grad_stride, grad_head,
    HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries of one head."""
    first, end, low, begin, stop = _tile(tiles, tile)
    key += head // RATIO * key_head
    value += head // RATIO * value_head
    q = _rows_of(query + head * query_head, first, end, query_stride, True, BLOCK, D, BLOCK_D)
    g = _rows_of(grad + head * grad_head, first, end, grad_stride, True, BLOCK, D, BLOCK_D)
    sums = _numbers(lse + head, first, end, HEADS, float("inf"), BLOCK) * 1.4426950408889634
    inner = _numbers(delta + head, first, end, HEADS, 0.0, BLOCK)
    token = first + tl.arange(0, BLOCK)
    floor = tl.load(floors + token, mask=token < end, other=0)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    others, clear, rest, own = _plan(floors, first, end, low, begin, stop, INNER)
    for j in range(0, others + clear):
        start = tl.where(j < others, begin + j * INNER, low + (j - others) * INNER)
        dq = _into_queries(
            q, g, dq, sums, inner, key, value, floor, token, start, end, key_stride, value_stride, base,
            False, D, INNER, BLOCK_D,
        )  # fmt: skip
    for j in range(0, rest + own):
        start = tl.where(j < rest, begin + others * INNER, low + (clear + j - rest) * INNER)
        dq = _into_queries(
            q, g, dq, sums, inner, key, value, tl.where(j < rest, 0, floor), tl.where(j < rest, stop - 1, token), start,
            tl.where(j < rest, stop, end), key_stride, value_stride, base, True, D, INNER, BLOCK_D,
        )  # fmt: skip
    _put(into_query + head * D, dq * scale, first, end, HEADS * D, BLOCK, D, BLOCK_D)


@triton.jit(do_not_specialize=["skip", "scale", "base", "key_tiles", "query_tiles"])
def backward_kernel(
    query, key, value, grad, lse, delta, into_query, into_key, into_value,
    of_keys, of_queries, floors, key_tiles, query_tiles, skip, scale, base,
    query_stride, query_head, key_stride, key_head, value_stride, value_head, grad_stride, grad_head,
    HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs of keys come first, since they are the longest. ``base`` is the scale of base 2."""
    query = _before(query, skip, query_stride)
    grad = _before(grad, skip, grad_stride)
    lse = _before(lse, skip, HEADS)
    delta = _before(delta, skip, HEADS)
    into_query = _before(into_query, skip, HEADS * D)
    program = tl.program_id(0)
    keys = key_tiles * (HEADS // RATIO)
    if program < keys:
        _keys_backward(
            query, key, value, grad, lse, delta, into_key, into_value, of_keys, floors,
            program % key_tiles, (program // key_tiles).to(tl.int64), scale, base,
            query_stride, query_head, key_stride, key_head, value_stride, value_head, grad_stride, grad_head,
            HEADS, RATIO, D, BLOCK, INNER, BLOCK_D,
        )  # fmt: skip
    else:
        _queries_backward(
            query, key, value, grad, lse, delta, into_query, of_queries, floors,
            (program - keys) % query_tiles, ((program - keys) // query_tiles).to(tl.int64), scale, base,
            query_stride, query_head, key_stride, key_head, value_stride, value_head, grad_stride, grad_head,
            HEADS, RATIO, D, BLOCK, INNER, BLOCK_D,
        )  # fmt: skip


class Shape(NamedTuple):
    """What a launch configuration depends on."""

    dtype: torch.dtype
    head_dim: int
    backward: bool


def launch_config(shape: Shape) -> Dict[str, Any]:
    """Tiles, warps and stages of a direction."""
    dim = max(16, triton.next_power_of_2(shape.head_dim))
    if shape.dtype == torch.float32:  # no tensor cores: tiles live in registers
        block, inner, warps, stages = 16, 16, 4, 1
    elif shape.backward:
        block, inner, warps, stages = (64, 32, 8, 2) if dim <= 128 else (32, 32, 8, 1)
    else:
        block, inner, warps, stages = (128, 64, 8, 3) if dim <= 128 else (64, 32, 8, 2)
    return {"BLOCK": block, "INNER": inner, "BLOCK_D": dim, "num_warps": warps, "num_stages": stages}


def forward(x: Packed) -> Tuple[torch.Tensor, torch.Tensor]:
    """out [N, Hq, d] in the query's dtype and lse [N, Hq] fp32."""
    query, key, value, spans, scale, skip = x
    tokens, heads, dim = query.shape
    config = launch_config(Shape(query.dtype, dim, False))
    tiles = spans.tiles("queries", config["BLOCK"], query.device, skip=skip > 0)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=query.device)
    forward_kernel[(len(tiles), heads)](
        query, key, value, out, lse, tiles, spans.floors(query.device), skip, scale * _LOG2E,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        HEADS=heads, RATIO=heads // key.shape[1], D=dim, enable_fp_fusion=True, **config,
    )  # fmt: skip
    return out, lse


def backward(
    grad: torch.Tensor, x: Packed, out: torch.Tensor, lse: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, contiguous."""
    query, key, value, spans, scale, skip = x
    tokens, heads, dim = query.shape
    grad = grad if grad.stride(2) == 1 else grad.contiguous()  # as that of a sum, which is expanded
    out, lse = out.contiguous(), lse.contiguous()
    config = launch_config(Shape(query.dtype, dim, True))
    delta = torch.empty_like(lse)
    common = {"HEADS": heads, "D": dim, "enable_fp_fusion": True}
    delta_kernel[(-(-tokens // 64), heads)](
        grad, out, delta, tokens, *grad.stride()[:2], BLOCK=64, BLOCK_D=config["BLOCK_D"], **common
    )
    of_keys, of_queries = (
        spans.tiles(side, config["BLOCK"], query.device, skip=skip > 0) for side in ("keys", "queries")
    )
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
    backward_kernel[(len(of_keys) * key.shape[1] + len(of_queries) * heads,)](
        query, key, value, grad, lse, delta, dq, dk, dv, of_keys, of_queries, spans.floors(query.device),
        len(of_keys), len(of_queries), skip, scale, scale * _LOG2E,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *grad.stride()[:2],
        RATIO=heads // key.shape[1], **common, **config,
    )  # fmt: skip
    return dq, dk, dv


__all__ = ["backward", "forward"]
