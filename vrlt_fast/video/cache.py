"""From a path to a clip, decoded once: an LRU of uint8 patches in host memory under a byte budget."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path

from vrlt_fast.config import VideoConfig
from vrlt_fast.video.decode import decode_frames
from vrlt_fast.video.index import probe
from vrlt_fast.video.preprocess import Clip, Geometry, to_clip
from vrlt_fast.video.sampling import sample_frames, seconds_per_grid


class ClipLoader:
    """Loads clips with one video configuration; keeps the most recently used ones.

    Counters: ``decoded`` (clips decoded) and ``hits`` (clips found in the cache).
    """

    def __init__(self, video: VideoConfig, geometry: Geometry):
        self.video, self.geometry = video, geometry
        self.decoded = self.hits = 0
        self._budget = int(video.cache_gb * 1e9)
        self._used = 0
        self._clips: OrderedDict[tuple[str, int, int], Clip] = OrderedDict()

    def load(self, path: Path) -> Clip:
        """The clip of a file. Raises VideoError (V01-V06)."""
        identity = self._identity(path)
        if identity is not None and identity in self._clips:
            self._clips.move_to_end(identity)
            self.hits += 1
            return self._clips[identity]
        clip = self._decode(path)
        self.decoded += 1
        if identity is not None and clip.nbytes <= self._budget:
            self._clips[identity] = clip
            self._used += clip.nbytes
            while self._used > self._budget:
                self._used -= self._clips.popitem(last=False)[1].nbytes
        return clip

    def _decode(self, path: Path) -> Clip:
        index = probe(path)
        numbers = sample_frames(index.n_frames, index.fps, self.video)
        frames = decode_frames(index, numbers)
        times = tuple(float(index.times[i]) for i in numbers)
        v = self.video
        plan = f"{self.geometry} {v.min_pixels} {v.max_pixels} {numbers}"
        digest = hashlib.blake2b(digest_size=16, key=hashlib.sha256(plan.encode()).digest())
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        return to_clip(
            frames,
            times,
            seconds_per_grid=seconds_per_grid(index.n_frames, index.fps, len(numbers)),
            geometry=self.geometry,
            min_pixels=v.min_pixels,
            max_pixels=v.max_pixels,
            key=digest.hexdigest(),
            where=str(path),
        )

    @staticmethod
    def _identity(path: Path) -> tuple[str, int, int] | None:
        try:
            stat = path.stat()
        except OSError:
            return None
        return str(path), stat.st_size, stat.st_mtime_ns
