"""The Triton kernel of ``patchify``; imported only where triton is installed.

A program resizes one merged patch of one frame: the window of source pixels that it reads times the weights of its
columns, then of its rows, both as small matrix products on the tensor cores. The weights come from the host as dense
matrices [outputs, window], so that a program loads few wide vectors of them and each pixel once.
Fixed point: 127 - x is an int8 for every byte x, and -w = 256 high + low is two of them for every weight, so that
w x = (-w) (127 - x) + 127 w is exact in int32, and the result is the CPU's to the bit. fp32 weights become two fp16,
and between the axes the lines too.
Sizes, strides and the number of frames are runtime arguments; patch, merge, tubelet and the block are constants.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from functools import lru_cache
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl

from ._launch import hyper
from .patchify_ref import YUV_BITS, Geometry, axis

_BITS = tl.constexpr(YUV_BITS)
_HALF = tl.constexpr(1 << (YUV_BITS - 1))
_SCALE = 4096.0  # of fp32 weights, so that the lower half of one isn't subnormal in fp16
_UNSCALE = tl.constexpr(1 / _SCALE)
# Pictures of all sizes come by, and nothing is read or written but single values: no number is worth a compilation.
_RUNTIME = [
    "height", "width", "across", "down", "x_precision", "y_precision", "x_blocks", "y_blocks",
    "out_stride", "frames_stride", "row_stride", "column_stride", "channel_stride",
    "uv_stride", "uv_row_stride", "uv_column_stride", "uv_channel_stride",
]  # fmt: skip


@triton.jit
def _pixel(rows, columns, height, width, ROTATION: tl.constexpr):
    """Where pixels of the turned picture lie in the source; height and width are the source's."""
    if ROTATION == 0:
        return rows, columns
    elif ROTATION == 90:
        return columns, width - 1 - rows
    elif ROTATION == 180:
        return height - 1 - rows, width - 1 - columns
    else:
        return height - 1 - columns, rows


@triton.jit
def _operand(x, FIXED: tl.constexpr):
    """Levels 0..255 as the products take them: 127 - x in int8, or fp16."""
    if FIXED:
        return (x ^ 0x7F).to(tl.uint8).to(tl.int8, bitcast=True)
    else:
        return (x | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def _colours(
    frame, chroma, factors, y, x, row_stride, column_stride, channel_stride,
    uv_row_stride, uv_column_stride, uv_channel_stride, NV12: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Red, green and blue of the pixels, as operands."""
    at = frame + (y * row_stride + x * column_stride)
    if NV12:
        pair = chroma + ((y >> 1) * uv_row_stride + (x >> 1) * uv_column_stride)
        luma = (tl.load(at).to(tl.int32) - tl.load(factors)) * tl.load(factors + 1) + _HALF
        u = tl.load(pair).to(tl.int32) - 128
        v = tl.load(pair + uv_channel_stride).to(tl.int32) - 128
        red = (luma + v * tl.load(factors + 3)) >> _BITS
        green = (luma + u * tl.load(factors + 4) + v * tl.load(factors + 5)) >> _BITS
        blue = (luma + u * tl.load(factors + 6)) >> _BITS
        red, green, blue = _clamped(red), _clamped(green), _clamped(blue)
    else:
        red = tl.load(at).to(tl.int16)
        green = tl.load(at + channel_stride).to(tl.int16)
        blue = tl.load(at + 2 * channel_stride).to(tl.int16)
    return _operand(red, FIXED), _operand(green, FIXED), _operand(blue, FIXED)


@triton.jit
def _clamped(x):
    return tl.minimum(tl.maximum(x, 0), 255)


@triton.jit
def _product(high, low, pixels, total, FIXED: tl.constexpr):
    """total + weights [M, K] @ pixels [K, N], the weights in two halves."""
    if FIXED:
        return total + (tl.dot(high, pixels, out_dtype=tl.int32) << 8) + tl.dot(low, pixels, out_dtype=tl.int32)
    else:
        return tl.dot(low, pixels, tl.dot(high, pixels, total))


@triton.jit
def _columns_done(lines, sums, precision, FIXED: tl.constexpr):
    """Sums over the columns, finished: levels as operands, or fp32."""
    if FIXED:
        return _operand(_level(lines, sums[:, None], precision), FIXED)
    else:
        return lines * _UNSCALE


@triton.jit
def _rows_product(high, low, lines, total, FIXED: tl.constexpr):
    """total + weights [M, K] @ lines^T, with lines [N, K]; fp32 lines in two halves as well."""
    if FIXED:
        return _product(high, low, tl.trans(lines), total, FIXED)
    else:
        coarse = lines.to(tl.float16)
        fine = tl.trans((lines - coarse.to(tl.float32)).to(tl.float16))
        return _product(high, low, tl.trans(coarse), tl.dot(high, fine, total), FIXED)


@triton.jit
def _level(total, sums, precision):
    """A fixed-point sum of (-w) (127 - x) to the level 0..255 of w x, rounded."""
    half = (1 << precision) >> 1
    return _clamped((total + sums * 127 + half) >> precision)


@triton.jit
def _store(to, total, sums, precision, mean, std, inside, FIXED: tl.constexpr, NORMALISE: tl.constexpr):
    """A channel of the merged patch, rounded and, asked for, normalised."""
    if FIXED:
        levels = _level(total, sums[:, None], precision)
    else:
        # Half to even: adding this leaves no room for a fraction.
        bounded = tl.minimum(tl.maximum(total * _UNSCALE, 0.0), 255.0)
        levels = ((bounded + 12582912.0) - 12582912.0).to(tl.int32)
    if NORMALISE:
        value = tl.div_rn(levels.to(tl.float32) - tl.load(mean), tl.load(std))
        if to.dtype.element_ty == tl.bfloat16:
            # Rounded here, half to even: the interpreter's conversion cuts off.
            bits = value.to(tl.int32, bitcast=True)
            value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        tl.store(to, value.to(to.dtype.element_ty), mask=inside)
    else:
        tl.store(to, levels.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=["out", "frames", "uv"])
def patchify_kernel(
    out, frames, uv, slots, factors, mean_std, x_first, x_high, x_low, x_sums, y_first, y_high, y_low, y_sums,
    height, width, across, down, x_precision, y_precision, x_blocks, y_blocks,
    out_stride, frames_stride, row_stride, column_stride, channel_stride,
    uv_stride, uv_row_stride, uv_column_stride, uv_channel_stride,
    PATCH: tl.constexpr, MERGE: tl.constexpr, TUBELET: tl.constexpr, ROTATION: tl.constexpr, NV12: tl.constexpr,
    PACKED: tl.constexpr, FIXED: tl.constexpr, NORMALISE: tl.constexpr,
    SIDE: tl.constexpr, X_BLOCK: tl.constexpr, Y_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a frame and merged patch, of which a picture has ``down`` x ``across``. ``height``: the source's."""
    KIND: tl.constexpr = tl.int32 if FIXED else tl.float32
    program = tl.program_id(0).to(tl.int64)
    if PACKED:
        column_stride = 1 if NV12 else 3
        channel_stride = 1
        uv_column_stride = 2
        uv_channel_stride = 1
    i = program // (across * down)
    token = (program % (across * down)).to(tl.int32)
    bh = token // across
    bw = token % across
    slot = tl.load(slots + i)
    frame = frames + i * frames_stride
    chroma = uv + i * uv_stride
    turned: tl.constexpr = ROTATION == 90 or ROTATION == 270
    last_row = (width if turned else height) - 1
    last_column = (height if turned else width) - 1

    outputs = tl.arange(0, SIDE)
    # Of a block, line by line: in two dimensions Triton would have the lanes of a warp read a column of pixels.
    pixel = tl.arange(0, Y_BLOCK * X_BLOCK)
    left = tl.load(x_first + bw)
    top = tl.load(y_first + bh)
    x_weights = ((bw * SIDE + outputs) * (x_blocks * X_BLOCK))[:, None] + tl.arange(0, X_BLOCK)[None, :]
    y_weights = ((bh * SIDE + outputs) * (y_blocks * Y_BLOCK))[:, None] + tl.arange(0, Y_BLOCK)[None, :]
    x_totals = tl.load(x_sums + bw * SIDE + outputs)
    y_totals = tl.load(y_sums + bh * SIDE + outputs)
    red = tl.zeros([SIDE, SIDE], KIND)
    green = tl.zeros([SIDE, SIDE], KIND)
    blue = tl.zeros([SIDE, SIDE], KIND)
    for rows_at in range(0, y_blocks):
        # Beyond the picture weights are 0: any pixel will do.
        rows = tl.minimum(top + rows_at * Y_BLOCK + pixel // X_BLOCK, last_row)
        red_lines = tl.zeros([SIDE, Y_BLOCK], KIND)
        green_lines = tl.zeros([SIDE, Y_BLOCK], KIND)
        blue_lines = tl.zeros([SIDE, Y_BLOCK], KIND)
        for columns_at in range(0, x_blocks):
            columns = tl.minimum(left + columns_at * X_BLOCK + pixel % X_BLOCK, last_column)
            y, x = _pixel(rows, columns, height, width, ROTATION)
            r, g, b = _colours(
                frame, chroma, factors, y, x, row_stride, column_stride, channel_stride,
                uv_row_stride, uv_column_stride, uv_channel_stride, NV12, FIXED,
            )  # fmt: skip
            high = tl.load(x_high + x_weights + columns_at * X_BLOCK)
            low = tl.load(x_low + x_weights + columns_at * X_BLOCK)
            red_lines = _product(high, low, tl.trans(tl.reshape(r, [Y_BLOCK, X_BLOCK])), red_lines, FIXED)
            green_lines = _product(high, low, tl.trans(tl.reshape(g, [Y_BLOCK, X_BLOCK])), green_lines, FIXED)
            blue_lines = _product(high, low, tl.trans(tl.reshape(b, [Y_BLOCK, X_BLOCK])), blue_lines, FIXED)
        high = tl.load(y_high + y_weights + rows_at * Y_BLOCK)
        low = tl.load(y_low + y_weights + rows_at * Y_BLOCK)
        red = _rows_product(high, low, _columns_done(red_lines, x_totals, x_precision, FIXED), red, FIXED)
        green = _rows_product(high, low, _columns_done(green_lines, x_totals, x_precision, FIXED), green, FIXED)
        blue = _rows_product(high, low, _columns_done(blue_lines, x_totals, x_precision, FIXED), blue, FIXED)

    patch_row = ((slot // TUBELET * down + bh) * across + bw) * (MERGE * MERGE)
    patch_row = patch_row + (outputs // PATCH * MERGE)[:, None] + (outputs // PATCH)[None, :]
    cell = (outputs % PATCH * PATCH)[:, None] + (outputs % PATCH)[None, :]
    to = out + patch_row * out_stride + cell + slot % TUBELET * (PATCH * PATCH)
    channel = TUBELET * PATCH * PATCH
    valid = outputs < PATCH * MERGE
    inside = valid[:, None] & valid[None, :]
    _store(to, red, y_totals, y_precision, mean_std, mean_std + 3, inside, FIXED, NORMALISE)
    _store(to + channel, green, y_totals, y_precision, mean_std + 1, mean_std + 4, inside, FIXED, NORMALISE)
    _store(to + 2 * channel, blue, y_totals, y_precision, mean_std + 2, mean_std + 5, inside, FIXED, NORMALISE)


class _Table(NamedTuple):
    """An axis on the device: of every merged patch the first pixel it reads, and its weights over a window from there.

    ``first`` int32 [patches]; ``high`` and ``low`` [patches, side, window], the halves of -w in int8 or of w in fp16;
    ``sums`` int32 [patches, side], of w. The window is ``blocks`` x ``block`` pixels.
    """

    first: torch.Tensor
    high: torch.Tensor
    low: torch.Tensor
    sums: torch.Tensor
    precision: int
    block: int
    blocks: int


@lru_cache(maxsize=256)
def _table(
    size_in: int, size_out: int, resample: str, *, factor: int, side: int, most: int, device: torch.device
) -> _Table:
    """``most``: pixels of a block at most, 32 or 64."""
    with torch.inference_mode(False):
        table = axis(size_in, size_out, resample)
        first = table.low.view(-1, factor).amin(1)
        span = int((table.end.view(-1, factor).amax(1) - first).max())
        block = 32 if span <= 32 else most
        blocks = triton.cdiv(span, block)
        native, taps = resample == "native", table.weights.shape[1]
        weights = torch.zeros(len(first), side, blocks * block + taps, dtype=torch.int32 if native else torch.float32)
        at = (table.low.view(-1, factor) - first[:, None])[:, :, None] + torch.arange(taps)
        weights[:, :factor].scatter_(2, at.long(), table.weights.view(-1, factor, taps).to(weights.dtype))
        weights = weights[:, :, : blocks * block]
        if native:
            low = ((128 - weights) & 255) - 128
            high, low = ((-weights - low) >> 8).to(torch.int8), low.to(torch.int8)
            sums = weights.sum(2, dtype=torch.int32)
        else:
            high = (weights * _SCALE).half()
            low, sums = (
                (weights * _SCALE - high.float()).half(),
                weights.new_zeros(weights.shape[:2], dtype=torch.int32),
            )
        first, high, low, sums = (x.contiguous().to(device) for x in (first, high, low, sums))
        return _Table(first, high, low, sums, table.precision, block, blocks)


@lru_cache(maxsize=64)
def _factors(coefficients: Tuple[int, ...], device: torch.device) -> torch.Tensor:
    """What is subtracted from y, the factor of y, then those of u and v for red, green and blue."""
    luma, red, green_u, green_v, blue, dark = coefficients
    with torch.inference_mode(False):
        return torch.tensor([dark, luma, 0, red, green_u, green_v, blue, 0], dtype=torch.int32, device=device)


def launch_config(factor: int, resample: str) -> Dict[str, int]:
    """Padded side of a merged patch, pixels of a block at most, and what Triton takes: of geometry and route alone.

    A product of 32 rows is two of the tensor cores' tiles, so more than two warps would work twice on the same ones.
    """
    side = max(16, triton.next_power_of_2(factor))
    return {"SIDE": side, "most": 32, "num_warps": max(1, side // 16), "num_stages": 1}


def patchify(
    out: torch.Tensor,
    frames: torch.Tensor,
    uv: Optional[torch.Tensor],
    slots: torch.Tensor,
    geometry: Geometry,
    resample: str,
    rotation: int,
    coefficients: Sequence[int],
    mean_std: Optional[torch.Tensor],
) -> None:
    """``slots`` int64 [F] on the device; the rest as in patchify.py."""
    count, height, width = frames.shape[:3]
    tall, wide = (width, height) if rotation in (90, 270) else (height, width)
    factor, device = geometry.patch * geometry.merge, frames.device
    config = launch_config(factor, resample)
    common: Any = {"factor": factor, "side": config["SIDE"], "most": config.pop("most"), "device": device}
    x, y = (_table(*sizes, resample, **common) for sizes in ((wide, geometry.width), (tall, geometry.height)))
    across, down = geometry.width // factor, geometry.height // factor
    numbers = [0.0] * 6 if mean_std is None else mean_std.flatten().tolist()
    chroma = (0, 0, 0, 0) if uv is None else uv.stride()
    strides = (*frames.stride(), 0)[:4]
    packed = strides[2:] == (3, 1) if uv is None else (strides[2], *chroma[2:]) == (1, 2, 1)
    patchify_kernel[(count * across * down,)](
        out, frames, frames if uv is None else uv, slots, _factors(tuple(coefficients), device),
        hyper(numbers, torch.float32, device), *x[:4], *y[:4],
        height, width, across, down, x.precision, y.precision, x.blocks, y.blocks, out.stride(0), *strides, *chroma,
        PATCH=geometry.patch, MERGE=geometry.merge, TUBELET=geometry.tubelet, ROTATION=rotation, NV12=uv is not None,
        PACKED=packed, FIXED=resample == "native", NORMALISE=mean_std is not None, X_BLOCK=x.block, Y_BLOCK=y.block,
        enable_fp_fusion=False, **config,
    )  # fmt: skip
