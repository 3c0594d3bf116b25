"""Named policies that choose frames. All return an even number of frames, in order."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from vrlt_fast.config import VideoConfig

TUBELET = 2
"""Frames that one temporal patch of a Qwen-VL tower covers."""


def _spread(n_frames: int, count: int) -> list[int]:
    return [int(i) for i in np.linspace(0, n_frames - 1, count).round()]


def qwen_utils(n_frames: int, fps: float, video: VideoConfig) -> list[int]:
    """qwen-vl-utils' smart_nframes and linspace: ``video.fps`` frames a second, first and last frame included.

    Short videos keep at least two frames; a one-frame video repeats it, as the towers need pairs.
    """
    low = math.ceil(video.min_frames / TUBELET) * TUBELET
    high = min(video.max_frames, n_frames) // TUBELET * TUBELET
    count = min(max(n_frames / fps * video.fps, low), high, n_frames)
    return _spread(n_frames, max(int(count) // TUBELET * TUBELET, TUBELET))


def uniform(n_frames: int, fps: float, video: VideoConfig) -> list[int]:
    """Always ``video.max_frames`` frames, evenly spread; frames repeat where the video is shorter."""
    return _spread(n_frames, video.max_frames // TUBELET * TUBELET)


def every(n_frames: int, fps: float, video: VideoConfig) -> list[int]:
    """The frames nearest to multiples of ``1 / video.fps`` seconds; falls back to an even spread above
    ``max_frames``.
    """
    count = int(n_frames / fps * video.fps + 1e-6) // TUBELET * TUBELET
    if not video.min_frames <= count <= video.max_frames:
        return qwen_utils(n_frames, fps, video)
    return [min(round(i * fps / video.fps), n_frames - 1) for i in range(count)]


POLICIES: dict[str, Callable[[int, float, VideoConfig], list[int]]] = {
    "qwen_utils": qwen_utils,
    "fps": every,
    "uniform": uniform,
}


def sample_frames(n_frames: int, fps: float, video: VideoConfig) -> list[int]:
    """Frame numbers of a video with ``n_frames`` frames at ``fps``, by the policy ``video.sampling``."""
    return POLICIES[video.sampling](n_frames, fps, video)


def seconds_per_grid(n_frames: int, fps: float, sampled: int) -> float:
    """Seconds from one frame pair to the next as Qwen2.5-VL's release code counts them: 2 over the mean rate of the
    sampled frames.
    """
    return TUBELET * n_frames / fps / sampled
