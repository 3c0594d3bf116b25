"""Video files to frames and patches: the choice of a decoder, isolation, what happens to files that don't decode.

Frames are exact or a :class:`~vrlt_fast.errors.VideoError` says why not; only ``on_error="tolerant"`` puts the nearest
frame in the place of one that can't be decoded, and counts it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vrlt_fast.errors import Problem, SetupError, VideoError
from vrlt_fast.video.backends.base import Availability, Backend, DecodeStats, OnError, decode_all
from vrlt_fast.video.backends.pyav import PyAVBackend
from vrlt_fast.video.fill import PatchSink, grid_of, patch_shape, same_size
from vrlt_fast.video.index import VideoIndex, video_error
from vrlt_fast.video.plan import DecodePlan, plan_decode, split_plan
from vrlt_fast.video.poison import PoisonList
from vrlt_fast.video.preprocess import Geometry
from vrlt_fast.video.workers.main import load_backend
from vrlt_fast.video.workers.pool import Done, Task, WorkerLost, WorkerPool
from vrlt_fast.video.workers.shared import shared_bytes

_PYAV = "vrlt_fast.video.backends.pyav:PyAVBackend"
BACKENDS = {
    "dali": "vrlt_fast.video.backends.dali:DaliBackend",
    "torchcodec-cuda": "vrlt_fast.video.backends.torchcodec:TorchcodecBackend:cuda",
    "pyav": _PYAV,
    "torchcodec": "vrlt_fast.video.backends.torchcodec:TorchcodecBackend:cpu",
    "decord": "vrlt_fast.video.backends.decord:DecordBackend",
}
"""Decoders by name, the one that ``auto`` prefers first."""


@dataclass(frozen=True)
class Report:
    """How a clip was decoded.

    ``decoded`` frames that the decoder gave, ``dropped`` packets that it didn't need to see, ``substituted`` the frame
    that stands in for each one that can't be decoded, CPU ``seconds`` by stage, ``passed_over`` why preferred decoders
    weren't taken.
    """

    backend: str
    decoded: int
    dropped: int
    substituted: Mapping[int, int]
    seconds: Mapping[str, float]
    passed_over: tuple[str, ...] = ()


class _Job:
    """One clip on its way: memory for its patches, shared with the workers where ``device`` is None."""

    def __init__(
        self, plan: DecodePlan, frames: Sequence[int], size: tuple[int, int], geometry: Geometry, device: str | None
    ):
        self.plan, self.size, self.geometry = plan, size, geometry
        self.slots: dict[int, list[int]] = {}
        for place, frame in enumerate(frames):
            self.slots.setdefault(frame, []).append(place)
        shape = patch_shape(grid_of(len(frames), size, geometry), geometry)
        self.descriptor = -1
        if device is None:
            self.descriptor, memory = shared_bytes(shape[0] * shape[1])
            self.out = memory.view(shape)
        else:
            self.out = torch.empty(shape, dtype=torch.uint8, device=device)
        self.sink = PatchSink(self.out, self.slots, size, geometry, plan.index.path)

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *error: object) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def task(self, backend: str, part: DecodePlan, names: Mapping[int, Sequence[int]]) -> Task:
        mine = {frame: tuple(names[frame]) for frame in part.frames}
        return Task(
            backend, part, mine, self.slots, self.size, self.geometry, self.descriptor, self.out.numel()
        )  # fmt: skip


class Decoder:
    """Decodes clips; may be used from several threads.

    Args:
        backend: a name of ``BACKENDS``, or "auto": the first one that can run here and can take the file. A file that
            the named one can't take is decoded by PyAV; ``counts`` says how often and why.
        workers: processes that decode. 0 decodes in this process: no deadline, and a crash takes the run along.
            Decoders that may hang get a process in any case.
        deadline_s: seconds that a piece of work may take on top of five times its predicted cost.
        poison: file that lists the videos that made a decoder hang or crash; None remembers them in memory.
        on_error: "strict", or "tolerant": the nearest frame stands in for one that can't be decoded.
        start_s: seconds that the start of a process may take.
        elide: leave out packets that no frame asked for needs.
        part_pixels: decoded pixels that are worth a piece of work of its own, which opens the file once more.
        specs: other decoders than ``BACKENDS``, as name to "module:class"; ``paths``: folders to import them from.

    Raises:
        SetupError: E01 when the named backend can't run here.
        ValueError: unknown name.
    """

    def __init__(
        self,
        backend: str = "auto",
        *,
        workers: int = 0,
        deadline_s: float = 20.0,
        poison: Path | None = None,
        on_error: OnError = "strict",
        start_s: float = 120.0,
        elide: bool = True,
        part_pixels: int = 50_000_000,
        specs: Mapping[str, str] | None = None,
        paths: Sequence[str] = (),
    ):
        self.specs = dict(specs or BACKENDS)
        if backend != "auto" and backend not in self.specs:
            raise ValueError(f"unknown decoder {backend}; there are auto, {', '.join(self.specs)}")
        if workers < 0:
            raise ValueError("workers must not be negative")
        self.backend, self.workers, self.on_error = backend, workers, on_error
        self.elide, self.part_pixels = elide, max(part_pixels, 1)
        self.counts: Counter[str] = Counter()
        self.poison = PoisonList(poison)
        self._deadline_s, self._start_s, self._paths = deadline_s, start_s, tuple(paths)
        self._pool = self._new_pool()
        self._loaded: dict[str, Backend | str] = {}
        if backend != "auto" and isinstance(reason := self._load(backend), str):
            raise SetupError(Problem("VRLT-E01", f"the decoder {backend} can't run here", "", reason, "vrlt doctor"))

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def _new_pool(self) -> WorkerPool:
        return WorkerPool(max(self.workers, 1), deadline_s=self._deadline_s, start_s=self._start_s, paths=self._paths)

    def patches(
        self, index: VideoIndex, frames: Sequence[int], size: tuple[int, int], geometry: Geometry
    ) -> tuple[torch.Tensor, tuple[int, int, int], Report]:
        """Decode, resize and patchify.

        Args:
            frames: an even number of presentation-order frame numbers, any order, repeats allowed.
            size: (height, width) after the resize, multiples of ``geometry.factor``.

        Returns:
            Patches uint8 [t * h * w, 3 * 2 * patch * patch] on the decoder's device, the grid (t, h, w), a report.

        Raises:
            VideoError: V02, V04 or V05 frames that can't be decoded; V06 a size that changes; V08 the decoder hung or
                crashed; V09 it did so before.
            ValueError: an odd number of frames, or a side that is no multiple.
        """
        self.poison.check(index.path)
        grid = grid_of(len(frames), size, geometry)
        plan = plan_decode(index, frames, elide=self.elide)
        name, backend, reasons = self._choose(index)
        found: tuple[torch.Tensor, DecodeStats] | None = None
        if name != "pyav":
            try:
                found = self._decode(name, backend, plan, frames, (size, geometry))
            except VideoError as error:
                if error.code == "VRLT-V08":
                    raise
                reasons = [*reasons, f"{name}: {error.problems[0].what}"]
                name, backend = "pyav", PyAVBackend(self.on_error)
        out, stats = found or self._decode(name, backend, plan, frames, (size, geometry))
        self.counts.update(reasons)
        self.counts[f"decoded by {name}"] += 1
        self.counts["frames decoded"] += stats.decoded
        self.counts["frames substituted"] += len(stats.substituted)
        report = Report(name, stats.decoded, stats.dropped, stats.substituted, stats.seconds or {}, tuple(reasons))
        return out, grid, report

    def takes(self, index: VideoIndex) -> str:
        """Name of the decoder that a file goes to first."""
        return self._choose(index)[0]

    def _load(self, name: str) -> Backend | str:
        """The backend, or why it can't run here."""
        if name not in self._loaded:
            try:
                backend: Backend = load_backend(self.specs[name])
                state = backend.availability()
            except ImportError as error:
                state = Availability(False, str(error))
            self._loaded[name] = backend if state.ok else state.reason
        return self._loaded[name]

    def _choose(self, index: VideoIndex) -> tuple[str, Backend, list[str]]:
        reasons: list[str] = []
        for name in self.specs if self.backend == "auto" else (self.backend, "pyav"):
            backend = self._load(name)
            reason = backend if isinstance(backend, str) else backend.supports(index)
            if not isinstance(backend, str) and not reason:
                return name, backend, reasons
            reasons.append(f"{name}: {reason}")
        raise SetupError(Problem("VRLT-E01", "no video decoder can run here", "", "; ".join(reasons), "vrlt doctor"))

    def _decode(
        self,
        name: str,
        backend: Backend,
        plan: DecodePlan,
        frames: Sequence[int],
        target: tuple[tuple[int, int], Geometry],
    ) -> tuple[torch.Tensor, DecodeStats]:
        apart = backend.isolate or (name == "pyav" and self.workers > 0)
        with _Job(plan, frames, *target, device=None if apart else backend.device) as job:
            if name == "pyav":
                return job.out, decode_all(plan, lambda part, names: self._attempt(job, part, names), self.on_error)
            if apart:
                return job.out, self._parallel(self.specs[name], job, plan, {f: (f,) for f in plan.frames})
            return job.out, backend.decode(plan, job.sink)

    def _attempt(self, job: _Job, part: DecodePlan, names: Mapping[int, Sequence[int]]) -> DecodeStats:
        if self.workers == 0:
            return PyAVBackend().attempt(part, names, job.sink)
        return self._parallel(BACKENDS["pyav"], job, part, names)

    def _parallel(self, backend: str, job: _Job, plan: DecodePlan, names: Mapping[int, Sequence[int]]) -> DecodeStats:
        """Decode a plan in worker processes, a part of its segments each.

        Raises:
            VideoError: the backend's; V08 when it hung or crashed, and then the file is on the list.
        """
        parts = split_plan(plan, max(1, min(3 * self.workers, plan.cost // self.part_pixels)))
        tasks = [job.task(backend, part, names) for part in parts]
        total = DecodeStats()
        for done in self._run(tasks, plan.index.path):
            total.add(done.stats)
            total.missing += done.stats.missing
            total.intact += done.stats.intact
            total.why = total.why or done.stats.why
            total.substituted.update(done.stats.substituted)
            if done.shape is not None:
                job.sink.expect(done.shape)
        total.missing = tuple(sorted(total.missing))
        return total

    def _run(self, tasks: Sequence[Task], path: Path) -> list[Done]:
        if self._pool.owner != os.getpid():
            self._pool = self._new_pool()
        try:
            try:
                return self._pool.run(tasks)
            except WorkerLost as error:
                if error.blame:
                    raise
                return self._pool.run(tasks)
        except WorkerLost as error:
            self.counts["decoders lost"] += 1
            if error.blame:
                self.poison.add(path, str(error))
            raise video_error("VRLT-V08", path, "video made the decoder hang or crash", str(error)) from None


class _Frames:
    """A sink that keeps whole pictures."""

    def __init__(self, index: VideoIndex, frames: Sequence[int]):
        self.index, self.count = index, len(frames)
        self.places: dict[int, list[int]] = {}
        for place, frame in enumerate(frames):
            self.places.setdefault(frame, []).append(place)
        self.out: np.ndarray | None = None

    def __call__(self, number: int, picture: torch.Tensor) -> None:
        if self.out is None:
            self.out = np.empty((self.count, *picture.shape), dtype=np.uint8)
        same_size(self.index.path, self.out.shape[1:3], picture.shape[:2])
        for place in self.places[number]:
            self.out[place] = picture.numpy()


def decode_frames(index: VideoIndex, frames: Sequence[int]) -> np.ndarray:
    """RGB frames, uint8 [len(frames), H, W, 3], turned upright where the file says so; decoded in this process.

    Args:
        index: from :func:`~vrlt_fast.video.index.probe`.
        frames: presentation-order frame numbers, any order, repeats allowed.

    Raises:
        VideoError: V02, V04 or V05 when a frame can't be decoded, never another frame in its place; V06 when the frames
            differ in size.
        ValueError: no frames asked for.
    """
    sink = _Frames(index, frames)
    PyAVBackend().decode(plan_decode(index, frames), sink)
    if sink.out is None:
        raise RuntimeError("the decoder gave no frame and no error")
    return sink.out
