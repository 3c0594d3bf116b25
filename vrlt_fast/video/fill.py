"""Pictures into the places of their patches, one at a time, so that a clip is never held at its source's size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

import vrlt_kernels
from vrlt_fast.video.index import video_error
from vrlt_fast.video.preprocess import Geometry
from vrlt_fast.video.sampling import TUBELET

Picture = torch.Tensor | vrlt_kernels.NV12


@cache
def _compiled() -> bool:
    return not vrlt_kernels.availability("cpu")["native"]


def grid_of(count: int, size: tuple[int, int], geometry: Geometry) -> tuple[int, int, int]:
    """(t, h, w) in patches of ``count`` frames, resized to ``size`` = (height, width).

    Raises:
        ValueError: an odd number of frames, or a side that is no multiple of ``geometry.factor``.
    """
    if count < 1 or count % TUBELET or min(size) < 1 or any(side % geometry.factor for side in size):
        raise ValueError(f"{count} frames of {size[0]} x {size[1]}: needs pairs, and multiples of {geometry.factor}")
    return count // TUBELET, size[0] // geometry.patch, size[1] // geometry.patch


def patch_shape(grid: tuple[int, int, int], geometry: Geometry) -> tuple[int, int]:
    return math.prod(grid), 3 * TUBELET * geometry.patch**2


def same_size(path: Path, one: Sequence[int], other: Sequence[int]) -> None:
    """Hold two pictures of a file to the same (height, width).

    Raises:
        VideoError: V06.
    """
    if tuple(one) != tuple(other):
        why = " and ".join(f"{width} x {height}" for height, width in sorted((tuple(one), tuple(other))))
        raise video_error("VRLT-V06", path, "the frame size changes within the video", why)


class PatchSink:
    """Takes pictures uint8 [H, W, 3], resizes them and writes their patches.

    Args:
        out: uint8 [t * h * w, 3 * 2 * patch * patch], in the layout of ``preprocess.patchify``; may be shared memory.
        slots: for each frame number its places in time, 0 to 2 t - 1.
        size: (height, width) after the resize.
    """

    def __init__(
        self,
        out: torch.Tensor,
        slots: Mapping[int, Sequence[int]],
        size: tuple[int, int],
        geometry: Geometry,
        path: Path,
    ):
        self.out, self.slots, self.size, self.geometry, self.path = out, slots, size, geometry, path
        self.shape: tuple[int, int] | None = None
        rows = size[0] // geometry.patch * (size[1] // geometry.patch)
        self._pictures = out.view(-1, rows, 3, TUBELET, geometry.patch**2)

    def expect(self, shape: tuple[int, int]) -> None:
        """Note the source's (height, width).

        Raises:
            VideoError: V06 when it was another one before.
        """
        same_size(self.path, self.shape or shape, shape)
        self.shape = shape

    def __call__(self, number: int, picture: Picture) -> None:
        """Write a picture to all its places: uint8 [H, W, 3] on the device of ``out``, or NV12 planes of one frame."""
        luma = picture if isinstance(picture, torch.Tensor) else picture.y[0]
        self.expect((luma.shape[0], luma.shape[1]))
        first, *others = self.slots[number]
        if isinstance(picture, torch.Tensor) and not (picture.is_cuda or _compiled()):
            self._write(first, picture)
        else:
            frames = picture[None] if isinstance(picture, torch.Tensor) else picture
            patch, merge = self.geometry.patch, self.geometry.merge
            vrlt_kernels.patchify_into(self.out, frames, [first], self.size, patch=patch, merge=merge, tubelet=TUBELET)
        places = self._pictures
        for other in others:
            places[other // TUBELET, :, :, other % TUBELET] = places[first // TUBELET, :, :, first % TUBELET]

    def _write(self, slot: int, picture: torch.Tensor) -> None:
        """The same by torch's own operators, which are faster than the reference of ``vrlt_kernels``."""
        (height, width), p, m = self.size, self.geometry.patch, self.geometry.merge
        x = picture.permute(2, 0, 1)[None]
        if x.shape[-2:] != (height, width):
            x = F.interpolate(x, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
        x = x.reshape(3, height // p // m, m, p, width // p // m, m, p).permute(1, 4, 2, 5, 0, 3, 6)
        self._pictures[slot // TUBELET, :, :, slot % TUBELET] = x.reshape(-1, 3, p * p)
