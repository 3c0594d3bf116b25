"""NVIDIA DALI: NVDEC with RGB pictures that stay on the GPU; without one VP8, VP9 and MJPEG on the CPU.

DALI numbers the pictures of a file by its packets, so it gets a plan's segments remuxed (`vrlt_fast.video.remux`), and
gives black pictures beyond the end, so every number is checked before it is asked. Its conversion to RGB isn't
FFmpeg's: the right pictures, not the same bits. A damaged packet whose picture the decoder patches up isn't told from a
sound one.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vrlt_fast.video.backends import nvdec
from vrlt_fast.video.backends.base import Availability, DecodeStats, Sink
from vrlt_fast.video.backends.foreign import upright
from vrlt_fast.video.index import VideoIndex, video_error
from vrlt_fast.video.plan import DecodePlan
from vrlt_fast.video.remux import Remuxed, obstacle, remux

_ON_CPU = ("mjpeg", "vp8", "vp9")
_ON_GPU = (*_ON_CPU, "av1", "h264", "hevc", "mpeg4")


@cache
def _imported() -> str:
    """Why DALI can't be used; empty where it can."""
    try:
        import_module("nvidia.dali.fn")
    except (ImportError, OSError, RuntimeError) as error:
        return " ".join(f"{error}".split())
    return ""


class DaliBackend:
    """Decodes all segments of a plan in batches; the pipeline stays warm and is made anew after a bad file.

    Args:
        device: "cuda", "cuda:N" or "cpu".
        files: segments decoded at once, the most that a batch holds.
        surface_bytes: of RGB pictures that a batch may have at once; at least one picture is always decoded.
    """

    name = "dali"
    isolate = False

    def __init__(self, device: str = "cuda", *, files: int = 8, surface_bytes: int = 2**30) -> None:
        if files < 1 or surface_bytes < 1:
            raise ValueError(f"files {files} and surface_bytes {surface_bytes} must be positive")
        self.device = device
        self._where = torch.device(device)
        self._ordinal = self._where.index or 0
        self._files, self._surface_bytes = files, surface_bytes
        self._pipeline: Any = None
        self._lock = threading.Lock()

    def availability(self) -> Availability:
        missing = _imported()
        if missing:
            fix = "pip install 'vrlt-fast[gpu]' (CUDA 13) or 'vrlt-fast[gpu-cu12]'"
            return Availability(False, f"DALI can't be imported: {missing}", fix)
        return Availability(True) if self._where.type == "cpu" else nvdec.availability(self._ordinal)

    def supports(self, index: VideoIndex) -> str:
        codec = index.codec
        if self._where.type == "cpu":
            return obstacle(index) or ("" if codec in _ON_CPU else f"DALI doesn't decode {codec} on the CPU")
        reason = "" if codec in _ON_GPU else f"DALI doesn't decode {codec}"
        return obstacle(index) or reason or nvdec.refusal(index, self._ordinal)

    def decode(self, plan: DecodePlan, sink: Sink) -> DecodeStats:
        """As `Backend.decode`. The sink runs on the current stream, which is waited for before memory is reused."""
        stats = DecodeStats()
        for batch in self._batches(plan):
            with self._lock:
                self._give(plan.index, batch, sink)
            stats.decoded += sum(max(part.places) + 1 for part in batch)
        stats.dropped = sum(segment.dropped for segment in plan.segments)
        return stats

    def _batches(self, plan: DecodePlan) -> Iterator[list[Remuxed]]:
        """Segments that fit into the surface budget together; one that alone doesn't is asked for piece by piece."""
        room = max(1, self._surface_bytes // max(1, 3 * plan.index.height * plan.index.width))
        batch: list[Remuxed] = []
        for part in _pieces(remux(plan), room):
            if batch and (len(batch) == self._files or sum(len(p.targets) for p in [*batch, part]) > room):
                yield batch
                batch = []
            batch.append(part)
        if batch:
            yield batch

    def _give(self, index: VideoIndex, batch: list[Remuxed], sink: Sink) -> None:
        for part in batch:
            if max(part.places) >= part.pictures:
                raise ValueError(f"place {max(part.places)} of {part.pictures}")
        try:
            if self._pipeline is None:
                self._pipeline = self._built()
            self._pipeline.feed_input("files", [np.frombuffer(part.data, dtype=np.uint8) for part in batch])
            self._pipeline.feed_input("places", [np.array(part.places, dtype=np.int32) for part in batch])
            (pictures,) = self._pipeline.run()
        except (RuntimeError, ValueError) as error:
            self._pipeline = None  # a pipeline that has failed gives nothing more
            raise video_error("VRLT-V02", index.path, "decoding failed", _last_line(error)) from None
        try:
            for number, part in enumerate(batch):
                frames = self._tensor(pictures[number])
                for frame, picture in zip(part.targets, frames, strict=True):
                    sink(frame, upright(index, picture))
        finally:
            if self._where.type == "cuda":
                torch.cuda.current_stream(self._where).synchronize()

    def _tensor(self, pictures: Any) -> torch.Tensor:
        """A view of DALI's memory, valid until the pipeline runs again."""
        if self._where.type == "cuda":
            return torch.utils.dlpack.from_dlpack(pictures)
        return torch.from_numpy(np.asarray(pictures))

    def _built(self) -> Any:
        dali, fn = import_module("nvidia.dali"), import_module("nvidia.dali.fn")
        gpu = self._where.type == "cuda"
        pipeline = dali.Pipeline(
            batch_size=self._files,
            num_threads=self._files if gpu else min(2, self._files),
            device_id=self._ordinal if gpu else None,
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        with pipeline:
            files = fn.external_source(name="files", dtype=dali.types.UINT8, ndim=1)
            places = fn.external_source(name="places", dtype=dali.types.INT32, ndim=1)
            device = "mixed" if gpu else "cpu"
            pipeline.set_outputs(fn.decoders.video(files, device=device, frames=places, pad_mode="none", affine=False))
        pipeline.build()
        _silence(Path(str(dali.__file__)).parent)
        return pipeline


def _silence(package: Path) -> None:
    """DALI carries its own FFmpeg, which writes to stderr; its log level DALI sets again for every file."""
    for library in package.glob(".libs/libavutil-*.so*"):
        ctypes.CDLL(str(library)).av_log_set_callback(None)


def _pieces(parts: Iterable[Remuxed], room: int) -> Iterator[Remuxed]:
    for part in parts:
        for start in range(0, len(part.targets), room):
            cut = slice(start, start + room)
            yield replace(part, targets=part.targets[cut], places=part.places[cut])


def _last_line(error: Exception) -> str:
    """DALI's messages begin with a traceback of the pipeline's definition and end with C++ stack frames."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line.startswith(("Error when", "Assert on", "Unexpected", "[/opt/"))]
    return (said or [line for line in lines if line] or [""])[0][:300]
