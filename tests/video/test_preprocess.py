"""Target sizes of Qwen2-VL, the resize, and the patch layout against transformers' formula."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from vrlt_fast.errors import VideoError
from vrlt_fast.video.preprocess import (
    Geometry,
    SizeRule,
    patchify,
    resize,
    smart_resize,
    smart_resize_clip,
    to_clip,
)


@pytest.mark.parametrize(
    ("height", "width", "bounds", "expected"),
    [
        (1080, 1920, (4 * 784, 16384 * 784), (1092, 1932)),
        (1080, 1920, (3136, 1_003_520), (728, 1316)),
        (720, 1280, (100_352, 602_112), (560, 1008)),
        (480, 640, (100_352, 602_112), (476, 644)),
        (64, 96, (100_352, 602_112), (280, 392)),
        (112, 84, (9408, 9408), (112, 84)),
        (10, 10, (1, 10**9), (28, 28)),
        (42, 70, (1, 10**9), (56, 56)),  # Python's round is half to even: 1.5 -> 2, 2.5 -> 2
    ],
)
def test_smart_resize_by_hand(height, width, bounds, expected):
    assert smart_resize(height, width, 28, *bounds) == expected


@given(height=st.integers(1, 4000), width=st.integers(1, 4000), low=st.integers(784, 50_000), room=st.integers(2, 200))
def test_smart_resize_keeps_its_bounds(height, width, low, room):
    assume(max(height, width) / min(height, width) <= 8)
    high = low * room + 16 * 784
    h, w = smart_resize(height, width, 28, low, high)
    assert h % 28 == 0
    assert w % 28 == 0
    assert low <= h * w <= high


def released_smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """transformers' Qwen2-VL image processor, word for word."""
    h_bar = round(height / factor) * factor
    w_bar = round(width / factor) * factor
    if h_bar * w_bar > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        h_bar = max(factor, math.floor(height / beta / factor) * factor)
        w_bar = max(factor, math.floor(width / beta / factor) * factor)
    elif h_bar * w_bar < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h_bar = math.ceil(height * beta / factor) * factor
        w_bar = math.ceil(width * beta / factor) * factor
    return h_bar, w_bar


def test_smart_resize_is_the_released_one(seed):
    rng = random.Random(seed)
    for _ in range(2000):
        height, width = rng.randint(20, 3000), rng.randint(20, 3000)
        low = rng.randint(784, 300_000)
        high = low + rng.randint(0, 1_000_000)
        assert smart_resize(height, width, 28, low, high) == released_smart_resize(height, width, 28, low, high)


@pytest.fixture(scope="module")
def hf_smart_resize():
    return pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl").smart_resize


@given(
    frames=st.integers(1, 800),
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    low=st.integers(1, 400_000),
    room=st.integers(0, 40_000_000),
)
def test_smart_resize_clip_is_the_imported_one(hf_smart_resize, frames, height, width, low, room):
    factor = 32
    try:
        expected = hf_smart_resize(frames, height, width, 2, factor, low, low + room)
    except ValueError:
        with pytest.raises(ValueError, match=r"aspect|fewer"):
            smart_resize_clip(frames, height, width, factor, low, low + room)
    else:
        assert smart_resize_clip(frames, height, width, factor, low, low + room) == expected


QWEN2 = SizeRule("qwen2", 128 * 28**2, 768 * 28**2, int(0.9 * 128_000 * 28**2))
QWEN2_32 = SizeRule("qwen2", 128 * 32**2, 768 * 32**2, int(0.9 * 128_000 * 32**2))
QWEN3 = SizeRule("qwen3", 128 * 32**2, None, 768 * 32**2)
QWEN3_CAP = SizeRule("qwen3", 128 * 32**2, 768 * 32**2, 768 * 32**2)


@pytest.mark.parametrize(
    ("rule", "factor", "frames", "height", "width", "expected"),
    [
        (QWEN2, 28, 32, 720, 1280, (560, 1008)),
        (QWEN2, 28, 768, 720, 1280, (336, 644)),
        (QWEN2_32, 32, 768, 720, 1280, (384, 736)),
        (QWEN2, 28, 4, 90, 160, (252, 448)),
        (QWEN2, 28, 5000, 720, 1280, (224, 420)),
        (QWEN2, 28, 33, 144, 90, (420, 252)),
        (QWEN2, 28, 768, 20, 30, (280, 392)),
        (QWEN2, 28, 3, 17, 300, (84, 1344)),
        (QWEN3_CAP, 32, 32, 72, 128, (64, 128)),
        (QWEN3_CAP, 32, 768, 20, 30, (32, 64)),
        (QWEN3, 32, 768, 20, 30, (32, 32)),
        (QWEN3_CAP, 32, 3, 17, 300, (64, 896)),
        (QWEN3_CAP, 32, 5, 720, 1280, (288, 512)),
        (QWEN3, 32, 5, 720, 1280, (288, 512)),
        (QWEN3_CAP, 32, 1000, 48, 64, (64, 64)),
        (QWEN3, 32, 1000, 48, 64, (32, 32)),
    ],
)
def test_size_rules_as_the_originals(rule, factor, frames, height, width, expected):
    """Made with qwen-vl-utils 0.0.14 (``fetch_video``'s bounds and ``smart_resize``) and transformers 5.23.0:
    ``Qwen2VLVideoProcessor().resize(torch.zeros(1, n, 1, h, w, dtype=torch.uint8), p.size, 3, 28, 2, True)`` and the
    same of ``Qwen3VLVideoProcessor`` with ``cap_pixels_per_frame`` true and false.
    """
    assert rule.size(frames, height, width, factor) == expected


def test_a_size_rule_needs_its_bound():
    with pytest.raises(ValueError, match="max_pixels"):
        SizeRule("qwen2", 100, None, 1000)
    with pytest.raises(ValueError, match="total_pixels"):
        SizeRule("qwen3", 100, 1000)


@given(
    t=st.integers(1, 3),
    h=st.integers(1, 3),
    w=st.integers(1, 3),
    patch=st.integers(1, 5),
    merge=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_patch_layout_is_transformers(t, h, w, patch, merge, seed):
    frames = torch.randint(
        0,
        256,
        (2 * t, 3, h * merge * patch, w * merge * patch),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )
    patches, grid = patchify(frames, Geometry(patch, merge))
    gh, gw = h * merge, w * merge
    assert grid == (t, gh, gw)
    x = frames.view(1, t, 2, 3, gh // merge, merge, patch, gw // merge, merge, patch)
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(t * gh * gw, 3 * 2 * patch * patch)
    assert torch.equal(patches, x)


@pytest.mark.parametrize("shape", [(53, 97), (64, 96), (112, 84), (300, 200)])
def test_the_resized_pictures_come_back_exactly(seed, shape):
    frames = np.random.default_rng(seed).integers(0, 256, (6, *shape, 3), dtype=np.uint8)
    times = tuple(i / 4 for i in range(6))
    clip = to_clip(frames, times, geometry=Geometry(), min_pixels=784, max_pixels=9408, seconds_per_grid=0.5, key="k")
    height, width = smart_resize(*shape, 28, 784, 9408)
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    expected = torch.nn.functional.interpolate(x, (height, width), mode="bicubic", antialias=True)
    assert torch.equal(clip.frames(), expected)
    assert torch.equal(resize(frames, height, width), expected)
    assert clip.grid == (3, height // 14, width // 14)
    assert clip.patches.dtype == torch.uint8
    assert clip.patches.shape == (3 * (height // 14) * (width // 14), 3 * 2 * 14 * 14)
    assert clip.n_tokens == 3 * (height // 28) * (width // 28)
    assert clip.nbytes == clip.patches.numel()
    assert clip.seconds_per_grid == pytest.approx(0.5)
    assert clip.grid_times == pytest.approx((0.125, 0.625, 1.125))


def test_a_strip_is_refused_by_name():
    frames = np.zeros((2, 2, 500, 3), dtype=np.uint8)
    with pytest.raises(VideoError, match=r"strip\.mp4") as caught:
        to_clip(
            frames,
            (0.0, 0.5),
            geometry=Geometry(),
            min_pixels=784,
            max_pixels=9408,
            seconds_per_grid=1.0,
            key="k",
            where="strip.mp4",
        )
    assert caught.value.code == "VRLT-V06"
