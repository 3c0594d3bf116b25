"""Named policies that choose frames, equal to their originals.

The original samplers of the Qwen-VL family disagree with each other (whether the last frame is taken, how counts are
rounded), and all of them take a frame's time to be its number over the mean frame rate. A policy here is a pure
function of what the index says and of :class:`SampleSettings`; where the original raises or points beyond the video's
end, the nearest choice that exists is taken instead. Where a policy gives an odd number, the last frame is repeated, as
the towers need pairs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch

from vrlt_fast.config import VideoConfig
from vrlt_fast.video.index import VideoIndex

TUBELET = 2
"""Frames that one temporal patch of a Qwen-VL tower covers."""

_PLAIN_RATE = 1001  # denominators of the usual frame rates are no larger


@dataclass(frozen=True)
class SampleSettings:
    """How frames are chosen.

    Args:
        policy: a name of ``POLICIES``.
        fps: frames per second of video.
        min_frames, max_frames: bounds of their number.
        num_frames: their number, whatever the duration; None: by ``fps``. Policies that have neither ignore it.
        frames: for ``explicit``: the frame numbers.
        seed: for ``jitter``.
        times: what a frame's time is: ``index`` its number over the mean frame rate, as the originals have it;
            ``pts`` its presentation time since the first frame.
    """

    policy: str = "qwen_utils"
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    num_frames: int | None = None
    frames: tuple[int, ...] = ()
    seed: int = 0
    times: Literal["index", "pts"] = "pts"


@dataclass(frozen=True)
class Source:
    """What policies need to know of a video; ``keyframes`` are frame numbers in presentation order, ascending."""

    n_frames: int
    fps: float
    keyframes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Choice:
    """Frames of one video.

    ``frames``: their numbers, an even count; ``sampled``: how many before the last one was repeated for a pair
    (Qwen3-VL's target size counts these); ``times``: seconds of each; ``seconds_per_grid``: as
    :func:`seconds_per_grid`.
    """

    frames: tuple[int, ...]
    sampled: int
    times: tuple[float, ...]
    seconds_per_grid: float


def _down(count: float) -> int:
    return math.floor(count / TUBELET) * TUBELET


def _spread(n_frames: int, count: int) -> list[int]:
    # torch, as qwen-vl-utils: its float32 steps round differently from numpy's on long videos.
    found: list[int] = torch.linspace(0, n_frames - 1, count).round().long().tolist()
    return found


def qwen_utils(source: Source, s: SampleSettings) -> list[int]:
    """qwen-vl-utils' smart_nframes and linspace: first and last frame included.

    A video of one frame, which the original refuses, repeats it.
    """
    n = source.n_frames
    if s.num_frames is not None:
        count: float = min(round(s.num_frames / TUBELET) * TUBELET, n)
    else:
        low = math.ceil(s.min_frames / TUBELET) * TUBELET
        count = min(max(n / source.fps * s.fps, low), _down(min(s.max_frames, n)), n)
    return _spread(n, max(_down(count), TUBELET))


def hf_qwen2(source: Source, s: SampleSettings) -> list[int]:
    """transformers' Qwen2VLVideoProcessor (Qwen2-VL, Qwen2.5-VL): even steps from the first frame, never the last one.

    On one count in 25 the original's steps give one frame more, which lies beyond the end; it is left out here.
    """
    n = source.n_frames
    if s.num_frames is not None:
        count = min(round(s.num_frames / TUBELET) * TUBELET, _down(n))
    else:
        most = _down(min(s.max_frames, n))
        count = _down(min(max(n / source.fps * s.fps, s.min_frames), most, n))
    if count < TUBELET:
        return [0] * TUBELET
    found: list[int] = torch.arange(0, n, n / count).int()[:count].tolist()
    return found


def hf_qwen3(source: Source, s: SampleSettings) -> list[int]:
    """transformers' Qwen3VLVideoProcessor: linspace in float64, odd counts too."""
    n = source.n_frames
    count = s.num_frames
    if count is None:
        count = min(max(int(n / source.fps * s.fps), s.min_frames), s.max_frames, n)
    return [int(i) for i in np.linspace(0, n - 1, max(count, 1)).round()]


def uniform(source: Source, s: SampleSettings) -> list[int]:
    """Always ``num_frames``, else ``max_frames`` frames, evenly spread; they repeat where the video is shorter."""
    return _spread(source.n_frames, max(_down(s.num_frames or s.max_frames), TUBELET))


def every(source: Source, s: SampleSettings) -> list[int]:
    """The frames nearest to multiples of ``1 / fps`` seconds; beyond the bounds of their number as ``qwen_utils``."""
    n = source.n_frames
    count = _down(n / source.fps * s.fps + 1e-6)
    if s.num_frames is not None or not s.min_frames <= count <= s.max_frames:
        return qwen_utils(source, s)
    return [min(round(i * source.fps / s.fps), n - 1) for i in range(count)]


def keyframe(source: Source, s: SampleSettings) -> list[int]:
    """The keyframes nearest to the frames of ``qwen_utils``, each once: every frame decodes on its own.

    There may be fewer than ``min_frames``. Their times are presentation times whatever ``times`` says.
    """
    asked = np.array(qwen_utils(source, s))
    keys = np.array(source.keyframes or (0,))
    right = np.searchsorted(keys, asked).clip(0, len(keys) - 1)
    left = (right - 1).clip(0)
    nearest = np.where(asked - keys[left] <= keys[right] - asked, keys[left], keys[right])
    return [int(i) for i in np.unique(nearest)]


def explicit(source: Source, s: SampleSettings) -> list[int]:
    """``frames`` as they are. Numbers that the video doesn't have are found by whoever decodes (VRLT-V05).

    Raises:
        ValueError: there are none.
    """
    if not s.frames:
        raise ValueError("the policy 'explicit' needs frame numbers")
    return list(s.frames)


def jitter(source: Source, s: SampleSettings) -> list[int]:
    """As many as ``qwen_utils``; one frame drawn evenly from each of as many equal segments, the same for equal seed,
    count and length on every machine.
    """
    n, count = source.n_frames, len(qwen_utils(source, s))
    return [min(int((i + _unit(s.seed, n, i)) * n / count), n - 1) for i in range(count)]


def _unit(*key: int) -> float:
    """A number in [0, 1) by hashing: stable over machines and versions of libraries, unlike generators."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


POLICIES: dict[str, Callable[[Source, SampleSettings], list[int]]] = {
    "qwen_utils": qwen_utils,
    "hf_qwen2": hf_qwen2,
    "hf_qwen3": hf_qwen3,
    "uniform": uniform,
    "fps": every,
    "keyframe": keyframe,
    "explicit": explicit,
    "jitter": jitter,
}


def settings_of(video: VideoConfig) -> SampleSettings:
    """The settings of a configuration; what it has no key for stays at its default."""
    return SampleSettings(video.sampling, video.fps, video.min_frames, video.max_frames, times=video.times)


def sample_frames(n_frames: int, fps: float, video: VideoConfig) -> list[int]:
    """Frame numbers of a video with ``n_frames`` frames at ``fps``, by the policy ``video.sampling``.

    For policies that need no keyframes; :func:`choose` is for all.
    """
    return _pairs(POLICIES[video.sampling](Source(n_frames, fps), settings_of(video)))


def choose(index: VideoIndex, settings: SampleSettings) -> Choice:
    """The frames of a video, and their times.

    Raises:
        ValueError: ``explicit`` without frames.
    """
    fps = frame_rate(index)
    sampled = POLICIES[settings.policy](Source(index.n_frames, fps, keyframes(index)), settings)
    frames = _pairs(sampled)
    times = frame_times(index, frames, "pts" if settings.policy == "keyframe" else settings.times)
    return Choice(tuple(frames), len(sampled), times, seconds_per_grid(index.n_frames, fps, len(frames)))


def _pairs(frames: list[int]) -> list[int]:
    return frames + frames[-1:] if len(frames) % TUBELET else frames


def keyframes(index: VideoIndex) -> tuple[int, ...]:
    """Presentation-order numbers of the frames at which decoding can start, ascending."""
    packets = index.packets
    return tuple(int(i) for i in np.unique(np.searchsorted(index.ticks, packets.ticks[packets.key & packets.shown])))


def frame_times(index: VideoIndex, frames: Sequence[int], mode: Literal["index", "pts"]) -> tuple[float, ...]:
    """Seconds of each frame; see :class:`SampleSettings`. Numbers beyond the end have the last frame's time."""
    if mode == "index":
        fps = frame_rate(index)
        return tuple(i / fps for i in frames)
    last = index.n_frames - 1
    return tuple(float(index.times[min(max(i, 0), last)]) for i in frames)


def frame_rate(index: VideoIndex) -> float:
    """Mean frames per second, as plain a number as the ticks allow; 1.0 for a single frame.

    Counts are rounded down from ``n_frames / fps * rate``: 29.9998 in place of 30, from a container that keeps
    milliseconds, would cost a frame pair that the original samplers take.
    """
    n, base = index.n_frames, index.time_base
    span = int(index.ticks[-1] - index.ticks[0]) if n > 1 else 0
    if span <= 0 or not base:
        return index.fps
    mean = Fraction(n - 1, span) / base
    if mean.denominator <= _PLAIN_RATE or span == 1:
        return float(mean)
    return float(_simplest(Fraction(n - 1, span + 1) / base, Fraction(n - 1, span - 1) / base))


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """The fraction of the smallest denominator between two positive ones."""
    whole = math.ceil(low)
    if whole <= high:
        return Fraction(whole)
    below = whole - 1
    return below + 1 / _simplest(1 / (high - below), 1 / (low - below))


def seconds_per_grid(n_frames: int, fps: float, sampled: int) -> float:
    """Seconds from one frame pair to the next as Qwen2.5-VL's release code counts them: 2 over the mean rate of the
    sampled frames.
    """
    return TUBELET * n_frames / fps / sampled
