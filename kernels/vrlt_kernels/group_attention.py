"""group_attention: causal attention over groups whose rows share a prefix, which is computed once.

Shapes: query [N, Hq, d], key and value [N, Hk, d] of a packed sequence (`GroupSpans`: prefix, row 1, ..., row G of
group 0, then of group 1, ...). A prefix token sees its prefix up to itself; a row token sees the whole prefix of its
group and its own row up to itself: what it would see in a sequence of prefix and row alone. With s_ij = scale q_i k_j,
    lse_i = log(exp(lse_i^own) + exp(lse_i^prefix))     out_i = sum_c exp(lse_i^c - lse_i) out_i^c,  c: own, prefix
    p_ij = exp(s_ij - lse_i)     ds_ij = p_ij (dout_i . v_j - dout_i . out_i)
so each part's backward pass, given the merged out and lse, yields its share of the gradient and nothing else.
Cost of a group against its rows replicated: (P + sum R) / (G P + sum R) of the queries, one copy of the prefix's keys.
"""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import torch

from . import _native
from . import group_attention_flash as flash
from ._checks import FLOATS, bad, compute_dtype, describe, tensor
from ._launch import Backend, choose, no_double_backward, no_forward_mode
from ._ops import add_op_namespace_prefix as op
from .group_spans import GroupSpans

Three = Tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _spans(prefix: List[int], counts: List[int], lengths: List[int]) -> GroupSpans:
    ends, rows = 0, []
    for count in counts:
        rows.append(lengths[ends : ends + count])
        ends += count
    key = (tuple(prefix), tuple(tuple(r) for r in rows))
    if _last and (_last[0].prefix, _last[0].rows) == key:
        return _last[0]  # its index tensors serve all layers of a pass
    _last[:] = [GroupSpans(*key)]
    return _last[0]


_last: List[GroupSpans] = []


def _backend(op: str, query: torch.Tensor) -> Backend:
    has: List[Backend] = ["flash", "reference"]
    if query.device.type == "cpu" and 0 < query.shape[2] <= _native.MAX_DIM:
        has.append("native")
    widest = 128 if query.dtype == torch.float32 else 256
    if op == "group_attention" and query.dtype != torch.float64 and 0 < query.shape[2] <= widest:
        has.append("triton")
    return choose(op, query, has=has)


def _one_pass(query: torch.Tensor) -> Any:
    """The module whose forward and backward run: both take a `Packed`."""
    if _backend("group_attention", query) == "triton":
        from . import group_attention_triton

        return group_attention_triton
    return flash


@torch.library.custom_op(op("group_attention_fwd"), mutates_args=())
def group_attention_fwd(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: List[int],
    counts: List[int],
    lengths: List[int],
    scale: float,
    skip: int = 0,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """out and lse [N, Hq], of the query's tokens: those behind the first ``skip``."""
    if _backend("group_attention", query) == "native":
        out, lse = torch.ops.vrlt_native.group_attention(query, key, value, prefix, counts, lengths, scale, skip)
        return out, lse
    found: Tuple[torch.Tensor, torch.Tensor]
    found = _one_pass(query).forward(flash.Packed(query, key, value, _spans(prefix, counts, lengths), scale, skip))
    return found


@group_attention_fwd.register_fake
def _(query: torch.Tensor, *_: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=compute_dtype(query))


@torch.library.custom_op(op("group_attention_bwd"), mutates_args=())
def group_attention_bwd(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    prefix: List[int],
    counts: List[int],
    lengths: List[int],
    scale: float,
    skip: int = 0,
) -> Three:
    """Gradients of query, key and value."""
    if _backend("group_attention", query) == "native":
        grad = grad if grad.stride(2) == 1 else grad.contiguous()  # as that of a sum, which is expanded
        dq, dk, dv = torch.ops.vrlt_native.group_attention_backward(
            grad, query, key, value, out, lse, prefix, counts, lengths, scale, skip
        )
        return dq, dk, dv
    x = flash.Packed(query, key, value, _spans(prefix, counts, lengths), scale, skip)
    grads: Three = _one_pass(query).backward(grad, x, out, lse)
    return grads


@group_attention_bwd.register_fake
def _(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> Three:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Optional[torch.Tensor], _: Any) -> Tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    return (*group_attention_bwd(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * len(ctx.rest))


group_attention_fwd.register_autograd(_backward, setup_context=_setup)
no_double_backward(group_attention_bwd, "group_attention")


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: GroupSpans, skip: int = 0) -> None:
    tensor("query", query, shape=[spans.tokens - skip, None, None], dtypes=FLOATS)
    shape = [spans.tokens, None, query.shape[2]]
    tensor("key", key, shape=shape, dtypes=[query.dtype], like=query)
    tensor("value", value, shape=[spans.tokens, key.shape[1], query.shape[2]], dtypes=[query.dtype], like=query)
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise bad("key", describe(key), f"heads that divide the query's {query.shape[1]}")


def group_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: GroupSpans,
    scale: Optional[float] = None,
    *,
    rows_only: bool = False,
) -> torch.Tensor:
    """Attention of a packed sequence of groups, differentiable once.

    Args:
        query: [N, Hq, d] fp32, fp64, bf16 or fp16, any strides but the last (1); N is ``spans.tokens``.
        key, value: [N, Hk, d] of the same dtype and device; Hk divides Hq, query head h reads key head h // (Hq / Hk).
        scale: of the scores, default d ** -0.5.
        rows_only: the prefix of the only group was computed before: query [N - P, Hq, d] is of the rows' tokens, while
            key and value hold the prefix too. Its gradients are what these rows add.

    Returns:
        The shape and dtype of the query. A row of an empty prefix sees itself alone.

    Raises:
        KernelInputError: a wrong type, shape, dtype or device.
        RuntimeError: in a second derivative, or under forward-mode AD.
    """
    if rows_only and len(spans.prefix) != 1:
        raise bad("spans", f"{len(spans.prefix)} groups", "one group where rows_only is set")
    skip = spans.prefix[0] if rows_only else 0
    _check(query, key, value, spans, skip)
    no_forward_mode("group_attention", query, key, value)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    if not len(query) or _backend("group_attention", query) == "reference":
        return group_attention_ref(query, key, value, spans, scale, rows_only=rows_only)
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    counts, lengths = [len(group) for group in spans.rows], [n for group in spans.rows for n in group]
    out: torch.Tensor = group_attention_fwd(query, key, value, list(spans.prefix), counts, lengths, scale, skip)[0]
    return out


def group_attention_ref(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: GroupSpans,
    scale: Optional[float] = None,
    *,
    rows_only: bool = False,
) -> torch.Tensor:
    """The mathematics of `group_attention` in plain PyTorch, differentiable everywhere; [T, T] scores a group."""
    dtype, repeat = compute_dtype(query), query.shape[1] // max(key.shape[1], 1)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    pieces = []
    skip = spans.prefix[0] if rows_only else 0
    for start, end, prefix, rows in zip(spans.starts[:-1], spans.starts[1:], spans.prefix, spans.rows, strict=True):
        tokens = (query[max(start - skip, 0) : end - skip], key[start:end], value[start:end])
        q, k, v = (x.to(dtype).transpose(0, 1) for x in tokens)
        k, v = (x.repeat_interleave(repeat, dim=0) for x in (k, v))
        scores = scale * q @ k.transpose(1, 2)
        owner = torch.tensor([0] * prefix + [i + 1 for i, n in enumerate(rows) for _ in range(n)], device=query.device)
        sees = (owner[:, None] == owner) | (owner == 0)
        sees &= torch.ones_like(sees).tril()
        pieces.append((scores.masked_fill(~sees[skip:], float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(pieces).to(query.dtype) if pieces else query * 1


@torch.library.custom_op(op("chunk_attention"), mutates_args=())
def _chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    if _backend("chunk_attention", query) == "native":
        out: torch.Tensor = torch.ops.vrlt_native.chunk_attention(query, key, value, past_key, past_value, scale)
        return out
    return flash.chunk(query, key, value, past_key, past_value, scale)


@_chunk.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape)


def chunk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    scale: Optional[float] = None,
) -> torch.Tensor:
    """Attention of one piece of a sequence behind its past: chunked prefill. Without gradients.

    Args:
        query, key, value: [n, Hq, d], [n, Hk, d], [n, Hk, d] as in `group_attention`.
        past_key, past_value: [m, Hk, d], all seen by every query; m may be 0.

    Returns:
        [n, Hq, d] in the query's dtype.

    Raises:
        KernelInputError: a wrong type, shape, dtype or device, or tensors that require gradients.
    """
    _check(query, key, value, GroupSpans((query.shape[0],), ((),)))
    for name, past in (("past_key", past_key), ("past_value", past_value)):
        tensor(name, past, shape=[None, key.shape[1], key.shape[2]], dtypes=[query.dtype], like=query)
    if past_key.shape != past_value.shape:
        raise bad("past_value", describe(past_value), f"the shape of past_key, {list(past_key.shape)}")
    everything = (query, key, value, past_key, past_value)
    if torch.is_grad_enabled() and any(x.requires_grad for x in everything):
        raise bad("query", "tensors that require gradients", "torch.no_grad(): it has no backward pass")
    scale = query.shape[2] ** -0.5 if scale is None else scale
    if _backend("chunk_attention", query) == "reference":
        return chunk_attention_ref(*everything, scale)
    out: torch.Tensor = _chunk(*(x if x.stride(2) == 1 else x.contiguous() for x in everything), scale)
    return out


def chunk_attention_ref(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    scale: Optional[float] = None,
) -> torch.Tensor:
    """The mathematics of `chunk_attention` in plain PyTorch."""
    dtype, repeat, past = compute_dtype(query), query.shape[1] // max(key.shape[1], 1), past_key.shape[0]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    q = query.to(dtype).transpose(0, 1)
    k, v = (
        torch.cat(pair).to(dtype).transpose(0, 1).repeat_interleave(repeat, dim=0)
        for pair in ((past_key, key), (past_value, value))
    )
    scores = scale * q @ k.transpose(1, 2)
    sees = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device).tril(past)
    return (scores.masked_fill(~sees, float("-inf")).softmax(-1) @ v).transpose(0, 1).to(query.dtype)


__all__ = ["GroupSpans", "chunk_attention", "chunk_attention_ref", "group_attention", "group_attention_ref"]
