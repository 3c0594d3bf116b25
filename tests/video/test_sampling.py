"""Frame choice against a literal transcription of qwen-vl-utils, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vrlt_fast.config import VideoConfig
from vrlt_fast.video.sampling import sample_frames


def reference_frames(total_frames: int, video_fps: float, ele: dict[str, float]) -> list[int]:
    """qwen-vl-utils 0.0.14, smart_nframes and the linspace of its readers, word for word."""

    def round_by_factor(number, factor):
        return round(number / factor) * factor

    def ceil_by_factor(number, factor):
        return math.ceil(number / factor) * factor

    def floor_by_factor(number, factor):
        return math.floor(number / factor) * factor

    fps = ele.get("fps", 2.0)
    min_frames = ceil_by_factor(ele.get("min_frames", 4), 2)
    max_frames = floor_by_factor(ele.get("max_frames", min(768, total_frames)), 2)
    nframes = total_frames / video_fps * fps
    nframes = min(min(max(nframes, min_frames), max_frames), total_frames)
    nframes = floor_by_factor(nframes, 2)
    if not (nframes >= 2 and nframes <= total_frames):
        raise ValueError
    return torch.linspace(0, total_frames - 1, nframes).round().long().tolist()


@given(
    total=st.integers(2, 5000),
    video_fps=st.floats(1.0, 120.0),
    fps=st.floats(0.1, 30.0),
    low=st.integers(2, 40),
    extra=st.integers(0, 200),
)
def test_qwen_utils(total, video_fps, fps, low, extra):
    limits = {"fps": fps, "min_frames": low, "max_frames": low + low % 2 + extra}
    ours = sample_frames(total, video_fps, VideoConfig(sampling="qwen_utils", **limits))
    assert ours == reference_frames(total, video_fps, limits)


@pytest.mark.parametrize("sampling", ["qwen_utils", "fps", "uniform"])
def test_one_frame_is_repeated(sampling):
    chosen = sample_frames(1, 1.0, VideoConfig(sampling=sampling, max_frames=4))
    assert set(chosen) == {0}
    assert len(chosen) == (4 if sampling == "uniform" else 2)


@given(total=st.integers(1, 3000), most=st.integers(2, 129))
def test_uniform_has_a_fixed_count(total, most):
    chosen = sample_frames(total, 25.0, VideoConfig(sampling="uniform", min_frames=2, max_frames=most))
    assert len(chosen) == most // 2 * 2
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (0, total - 1)


@pytest.mark.parametrize(
    ("total", "video_fps", "fps", "expected"),
    [
        (16, 8.0, 2.0, [0, 4, 8, 12]),
        (16, 8.0, 4.0, [0, 2, 4, 6, 8, 10, 12, 14]),
        (75, 30.0, 4.0, [0, 8, 15, 22, 30, 38, 45, 52, 60, 68]),
        (60, 23.976, 2.0, [0, 12, 24, 36]),
        (20, 8.0, 2.0, [0, 4, 8, 12]),  # 2.5 s: a fifth frame would have no partner
        (8, 8.0, 2.0, [0, 2, 5, 7]),  # too short for min_frames: spread as qwen_utils does
    ],
)
def test_fps_takes_exact_multiples(total, video_fps, fps, expected):
    assert sample_frames(total, video_fps, VideoConfig(sampling="fps", fps=fps, min_frames=4)) == expected


@given(total=st.integers(1, 3000), video_fps=st.floats(0.5, 240.0), fps=st.floats(0.1, 240.0))
def test_every_policy_gives_pairs_of_existing_frames_in_order(total, video_fps, fps):
    for sampling in ("qwen_utils", "fps", "uniform"):
        video = VideoConfig(sampling=sampling, fps=fps, max_frames=32)
        chosen = sample_frames(total, video_fps, video)
        assert len(chosen) % 2 == 0
        assert 2 <= len(chosen) <= 32
        assert chosen == sorted(chosen)
        assert set(chosen) <= set(range(total))
