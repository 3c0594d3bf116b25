"""RGB frames to uint8 patches in the layout of the Qwen-VL towers, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from vrlt_fast.errors import Problem, VideoError
from vrlt_fast.video.sampling import TUBELET


@dataclass(frozen=True)
class Geometry:
    """What the tower fixes: patch side in pixels and how many patches a side are merged to one token."""

    patch: int = 14
    merge: int = 2

    @property
    def factor(self) -> int:
        return self.patch * self.merge


@dataclass(frozen=True)
class Clip:
    """A decoded video, or an image as a video of one frame pair, as the tower takes it.

    ``patches`` uint8 [t * h * w, 3 * 2 * patch * patch], ``grid`` (t, h, w) in patches, ``times`` the presentation
    time in seconds of each of the 2 t frames, ``seconds_per_grid`` the seconds between temporal grids as positions
    count them, ``key`` names content and preprocessing (equal keys, equal patches). An image has grid (1, h, w), its
    picture for both frames, and no times that mean anything. A clip that processes share has ``cuts``, the first frame
    pair of each and the end; its ``patches`` are those of this process's pairs alone.
    """

    patches: torch.Tensor
    grid: tuple[int, int, int]
    times: tuple[float, ...]
    seconds_per_grid: float
    key: str
    geometry: Geometry
    kind: Literal["video", "image"] = "video"
    cuts: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.patches.numel()

    @property
    def n_tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w // self.geometry.merge**2

    @property
    def grid_times(self) -> tuple[float, ...]:
        """Mean time of the two frames of each temporal grid, in seconds."""
        return tuple((a + b) / 2 for a, b in zip(self.times[::2], self.times[1::2], strict=True))

    def frames(self) -> torch.Tensor:
        """The resized pictures exactly, uint8 [2 t, 3, H, W]."""
        (t, h, w), p, m = self.grid, self.geometry.patch, self.geometry.merge
        x = self.patches.view(t, h // m, w // m, m, m, 3, TUBELET, p, p)
        return x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * TUBELET, 3, h * p, w * p)


def smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Qwen2-VL's target size: sides are multiples of ``factor``, the area lies within the bounds, the aspect is kept.

    qwen-vl-utils' rule; a side that it would round to 0 stays at ``factor``, as transformers has it.

    Raises:
        ValueError: the aspect ratio is above 200.
    """
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"aspect ratio of {width} x {height} is above 200")
    h = max(factor, round(height / factor) * factor)
    w = max(factor, round(width / factor) * factor)
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / beta / factor) * factor)
        w = max(factor, math.floor(width / beta / factor) * factor)
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * beta / factor) * factor
        w = math.ceil(width * beta / factor) * factor
    return h, w


def smart_resize_clip(
    n_frames: int, height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Qwen3-VL's target size: as :func:`smart_resize` with bounds on the pixels of all frames together; sides below
    ``factor`` are scaled up first.

    Raises:
        ValueError: the aspect ratio is above 200, or there are fewer than two frames.
    """
    if n_frames < TUBELET:
        raise ValueError(f"{n_frames} frames, fewer than the {TUBELET} of a temporal patch")
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"aspect ratio of {width} x {height} is above 200")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    t = round(n_frames / TUBELET) * TUBELET
    if t * h * w > max_pixels:
        beta = math.sqrt(n_frames * height * width / max_pixels)
        h = max(factor, math.floor(height / beta / factor) * factor)
        w = max(factor, math.floor(width / beta / factor) * factor)
    elif t * h * w < min_pixels:
        beta = math.sqrt(min_pixels / (n_frames * height * width))
        h = math.ceil(height * beta / factor) * factor
        w = math.ceil(width * beta / factor) * factor
    return h, w


@dataclass(frozen=True)
class SizeRule:
    """The target size of a clip's frames, as the originals have it.

    Args:
        family: ``qwen2``: Qwen2-VL and Qwen2.5-VL, and qwen-vl-utils for all models: bounds of one frame.
            ``qwen3``: transformers' Qwen3VLVideoProcessor: bounds of the clip.
        min_pixels: least pixels of a frame; with ``qwen3`` of the clip (``size["shortest_edge"]``).
        max_pixels: most pixels of a frame; None with ``qwen3``: as transformers without ``cap_pixels_per_frame``.
        total_pixels: most pixels of the clip: qwen-vl-utils' ``total_pixels``, of which two frames take one share, and
            transformers' ``size["longest_edge"]`` with ``qwen3``. None: no such bound.
    """

    family: Literal["qwen2", "qwen3"]
    min_pixels: int
    max_pixels: int | None
    total_pixels: int | None = None

    def __post_init__(self) -> None:
        needed = "max_pixels" if self.family == "qwen2" else "total_pixels"
        if getattr(self, needed) is None:
            raise ValueError(f"the size rule {self.family!r} needs {needed}")

    def size(self, n_frames: int, height: int, width: int, factor: int) -> tuple[int, int]:
        """Height and width for ``n_frames`` frames (before one is repeated for a pair) of upright pictures.

        Raises:
            ValueError: see :func:`smart_resize` and :func:`smart_resize_clip`.
        """
        least = int(self.min_pixels * 1.05)
        if self.family == "qwen2":
            most: float = self.max_pixels or 0
            if self.total_pixels is not None:
                most = min(most, max(min(most, self.total_pixels / n_frames * TUBELET), least))
            return smart_resize(height, width, factor, self.min_pixels, most)
        total = self.total_pixels or 0
        if self.max_pixels is not None:
            total = max(min(self.max_pixels, total // n_frames), least) * n_frames
        return smart_resize_clip(n_frames, height, width, factor, self.min_pixels, total)


def patchify(frames: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Cut pictures uint8 [2 t, 3, H, W] into patches [t h w, 3 * 2 * p * p]; merged patches are neighbours."""
    n, _, height, width = frames.shape
    p, m = geometry.patch, geometry.merge
    t, h, w = n // TUBELET, height // p, width // p
    x = frames.reshape(t, TUBELET, 3, h // m, m, p, w // m, m, p)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * h * w, 3 * TUBELET * p * p).contiguous(), (t, h, w)


def resize(frames: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Antialiased bicubic resize of uint8 [F, H, W, 3] by torch's native uint8 kernel, to uint8 [F, 3, height,
    width].
    """
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    if x.shape[-2:] == (height, width):
        return x
    return F.interpolate(x, size=(height, width), mode="bicubic", antialias=True, align_corners=False)


def to_clip(
    frames: np.ndarray,
    times: tuple[float, ...],
    *,
    seconds_per_grid: float,
    geometry: Geometry,
    min_pixels: int,
    max_pixels: int,
    key: str,
    where: str = "",
) -> Clip:
    """Resize and patchify uint8 [F, H, W, 3] (F even).

    Raises:
        VideoError: V06 when the aspect ratio can't be handled.
    """
    try:
        height, width = smart_resize(frames.shape[1], frames.shape[2], geometry.factor, min_pixels, max_pixels)
    except ValueError as error:
        raise VideoError(
            Problem("VRLT-V06", "frames can't be resized", where, str(error), "crop the video, or remove its lines")
        ) from None
    patches, grid = patchify(resize(frames, height, width), geometry)
    return Clip(patches, grid, times, seconds_per_grid, key, geometry)
