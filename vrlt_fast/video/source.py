"""The clips of a run: decoder, caches and loading ahead, from one configuration."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from vrlt_fast.config import VideoConfig
from vrlt_fast.video.cache import HORIZON, ClipLoader, decoding
from vrlt_fast.video.decode import Decoder
from vrlt_fast.video.index_cache import IndexCache
from vrlt_fast.video.prefetch import Prefetcher
from vrlt_fast.video.preprocess import Clip, Geometry
from vrlt_fast.video.store.frame_cache import CacheSettings, FrameCache, shared_folder

_GB = 10**9


class Clips(Protocol):
    """Where clips come from: a :class:`ClipSource`, or a ClipLoader alone."""

    def load(self, path: Path) -> Clip:
        """The clip of a file. Raises VideoError (V codes)."""

    def expect(self, order: Iterable[Path]) -> None:
        """The files that will be loaded next, in order; may be endless."""


class ClipSource:
    """Loads clips; close it when done. Safe to use from several threads.

    Args:
        folder: keeps the list of videos that made a decoder hang or crash; None: ``video.cache_dir``, else this
            process's memory.
        device: of the GPU cache.
        warn: called with one line where a cache can't be used.
        part: rank and number of processes that share each clip.
    """

    def __init__(
        self,
        video: VideoConfig,
        geometry: Geometry,
        *,
        folder: Path | None = None,
        device: torch.device | None = None,
        warn: Callable[[str], None] | None = None,
        part: tuple[int, int] = (0, 1),
    ):
        keep = Path(video.cache_dir) if video.cache_dir else None
        listed = keep or folder
        self.decoder = Decoder(
            video.decoder,
            workers=decoding_processes(video),
            deadline_s=video.deadline,
            poison=listed / "poisoned_videos.jsonl" if listed else None,
            on_error=video.on_error,
        )
        settings = CacheSettings(
            host_bytes=int(video.cache_gb * _GB),
            host_folder=shared_folder() if video.cache_shared else None,
            disk_bytes=int(video.cache_disk_gb * _GB) if keep else 0,
            disk_folder=keep / "patches" if keep else None,
            gpu_bytes=int(video.cache_gpu_gb * _GB),
            device=device if device is not None and device.type == "cuda" else None,
        )
        self.cache = FrameCache(settings, warn=warn) if warn else FrameCache(settings)
        decode, pixels = decoding(self.decoder)
        index = IndexCache(keep / "indices" if keep else None)
        how: dict[str, Any] = {"cache": self.cache, "decode": decode, "pixels": pixels, "index": index}
        self.loader = ClipLoader(video, geometry, part=part, **how)
        self._ahead = Prefetcher(self.loader, threads=video.prefetch)
        self._uses: Iterator[Path] = iter(())
        self._window: deque[Path] = deque()
        self._used = 0

    def __enter__(self) -> ClipSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def decoded(self) -> int:
        """Clips of which anything was decoded."""
        return self.loader.decoded

    @property
    def hits(self) -> int:
        """Clips that were in a cache."""
        return self.loader.hits

    def load(self, path: Path) -> Clip:
        """The clip of a file. Raises VideoError (V codes)."""
        self._used += 1
        if self._used > HORIZON // 2 and len(self._window) == HORIZON:
            self._look_ahead(self._used)
        return self._ahead.load(path)

    def expect(self, order: Iterable[Path]) -> None:
        """The files that will be loaded next, in order, each as often as it will be; may be endless."""
        ahead, self._uses = itertools.tee(order)
        self._window.clear()
        self._look_ahead(0)
        self._ahead.expect(ahead)

    def close(self) -> None:
        """End the threads and processes. Clips handed out stay valid."""
        self._ahead.close()
        self.decoder.close()
        self.cache.close()

    def _look_ahead(self, past: int) -> None:
        for _ in range(min(past, len(self._window))):
            self._window.popleft()
        self._window.extend(itertools.islice(self._uses, HORIZON - len(self._window)))
        self._used = 0
        self.cache.expect(self._window)


def decoding_processes(video: VideoConfig) -> int:
    """``video.workers``, with -1 resolved for this machine."""
    return video.workers if video.workers >= 0 else min(8, max(1, (os.cpu_count() or 1) // 2))
