"""DALI for real, on the CPU: VP8, VP9 and MJPEG. ``make test-dali`` installs it; elsewhere these are skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from vrlt_fast.errors import VideoError
from vrlt_fast.video.backends.dali import DaliBackend
from vrlt_fast.video.index import VideoIndex, probe
from vrlt_fast.video.plan import plan_decode

FILMS = {
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp9.mp4": {"codec": "libvpx-vp9"},
    "vp9vfr.webm": {"codec": "libvpx-vp9", "ticks": [0, 40, 200, 230, 900, 1000, 1001, 1400, 5000, 5100, 5150, 9000]},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "0"}},
    "motion.mp4": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "odd.webm": {"codec": "libvpx-vp9", "size": (35, 51)},
    "one.webm": {"codec": "libvpx-vp9", "count": 1},
}


@pytest.fixture(scope="module")
def dali() -> DaliBackend:
    backend = DaliBackend("cpu")
    found = backend.availability()
    if not found.ok:
        pytest.skip(found.reason)
    return backend


def collect(backend: DaliBackend, index: VideoIndex, frames: list[int]) -> dict[int, np.ndarray]:
    given: dict[int, np.ndarray] = {}

    def sink(number: int, picture: torch.Tensor) -> None:
        assert number not in given
        given[number] = picture.numpy().copy()

    backend.decode(plan_decode(index, frames), sink)
    return given


def nearest(picture: np.ndarray, truth: np.ndarray) -> int:
    """The number of the picture that this one is: its conversion to RGB isn't FFmpeg's, so not by equality."""
    return int(np.abs(truth.astype(np.int16) - picture.astype(np.int16)).mean(axis=(1, 2, 3)).argmin())


@pytest.mark.parametrize("film", FILMS)
def test_the_right_pictures(dali: DaliBackend, studio, decoded: Callable, film: str, seed: int) -> None:
    path = studio.film(film, **{"count": 24, **FILMS[film]})
    index = probe(path)
    assert dali.supports(index) == ""
    truth, _ = decoded(path)
    few = np.random.default_rng(seed).choice(index.n_frames, size=min(5, index.n_frames), replace=False)
    for frames in (sorted(map(int, few)), list(range(index.n_frames))):
        given = collect(dali, index, frames)
        assert sorted(given) == frames
        assert {number: nearest(picture, truth) for number, picture in given.items()} == {n: n for n in frames}


def test_a_tight_budget_gives_the_same_bits(dali: DaliBackend, studio) -> None:
    index = probe(studio.film("a.webm", codec="libvpx-vp9"))
    frames = list(range(0, index.n_frames, 2))
    whole = collect(dali, index, frames)
    for files, pictures in ((1, 1), (2, 5), (8, 3)):
        tight = DaliBackend("cpu", files=files, surface_bytes=pictures * 3 * index.height * index.width)
        again = collect(tight, index, frames)
        assert all(np.array_equal(whole[n], again[n]) for n in frames)


def test_a_bad_file_costs_itself_only_and_prints_nothing(
    dali: DaliBackend, studio, capfd: pytest.CaptureFixture[str]
) -> None:
    good = probe(studio.film("good.webm", codec="libvpx-vp9"))
    before = collect(dali, good, [1, 8])
    path = studio.film("bad.webm", codec="libvpx-vp9")
    bad = probe(path)
    data = bytearray(path.read_bytes())
    at = data.find(b"\x49\x83\x42")  # VP9's sync code of the first key picture, behind the byte that says so
    assert at > 0
    data[at - 1 : at + 3] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    capfd.readouterr()
    with pytest.raises(VideoError) as caught:
        collect(dali, bad, [0, 3])
    assert caught.value.code == "VRLT-V02"
    assert capfd.readouterr() == ("", "")
    after = collect(dali, good, [1, 8])
    assert all(np.array_equal(before[n], after[n]) for n in before)


def test_frames_out_of_range_are_refused(dali: DaliBackend, studio) -> None:
    index = probe(studio.film("a.webm", codec="libvpx-vp9"))
    with pytest.raises(VideoError) as caught:
        collect(dali, index, [index.n_frames])
    assert caught.value.code == "VRLT-V05"
    # an index that promises more than the file has
    ticks = np.append(index.ticks, index.ticks[-1] + 1000)
    longer = dataclasses.replace(index, ticks=ticks, times=np.append(index.times, index.times[-1] + 1))
    with pytest.raises(VideoError):
        collect(dali, longer, [index.n_frames])
