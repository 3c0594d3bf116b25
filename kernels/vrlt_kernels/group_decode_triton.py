"""The Triton kernels of ``group_decode``; imported only where triton is installed.

First launch: a program a KV head and unit. A unit is a split of a group's prefix, for all rows of the group, or a split
of one row's suffix; it leaves its softmax over its own keys and the base-2 log-sum-exp of its scores. Second launch: a
program a row and query head, which merges what the first one left. How many units there are follows from capacities;
which keys a unit has follows from lengths, read on the device, and units beyond a length have nothing to do.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import math
from typing import Any, Dict, NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import interpreting
from .group_decode_ref import Arguments

_RUNTIME = ["rows", "groups", "splits", "suffix_splits", "tokens", "places", "columns", "max_group"]
_LAYOUT = ["prefix_start", "prefix_length", "row_offsets", "slots", "suffix_length"]
# Keys of a split at least: below, what it leaves for the merge is no longer little beside what it reads.
_SUFFIX_LEAST = 512
_MOST_SPLITS = 64


@triton.jit
def _prefix(group, prefix_start, prefix_length, tokens):
    """Start and length of a group's prefix; length -1 if it isn't within the arena."""
    start = tl.load(prefix_start + group).to(tl.int64)
    length = tl.load(prefix_length + group).to(tl.int64)
    inside = (length == 0) | ((length > 0) & (start >= 0) & (start + length <= tokens))
    return start, tl.where(inside, length, -1).to(tl.int32)


@triton.jit
def _suffix(row, slots, suffix_length, places, columns):
    """Slot and length of a row's suffix; length -1 if it isn't within the slab."""
    slot = tl.load(slots + row).to(tl.int64)
    length = tl.load(suffix_length + row).to(tl.int64)
    inside = (length == 0) | ((length > 0) & (length <= columns) & (slot >= 0) & (slot < places))
    return slot, tl.where(inside, length, -1).to(tl.int32)


@triton.jit
def _splits(length, most, LEAST: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys of a split, which all but the last one have, and the number of splits of a length."""
    even = (length + most - 1) // most
    size = tl.maximum((even + BLOCK_N - 1) // BLOCK_N * BLOCK_N, LEAST)
    return size, (length + size - 1) // size


@triton.jit
def _attend(
    query, key, value, out, lse, vector, vectors, begin, end, key_stride, value_stride, scale,
    HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries ``vector``, RATIO of a row, on keys begin..end, of which there is at least one.

    Bases are int64 and what is added within a tile int32: 64-bit products for each element would cost registers.
    """
    dims = tl.arange(0, BLOCK_D)
    cols = tl.arange(0, BLOCK_N)
    place = vector // RATIO * HEADS + vector % RATIO
    at = place[:, None] * D + dims[None, :]
    inside = (vector < vectors)[:, None] & (dims < D)[None, :]
    q = tl.load(query + at, mask=inside, other=0.0)
    top = tl.full(vector.shape, float("-inf"), tl.float32)
    total = tl.zeros(vector.shape, tl.float32)
    acc = tl.zeros(at.shape, tl.float32)
    for start in range(begin, end, BLOCK_N):
        valid = start + cols < end
        loaded = valid[:, None] & (dims < D)[None, :]
        from_key = key + tl.full((), start, tl.int64) * key_stride
        from_value = value + tl.full((), start, tl.int64) * value_stride
        k = tl.load(from_key + (cols[:, None] * key_stride + dims[None, :]), mask=loaded, other=0.0)
        v = tl.load(from_value + (cols[:, None] * value_stride + dims[None, :]), mask=loaded, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(valid[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    tl.store(out + at, acc / total[:, None], mask=inside)
    tl.store(lse + place, top + tl.log2(total), mask=vector < vectors)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_LAYOUT)
def attend_kernel(
    query, prefix_key, prefix_value, suffix_key, suffix_value,
    prefix_start, prefix_length, row_offsets, slots, suffix_length, out, lse,
    rows, groups, splits, suffix_splits, tokens, places, columns, max_group, scale,
    prefix_key_stride, prefix_key_head, prefix_value_stride, prefix_value_head,
    suffix_key_slot, suffix_key_stride, suffix_key_head, suffix_value_slot, suffix_value_stride, suffix_value_head,
    HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, LEAST: tl.constexpr, SUFFIX_LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr, SUFFIX_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out fp32 [splits + suffix_splits, rows, HEADS, D] and lse of its first axes; only what has keys is written."""
    head = tl.program_id(1).to(tl.int64)
    tiles = (max_group * RATIO + BLOCK_M - 1) // BLOCK_M
    unit = tl.program_id(0) // tiles
    # The tiles of a split are neighbours: they run at the same time and find its keys in the L2 cache.
    tile = tl.program_id(0) % tiles
    if unit < groups * splits:
        group = unit // splits
        split = unit % splits
        first = tl.maximum(tl.load(row_offsets + group).to(tl.int32), 0)
        last = tl.minimum(tl.load(row_offsets + group + 1).to(tl.int32), rows)
        vectors = (last - first) * RATIO
        start, length = _prefix(group, prefix_start, prefix_length, tokens)
        size, _ = _splits(length, splits, LEAST, BLOCK_N)
        begin = split * size
        if (tile * BLOCK_M < vectors) & (begin < length):
            place = tl.full((), first, tl.int64) * HEADS + head * RATIO
            part = split.to(tl.int64) * rows * HEADS + place
            _attend(
                query + place * D,
                prefix_key + start * prefix_key_stride + head * prefix_key_head,
                prefix_value + start * prefix_value_stride + head * prefix_value_head,
                out + part * D, lse + part, tile * BLOCK_M + tl.arange(0, BLOCK_M), vectors,
                begin, tl.minimum(begin + size, length), prefix_key_stride, prefix_value_stride, scale,
                HEADS, RATIO, D, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    else:
        own = tl.program_id(0) - groups * splits * tiles
        row = own // suffix_splits
        split = own % suffix_splits
        slot, length = _suffix(row, slots, suffix_length, places, columns)
        size, _ = _splits(length, suffix_splits, SUFFIX_LEAST, BLOCK_N)
        begin = split * size
        if (row < tl.load(row_offsets + groups)) & (begin < length):
            place = row.to(tl.int64) * HEADS + head * RATIO
            part = (splits + split).to(tl.int64) * rows * HEADS + place
            _attend(
                query + place * D,
                suffix_key + slot * suffix_key_slot + head * suffix_key_head,
                suffix_value + slot * suffix_value_slot + head * suffix_value_head,
                out + part * D, lse + part, tl.arange(0, SUFFIX_M), RATIO,
                begin, tl.minimum(begin + size, length), suffix_key_stride, suffix_value_stride, scale,
                HEADS, RATIO, D, BLOCK_N, BLOCK_D,
            )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_LAYOUT)
def merge_kernel(
    parts, lse, out, prefix_start, prefix_length, row_offsets, slots, suffix_length,
    rows, groups, splits, suffix_splits, tokens, places, columns, max_group,
    HEADS: tl.constexpr, D: tl.constexpr, LEAST: tl.constexpr, SUFFIX_LEAST: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A row and head: its parts by their log-sum-exp; zeros where it has none, NaN where its numbers are wrong."""
    row = tl.program_id(0)
    place = row.to(tl.int64) * HEADS + tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    if row < tl.load(row_offsets + groups):
        group = 0
        for base in range(0, groups, BLOCK_G):
            other = base + tl.arange(0, BLOCK_G)
            ends = tl.load(row_offsets + other + 1, mask=other < groups, other=0x7FFFFFFF)
            group += tl.sum((ends <= row).to(tl.int32), 0)
        group = tl.minimum(group, groups - 1)
        _, length = _prefix(group, prefix_start, prefix_length, tokens)
        _, own = _suffix(row, slots, suffix_length, places, columns)
        # With offsets that aren't in order, or more rows than allowed, no program may have worked for this row.
        index = row - tl.maximum(tl.load(row_offsets + group).to(tl.int32), 0)
        sound = (length >= 0) & (own >= 0) & (index >= 0) & (index < max_group)
        _, shared = _splits(length, splits, LEAST, BLOCK_N)
        _, used = _splits(own, suffix_splits, SUFFIX_LEAST, BLOCK_N)
        used += shared
        if sound & (used > 0):
            top = tl.full((), float("-inf"), tl.float32)
            total = tl.zeros((), tl.float32)
            for base in range(0, used, BLOCK_P):
                part = base + tl.arange(0, BLOCK_P)
                valid = part < used
                part = tl.where(part < shared, part, splits + part - shared)
                at = part.to(tl.int64) * rows * HEADS + place
                weight = tl.load(lse + at, mask=valid, other=float("-inf"))
                inside = valid[:, None] & (dims < D)[None, :]
                values = tl.load(parts + (at[:, None] * D + dims[None, :]), mask=inside, other=0.0)
                higher = tl.maximum(top, tl.max(weight, 0))
                weight = tl.exp2(weight - higher)
                shrink = tl.exp2(top - higher)
                total = total * shrink + tl.sum(weight, 0)
                acc = acc * shrink + tl.sum(values * weight[:, None], 0)
                top = higher
            acc = acc / total
        elif not sound:
            acc += float("nan")
    tl.store(out + place * D + dims, acc.to(out.dtype.element_ty), mask=dims < D)


class Shape(NamedTuple):
    """What a launch configuration depends on: the device, and shapes and capacities of a call."""

    capability: int
    processors: int
    dtype: torch.dtype
    head_dim: int
    ratio: int
    kv_heads: int
    groups: int
    max_group: int
    max_prefix: int
    columns: int


def launch_config(shape: Shape) -> Dict[str, Any]:
    """Tiles, splits, warps and stages. The number of rows isn't among what decides."""
    single = shape.dtype == torch.float32  # no tensor cores: tiles live in registers
    dim = max(16, triton.next_power_of_2(shape.head_dim))
    most = 16 if single else (128 if dim <= 128 and shape.capability >= 90 else 64)
    vectors = triton.next_power_of_2(max(1, shape.max_group) * shape.ratio)
    block_m = min(most, max(16, vectors))
    block_n = 32 if single or dim > 128 else 64
    least = max(256, 8 * block_m)
    wanted = -(-2 * shape.processors // (shape.groups * shape.kv_heads))
    splits = min(-(-shape.max_prefix // least), wanted, _MOST_SPLITS)
    return {
        "splits": max(1, splits),
        "suffix_splits": max(1, min(-(-shape.columns // _SUFFIX_LEAST), _MOST_SPLITS)),
        "LEAST": least,
        "BLOCK_M": block_m,
        "SUFFIX_M": max(16, triton.next_power_of_2(shape.ratio)),  # all of a row, in one tile
        "BLOCK_N": block_n,
        "BLOCK_D": dim,
        "num_warps": 8 if block_m > 64 else 4,
        "num_stages": 2 if single else 3,
    }


def _device(device: torch.device) -> tuple[int, int]:
    """Compute capability and multiprocessors; for tensors on the CPU of what is compiled for, or of an H100."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.major * 10 + properties.minor, properties.multi_processor_count
    return 90 if interpreting() else triton.runtime.driver.active.get_current_target().arch, 132


def decode(x: Arguments, scale: float, max_prefix: int, max_group: int, out: torch.Tensor) -> None:
    """``out`` [rows, Hq, d], contiguous."""
    query = x.query.contiguous()
    rows, heads, dim = query.shape
    groups, columns = x.prefix_length.shape[0], x.suffix_key.shape[1]
    capability, processors = _device(query.device)
    shape = Shape(
        capability, processors, query.dtype, dim, x.ratio, heads // x.ratio, groups, max_group, max_prefix, columns
    )
    config = launch_config(shape)
    splits, suffix_splits = config.pop("splits"), config.pop("suffix_splits")
    parts = torch.empty(splits + suffix_splits, rows, heads, dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(parts.shape[:-1], dtype=torch.float32, device=query.device)
    layout = x[5:]
    numbers = (rows, groups, splits, suffix_splits, x.prefix_key.shape[0], x.suffix_key.shape[0], columns, max_group)
    tiles = -(-max_group * x.ratio // config["BLOCK_M"])
    attend_kernel[(groups * splits * tiles + rows * suffix_splits, shape.kv_heads)](
        query, *x[1:5], *layout, parts, lse, *numbers, scale * math.log2(math.e),
        *x.prefix_key.stride()[:2], *x.prefix_value.stride()[:2], *x.suffix_key.stride()[:3],
        *x.suffix_value.stride()[:3],
        HEADS=heads, RATIO=x.ratio, D=dim, SUFFIX_LEAST=_SUFFIX_LEAST, enable_fp_fusion=True, **config,
    )  # fmt: skip
    merge_kernel[(rows, heads)](
        parts, lse, out, *layout, *numbers,
        HEADS=heads, D=dim, LEAST=config["LEAST"], SUFFIX_LEAST=_SUFFIX_LEAST, BLOCK_N=config["BLOCK_N"],
        BLOCK_D=config["BLOCK_D"], BLOCK_P=16, BLOCK_G=64, enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip
