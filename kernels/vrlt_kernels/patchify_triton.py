"""The Triton kernel of ``patchify``; imported only where triton is installed.

A program resizes one merged patch of one frame: the window of source pixels that it reads, in blocks, times the
weights of its columns, then of its rows, both as small matrix products on the tensor cores. In fixed point a weight is
256 high + low: bytes and pixels are exact in fp16, and so is the sum of a block of their products in fp32, so the
result is the CPU's to the bit. Weights of the fp32 route are split into three tf32 products.
Sizes, strides and the number of frames are runtime arguments; patch, merge and tubelet are constants.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from functools import lru_cache
from typing import Dict, NamedTuple, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl

from ._launch import hyper
from .patchify_ref import YUV_BITS, Geometry, axis

_BITS = tl.constexpr(YUV_BITS)
_HALF = tl.constexpr(1 << (YUV_BITS - 1))
# Pictures of all sizes come by, and nothing is read or written but single values: no number is worth a compilation.
_RUNTIME = [
    "height", "width", "across", "down", "x_taps", "y_taps", "x_precision", "y_precision", "x_blocks", "y_blocks",
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
def _channel(
    frame, chroma, factors, y, x, inside, c, row_stride, column_stride, channel_stride,
    uv_row_stride, uv_column_stride, uv_channel_stride, NV12: tl.constexpr,
):  # fmt: skip
    """One channel of the pixels, int32, 0 outside."""
    at = frame + (y * row_stride + x * column_stride)
    if not NV12:
        return tl.load(at + c * channel_stride, mask=inside, other=0).to(tl.int32)
    luma = tl.load(at, mask=inside, other=0).to(tl.int32)
    pair = chroma + ((y >> 1) * uv_row_stride + (x >> 1) * uv_column_stride)
    u = tl.load(pair, mask=inside, other=0).to(tl.int32) - 128
    v = tl.load(pair + uv_channel_stride, mask=inside, other=0).to(tl.int32) - 128
    total = (luma - tl.load(factors)) * tl.load(factors + 1) + _HALF
    total += u * tl.load(factors + 2 + 2 * c) + v * tl.load(factors + 3 + 2 * c)
    return tl.where(inside, tl.minimum(tl.maximum(total >> _BITS, 0), 255), 0)


@triton.jit
def _weights(low, table, taps, first, pixels, outputs, valid, OUTPUT_DIM: tl.constexpr):
    """Weights of ``outputs`` for ``pixels``, one of them along each dimension; 0 where an output doesn't read."""
    start = tl.load(low + first + outputs, mask=valid, other=0)
    if OUTPUT_DIM == 1:
        tap = pixels[:, None] - start[None, :]
        at = ((first + outputs) * taps)[None, :] + tap
        return tl.load(table + at, mask=(tap >= 0) & (tap < taps) & valid[None, :], other=0)
    else:
        tap = pixels[None, :] - start[:, None]
        at = ((first + outputs) * taps)[:, None] + tap
        return tl.load(table + at, mask=(tap >= 0) & (tap < taps) & valid[:, None], other=0)


@triton.jit
def _level(total, precision):
    """A fixed-point sum to 0..255, rounded."""
    half = (1 << precision) >> 1
    return tl.minimum(tl.maximum((total + half) >> precision, 0), 255)


@triton.jit
def _product(a, b, total, FIXED: tl.constexpr, WEIGHTS_FIRST: tl.constexpr):
    """total + a @ b, of which one holds weights and the other pixels in 0..255."""
    if FIXED:
        w = a if WEIGHTS_FIRST else b
        low = ((w + 128) & 255) - 128
        high = (w - low) >> 8
        if WEIGHTS_FIRST:
            pixels = b.to(tl.float16)
            fine, coarse = tl.dot(low.to(tl.float16), pixels), tl.dot(high.to(tl.float16), pixels)
        else:
            pixels = a.to(tl.float16)
            fine, coarse = tl.dot(pixels, low.to(tl.float16)), tl.dot(pixels, high.to(tl.float16))
        return total + fine.to(tl.int32) + (coarse.to(tl.int32) << 8)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="tf32x3")


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=["out", "frames", "uv"])
def patchify_kernel(
    out, frames, uv, slots, factors, mean_std, x_low, x_end, x_weights, y_low, y_end, y_weights,
    height, width, across, down, x_taps, y_taps, x_precision, y_precision, x_blocks, y_blocks,
    out_stride, frames_stride, row_stride, column_stride, channel_stride,
    uv_stride, uv_row_stride, uv_column_stride, uv_channel_stride,
    PATCH: tl.constexpr, MERGE: tl.constexpr, TUBELET: tl.constexpr, ROTATION: tl.constexpr, NV12: tl.constexpr,
    FIXED: tl.constexpr, NORMALISE: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a frame and merged patch, of which a picture has ``down`` x ``across``. ``height``: the source's."""
    FACTOR: tl.constexpr = PATCH * MERGE
    KIND: tl.constexpr = tl.int32 if FIXED else tl.float32
    program = tl.program_id(0).to(tl.int64)
    i = program // (across * down)
    token = (program % (across * down)).to(tl.int32)
    bh = token // across
    bw = token % across
    slot = tl.load(slots + i)
    frame = frames + i * frames_stride
    chroma = uv + i * uv_stride

    outputs = tl.arange(0, SIDE)
    valid = outputs < FACTOR
    left = tl.min(tl.load(x_low + bw * FACTOR + outputs, mask=valid, other=2147483647), 0)
    top = tl.min(tl.load(y_low + bh * FACTOR + outputs, mask=valid, other=2147483647), 0)
    right = tl.max(tl.load(x_end + bw * FACTOR + outputs, mask=valid, other=0), 0)
    bottom = tl.max(tl.load(y_end + bh * FACTOR + outputs, mask=valid, other=0), 0)
    block = tl.arange(0, BLOCK)

    patch_row = ((slot // TUBELET * down + bh) * across + bw) * (MERGE * MERGE)
    patch_row = patch_row + (outputs // PATCH * MERGE)[:, None] + (outputs // PATCH)[None, :]
    cell = (outputs % PATCH * PATCH)[:, None] + (outputs % PATCH)[None, :]
    to = out + patch_row * out_stride + cell + slot % TUBELET * (PATCH * PATCH)
    for c in range(3):
        picture = tl.zeros([SIDE, SIDE], KIND)
        for rows_at in range(0, y_blocks):
            rows = top + rows_at * BLOCK + block
            lines = tl.zeros([BLOCK, SIDE], KIND)
            for columns_at in range(0, x_blocks):
                columns = left + columns_at * BLOCK + block
                inside = (rows < bottom)[:, None] & (columns < right)[None, :]
                y, x = _pixel(rows[:, None], columns[None, :], height, width, ROTATION)
                values = _channel(
                    frame, chroma, factors, y, x, inside, c, row_stride, column_stride, channel_stride,
                    uv_row_stride, uv_column_stride, uv_channel_stride, NV12,
                )  # fmt: skip
                w = _weights(x_low, x_weights, x_taps, bw * FACTOR, columns, outputs, valid, 1).to(KIND)
                lines = _product(values, w, lines, FIXED, False)
            if FIXED:
                lines = _level(lines, x_precision)
            w = _weights(y_low, y_weights, y_taps, bh * FACTOR, rows, outputs, valid, 0).to(KIND)
            picture = _product(w, lines, picture, FIXED, True)
        if FIXED:
            levels = _level(picture, y_precision)
        else:
            # Half to even: adding this leaves no room for a fraction.
            bounded = tl.minimum(tl.maximum(picture, 0.0), 255.0)
            levels = ((bounded + 12582912.0) - 12582912.0).to(tl.int32)
        at = to + c * (TUBELET * PATCH * PATCH)
        inside = valid[:, None] & valid[None, :]
        if NORMALISE:
            value = tl.div_rn(levels.to(tl.float32) - tl.load(mean_std + c), tl.load(mean_std + 3 + c))
            if out.dtype.element_ty == tl.bfloat16:
                # Rounded here, half to even: the interpreter's conversion cuts off.
                bits = value.to(tl.int32, bitcast=True)
                value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
            tl.store(at, value.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(at, levels.to(tl.uint8), mask=inside)


class _Table(NamedTuple):
    """An axis on the device, and how many source pixels a merged patch reads at most."""

    low: torch.Tensor
    end: torch.Tensor
    weights: torch.Tensor
    precision: int
    window: int


@lru_cache(maxsize=256)
def _table(size_in: int, size_out: int, resample: str, factor: int, device: torch.device) -> _Table:
    with torch.inference_mode(False):
        table = axis(size_in, size_out, resample)
        spans = table.end.view(-1, factor).amax(1) - table.low.view(-1, factor).amin(1)
        low, end, weights = (x.to(device) for x in table[:3])
        return _Table(low, end, weights, table.precision, int(spans.max()))


@lru_cache(maxsize=64)
def _factors(coefficients: Tuple[int, ...], device: torch.device) -> torch.Tensor:
    """What is subtracted from y, the factor of y, then those of u and v for red, green and blue."""
    luma, red, green_u, green_v, blue, dark = coefficients
    with torch.inference_mode(False):
        return torch.tensor([dark, luma, 0, red, green_u, green_v, blue, 0], dtype=torch.int32, device=device)


def launch_config(factor: int) -> Dict[str, int]:
    """Padded side of a merged patch, pixels of a block, warps: of the tower's geometry alone."""
    side = max(16, triton.next_power_of_2(factor))
    return {"SIDE": side, "BLOCK": 32, "num_warps": 8}


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
    x = _table(wide, geometry.width, resample, factor, device)
    y = _table(tall, geometry.height, resample, factor, device)
    across, down = geometry.width // factor, geometry.height // factor
    numbers = [0.0] * 6 if mean_std is None else mean_std.flatten().tolist()
    config = launch_config(factor)
    block = config["BLOCK"]
    chroma = (0, 0, 0, 0) if uv is None else uv.stride()
    strides = (*frames.stride(), 0)[:4]
    patchify_kernel[(count * across * down,)](
        out, frames, frames if uv is None else uv, slots, _factors(tuple(coefficients), device),
        hyper(numbers, torch.float32, device), *x[:3], *y[:3],
        height, width, across, down, x.weights.shape[1], y.weights.shape[1], x.precision, y.precision,
        triton.cdiv(x.window, block), triton.cdiv(y.window, block), out.stride(0), *strides, *chroma,
        PATCH=geometry.patch, MERGE=geometry.merge, TUBELET=geometry.tubelet, ROTATION=rotation, NV12=uv is not None,
        FIXED=resample == "native", NORMALISE=mean_std is not None, enable_fp_fusion=False, **config,
    )  # fmt: skip
