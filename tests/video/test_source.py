"""A run's clips: from one configuration, loaded ahead in order, kept between runs, whatever decodes them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from vrlt_fast.config import VideoConfig
from vrlt_fast.errors import VideoError
from vrlt_fast.video import source
from vrlt_fast.video.cache import ClipLoader
from vrlt_fast.video.preprocess import Geometry
from vrlt_fast.video.source import ClipSource, decoding_processes

SMALL = {"min_pixels": 784, "max_pixels": 4704, "min_frames": 2, "max_frames": 8, "fps": 4.0}


@pytest.fixture
def films(studio) -> list[Path]:
    return [studio.film(f"{i}.mp4", count=16 + i, size=(56 + 8 * i, 84)) for i in range(5)]


@pytest.mark.parametrize("changes", [{"workers": 0}, {"workers": 1}, {"workers": 0, "prefetch": 0, "cache_gb": 0.0}])
def test_clips_are_those_of_a_plain_loader(films: list[Path], changes: dict) -> None:
    plain = ClipLoader(VideoConfig(**SMALL), Geometry())
    order = [films[i] for i in (0, 1, 1, 4, 2, 0, 3)]
    with ClipSource(VideoConfig(**SMALL, **changes), Geometry()) as clips:
        clips.expect(itertools.cycle(order))
        for path in order + order[:3]:
            clip, wanted = clips.load(path), plain.load(path)
            assert torch.equal(clip.patches, wanted.patches)
            assert (clip.grid, clip.times, clip.key) == (wanted.grid, wanted.times, wanted.key)
    assert clips.load(films[0]).grid == plain.load(films[0]).grid  # closed: slower, not broken


def test_a_folder_keeps_clips_for_the_next_run(films: list[Path], tmp_path: Path) -> None:
    video = VideoConfig(**SMALL, workers=0, cache_dir=str(tmp_path / "cache"))
    with ClipSource(video, Geometry()) as first:
        wanted = [first.load(path) for path in films]
        assert (first.decoded, first.hits) == (5, 0)
    with ClipSource(video, Geometry()) as second:
        for path, clip in zip(films, wanted, strict=True):
            assert torch.equal(second.load(path).patches, clip.patches)
        assert (second.decoded, second.hits) == (0, 5)


def test_errors_come_with_their_clip(films: list[Path], studio) -> None:
    bad = studio.text("bad.mp4", b"no video")
    with ClipSource(VideoConfig(**SMALL, workers=0), Geometry()) as clips:
        clips.expect([films[0], bad, films[1]])
        clips.load(films[0])
        with pytest.raises(VideoError) as caught:
            clips.load(bad)
        assert caught.value.code == "VRLT-V02"
        assert clips.load(films[1]).n_tokens > 0


def test_eviction_knows_the_order_of_an_endless_run(films: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "HORIZON", 16)
    one = ClipLoader(VideoConfig(**SMALL), Geometry()).load(films[0]).nbytes
    video = VideoConfig(**SMALL, workers=0, prefetch=0, cache_gb=2.6 * one / 1e9)
    with ClipSource(video, Geometry()) as clips:
        clips.expect(itertools.cycle(films))
        for path in itertools.islice(itertools.cycle(films), 100):
            clips.load(path)
        # a budget of about half an epoch: the least recently used would always be the one that was just evicted
        assert clips.hits >= 30


def test_workers_of_this_machine() -> None:
    assert decoding_processes(VideoConfig(workers=3)) == 3
    assert 1 <= decoding_processes(VideoConfig()) <= 8
