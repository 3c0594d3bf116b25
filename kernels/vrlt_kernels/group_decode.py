"""group_decode: attention of one new token a row over the prefix of its group and a suffix of its own.

Shapes: rows of groups one after the other, Hq query heads, Hk KV heads, r = Hq / Hk, head dimension d.
    out[row, h] = sum_j p_j V_j,   p = softmax(scale * q[row, h] K^T),   K = [prefix of the row's group; its suffix]
A group's rows share the prefix, so it is read once for all of them: the r query heads of a KV head and the rows of the
group are the query vectors of one matrix product. The keys are cut into splits; each leaves its own softmax and the
log-sum-exp L_i of its scores, and a second launch merges them in fixed order:
    out = sum_i 2^(L_i - L) out_i,   L = log2 sum_i 2^L_i                                (base 2, in fp32)
Bytes of a call, elements of e bytes:  2 e Hk d (sum of prefix lengths + sum of suffix lengths) + 2 e rows Hq d.
"""

from __future__ import annotations

import contextlib
from typing import Any, List, Optional, Tuple

import torch

from ._checks import FLOATS, INTEGERS, bad, describe, offsets, tensor
from ._launch import CUDA_DTYPES, Backend, choose, no_forward_mode, use_backend
from ._ops import add_op_namespace_prefix as op
from .group_decode_ref import Arguments, decode_cpu, decode_formula

MAX_HEAD_DIM = 256


@torch.library.custom_op(op("group_decode"), mutates_args=())
def _decode(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    suffix_key: torch.Tensor,
    suffix_value: torch.Tensor,
    prefix_start: torch.Tensor,
    prefix_length: torch.Tensor,
    row_offsets: torch.Tensor,
    slots: torch.Tensor,
    suffix_length: torch.Tensor,
    scale: float,
    max_prefix: int,
    max_group: int,
) -> torch.Tensor:
    x = Arguments(
        query, prefix_key, prefix_value, suffix_key, suffix_value,
        prefix_start, prefix_length, row_offsets, slots, suffix_length,
    )  # fmt: skip
    x = _unit_stride(x)
    if query.numel() == 0 or prefix_length.numel() == 0:
        return torch.zeros_like(query)
    backend = _backend(query)
    if backend == "triton":
        from . import group_decode_triton

        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(query):
            group_decode_triton.decode(x, scale, max_prefix, max_group, out)
        return out
    if backend == "native":
        return _compiled(x, scale, max_group)
    return decode_cpu(x, scale) if query.device.type == "cpu" else decode_formula(x, scale)


def _unit_stride(x: Arguments) -> Arguments:
    """With a query whose components lie side by side, which aten's flash attention takes for granted."""
    return x if x.query.stride(-1) == 1 else x._replace(query=x.query.contiguous())


def _backend(query: torch.Tensor) -> Backend:
    has: List[Backend] = ["triton"] if query.dtype in CUDA_DTYPES else []
    has += ["native"] if query.device.type == "cpu" else []
    return choose("group_decode", query, has=(*has, "reference"))


def _compiled(x: Arguments, scale: float, max_group: int) -> torch.Tensor:
    """csrc/'s, which looks at the values itself."""
    try:
        out: torch.Tensor = torch.ops.vrlt_native.group_decode(*x, scale, max_group)
    except RuntimeError:
        _check_values(x, max_group)  # says it in this package's words
        raise
    return out


@_decode.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query)


def group_decode(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    suffix_key: torch.Tensor,
    suffix_value: torch.Tensor,
    *,
    prefix_start: torch.Tensor,
    prefix_length: torch.Tensor,
    row_offsets: torch.Tensor,
    slots: torch.Tensor,
    suffix_length: torch.Tensor,
    scale: Optional[float] = None,
    max_prefix: Optional[int] = None,
    max_group: Optional[int] = None,
    backend: Optional[Backend] = None,
    validate: bool = True,
) -> torch.Tensor:
    """Attention output [rows, Hq, d] in the dtype of the query; no gradient.

    Everything that changes from step to step is in tensors, which the launches read on the device: a CUDA graph of a
    call stays right when their contents change. Only shapes and the two capacities decide what is launched. The bits of
    a row depend on its own inputs, on the number of groups (empty ones included), R_max and the two capacities; not on
    other rows, nor on which groups have any. Of the compiled operator they depend on the row's own inputs alone; of the
    reference on the CPU, whose matrix product has all rows of the group, so to rounding.

    Args:
        query: fp32, fp64, bf16 or fp16 [rows, Hq, d], d at most 256, rows sorted by group.
        prefix_key, prefix_value: [tokens, Hk, d], Hk divides Hq, the prefixes of all groups, anywhere; heads
            contiguous, other strides any. What isn't part of a prefix isn't read.
        suffix_key, suffix_value: [slots, R_max, Hk, d] likewise, the rows' own tokens, the new one among them.
        prefix_start: int32/int64 [groups], the group's first token in the arena.
        prefix_length: int32/int64 [groups], its tokens; 0: none.
        row_offsets: int32/int64 [groups + 1], the group's rows, from 0. A group may have none. Rows behind the last
            offset are padding and get zeros.
        slots: int32/int64 [rows], where the row's suffix lies.
        suffix_length: int32/int64 [rows], its columns; 0: none. A row without prefix and suffix gets zeros.
        scale: of the scores; 1 / sqrt(d) by default.
        max_prefix: the longest prefix to expect, by default the size of the arena. For speed alone.
        max_group: the most rows that a group may have, by default all. Give it where ``rows`` is of several groups or
            varies: it decides the tiles.
        backend: "triton", "native" (CPU) or "reference" for this call, else as everywhere.
        validate: False for the further layers of a model, whose arguments differ from those of a validated call in
            nothing but the contents of query and caches.

    Raises:
        KernelInputError: a wrong shape, dtype, device or number, or an input that wants a gradient. Values of integer
            tensors are looked at on the CPU only; on a GPU a row that points outside of the arena or slab, or is one
            too many for max_group, gets NaN.
    """
    x = Arguments(
        query, prefix_key, prefix_value, suffix_key, suffix_value,
        prefix_start, prefix_length, row_offsets, slots, suffix_length,
    )  # fmt: skip
    check = _checked if validate else _numbers
    numbers = check(x, scale, max_prefix, max_group)
    with contextlib.nullcontext() if backend is None else use_backend(backend):
        if not torch.compiler.is_compiling() and query.numel() and _backend(query) == "native":
            # without the custom operator's own dozens of microseconds
            return _compiled(_unit_stride(x), numbers[0], numbers[2])
        out: torch.Tensor = _decode(*x, *numbers)
    return out


def group_decode_ref(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    suffix_key: torch.Tensor,
    suffix_value: torch.Tensor,
    *,
    scale: Optional[float] = None,
    max_prefix: Optional[int] = None,
    max_group: Optional[int] = None,
    **layout: torch.Tensor,
) -> torch.Tensor:
    """`group_decode` as a formula of plain PyTorch, row by row, in fp32 (fp64 for fp64)."""
    x = Arguments(query, prefix_key, prefix_value, suffix_key, suffix_value, **layout)
    return decode_formula(x, _checked(x, scale, max_prefix, max_group)[0])


def _scale(scale: Optional[float], x: Arguments) -> float:
    if scale is None:
        return float(x.query.shape[2] ** -0.5)
    if not isinstance(scale, (int, float)):
        raise bad("scale", repr(scale), "a number")
    return float(scale)


def _capacity(name: str, value: Optional[int], default: int) -> int:
    if value is None:
        return default
    if not isinstance(value, int) or value < 1:
        raise bad(name, repr(value), "a whole number above 0")
    return value


def _checked(
    x: Arguments, scale: Optional[float], max_prefix: Optional[int], max_group: Optional[int]
) -> Tuple[float, int, int]:
    """Scale and capacities. Raises KernelInputError."""
    tensor("query", x.query, shape=[None, None, None], dtypes=FLOATS)
    rows, heads, dim = x.query.shape
    if not 0 < dim <= MAX_HEAD_DIM:
        raise bad("query", describe(x.query), f"a head dimension of 1 to {MAX_HEAD_DIM}")
    like: Any = {"dtypes": [x.query.dtype], "like": x.query}
    tensor("prefix_key", x.prefix_key, shape=[None, None, dim], **like)
    tokens, shared, _ = x.prefix_key.shape
    if shared == 0 or heads % shared:
        raise bad("prefix_key", describe(x.prefix_key), f"KV heads that divide the {heads} of query")
    tensor("prefix_value", x.prefix_value, shape=[tokens, shared, dim], **like)
    tensor("suffix_key", x.suffix_key, shape=[None, None, shared, dim], **like)
    tensor("suffix_value", x.suffix_value, shape=x.suffix_key.shape, **like)
    for name, cache in zip(Arguments._fields[1:5], x[1:5], strict=True):
        if cache.stride(-1) != 1 and dim > 1:
            raise bad(name, f"strides {cache.stride()}", "a last stride of 1")
    for name, value in x._asdict().items():
        if torch.is_grad_enabled() and value.requires_grad:
            raise bad(name, "a tensor that requires grad", "torch.no_grad() or detach(): group_decode has no gradient")
    no_forward_mode("group_decode", *x[:5])
    offsets("row_offsets", x.row_offsets, None, x.query)
    groups = x.row_offsets.shape[0] - 1
    for name, value, size in (
        ("prefix_start", x.prefix_start, groups),
        ("prefix_length", x.prefix_length, groups),
        ("slots", x.slots, rows),
        ("suffix_length", x.suffix_length, rows),
    ):
        tensor(name, value, shape=[size], dtypes=INTEGERS, like=x.query)
    numbers = _numbers(x, scale, max_prefix, max_group)
    if x.query.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(x, numbers[2])
    return numbers


def _numbers(
    x: Arguments, scale: Optional[float], max_prefix: Optional[int], max_group: Optional[int]
) -> Tuple[float, int, int]:
    most = _capacity("max_group", max_group, x.query.shape[0])
    return _scale(scale, x), _capacity("max_prefix", max_prefix, x.prefix_key.shape[0]), most


def _check_values(x: Arguments, max_group: int) -> None:
    """What groups with rows, and rows of groups, point at."""
    ends, slots, lengths = x.row_offsets.tolist(), x.slots.tolist(), x.suffix_length.tolist()
    tokens, (places, columns) = x.prefix_key.shape[0], x.suffix_key.shape[:2]
    if ends[-1] > x.query.shape[0]:
        raise bad("row_offsets", f"offsets that end at {ends[-1]}", f"at most the {x.query.shape[0]} rows")
    for i, (start, length) in enumerate(zip(x.prefix_start.tolist(), x.prefix_length.tolist(), strict=True)):
        size = ends[i + 1] - ends[i]
        if size > max_group:
            raise bad("row_offsets", f"{size} rows for group {i}", f"at most max_group = {max_group}")
        if size and (length < 0 or (length and (start < 0 or start + length > tokens))):
            raise bad("prefix_start", f"{length} tokens from {start} for group {i}", f"part of [0, {tokens})")
    for row in range(ends[-1]):
        if not 0 <= lengths[row] <= columns:
            raise bad("suffix_length", f"{lengths[row]} for row {row}", f"values in [0, {columns}]")
        if lengths[row] and not 0 <= slots[row] < places:
            raise bad("slots", f"{slots[row]} for row {row}", f"values in [0, {places})")


__all__ = ["group_decode", "group_decode_ref"]
