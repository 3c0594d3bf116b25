"""group_attention on torch's own flash attention: two calls, merged by log-sum-exp.

CPU: aten's CPU kernel, segment by segment on views (keys and values aren't repeated for query heads). CUDA: aten's
varlen kernel on the packed tensors, one call for what is causal within a segment, one for rows on their prefix.
"""

from __future__ import annotations

from itertools import accumulate
from typing import List, NamedTuple, Sequence, Tuple

import torch

from .group_spans import GroupSpans

Three = Tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda = torch.ops.aten._flash_attention_forward
_cuda_backward = torch.ops.aten._flash_attention_backward


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys from attention over each: out [..., d], lse [...] in fp32 or fp64."""
    merged = torch.logaddexp(lse, other_lse)
    first, second = ((x - merged).exp().unsqueeze(-1) for x in (lse, other_lse))
    return (out * first + other * second).to(out.dtype), merged


class Packed(NamedTuple):
    """What attends: query [N, Hq, d], key and value [N, Hk, d] of groups that stand as ``spans`` says."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    spans: GroupSpans
    scale: float
    skip: int = 0
    """Tokens at the front that have no queries: 0, or all of the only prefix."""


def forward(x: Packed) -> Tuple[torch.Tensor, torch.Tensor]:
    """Merged out [N, Hq, d] in the query's dtype, and lse [N, Hq] fp32 (fp64 for fp64)."""
    if x.skip:
        out, lse = forward(_rows_alone(x))
        return merge(out, lse, *_segment(x.query, x.key[: x.skip], x.value[: x.skip], x.scale, causal=False))
    return (_forward_cuda if x.query.is_cuda else _forward_cpu)(x)


def backward(grad: torch.Tensor, x: Packed, out: torch.Tensor, lse: torch.Tensor) -> Three:
    """Gradients of query, key and value. Both calls get the merged output and lse: then their sum is exact."""
    if x.skip:
        dq, dk, dv = backward(grad, _rows_alone(x), out, lse)
        more = _prefix_backward(grad, x, out, lse)
        return dq + more[0], torch.cat([more[1], dk]), torch.cat([more[2], dv])
    return (_backward_cuda if x.query.is_cuda else _backward_cpu)(grad, x, out, lse)


def _rows_alone(x: Packed) -> Packed:
    return Packed(x.query, x.key[x.skip :], x.value[x.skip :], x.spans.without_prefix, x.scale)


def chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Queries [n, Hq, d] on their own causal keys [n, Hk, d] and on the past [m, Hk, d]: out [n, Hq, d]."""
    found, sums = _segment(query, key, value, scale, causal=True)
    if past_key.shape[0]:
        found, _ = merge(found, sums, *_segment(query, past_key, past_value, scale, causal=False))
    out: torch.Tensor = found.contiguous()
    return out


def _segment(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, *, causal: bool
) -> Tuple[torch.Tensor, torch.Tensor]:
    """out [n, Hq, d] and lse [n, Hq] of one segment."""
    if query.is_cuda:
        out, sums, *_ = _cuda(
            query[None], key[None], value[None], None, None, len(query), len(key), 0.0, causal, False, scale=scale
        )
        return out[0], sums[0].transpose(0, 1)
    kv, repeat = key.shape[1], query.shape[1] // key.shape[1]
    k, v = (_by_kv(x, kv).expand(-1, repeat, -1, -1) for x in (key, value))
    out, sums = _cpu(_by_kv(query, kv), k, v, 0.0, causal, scale=scale)
    return out.permute(2, 0, 1, 3).flatten(1, 2), sums.permute(2, 0, 1).flatten(1, 2)


def _prefix_backward(grad: torch.Tensor, x: Packed, out: torch.Tensor, lse: torch.Tensor) -> Three:
    """What rows on a prefix that was computed before give to the gradients of their queries, and of its keys."""
    query, key, value = x.query, x.key[: x.skip], x.value[: x.skip]
    if query.is_cuda:
        none = torch.empty(2, dtype=torch.uint64, device=query.device)
        ends = [_cumulative(x.spans, f"0 to {n}", [n], query.device) for n in (len(query), len(key))]
        parts = (grad.contiguous(), query, key, value, out, lse.transpose(0, 1).contiguous())
        dq, dk, dv = _cuda_backward(*parts, *ends, len(query), len(key), 0.0, False, none, none, scale=x.scale)
        return dq, dk, dv
    kv, repeat = key.shape[1], query.shape[1] // key.shape[1]
    q, o, g = (_by_kv(t, kv) for t in (query, out, grad))
    k, v = (_by_kv(t, kv).expand(-1, repeat, -1, -1) for t in (key, value))
    found = _cpu_backward(g, q, k, v, o, lse.unflatten(1, (kv, -1)).permute(1, 2, 0), 0.0, False, scale=x.scale)
    dq = found[0].permute(2, 0, 1, 3).flatten(1, 2)
    dk, dv = (t.sum(1).transpose(0, 1) for t in found[1:])
    return dq, dk, dv


def _by_kv(x: torch.Tensor, kv: int) -> torch.Tensor:
    """[n, H, d] as a view [kv, H / kv, n, d]: query heads beside the key head that they read."""
    view: torch.Tensor = x.unflatten(1, (kv, -1)).permute(1, 2, 0, 3)
    return view


def _forward_cpu(x: Packed) -> Tuple[torch.Tensor, torch.Tensor]:
    query, key, value, spans, scale, _ = x
    kv, repeat = key.shape[1], query.shape[1] // key.shape[1]
    q, k, v = _by_kv(query, kv), _by_kv(key, kv), _by_kv(value, kv)
    k, v = (t.expand(-1, repeat, -1, -1) for t in (k, v))
    out = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty(query.shape[:2], dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
    o, sums = _by_kv(out, kv), lse.unflatten(1, (kv, -1)).permute(1, 2, 0)
    if any(spans.row_tokens):
        _own_forward(x, out, lse)
    for start, prefix, rows in zip(spans.starts[:-1], spans.prefix, spans.row_tokens, strict=True):
        head, tail = slice(start, start + prefix), slice(start + prefix, start + prefix + rows)
        if not prefix:
            continue
        keys, values = k[:, :, head], v[:, :, head]
        o[:, :, head], sums[:, :, head] = _cpu(q[:, :, head], keys, values, 0.0, True, scale=scale)
        if rows:
            seen, seen_lse = _cpu(q[:, :, tail], keys, values, 0.0, False, scale=scale)
            o[:, :, tail], sums[:, :, tail] = merge(o[:, :, tail], sums[:, :, tail], seen, seen_lse)
    return out, lse


def _rectangle(x: Packed, places: torch.Tensor, width: int) -> List[torch.Tensor]:
    """Rows as [rows, Hq, R, d], keys and values repeated for the query heads."""
    repeat = x.query.shape[1] // x.key.shape[1]
    wide = [x.query[places], *(t[places].repeat_interleave(repeat, dim=1) for t in (x.key, x.value))]
    return [t.unflatten(0, (-1, width)).transpose(1, 2) for t in wide]


def _own_forward(x: Packed, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Rows on themselves. Padding stands on the right, where a causal row doesn't look."""
    places, real, width = x.spans.padded_rows(x.query.device)
    found, sums = _cpu(*_rectangle(x, places, width), 0.0, True, scale=x.scale)
    rows = places[real]
    out[rows] = found.transpose(1, 2).flatten(0, 1)[real]
    lse[rows] = sums.transpose(1, 2).flatten(0, 1)[real]


def _backward_cpu(grad: torch.Tensor, x: Packed, out: torch.Tensor, lse: torch.Tensor) -> Three:
    query, key, value, spans, scale, _ = x
    kv, repeat = key.shape[1], query.shape[1] // key.shape[1]
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (query, key, value))
    if any(spans.row_tokens):
        _own_backward((dq, dk, dv), grad, x, out, lse)
    q, k, v, o, g = (_by_kv(t, kv) for t in (query, key, value, out, grad))
    k, v = (t.expand(-1, repeat, -1, -1) for t in (k, v))
    sums = lse.unflatten(1, (kv, -1)).permute(1, 2, 0)
    into_q, into_k, into_v = _by_kv(dq, kv), dk.transpose(0, 1), dv.transpose(0, 1)
    for start, prefix, rows in zip(spans.starts[:-1], spans.prefix, spans.row_tokens, strict=True):
        head = slice(start, start + prefix)
        for part, causal in ((head, True), (slice(start + prefix, start + prefix + rows), False)):
            if not prefix or part.start == part.stop:
                continue
            more = _cpu_backward(
                g[:, :, part],
                q[:, :, part],
                k[:, :, head],
                v[:, :, head],
                o[:, :, part],
                sums[:, :, part],
                0.0,
                causal,
                scale=scale,
            )
            into_q[:, :, part] += more[0]
            into_k[:, head] += more[1].sum(1)
            into_v[:, head] += more[2].sum(1)
    return dq, dk, dv


def _own_backward(into: Three, grad: torch.Tensor, x: Packed, out: torch.Tensor, lse: torch.Tensor) -> None:
    places, real, width = x.spans.padded_rows(x.query.device)
    rows, kv = places[real], x.key.shape[1]
    mask = torch.zeros(len(places), 1, 1, dtype=grad.dtype)
    mask[real] = 1  # a padded token's gradient is 0, so that its keys and values get none
    g = (grad[places] * mask).unflatten(0, (-1, width)).transpose(1, 2)
    o, sums = (t[places].unflatten(0, (-1, width)).transpose(1, 2) for t in (out, lse))
    more = _cpu_backward(g, *_rectangle(x, places, width), o, sums, 0.0, True, scale=x.scale)
    flat = [t.transpose(1, 2).flatten(0, 1)[real] for t in more]
    into[0][rows] = flat[0]
    into[1][rows] = flat[1].unflatten(1, (kv, -1)).sum(2)
    into[2][rows] = flat[2].unflatten(1, (kv, -1)).sum(2)


def _cumulative(spans: GroupSpans, name: str, lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return spans.index(name, list(accumulate(lengths, initial=0)), torch.int32, device)


def _cuda_calls(spans: GroupSpans, device: torch.device) -> List[Tuple[torch.Tensor, torch.Tensor, int, int]]:
    """cu_seqlens of queries and keys, longest of each: (a) each segment on itself, (b) rows on their prefix, if any."""
    own = _cumulative(spans, "segments", spans.segments, device)
    calls = [(own, own, max(spans.segments), max(spans.segments))]
    both = _crossing(spans)
    if both:
        rows, prefixes = [spans.row_tokens[g] for g in both], [spans.prefix[g] for g in both]
        queries = _cumulative(spans, "cross rows", rows, device)
        keys = _cumulative(spans, "cross prefixes", prefixes, device)
        calls.append((queries, keys, max(rows), max(prefixes)))
    return calls


def _crossing(spans: GroupSpans) -> List[int]:
    """Groups with a prefix and rows. Rows without a prefix see themselves alone: flash gives them lse = inf."""
    return [g for g, (p, r) in enumerate(zip(spans.prefix, spans.row_tokens, strict=True)) if p and r]


def _cross_places(spans: GroupSpans, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor]:
    """int64: where the rows, and where the prefixes, of the second call stand in the sequence."""
    rows: List[int] = []
    prefixes: List[int] = []
    for g in _crossing(spans):
        start, middle, end = spans.starts[g], spans.starts[g] + spans.prefix[g], spans.starts[g + 1]
        prefixes.extend(range(start, middle))
        rows.extend(range(middle, end))
    return (
        spans.index("row places", rows, torch.int64, device),
        spans.index("prefix places", prefixes, torch.int64, device),
    )


def _forward_cuda(x: Packed) -> Tuple[torch.Tensor, torch.Tensor]:
    query, key, value, spans, scale, _ = x
    own, *cross = _cuda_calls(spans, query.device)
    out, lse, *_ = _cuda(query, key, value, *own, 0.0, True, False, scale=scale)
    lse = lse.transpose(0, 1).contiguous()
    for call in cross:
        rows, heads = _cross_places(spans, query.device)
        seen, seen_lse, *_ = _cuda(query[rows], key[heads], value[heads], *call, 0.0, False, False, scale=scale)
        out[rows], lse[rows] = merge(out[rows], lse[rows], seen, seen_lse.transpose(0, 1))
    return out, lse


def _backward_cuda(grad: torch.Tensor, x: Packed, out: torch.Tensor, lse: torch.Tensor) -> Three:
    query, key, value, spans, scale, _ = x
    own, *cross = _cuda_calls(spans, query.device)
    none = torch.empty(2, dtype=torch.uint64, device=query.device)  # random state of a dropout that there isn't
    sums = lse.transpose(0, 1).contiguous()
    dq, dk, dv = _cuda_backward(
        grad.contiguous(), query, key, value, out, sums, *own, 0.0, True, none, none, scale=scale
    )
    for call in cross:
        rows, heads = _cross_places(spans, query.device)
        parts = (grad[rows], query[rows], key[heads], value[heads], out[rows], sums[:, rows].contiguous())
        more = _cuda_backward(*parts, *call, 0.0, False, none, none, scale=scale)
        dq.index_add_(0, rows, more[0])
        dk.index_add_(0, heads, more[1])
        dv.index_add_(0, heads, more[2])
    return dq, dk, dv


__all__ = ["Packed", "backward", "chunk", "forward", "merge"]
