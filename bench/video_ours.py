"""Our arms of the case ``video``, in a process of their own: ``python -m bench.video_ours JOB``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.video_arm import Arm, Job, serve
from vrlt_fast.config import VideoConfig
from vrlt_fast.video.backends.pyav import PyAVBackend
from vrlt_fast.video.cache import ClipLoader
from vrlt_fast.video.decode import Decoder, decode_frames
from vrlt_fast.video.index import VideoIndex, probe
from vrlt_fast.video.plan import plan_decode, split_plan
from vrlt_fast.video.preprocess import Geometry, SizeRule, patchify, resize
from vrlt_fast.video.sampling import TUBELET, SampleSettings, choose
from vrlt_fast.video.store.frame_cache import CacheSettings, Decoded, FrameCache
from vrlt_kernels.patchify import patchify_into

GEOMETRY = Geometry(14, 2)
RULE = SizeRule("qwen2", 128 * 28**2, 768 * 28**2, int(0.9 * 128_000 * 28**2))
"""What qwen-vl-utils resizes to."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HEAD = 2048  # rows that are kept as floats for parity


class _Arm:
    def __init__(self, job: Job):
        self.job, self.path = job, Path(job.video)
        self.result: Any = None

    def drop(self) -> None:
        self.result = None

    def save(self, path: Path) -> None:
        np.save(path / "levels.npy", self.result.numpy())

    def step(self) -> dict[str, float]:
        raise NotImplementedError


class Default(_Arm):
    """uint8 patches by the native resampler; worker processes decode."""

    def __init__(self, job: Job):
        super().__init__(job)
        self.decoder = Decoder("pyav", workers=job.workers)

    def step(self) -> dict[str, float]:
        self.result, _, report = self.decoder.patches(probe(self.path), self.job.frames, self.job.size, GEOMETRY)
        return {"decoded": report.decoded, "dropped": report.dropped}


class Like(_Arm):
    """Like for like: the peer's resampler (fp32, rounded once) and normalised fp32 patches; threads decode."""

    def step(self) -> dict[str, float]:
        job, index = self.job, probe(self.path)
        plan = plan_decode(index, job.frames)
        rows = len(job.frames) // TUBELET * job.size[0] * job.size[1] // GEOMETRY.patch**2
        out = torch.empty(rows, 3 * TUBELET * GEOMETRY.patch**2)
        slots = {frame: slot for slot, frame in enumerate(job.frames)}

        def sink(number: int, picture: torch.Tensor) -> None:
            patchify_into(
                out, picture[None], [slots[number]], job.size, patch=GEOMETRY.patch, merge=GEOMETRY.merge,
                tubelet=TUBELET, resample="float", normalize=(MEAN, STD),
            )  # fmt: skip

        with ThreadPoolExecutor(job.workers) as pool:
            parts = split_plan(plan, 2 * job.workers)
            stats = list(pool.map(lambda part: PyAVBackend().decode(part, sink), parts))
        self.result = out
        return {"decoded": sum(s.decoded for s in stats), "dropped": sum(s.dropped for s in stats)}

    def save(self, path: Path) -> None:
        mean, std = (np.repeat(np.array(x, np.float32), TUBELET * GEOMETRY.patch**2) for x in (MEAN, STD))
        values = self.result.numpy()
        np.save(path / "head.npy", values[:_HEAD])
        levels = np.empty(values.shape, np.uint8)
        for i in range(0, len(levels), 4096):
            levels[i : i + 4096] = ((values[i : i + 4096] * std + mean) * 255).round()
        np.save(path / "levels.npy", levels)


class Frames(_Arm):
    """RGB frames of the source's size, decoded in one thread."""

    def step(self) -> dict[str, float]:
        self.result = decode_frames(probe(self.path), self.job.frames)
        return {}

    def save(self, path: Path) -> None:
        np.save(path / "levels.npy", self.result.reshape(len(self.result), -1))


class Plain(_Arm):
    """The plain way: PyAV from the first frame on, counting frames; torch's resize; patches. Only for parity."""

    def step(self) -> dict[str, float]:
        import av

        places = {frame: place for place, frame in enumerate(self.job.frames)}
        pictures: dict[int, torch.Tensor] = {}
        with av.open(str(self.path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in places:
                    picture = frame.to_ndarray(format="rgb24")
                    pictures[places[number]] = (
                        torch.from_numpy(picture).flatten()
                        if self.job.stage == "frames"
                        else resize(picture[None], *self.job.size)[0]
                    )
                if len(pictures) == len(places):
                    break
        stacked = torch.stack([pictures[i] for i in range(len(places))])
        self.result = stacked if self.job.stage == "frames" else patchify(stacked, GEOMETRY)[0]
        return {}


class Cached(_Arm):
    """The loader with a cache on disk: the first process that loads the clip fills it."""

    def __init__(self, job: Job):
        super().__init__(job)
        self.decoder = Decoder("pyav", workers=job.workers)
        settings = CacheSettings(disk_bytes=8 << 30, disk_folder=Path(job.folder) / "cache", min_free=0)
        self.loader = ClipLoader(
            VideoConfig(),
            GEOMETRY,
            cache=FrameCache(settings),
            decode=self._decode,
            settings=SampleSettings("qwen_utils", num_frames=len(job.frames)),
            rule=RULE,
        )

    def _decode(self, index: VideoIndex, frames: Any, size: tuple[int, int], geometry: Geometry) -> Decoded:
        return Decoded(self.decoder.patches(index, frames, size, geometry)[0])

    def step(self) -> dict[str, float]:
        hits = self.loader.hits
        patches = self.loader.load(self.path).patches
        patches.view(-1)[:: 1 << 12].sum()  # a mapping costs nothing until its pages are touched
        self.result = patches
        return {"hit": self.loader.hits - hits}


ARMS: dict[str, Callable[[Job], Arm]] = {"default": Default, "like": Like, "plain": Plain, "cache": Cached}


def frames_and_size(path: Path, count: int) -> tuple[list[int], tuple[int, int]]:
    """What qwen-vl-utils chooses for this many frames, and the size it resizes them to."""
    index = probe(path)
    frames = list(choose(index, SampleSettings("qwen_utils", num_frames=count)).frames)
    height, width = (index.width, index.height) if index.rotation % 180 else (index.height, index.width)
    return frames, RULE.size(len(frames), height, width, GEOMETRY.factor)


def main(argv: list[str]) -> int:
    job = Job(**json.loads(argv[0]))
    frames = job.stage == "frames" and job.arm != "plain"
    return serve(job, Frames if frames else ARMS[job.arm])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
