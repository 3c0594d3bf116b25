"""NVDEC through DALI and torchcodec: the right pictures, on the device, whatever is left out.

bench/gpu_check.sh video runs it. With GPU_CHECK_SMALL=1 and no device, CPU decoders try the tests themselves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vrlt_fast.errors import VideoError
from vrlt_fast.video.backends import nvdec
from vrlt_fast.video.backends.base import Backend
from vrlt_fast.video.backends.dali import DaliBackend
from vrlt_fast.video.backends.torchcodec import TorchcodecBackend
from vrlt_fast.video.decode import Decoder
from vrlt_fast.video.index import probe
from vrlt_fast.video.plan import plan_decode
from vrlt_fast.video.preprocess import Geometry
from vrlt_kernels import NV12

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and not os.environ.get("GPU_CHECK_SMALL"),
        reason="needs a CUDA device, or GPU_CHECK_SMALL=1 to try it without",
    ),
]
MAKERS: dict[str, Callable[[], Backend]] = {
    "dali": lambda: DaliBackend(DEVICE),
    "torchcodec": lambda: TorchcodecBackend(DEVICE, planes=False),
}
X265 = {"x265-params": "log-level=none:keyint=12"}
FILMS = {
    "h264.mp4": ("libx264", "yuv420p", {"bf": "3"}),
    "h264.ts": ("libx264", "yuv420p", {"bf": "2"}),
    "hevc.mp4": ("libx265", "yuv420p", X265),
    "hevc10.mp4": ("libx265", "yuv420p10le", X265),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {}),
    "mpeg4.mp4": ("mpeg4", "yuv420p", {"bf": "2"}),
    "av1.mkv": ("libsvtav1", "yuv420p", {"svtav1-params": "lp=1"}),
}


@pytest.fixture(params=MAKERS)
def backend(request: pytest.FixtureRequest) -> Backend:
    made = MAKERS[request.param]()
    found = made.availability()
    if not found.ok:
        pytest.skip(f"{found.reason}; {found.fix}")
    return made


def film(folder: Path, name: str, *, count: int = 40, rotation: bool = False) -> Path:
    """Waves that move: every picture differs from every other one, and chroma is smooth."""
    codec, pixels, options = FILMS[name]
    y, x = np.mgrid[:144, :240]
    path = folder / name
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options={"g": "12", "b": "1M", **options})
        stream.width, stream.height, stream.pix_fmt = 240, 144, pixels
        if rotation:
            stream.set_display_rotation(90)
        for number in range(count):
            waves = [np.sin(x / (23 + 9 * c) + number * 0.45) + np.cos(y / (17 + 5 * c) - number) for c in range(3)]
            frame = av.VideoFrame.from_ndarray(np.stack([(w * 55 + 128).astype(np.uint8) for w in waves], -1), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def plain(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        pictures = [np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90) % 4) for f in file.decode(video=0)]
    return np.stack(pictures).astype(np.int16)


def collect(backend: Backend, path: Path, frames: list[int], *, elide: bool = True) -> dict[int, torch.Tensor]:
    given: dict[int, torch.Tensor] = {}

    def sink(number: int, picture: torch.Tensor) -> None:
        assert picture.device.type == DEVICE
        assert picture.dtype == torch.uint8
        given[number] = picture.clone()

    backend.decode(plan_decode(probe(path), frames, elide=elide), sink)
    assert sorted(given) == frames
    return given


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("name", FILMS)
def test_the_right_pictures(backend: Backend, tmp_path: Path, name: str, rotation: bool) -> None:
    if rotation and name != "h264.mp4":
        pytest.skip("one container is enough")
    path = film(tmp_path, name, rotation=rotation)
    reason = backend.supports(probe(path))
    if reason:
        pytest.skip(reason)
    truth = plain(path)
    for frames in (list(range(len(truth))), [1, 7, 22, len(truth) - 1]):
        for number, picture in collect(backend, path, frames).items():
            apart = np.abs(truth - picture.cpu().numpy().astype(np.int16)).mean(axis=(1, 2, 3))
            assert int(apart.argmin()) == number
            assert apart[number] < 6


@pytest.mark.parametrize("name", ["h264.mp4", "h264.ts", "hevc.mp4"])
def test_packets_left_out_change_no_bit(backend: Backend, tmp_path: Path, name: str) -> None:
    path = film(tmp_path, name)
    if reason := backend.supports(probe(path)):
        pytest.skip(reason)
    frames = [0, 5, 17, 31, 39]
    assert plan_decode(probe(path), frames).cost < plan_decode(probe(path), frames, elide=False).cost
    cut, whole = (collect(backend, path, frames, elide=elide) for elide in (True, False))
    assert all(torch.equal(cut[n], whole[n]) for n in frames)


def test_a_bad_file_costs_itself_only(backend: Backend, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = film(tmp_path, "h264.mp4")
    if reason := backend.supports(probe(path)):
        pytest.skip(reason)
    before = collect(backend, path, [3, 30])
    index = probe(path)
    bad = tmp_path / "bad.mp4"
    data = bytearray(path.read_bytes())
    start = data.find(b"mdat") + 4
    data[start : start + 3000] = bytes(3000)
    bad.write_bytes(data)
    capfd.readouterr()
    with contextlib.suppress(VideoError):  # some decoders patch the picture up and say nothing
        backend.decode(plan_decode(probe(bad), [0, 3]), lambda number, picture: None)
    assert capfd.readouterr().err == ""
    with pytest.raises(VideoError):
        collect(backend, path, [index.n_frames])
    after = collect(backend, path, [3, 30])
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_planes_are_the_same_pictures(tmp_path: Path) -> None:
    planes, rgb = TorchcodecBackend(DEVICE), TorchcodecBackend(DEVICE, planes=False)
    if not planes.availability().ok:
        pytest.skip(planes.availability().reason)
    path = film(tmp_path, "h264.mp4")
    whole = collect(rgb, path, [2, 20])
    seen = []

    def sink(number: int, picture: object) -> None:
        if isinstance(picture, NV12):
            luma = picture.y[0].float()
            seen.append(number)
            grey = whole[number].float() @ torch.tensor([0.299, 0.587, 0.114], device=DEVICE)
            assert ((luma - 16) * 255 / 219 - grey).abs().mean() < 4
            assert picture.uv.shape == (1, 72, 120, 2)

    planes.decode(plan_decode(probe(path), [2, 20]), sink)
    if not seen:
        pytest.skip("this torchcodec gives no planes")
    assert sorted(seen) == [2, 20]


@pytest.mark.parametrize("name", ["dali", "torchcodec-cuda"] if DEVICE == "cuda" else ["torchcodec"])
def test_patches_are_on_the_device_and_near_those_of_the_cpu(tmp_path: Path, name: str) -> None:
    if not MAKERS[name.removesuffix("-cuda")]().availability().ok:
        pytest.skip(f"{name} isn't available")
    path = film(tmp_path, "h264.mp4")
    frames, size, geometry = [0, 9, 9, 30], (112, 196), Geometry(14, 2)
    ours, grid, report = Decoder(name).patches(probe(path), frames, size, geometry)
    cpu, same, _ = Decoder("pyav").patches(probe(path), frames, size, geometry)
    assert grid == same
    assert report.backend == name
    assert ours.device.type == DEVICE
    assert (ours.cpu().float() - cpu.float()).abs().mean() < 6


def test_the_driver_says_what_it_decodes() -> None:
    if not nvdec.availability().ok:
        pytest.skip(nvdec.availability().reason)
    can = nvdec.capability("h264", "420", 8)
    assert can is not None
    assert can.supported
    assert can.engines >= 1
    assert can.max_size[0] >= 1920
