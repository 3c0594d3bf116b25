"""Frame choice against the originals: frozen vectors, their code where it can be imported, transcriptions, by hand."""

from __future__ import annotations

import math
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vrlt_fast.config import VideoConfig
from vrlt_fast.video.index import Packets, VideoIndex
from vrlt_fast.video.sampling import (
    POLICIES,
    SampleSettings,
    Source,
    choose,
    frame_rate,
    keyframes,
    sample_frames,
)


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
    total=st.integers(2, 60_000),
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
    index = make_index(np.arange(total) * 1000, Fraction(1 / (video_fps * 1000)))
    for policy in sorted(POLICIES.keys() - {"explicit"}):
        chosen = list(choose(index, SampleSettings(policy, fps, max_frames=32)).frames)
        assert len(chosen) % 2 == 0
        assert 2 <= len(chosen) <= 32
        assert chosen == sorted(chosen)
        assert set(chosen) <= set(range(total))


FROZEN = [
    ("qwen_utils", 16, 8.0, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 4, [0, 5, 10, 15]),
    ("qwen_utils", 75, 30.0, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 4, [0, 25, 49, 74]),
    ("qwen_utils", 132, 25.0, {"fps": 1.0, "min_frames": 4, "max_frames": 768}, 4, [0, 44, 87, 131]),
    ("qwen_utils", 37, 23.976, {"fps": 3.0, "min_frames": 5, "max_frames": 9}, 6, [0, 7, 14, 22, 29, 36]),
    ("qwen_utils", 5, 10.0, {"fps": 2.0, "min_frames": 4, "max_frames": 64}, 4, [0, 1, 3, 4]),
    ("qwen_utils", 1800, 30.0, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 120, 3920921455),
    ("qwen_utils", 1801, 29.97002997002997, {"fps": 2.0, "min_frames": 4, "max_frames": 64}, 64, 3334234769),
    ("qwen_utils", 12000, 30.0, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 768, 1370430434),
    ("qwen_utils", 55937, 29.97, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 768, 1571366070),
    ("qwen_utils", 108000, 60.0, {"fps": 4.0, "min_frames": 4, "max_frames": 512}, 512, 2978395955),
    ("qwen_utils", 300, 25.0, {"num_frames": 32}, 32, 2891041155),
    ("qwen_utils", 300, 25.0, {"num_frames": 13}, 12, [0, 27, 54, 82, 109, 136, 163, 190, 217, 245, 272, 299]),
    ("hf_qwen2", 16, 8.0, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 4, [0, 4, 8, 12]),
    ("hf_qwen2", 75, 30.0, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 4, [0, 18, 37, 56]),
    ("hf_qwen2", 132, 25.0, {"fps": 1.0, "min_frames": 4, "max_frames": 768}, 4, [0, 33, 66, 99]),
    ("hf_qwen2", 37, 23.976, {"fps": 3.0, "min_frames": 5, "max_frames": 9}, 4, [0, 9, 18, 27]),
    ("hf_qwen2", 5, 10.0, {"fps": 2.0, "min_frames": 4, "max_frames": 64}, 4, [0, 1, 2, 3]),
    ("hf_qwen2", 1800, 30.0, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 120, 1937311484),
    ("hf_qwen2", 1801, 29.97002997002997, {"fps": 2.0, "min_frames": 4, "max_frames": 64}, 64, 2672988461),
    ("hf_qwen2", 12000, 30.0, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 768, 455063400),
    ("hf_qwen2", 55937, 29.97, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 768, 1626319146),
    ("hf_qwen2", 108000, 60.0, {"fps": 4.0, "min_frames": 4, "max_frames": 512}, 512, 1500306950),
    ("hf_qwen2", 300, 25.0, {"num_frames": 32}, 32, 16838632),
    ("hf_qwen2", 300, 25.0, {"num_frames": 13}, 12, [0, 25, 50, 75, 100, 125, 150, 175, 200, 225, 250, 275]),
    ("hf_qwen3", 16, 8.0, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 4, [0, 5, 10, 15]),
    ("hf_qwen3", 75, 30.0, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 5, [0, 18, 37, 56, 74]),
    ("hf_qwen3", 132, 25.0, {"fps": 1.0, "min_frames": 4, "max_frames": 768}, 5, [0, 33, 66, 98, 131]),
    ("hf_qwen3", 37, 23.976, {"fps": 3.0, "min_frames": 5, "max_frames": 9}, 5, [0, 9, 18, 27, 36]),
    ("hf_qwen3", 5, 10.0, {"fps": 2.0, "min_frames": 4, "max_frames": 64}, 4, [0, 1, 3, 4]),
    ("hf_qwen3", 1800, 30.0, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 120, 3920921455),
    ("hf_qwen3", 1801, 29.97002997002997, {"fps": 2.0, "min_frames": 4, "max_frames": 64}, 64, 3334234769),
    ("hf_qwen3", 12000, 30.0, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 768, 1370430434),
    ("hf_qwen3", 55937, 29.97, {"fps": 2.0, "min_frames": 4, "max_frames": 768}, 768, 2232254498),
    ("hf_qwen3", 108000, 60.0, {"fps": 4.0, "min_frames": 4, "max_frames": 512}, 512, 306077533),
    ("hf_qwen3", 300, 25.0, {"num_frames": 32}, 32, 2891041155),
    ("hf_qwen3", 300, 25.0, {"num_frames": 13}, 13, [0, 25, 50, 75, 100, 125, 150, 174, 199, 224, 249, 274, 299]),
]


@pytest.mark.parametrize(("policy", "total", "fps", "limits", "count", "expected"), FROZEN)
def test_frozen_vectors_of_the_originals(policy, total, fps, limits, count, expected):
    """Made with qwen-vl-utils 0.0.14, transformers 5.23.0, torch 2.13.0 (CRC-32 of little-endian int32 above 16):

    - ``torch.linspace(0, total - 1, smart_nframes(limits, total, fps)).round().long()``, with ``nframes`` for
      ``num_frames``, as ``_read_video_torchcodec`` has it;
    - ``Qwen2VLVideoProcessor().sample_frames(VideoMetadata(total_num_frames=total, fps=fps), **limits)``;
    - ``Qwen3VLVideoProcessor().sample_frames(...)`` with ``min_frames`` and ``max_frames`` set on it.
    """
    found = POLICIES[policy](Source(total, fps), SampleSettings(policy, **limits))
    assert len(found) == count
    assert expected == (found if count <= 16 else zlib.crc32(np.array(found, dtype="<i4").tobytes()))


LIMITS = {
    "total": st.integers(1, 60_000),
    "video_fps": st.floats(1.0, 120.0),
    "fps": st.floats(0.1, 30.0),
    "low": st.integers(1, 40),
    "extra": st.integers(0, 800),
}


@pytest.fixture(scope="module")
def hf_qwen3_class():
    return pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl").Qwen3VLVideoProcessor


@pytest.fixture(scope="module")
def hf_qwen2_class():
    try:
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    except (ImportError, RuntimeError) as error:  # torchvision absent, or built for another torch
        pytest.skip(f"torchvision can't be imported: {error}")
    return Qwen2VLVideoProcessor


@given(**LIMITS)
def test_hf_qwen3_is_the_imported_code(hf_qwen3_class, total, video_fps, fps, low, extra):
    processor = SimpleNamespace(fps=2, min_frames=low, max_frames=low + extra)
    metadata = SimpleNamespace(total_num_frames=total, fps=video_fps)
    original = hf_qwen3_class.sample_frames(processor, metadata, fps=fps)
    settings = SampleSettings("hf_qwen3", fps, low, low + extra)
    assert POLICIES["hf_qwen3"](Source(total, video_fps), settings) == original.tolist()


@given(**LIMITS)
def test_hf_qwen2_is_its_formula_within_the_video(total, video_fps, fps, low, extra):
    """transformers' Qwen2VLVideoProcessor.sample_frames, word for word, but for frames beyond the end."""
    max_frames = math.floor(min(low + extra, total) / 2) * 2
    num_frames = total / video_fps * fps
    num_frames = min(max(num_frames, low), max_frames, total)
    num_frames = math.floor(num_frames / 2) * 2
    settings = SampleSettings("hf_qwen2", fps, low, low + extra)
    found = POLICIES["hf_qwen2"](Source(total, video_fps), settings)
    if num_frames == 0:  # the original divides by it
        assert found == [0, 0]
        return
    indices = torch.arange(0, total, total / num_frames).int().tolist()
    assert found == indices[:num_frames]
    assert all(i >= total for i in indices[num_frames:])


@given(**LIMITS)
def test_hf_qwen2_is_the_imported_code(hf_qwen2_class, total, video_fps, fps, low, extra):
    processor = SimpleNamespace(
        fps=None, num_frames=None, temporal_patch_size=2, min_frames=low, max_frames=low + extra
    )
    metadata = SimpleNamespace(total_num_frames=total, fps=video_fps)
    found = POLICIES["hf_qwen2"](Source(total, video_fps), SampleSettings("hf_qwen2", fps, low, low + extra))
    if total >= 2 and low + extra >= 2 and max(total / video_fps * fps, low) >= 2:
        original = hf_qwen2_class.sample_frames(processor, metadata, fps=fps).tolist()
        assert found == original[: len(found)]
        assert all(i >= total for i in original[len(found) :])


def test_steps_beyond_the_end_are_left_out():
    assert torch.arange(0, 17, 17 / 14).int().tolist()[-1] == 17  # the original asks for frame 17 of 17
    found = POLICIES["hf_qwen2"](Source(17, 1.0), SampleSettings("hf_qwen2", num_frames=14))
    assert found == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15]


def test_an_odd_count_is_paired_and_remembered():
    index = make_index(range(75), Fraction(1, 30))
    choice = choose(index, SampleSettings("hf_qwen3"))
    assert choice.frames == (0, 18, 37, 56, 74, 74)
    assert choice.sampled == 5
    assert choice.seconds_per_grid == pytest.approx(2 * 2.5 / 6)


@given(total=st.integers(1, 3000), video_fps=st.floats(0.5, 240.0), seed=st.integers(0, 2**40))
def test_jitter_draws_one_frame_of_every_segment(total, video_fps, seed):
    settings = SampleSettings("jitter", max_frames=64, seed=seed)
    found = POLICIES["jitter"](Source(total, video_fps), settings)
    count = len(found)
    assert count == len(POLICIES["qwen_utils"](Source(total, video_fps), settings))
    assert all(math.floor(i * total / count) <= frame <= (i + 1) * total / count for i, frame in enumerate(found))
    assert max(found) < total


def test_jitter_is_the_same_everywhere_and_spread_evenly():
    source = Source(10_000, 25.0)
    drawn = [POLICIES["jitter"](source, SampleSettings("jitter", num_frames=100, seed=seed)) for seed in range(200)]
    assert drawn[7][:6] == [1, 143, 231, 314, 449, 575]
    inside = np.array(drawn) - np.arange(100) * 100
    assert inside.min() == 0
    assert inside.max() == 99
    assert abs(inside.mean() - 49.5) < 0.7  # 3.4 standard errors of 20,000 draws


def test_keyframes_are_the_nearest_ones_each_once():
    index = make_index(range(0, 3000, 10), Fraction(1, 300), keys=(0, 90, 100, 250))
    assert keyframes(index) == (0, 90, 100, 250)
    choice = choose(index, SampleSettings("keyframe", num_frames=8, times="index"))
    # asked for: 0 43 85 128 171 214 256 299
    assert choice.frames == (0, 90, 100, 250)
    assert choice.times == tuple(float(index.times[i]) for i in choice.frames)
    only = choose(make_index(range(9), Fraction(1, 3), keys=(0,)), SampleSettings("keyframe"))
    assert only.frames == (0, 0)


def test_explicit_frames_stay_as_they_are():
    index = make_index([0, 100, 150, 400], Fraction(1, 100))
    choice = choose(index, SampleSettings("explicit", frames=(3, 1, 1)))
    assert choice.frames == (3, 1, 1, 1)
    assert choice.times == (4.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="frame numbers"):
        choose(index, SampleSettings("explicit"))


def test_times_by_number_and_by_presentation_time():
    index = make_index([0, 1, 2, 9, 10, 12], Fraction(1, 2))  # 5 intervals in 6 s
    by_time = choose(index, SampleSettings("uniform", max_frames=6))
    by_number = choose(index, SampleSettings("uniform", max_frames=6, times="index"))
    assert by_time.times == (0.0, 0.5, 1.0, 4.5, 5.0, 6.0)
    assert by_number.times == pytest.approx([i * 6 / 5 for i in range(6)])
    assert by_time.frames == by_number.frames == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("rate", ["30", "25", "24", "60", "30000/1001", "24000/1001", "60000/1001", "15", "12.5", "7"])
@pytest.mark.parametrize("base", ["1/1000", "1/90000", "1/15360", "1/1000000"])
@pytest.mark.parametrize("total", [60, 1799, 1800, 12_000])
def test_the_frame_rate_is_the_plain_one(rate, base, total):
    rate, base = Fraction(rate), Fraction(base)
    index = make_index([round(i / rate / base) for i in range(total)], base)
    found = frame_rate(index)
    assert found == pytest.approx(float(rate), rel=2 / (index.ticks[-1] - index.ticks[0]))
    if rate.denominator == 1 and total > 60:
        assert found == rate
        wanted = reference_frames(total, float(rate), {"fps": 2.0})
        assert list(choose(index, SampleSettings("qwen_utils")).frames) == wanted


def test_the_frame_rate_of_one_frame_and_of_two():
    assert frame_rate(make_index([5], Fraction(1, 10))) == 1.0
    assert frame_rate(make_index([5, 6], Fraction(1, 10))) == 10.0


def make_index(ticks, base, keys=(0,)) -> VideoIndex:
    """Of packets that are all shown, in presentation order."""
    ticks = np.array(ticks, dtype=np.int64)
    n = len(ticks)
    key = np.isin(np.arange(n), keys)
    packets = Packets(ticks, key, np.zeros(n, bool), np.ones(n, bool))
    return VideoIndex(
        path=Path("made.mp4"),
        ticks=ticks,
        times=(ticks - ticks[0]) * float(base),
        height=64,
        width=64,
        time_base=base,
        codec="h264",
        pixels="yuv420p",
        rotation=0,
        stream=0,
        container="mov",
        packets=packets,
        flags=frozenset(),
    )
