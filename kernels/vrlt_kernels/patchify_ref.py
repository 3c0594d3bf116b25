"""patchify in plain PyTorch, and the tables that every backend of it reads.

One axis of an antialiased bicubic resize (a = -0.5, pixel centres at i + 1/2), with s = in / out, S = 2 max(s, 1) and
c = s (i + 1/2): output i reads low = max(trunc(c - S + 1/2), 0) up to min(trunc(c + S + 1/2), in), with weights
k((j - c + 1/2) / max(s, 1)) that are divided by their sum. Horizontal before vertical.

"native" is what torch's CPU kernel does to uint8: weights times 2^precision rounded to int16, where precision is the
largest at which the largest weight of the axis fits, and (sum + half) >> precision, clamped to 0..255, after each axis.
"float" keeps fp32 between the axes and rounds once, half to even.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Dict, NamedTuple, Optional, Sequence, Tuple

import torch

RESAMPLES = ("native", "float")
MATRICES: Dict[str, Tuple[float, float]] = {  # kr, kb
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
}
YUV_BITS = 21  # of the fraction: the largest sum, 550 * 2^21, fits in int32


class Axis(NamedTuple):
    """``low`` int32 [out]: first pixel read; ``weights`` [out, taps], int16 with ``precision`` bits of fraction or
    fp32 (``precision`` 0). ``low + taps`` may pass the end of the picture, where weights are 0; ``end`` int32 [out] is
    one past the last pixel whose weight isn't 0.
    """

    low: torch.Tensor
    end: torch.Tensor
    weights: torch.Tensor
    precision: int


class Geometry(NamedTuple):
    """Sizes in pixels after the resize; ``patch`` in pixels, ``merge`` in patches, ``tubelet`` in frames."""

    height: int
    width: int
    patch: int
    merge: int
    tubelet: int

    @property
    def columns(self) -> int:
        """Values of a patch: 3 * tubelet * patch * patch."""
        return 3 * self.tubelet * self.patch * self.patch

    @property
    def rows(self) -> int:
        """Patches of one tubelet."""
        return (self.height // self.patch) * (self.width // self.patch)


def _cubic(x: torch.Tensor) -> torch.Tensor:
    x, a = x.abs(), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _weights(size_in: int, size_out: int, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
    """``low`` int64 [out] and weights [out, taps] in ``dtype``, in torch's order of operations: it decides ties."""
    scale = float(torch.tensor(size_in, dtype=dtype) / size_out)
    support = 2.0 * max(scale, 1.0)
    inverse = float(1.0 / torch.tensor(max(scale, 1.0), dtype=dtype))
    centre = scale * (torch.arange(size_out, dtype=dtype) + 0.5)
    low = (centre - support + 0.5).trunc().long().clamp(min=0)
    most = math.ceil(support) * 2 + 1
    count = ((centre + support + 0.5).trunc().long().clamp(max=size_in) - low).clamp(0, most)
    columns, total = [], torch.zeros(size_out, dtype=dtype)
    for j in range(int(count.max())):
        weight = torch.where(j < count, _cubic((j + low - centre + 0.5) * inverse), 0.0)
        columns.append(weight)
        total = total + weight  # one after the other: the sum decides how weights round
    weights = torch.stack(columns, 1)
    return low, torch.where(total[:, None] != 0, weights / total[:, None], weights)


def _fixed(weights: torch.Tensor) -> Tuple[torch.Tensor, int]:
    most, precision = max(float(weights.max()), 0.0), 0
    while precision < 22 and int(0.5 + most * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    scaled = weights * (1 << precision)
    return torch.where(scaled < 0, scaled - 0.5, scaled + 0.5).trunc().to(torch.int16), precision


@lru_cache(maxsize=256)
def axis(size_in: int, size_out: int, resample: str) -> Axis:
    """The table of one axis, on the CPU; kept, so don't write to it."""
    with torch.inference_mode(False):
        native = resample == "native"
        low, exact = _weights(size_in, size_out, torch.float64 if native else torch.float32)
        weights, precision = _fixed(exact) if native else (exact, 0)
        used = weights != 0
        first = used.int().argmax(1)
        last = weights.shape[1] - used.flip(1).int().argmax(1)  # one past
        taps = int((last - first).max())
        column = first[:, None] + torch.arange(taps)
        inside = column < last[:, None]
        weights = torch.where(inside, weights.gather(1, column.clamp(max=weights.shape[1] - 1)), 0)
        return Axis((low + first).int(), (low + last).int(), weights.contiguous(), precision)


@lru_cache(maxsize=16)
def yuv_coefficients(matrix: str, full_range: bool) -> Tuple[int, ...]:
    """Fixed-point factors (y, v to red, u to green, v to green, u to blue) and what is subtracted from y.

    The formula is the float one, y' = (Y - 16) 255 / 219 and so on, with its factors rounded to 2^-21, so that all
    backends agree to the bit; one of 4,000 pixels may be a level away from the float formula.
    """
    kr, kb = MATRICES[matrix]
    luma, chroma = (1.0, 1.0) if full_range else (255 / 219, 255 / 224)
    kg = 1 - kr - kb
    red, blue = 2 * (1 - kr) * chroma, 2 * (1 - kb) * chroma
    factors = (luma, red, -blue * kb / kg, -red * kr / kg, blue)
    return (*(round(f * (1 << YUV_BITS)) for f in factors), 0 if full_range else 16)


def nv12_to_rgb(y: torch.Tensor, uv: torch.Tensor, coefficients: Sequence[int]) -> torch.Tensor:
    """uint8 [F, H, W] and [F, ceil(H/2), ceil(W/2), 2] to RGB uint8 [F, H, W, 3]; each pixel takes its own chroma."""
    luma, red, green_u, green_v, blue, dark = coefficients
    chroma = uv.repeat_interleave(2, 1)[:, : y.shape[1]].repeat_interleave(2, 2)[:, :, : y.shape[2]].int() - 128
    u, v = chroma[..., 0], chroma[..., 1]
    base = (y.int() - dark) * luma + (1 << (YUV_BITS - 1))
    rgb = torch.stack([base + red * v, base + green_u * u + green_v * v, base + blue * u], -1)
    return (rgb >> YUV_BITS).clamp(0, 255).to(torch.uint8)


def _along(x: torch.Tensor, table: Axis, dim: int) -> torch.Tensor:
    """One axis of int32 or fp32 [H, W, 3]; integers are rounded and clamped, floats aren't."""
    shape = [1, 1, 1]
    shape[dim] = -1
    low, weights = table.low.to(x.device).long(), table.weights.to(x.device)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for j in range(weights.shape[1]):
        total = total + x.index_select(dim, (low + j).clamp(max=x.shape[dim] - 1)) * weights[:, j].reshape(shape)
    if x.dtype == torch.float32:
        return total
    return ((total + ((1 << table.precision) >> 1)) >> table.precision).clamp(0, 255)


def resize_ref(picture: torch.Tensor, size: Tuple[int, int], resample: str) -> torch.Tensor:
    """uint8 [H, W, 3] to uint8 [height, width, 3]."""
    if tuple(picture.shape[:2]) == tuple(size):
        return picture
    x = picture.to(torch.int32 if resample == "native" else torch.float32)
    x = _along(x, axis(x.shape[1], size[1], resample), 1)
    x = _along(x, axis(x.shape[0], size[0], resample), 0)
    return (x if resample == "native" else x.round().clamp(0, 255)).to(torch.uint8)


def normalised(x: torch.Tensor, mean_std: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(x - 255 mean) / (255 std) of uint8 [..., 3] in fp32, then rounded to ``dtype``. ``mean_std``: fp32 [2, 3]."""
    scaled = mean_std.to(x.device)
    return ((x.float() - scaled[0]) / scaled[1]).to(dtype)


def patchify_into_ref(
    out: torch.Tensor,
    frames: torch.Tensor,
    uv: Optional[torch.Tensor],
    slots: Sequence[int],
    geometry: Geometry,
    *,
    resample: str,
    rotation: int,
    coefficients: Sequence[int],
    mean_std: Optional[torch.Tensor],
) -> None:
    """What `vrlt_kernels.patchify_into` does, a frame at a time."""
    height, width, p, m, tubelet = geometry
    time = out.shape[0] // geometry.rows
    parts = out.view(time, height // p // m, width // p // m, m, m, 3, tubelet, p, p)
    for i, slot in enumerate(slots):
        picture = frames[i] if uv is None else nv12_to_rgb(frames[i : i + 1], uv[i : i + 1], coefficients)[0]
        picture = resize_ref(torch.rot90(picture, rotation // 90, (0, 1)), (height, width), resample)
        values = picture if mean_std is None else normalised(picture, mean_std, out.dtype)
        cells = values.reshape(height // p // m, m, p, width // p // m, m, p, 3).permute(0, 3, 1, 4, 6, 2, 5)
        parts[slot // tubelet, :, :, :, :, :, slot % tubelet] = cells


__all__ = ["MATRICES", "RESAMPLES", "YUV_BITS", "Axis", "Geometry", "axis", "patchify_into_ref", "yuv_coefficients"]
