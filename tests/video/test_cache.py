"""The clip loader: hits, byte budget, eviction, changed files, keys."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from vrlt_fast.config import VideoConfig
from vrlt_fast.errors import VideoError
from vrlt_fast.video.cache import ClipLoader
from vrlt_fast.video.index import probe
from vrlt_fast.video.preprocess import Geometry

VIDEO = {"sampling": "fps", "fps": 2.0, "min_pixels": 784, "max_pixels": 4704}


def loader(**changes):
    return ClipLoader(VideoConfig(**{**VIDEO, **changes}), Geometry())


def test_clip_equals_its_frames_and_the_second_load_is_a_hit(studio, decoded):
    path = studio.film("a.mp4")
    clips = loader()
    clip = clips.load(path)
    pictures, times = decoded(path)
    numbers = [0, 4, 8, 12, 16, 20]
    assert clip.times == pytest.approx([times[i] for i in numbers])
    size = tuple(clip.frames().shape[-2:])
    x = torch.from_numpy(np.ascontiguousarray(pictures[numbers])).permute(0, 3, 1, 2)
    assert torch.equal(clip.frames(), torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=True))
    assert clips.load(path) is clip
    assert (clips.decoded, clips.hits) == (1, 1)


def test_budget_evicts_the_least_recently_used(studio):
    a, b, c = (studio.film(f"{name}.mp4") for name in "abc")
    size = loader().load(a).nbytes
    clips = loader(cache_gb=2.5 * size / 1e9)
    for path in (a, b, a, c):  # c takes the place of b
        clips.load(path)
    assert (clips.decoded, clips.hits) == (3, 1)
    for path in (a, c):
        clips.load(path)
    assert (clips.decoded, clips.hits) == (3, 3)
    clips.load(b)
    assert (clips.decoded, clips.hits) == (4, 3)


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_clip_above_the_budget_is_not_kept(studio, share):
    path = studio.film("a.mp4")
    clips = loader(cache_gb=share * loader().load(path).nbytes / 1e9)
    first, second = clips.load(path), clips.load(path)
    assert torch.equal(first.patches, second.patches)
    assert first.key == second.key
    assert (clips.decoded, clips.hits) == (2, 0)


def test_a_changed_file_is_decoded_again(studio):
    path = studio.film("a.mp4")
    clips = loader()
    before = clips.load(path)
    studio.seed += 1
    studio.film("a.mp4")
    os.utime(path, ns=(1, 1))  # also on file systems with coarse times
    after = clips.load(path)
    assert clips.decoded == 2
    assert after.key != before.key
    assert not torch.equal(after.patches, before.patches)


def test_keys_name_content_and_preprocessing(studio):
    path = studio.film("a.mp4")
    copy = studio.text("copy.mp4", path.read_bytes())
    key = loader().load(path).key
    assert loader().load(copy).key == key
    others = [loader(fps=4.0), loader(max_pixels=6272), loader(min_pixels=1568), loader(sampling="uniform")]
    keys = [other.load(path).key for other in others] + [
        ClipLoader(VideoConfig(**VIDEO), Geometry(7, 2)).load(path).key
    ]
    assert len({key, *keys}) == 6


def test_failures_are_not_remembered(studio):
    path = studio.text("a.mp4", b"no video")
    clips = loader()
    for _ in range(2):
        with pytest.raises(VideoError, match=r"a\.mp4"):
            clips.load(path)
    studio.film("a.mp4")
    assert len(clips.load(path).times) == 6
    assert probe(path).n_frames == 24
