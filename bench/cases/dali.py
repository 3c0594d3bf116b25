"""dali: DALI's decoder for real, on the CPU (VP8, VP9, MJPEG), against PyAV: ``make test-dali``.

Its conversion to RGB isn't FFmpeg's, so a picture is right when no other one of the film is nearer to it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from bench.harness import BenchError, Claim, Record, records_of, summarize, write_result
from vrlt_fast.errors import VideoError
from vrlt_fast.video.backends.dali import DaliBackend
from vrlt_fast.video.index import VideoIndex, probe
from vrlt_fast.video.plan import plan_decode

SEED = 11
ARM = "dali cpu"
_FRAMES = 48
_MS = Fraction(1, 1000)
_FILMS = {  # codec, pixel format, size, presentation times in ms
    "vp9.webm": ("libvpx-vp9", "yuv420p", (240, 320), None),
    "vp9.mp4": ("libvpx-vp9", "yuv420p", (240, 320), None),
    "vp9 uneven times.webm": ("libvpx-vp9", "yuv420p", (240, 320), [n * n * 7 for n in range(_FRAMES)]),
    "vp9 odd size.webm": ("libvpx-vp9", "yuv420p", (135, 241), None),
    "vp8.webm": ("libvpx", "yuv420p", (240, 320), None),
    "mjpeg.mp4": ("mjpeg", "yuvj420p", (240, 320), None),
}


def run(argv: Sequence[str]) -> None:
    """Decode every film whole and in part, and write bench/results/dali.cpu.json.

    Raises:
        BenchError: DALI can't be imported.
    """
    argparse.ArgumentParser(prog="python -m bench dali").parse_args(argv)
    dali = DaliBackend("cpu")
    found = dali.availability()
    if not found.ok:
        raise BenchError(f"{found.reason}; make test-dali installs it")
    version = f"DALI {import_module('nvidia.dali').__version__}"
    with tempfile.TemporaryDirectory() as folder:
        records = [summarize(version, "all", "version", "", [1])]
        for name in _FILMS:
            records += _film(dali, _made(Path(folder) / name, name), name)
        records += _faults(dali, Path(folder))
    write_result("dali", "cpu", records, claims, seed=SEED)


def _made(path: Path, name: str) -> Path:
    """Waves that move, so that neighbouring pictures differ and chroma is smooth."""
    codec, pixels, (height, width), ticks = _FILMS[name]
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=25, options={"g": "16", "b": "2M", "auto-alt-ref": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if ticks is not None:
            stream.codec_context.time_base = _MS
        for number in range(_FRAMES):
            phase = number * 0.45
            waves = [np.sin(x / (23 + 9 * c) + phase) + np.cos(y / (17 + 5 * c) - phase) for c in range(3)]
            picture = np.stack([(w * 60 + 128).astype(np.uint8) for w in waves], axis=-1)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[number], _MS
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def _decoded(dali: DaliBackend, index: VideoIndex, frames: Sequence[int]) -> dict[int, np.ndarray]:
    given: dict[int, np.ndarray] = {}

    def sink(number: int, picture: torch.Tensor) -> None:
        given[number] = picture.numpy().astype(np.int16)

    dali.decode(plan_decode(index, frames), sink)
    return given


def _film(dali: DaliBackend, path: Path, name: str) -> list[Record]:
    index = probe(path)
    with av.open(str(path)) as source:
        truth = np.stack([f.to_ndarray(format="rgb24") for f in source.decode(video=0)]).astype(np.int16)
    some = sorted(np.random.default_rng(SEED).choice(index.n_frames, size=9, replace=False).tolist())
    asked, right, far, seconds = 0, 0, [], []
    for frames in (list(range(index.n_frames)), some, [index.n_frames - 1]):
        began = time.perf_counter()
        given = _decoded(dali, index, frames)
        seconds.append(time.perf_counter() - began)
        asked += len(frames)
        for number, picture in given.items():
            apart = np.abs(truth - picture).mean(axis=(1, 2, 3))
            right += int(apart.argmin()) == number
            far.append(float(apart[number]))
    return [
        summarize(ARM, name, "frames asked for", "frames", [asked]),
        summarize(ARM, name, "frames right", "frames", [right]),
        summarize(ARM, name, "difference from PyAV", "mean levels", far),
        summarize(ARM, name, "time for all frames", "s", [seconds[0]]),
    ]


def _faults(dali: DaliBackend, folder: Path) -> list[Record]:
    """Frames that aren't there, and a good file after a bad one."""
    good = probe(_made(folder / "good.webm", "vp9.webm"))
    before = _decoded(dali, good, [3, 30])
    longer = np.append(good.ticks, good.ticks[-1] + 40)
    promising = replace(good, ticks=longer, times=np.append(good.times, good.times[-1] + 0.04))
    refused = sum(_fails(dali, index, [good.n_frames]) for index in (good, promising))
    data = bytearray(good.path.read_bytes())
    at = data.find(b"\x49\x83\x42")  # of VP9's first key picture
    data[at - 1 : at + 3] = b"\xff\xff\xff\xff"
    bad = folder / "bad.webm"
    bad.write_bytes(data)
    failed = _fails(dali, probe(bad), [0, 3])
    after = _decoded(dali, good, [3, 30])
    same = all(np.array_equal(before[n], after[n]) for n in before)
    return [
        summarize(ARM, "frames out of range", "refused", "of 2", [refused]),
        summarize(ARM, "damaged file", "refused", "of 1", [failed]),
        summarize(ARM, "good file after a damaged one", "same bits", "of 1", [same]),
    ]


def _fails(dali: DaliBackend, index: VideoIndex, frames: list[int]) -> bool:
    try:
        _decoded(dali, index, frames)
    except VideoError:
        return True
    return False


def claims(records: list[Record]) -> list[Claim]:
    asked = sum(r.median for r in records if r.metric == "frames asked for")
    right = sum(r.median for r in records if r.metric == "frames right")
    far = [r.median for r in records if r.metric == "difference from PyAV"]
    refused = sum(r.median for r in records if r.metric == "refused")
    same = sum(r.median for r in records if r.metric == "same bits")
    return [
        Claim("dali.cpu.right", "share of frames from DALI on the CPU that are the ones asked for", right / asked, 1.0),
        Claim("dali.cpu.difference", "their mean difference from PyAV's, levels of 255", max(far), 3.0, "<="),
        Claim("dali.cpu.refused", "frames out of range (2) and a damaged file (1) refused", refused, 3.0),
        Claim("dali.cpu.after", "a good file decodes to the same bits after a damaged one", same, 1.0),
    ]


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``films``: a row a film."""
    records = records_of(result)
    values = {(r.shape, r.metric): r.median for r in records}
    rows = ["| film | frames right | mean difference from PyAV |", "|---|---|---|"]
    rows += [
        f"| {name} | {values[name, 'frames right']:.0f} of {values[name, 'frames asked for']:.0f} "
        f"| {values[name, 'difference from PyAV']:.2f} |"
        for name in dict.fromkeys(r.shape for r in records if r.metric == "frames asked for")
    ]
    return {"films": "\n".join(rows)}
