"""Decoders that aren't ours: what each says of itself and of files, and, where it is installed, its pictures."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vrlt_fast.errors import VideoError
from vrlt_fast.video.backends import nvdec
from vrlt_fast.video.backends.base import Availability
from vrlt_fast.video.backends.dali import DaliBackend
from vrlt_fast.video.backends.decord import DecordBackend
from vrlt_fast.video.backends.torchcodec import TorchcodecBackend
from vrlt_fast.video.index import VideoIndex, probe
from vrlt_fast.video.plan import plan_decode

EXACT = {"torchcodec": TorchcodecBackend("cpu"), "decord": DecordBackend()}
X265 = {"x265-params": "log-level=none:keyint=12"}
FILMS = {
    "bframes.mp4": {"options": {"bf": "3"}},
    "opengop.mp4": {"codec": "libx265", "options": X265},
    "stream.ts": {"options": {"bf": "2"}},
    "vfr.mp4": {"ticks": [0, 40, 200, 230, 900, 1000, 1001, 1400, 5000, 5100, 5150, 5300, 5400, 5500, 5502, 9000]},
    "odd.mp4": {"pixels": "yuv444p", "size": (35, 51)},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "0"}},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "motion.mp4": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "one.mp4": {"count": 1},
}


def needs(name: str) -> None:
    found = EXACT[name].availability()
    if not found.ok:
        pytest.skip(found.reason)


def collect(backend: object, index: VideoIndex, frames: list[int]) -> dict[int, np.ndarray]:
    """What the backend gives, by frame number."""
    given: dict[int, np.ndarray] = {}

    def sink(number: int, picture: torch.Tensor) -> None:
        assert number not in given
        assert picture.dtype == torch.uint8
        given[number] = picture.cpu().numpy().copy()

    backend.decode(plan_decode(index, frames), sink)
    return given


@pytest.mark.parametrize(
    "backend",
    [DaliBackend("cuda"), DaliBackend("cpu"), TorchcodecBackend("cuda"), TorchcodecBackend("cpu"), DecordBackend()],
    ids=lambda b: f"{b.name}-{b.device}",
)
def test_availability_never_raises_and_says_how_to_mend(backend) -> None:
    found = backend.availability()
    assert isinstance(found, Availability)
    assert found.ok == (not found.reason)
    assert found.ok or found.fix
    if backend.device == "cuda" and not torch.cuda.is_available():
        assert not found.ok


def test_a_missing_driver_library_is_said() -> None:
    """In a process of its own, whose torch claims a GPU and whose library search finds none of the driver."""
    program = (
        "import torch; torch.version.cuda = '13.0'; torch.cuda.is_available = lambda: True\n"
        "torch.cuda.device_count = lambda: 1\n"
        "from vrlt_fast.video.backends import nvdec\n"
        "found = nvdec.availability(); print(found.ok, found.reason, found.fix)\n"
        "print(nvdec.availability(3))"
    )
    if nvdec.availability().ok:
        pytest.skip("this machine has the library")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "libnvcuvid" in done.stdout
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in done.stdout
    assert "no CUDA device 3" in done.stdout


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        ("yuv420p", ("420", 8)),
        ("yuvj422p", ("422", 8)),
        ("yuv420p10le", ("420", 10)),
        ("yuv444p12be", ("444", 12)),
        ("gray", ("400", 8)),
        ("gray10le", ("400", 10)),
        ("nv12", ("420", 8)),
        ("yuv410p", None),
        ("gbrp", None),
        ("bgr24", None),
        ("", None),
    ],
)
def test_pixel_formats_are_read(pixels: str, kind: tuple[str, int] | None) -> None:
    assert nvdec.layout(pixels) == kind


def test_what_a_decoder_cannot_do_is_a_reason(studio) -> None:
    index = probe(studio.film("a.mp4"))
    ten = dataclasses.replace(index, pixels="yuv420p10le")
    assert "h264" in DaliBackend("cpu").supports(index)
    assert "prores" in DaliBackend("cuda").supports(dataclasses.replace(index, codec="prores"))
    assert "yuv420p10le" in TorchcodecBackend("cpu").supports(ten)
    assert "yuv420p10le" in DecordBackend().supports(ten)
    assert "av1" in DecordBackend().supports(dataclasses.replace(index, codec="av1"))
    assert "MPEG-TS" in DecordBackend().supports(dataclasses.replace(index, container="mpegts"))
    for flag in ("edit_list", "vfr"):
        flagged = dataclasses.replace(index, flags=frozenset({flag}))
        assert DecordBackend().supports(flagged)
        assert not TorchcodecBackend("cpu").supports(flagged)
    damaged = dataclasses.replace(index, flags=frozenset({"truncated"}))
    for backend in (DaliBackend("cuda"), TorchcodecBackend("cuda"), TorchcodecBackend("cpu"), DecordBackend()):
        assert "cut off" in backend.supports(damaged)
    if not nvdec.availability().ok:
        assert nvdec.refusal(index) == ""
        assert "yuv420p10le" in nvdec.refusal(ten)
        assert nvdec.refusal(dataclasses.replace(index, codec="av1"))
        assert nvdec.refusal(dataclasses.replace(index, flags=frozenset({"interlaced"})))


@pytest.mark.parametrize("film", FILMS)
@pytest.mark.parametrize("name", EXACT)
def test_pictures_are_bit_for_bit_those_of_a_plain_decode(studio, decoded, name: str, film: str, seed: int) -> None:
    """Also where the decoder alone would be wrong and so refuses the file: what it gets is remuxed."""
    needs(name)
    if (name, film) == ("decord", "vp8.webm"):
        pytest.skip("not in a MP4")
    path = studio.film(film, **{"count": 24, **FILMS[film]})
    index = probe(path)
    truth, _ = decoded(path)
    few = np.random.default_rng(seed).choice(index.n_frames, size=min(6, index.n_frames), replace=False)
    for frames in (sorted(map(int, few)), list(range(index.n_frames))):
        given = collect(EXACT[name], index, frames)
        assert sorted(given) == frames
        for number, picture in given.items():
            assert np.array_equal(picture, truth[number]), number


@pytest.mark.parametrize("name", EXACT)
def test_small_budgets_give_the_same(studio, name: str) -> None:
    needs(name)
    index = probe(studio.film("a.mp4", options={"bf": "2"}))
    few = TorchcodecBackend("cpu", surface_bytes=1) if name == "torchcodec" else DecordBackend(surface_bytes=1)
    frames = [0, 3, 4, 9, 20]
    whole, one_by_one = collect(EXACT[name], index, frames), collect(few, index, frames)
    assert all(np.array_equal(whole[n], one_by_one[n]) for n in frames)


@pytest.mark.parametrize("name", EXACT)
def test_a_damaged_file_is_an_error_and_a_fault_of_the_sink_is_its_own(
    studio, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    needs(name)
    path: Path = studio.film("a.mp4")
    index = probe(path)

    def failing(number: int, picture: torch.Tensor) -> None:
        raise RuntimeError("the sink's")

    with pytest.raises(RuntimeError, match="the sink's"):
        EXACT[name].decode(plan_decode(index, [3]), failing)
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    path.write_bytes(data)
    capfd.readouterr()
    with pytest.raises(VideoError):
        collect(EXACT[name], index, list(range(index.n_frames)))
    assert capfd.readouterr() == ("", "")
