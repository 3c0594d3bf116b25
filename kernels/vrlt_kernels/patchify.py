"""patchify: decoded frames to the patches of a Qwen-VL tower, resized on the way, in one pass.

Shapes: frames uint8 [F, H, W, 3] (or NV12), out [t * h * w, 3 * tubelet * p * p] with h = height / p, w = width / p.
    row    = ((t * h/m + bh) * w/m + bw) * m * m + mh * m + mw            merged patches (m x m) are neighbours
    column = ((c * tubelet + tt) * p + y) * p + x
    value  = channel c of frame t * tubelet + tt, at row (bh m + mh) p + y and column (bw m + mw) p + x
The resize is the antialiased bicubic one of torch; formulas and rounding: patchify_ref.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from ._checks import bad, describe, one_of, tensor
from ._launch import Backend, choose
from ._ops import add_op_namespace_prefix as op
from .patchify_ref import MATRICES, RESAMPLES, Geometry, axis, patchify_into_ref, yuv_coefficients


class NV12(NamedTuple):
    """Luma ``y`` uint8 [F, H, W] and chroma ``uv`` uint8 [F, ceil(H/2), ceil(W/2), 2], any strides.

    ``matrix``: bt601, bt709 or bt2020 (non-constant luminance); ``full_range``: 0..255 instead of 16..235.
    """

    y: torch.Tensor
    uv: torch.Tensor
    matrix: str = "bt601"
    full_range: bool = False


Frames = Union[torch.Tensor, NV12]
Normalize = Tuple[Sequence[float], Sequence[float]]
ROTATIONS = (0, 90, 180, 270)
_DTYPES = (torch.float32, torch.bfloat16)


@lru_cache(maxsize=256)
def _native_plan(size_in: int, size_out: int, resample: str, vertical: bool) -> torch.Tensor:
    table = axis(size_in, size_out, resample)
    with torch.inference_mode(False):
        plan: torch.Tensor = torch.ops.vrlt_native.patchify_plan(
            table.low, table.end, table.weights, table.precision, size_in, vertical, -1
        )
        return plan


@lru_cache(maxsize=64)
def _constants(values: Tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _run(
    out: torch.Tensor,
    frames: torch.Tensor,
    uv: Optional[torch.Tensor],
    slots: Sequence[int],
    size: Sequence[int],
    resample: str,
    rotation: int,
    coefficients: Sequence[int],
    mean_std: Optional[torch.Tensor],
) -> None:
    if len(slots) == 0:
        return
    geometry = Geometry(*size)
    _check_slots(slots, out.shape[0] // geometry.rows * geometry.tubelet)
    # The compiled operators' list of dtypes is that of logits: a sample of one of them stands in for the pixels.
    sample = torch.empty(0, device=frames.device)
    has: Tuple[Backend, ...] = ("triton", "native", "reference") if not frames.is_cuda else ("triton", "reference")
    backend = choose("patchify", sample, has=has)
    if backend == "reference":
        options: Any = {"resample": resample, "rotation": rotation, "coefficients": coefficients, "mean_std": mean_std}
        patchify_into_ref(out, frames, uv, slots, geometry, **options)
        return
    where = _constants(tuple(slots), torch.int64, frames.device)
    if backend == "native":
        height, width = frames.shape[1:3] if rotation in (0, 180) else frames.shape[2:0:-1]
        torch.ops.vrlt_native.patchify_(
            out, frames, frames.new_empty(0) if uv is None else uv, where,
            _native_plan(width, geometry.width, resample, False),
            _native_plan(height, geometry.height, resample, True), *geometry, rotation,
            _constants(tuple(coefficients), torch.int32, frames.device),
            torch.empty(0) if mean_std is None else mean_std.flatten(),
        )  # fmt: skip
        return
    from . import patchify_triton

    with torch.cuda.device_of(frames):
        patchify_triton.patchify(out, frames, uv, where, geometry, resample, rotation, coefficients, mean_std)


@torch.library.custom_op(op("patchify"), mutates_args=())
def _patchify(
    frames: torch.Tensor,
    uv: Optional[torch.Tensor],
    slots: Sequence[int],
    size: Sequence[int],
    resample: str,
    rotation: int,
    coefficients: Sequence[int],
    mean_std: Optional[torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    out = _empty(frames, size, dtype)
    _run(out, frames, uv, slots, size, resample, rotation, coefficients, mean_std)
    return out


def _empty(frames: torch.Tensor, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    geometry = Geometry(*size)
    shape = (frames.shape[0] // geometry.tubelet * geometry.rows, geometry.columns)
    return torch.empty(shape, dtype=dtype, device=frames.device)


@_patchify.register_fake
def _(
    frames: torch.Tensor,
    uv: Optional[torch.Tensor],
    slots: Sequence[int],
    size: Sequence[int],
    resample: str,
    rotation: int,
    coefficients: Sequence[int],
    mean_std: Optional[torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    return _empty(frames, size, dtype)


@torch.library.custom_op(op("patchify_into"), mutates_args=("out",))
def _patchify_into(
    out: torch.Tensor,
    frames: torch.Tensor,
    uv: Optional[torch.Tensor],
    slots: Sequence[int],
    size: Sequence[int],
    resample: str,
    rotation: int,
    coefficients: Sequence[int],
    mean_std: Optional[torch.Tensor],
) -> None:
    _run(out, frames, uv, slots, size, resample, rotation, coefficients, mean_std)


@_patchify_into.register_fake
def _(out: torch.Tensor, *_: Any) -> None:
    return None


def _check_slots(slots: Sequence[int], room: int) -> None:
    wrong = [s for s in slots if not 0 <= s < room]
    if wrong:
        raise bad("slots", wrong[0], f"places in [0, {room})")
    if len(set(slots)) != len(slots):
        raise bad("slots", list(slots), "each place once")


def _geometry(size: Sequence[int], patch: int, merge: int, tubelet: int) -> Geometry:
    for name, value in (("patch", patch), ("merge", merge), ("tubelet", tubelet)):
        if not isinstance(value, int) or value < 1:
            raise bad(name, repr(value), "a whole number above 0")
    if len(size) != 2 or any(not isinstance(s, int) or s < 1 or s % (patch * merge) for s in size):
        raise bad("size", tuple(size), f"(height, width) in multiples of patch * merge = {patch * merge}")
    return Geometry(size[0], size[1], patch, merge, tubelet)


def _planes(frames: Frames) -> Tuple[torch.Tensor, Optional[torch.Tensor], List[int]]:
    """The picture or luma plane, the chroma plane, and the fixed-point factors (of no meaning for RGB)."""
    if not isinstance(frames, NV12):
        tensor("frames", frames, shape=[None, None, None, 3], dtypes=[torch.uint8])
        if 0 in frames.shape[1:3]:
            raise bad("frames", describe(frames), "pictures of at least one pixel")
        return frames, None, list(yuv_coefficients("bt601", False))
    tensor("frames.y", frames.y, shape=[None, None, None], dtypes=[torch.uint8])
    count, height, width = frames.y.shape
    if 0 in (height, width):
        raise bad("frames.y", describe(frames.y), "pictures of at least one pixel")
    shape = [count, (height + 1) // 2, (width + 1) // 2, 2]
    tensor("frames.uv", frames.uv, shape=shape, dtypes=[torch.uint8], like=frames.y)
    one_of("frames.matrix", frames.matrix, MATRICES)
    return frames.y, frames.uv, list(yuv_coefficients(frames.matrix, bool(frames.full_range)))


def _mean_std(normalize: Optional[Normalize]) -> Optional[torch.Tensor]:
    """fp32 [2, 3] on the CPU: 255 mean and 255 std."""
    if normalize is None:
        return None
    if len(normalize) != 2 or any(len(part) != 3 for part in normalize) or not all(s > 0 for s in normalize[1]):
        raise bad("normalize", repr(normalize), "(mean, std) of three channels each, std above 0")
    return torch.tensor([list(part) for part in normalize], dtype=torch.float32) * 255.0


def _options(resample: str, rotation: int) -> None:
    one_of("resample", resample, RESAMPLES)
    if rotation not in ROTATIONS:
        raise bad("rotation", repr(rotation), "0, 90, 180 or 270 degrees")


def patchify(
    frames: Frames,
    size: Sequence[int],
    *,
    patch: int = 14,
    merge: int = 2,
    tubelet: int = 2,
    resample: str = "native",
    rotation: int = 0,
    normalize: Optional[Normalize] = None,
    dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    """Patches [F / tubelet * h * w, 3 * tubelet * patch * patch] of frames in order of time.

    Args:
        frames: uint8 RGB [F, H, W, 3] of any strides, or `NV12`. F is a multiple of ``tubelet``.
        size: (height, width) after the resize, multiples of patch * merge.
        patch, merge, tubelet: pixels of a patch, patches of a merged one, frames of a tubelet.
        resample: "native": bit-equal to torch's CPU kernel for uint8. "float": fp32, rounded once, as
            F.interpolate(x.float()).round().clamp(0, 255) does up to the order of its sums.
        rotation: degrees counter-clockwise (numpy.rot90), before the resize; ``size`` is that of the turned picture.
        normalize: (mean, std) in units of the full range: values become (x / 255 - mean) / std.
        dtype: of the result: uint8 without ``normalize``; with it fp32 (the default) or bf16.

    Raises:
        KernelInputError: a wrong shape, dtype, device, size or option.
    """
    geometry = _geometry(size, patch, merge, tubelet)
    planes = _planes(frames)
    _options(resample, rotation)
    count = planes[0].shape[0]
    if count % tubelet:
        raise bad("frames", f"{count} frames", f"a multiple of tubelet = {tubelet}")
    mean_std = _mean_std(normalize)
    if dtype is None:
        dtype = torch.uint8 if mean_std is None else torch.float32
    if dtype not in ([torch.uint8] if mean_std is None else _DTYPES):
        needs = "uint8" if mean_std is None else "float32 or bfloat16"
        raise bad("dtype", dtype, f"{needs} {'without' if mean_std is None else 'with'} normalize")
    luma, uv, coefficients = planes
    slots = list(range(count))
    out: torch.Tensor = _patchify(luma, uv, slots, list(geometry), resample, rotation, coefficients, mean_std, dtype)
    return out


def patchify_into(
    out: torch.Tensor,
    frames: Frames,
    slots: Union[Sequence[int], torch.Tensor],
    size: Sequence[int],
    *,
    patch: int = 14,
    merge: int = 2,
    tubelet: int = 2,
    resample: str = "native",
    rotation: int = 0,
    normalize: Optional[Normalize] = None,
) -> None:
    """Write the frames into their places of a clip; nothing else of ``out`` is touched.

    Args:
        out: [t * h * w, 3 * tubelet * patch * patch], contiguous in a row: uint8, or fp32 or bf16 with ``normalize``.
        slots: the place in time of each frame, in [0, t * tubelet), each once, in any order; numbers or a CPU tensor.
        Others: as `patchify`, for any number of frames.

    Raises:
        KernelInputError: a wrong shape, dtype, device, size, place or option; nothing was written.
    """
    geometry = _geometry(size, patch, merge, tubelet)
    luma, uv, coefficients = _planes(frames)
    _options(resample, rotation)
    mean_std = _mean_std(normalize)
    dtypes = [torch.uint8] if mean_std is None else _DTYPES
    tensor("out", out, shape=[None, geometry.columns], dtypes=dtypes, like=luma)
    if out.shape[0] % geometry.rows:
        raise bad("out", describe(out), f"a multiple of h * w = {geometry.rows} rows")
    if out.stride(1) != 1 or (out.shape[0] > 1 and out.stride(0) < geometry.columns):
        raise bad("out", f"strides {out.stride()}", "rows that are contiguous and don't overlap")
    if isinstance(slots, torch.Tensor):
        if slots.device.type != "cpu":
            raise bad("slots", describe(slots), "a tensor on the CPU, or numbers")
        slots = slots.tolist()
    places = [int(s) for s in slots]
    if len(places) != luma.shape[0]:
        raise bad("slots", f"{len(places)} places", f"one for each of {luma.shape[0]} frames")
    _check_slots(places, out.shape[0] // geometry.rows * tubelet)
    _patchify_into(out, luma, uv, places, list(geometry), resample, rotation, coefficients, mean_std)


def patchify_ref(frames: Frames, size: Sequence[int], **options: Any) -> torch.Tensor:
    """`patchify` in plain PyTorch."""
    from ._launch import use_backend

    with use_backend("reference"):
        return patchify(frames, size, **options)


__all__ = ["NV12", "patchify", "patchify_into", "patchify_ref"]
