"""Decoded patches, kept: on the GPU, in host memory (of one process or shared by all), on disk; each under its budget.

The unit is a tubelet: what a clip lacks is decoded, what another clip of the same video and geometry has is taken from
there. A decoded clip goes to each tier that has room for it or would rather have it than what it has; a clip found in
host memory or on disk stays where it is, mapped, without a copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from vrlt_fast.video.index import VideoIndex
from vrlt_fast.video.preprocess import Geometry
from vrlt_fast.video.sampling import TUBELET
from vrlt_fast.video.store.entry import SCHEMA, Run
from vrlt_fast.video.store.eviction import Entry, Evictor, Horizon
from vrlt_fast.video.store.folder import Claim, Store

LAYOUT = "merged-1"
"""Order of patches and of the bytes in them, as :func:`vrlt_fast.video.preprocess.patchify` has it."""

_log = logging.getLogger("vrlt_fast")


class Decoded(NamedTuple):
    """Patches uint8 [t * h * w, 3 * 2 * patch * patch] on any device; ``exact``: they are what the run's name
    says, every frame is the one asked for. Others aren't kept.
    """

    patches: torch.Tensor
    exact: bool = True


class Fetched(NamedTuple):
    """Patches, how many of their tubelets were decoded now, and whether all are exact."""

    patches: torch.Tensor
    fresh: int
    exact: bool


@dataclass(frozen=True)
class CacheSettings:
    """Budgets and places.

    Args:
        host_bytes: host memory; 0: none.
        host_folder: a folder in shared memory for it, for all processes of a machine (:func:`shared_folder`); emptied
            by the last one that leaves. None: memory of this process alone.
        disk_bytes, disk_folder: a folder on disk, kept. None: none.
        min_free: bytes to leave free on the disk.
        gpu_bytes, device: memory of a device; what is fetched then comes as its tensors.
        wait_s: how long to wait for another process that decodes the same clip.
    """

    host_bytes: int = 0
    host_folder: Path | None = None
    disk_bytes: int = 0
    disk_folder: Path | None = None
    min_free: int = 1 << 30
    gpu_bytes: int = 0
    device: torch.device | None = None
    wait_s: float = 60.0


def shared_folder() -> Path:
    """This user's folder in the machine's shared memory."""
    return Path("/dev/shm") / f"vrlt-{os.geteuid()}"


def run_of(
    content: str, index: VideoIndex, frames: Sequence[int], size: tuple[int, int], geometry: Geometry, *, pixels: str
) -> Run:
    """The run of tubelets that a clip consists of.

    Args:
        content: digest of the file's bytes.
        frames: an even count, all of the video's.
        size: height and width after resizing.
        pixels: name of how frames become RGB and are resized; equal names, equal patches.
    """
    decides = {
        "schema": SCHEMA,
        "content": content,
        "stream": index.stream,
        "time_base": str(index.time_base),
        "rotation": index.rotation,
        "size": size,
        "pixels": pixels,
        "patch": geometry.patch,
        "merge": geometry.merge,
        "tubelet": TUBELET,
        "layout": LAYOUT,
    }
    base = hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=16).digest()
    ticks = [int(index.ticks[i]) for i in frames]
    height, width = size[0] // geometry.patch, size[1] // geometry.patch
    pairs = tuple(zip(ticks[::TUBELET], ticks[1::TUBELET], strict=True))
    return Run(base, pairs, height, width, 3 * TUBELET * geometry.patch**2)


class TensorTier:
    """Tensors of one device under a budget."""

    def __init__(self, budget: int, horizon: Horizon, count: Callable[[str], None], device: torch.device | None = None):
        self.budget, self.device = budget, device
        self._horizon, self._evictor, self._count = horizon, Evictor(horizon), count
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._held: dict[str, tuple[Run, torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(entry.size for entry in self._entries.values())

    def find(self, run: Run) -> torch.Tensor | None:
        with self._lock:
            held = self._held.get(run.name)
            if held is None:
                return None
            self._entries[run.name].last = self._horizon.clock
            return held[1]

    def tubelets(self, run: Run) -> dict[tuple[int, int], torch.Tensor]:
        """As :meth:`Store.tubelets`."""
        with self._lock:
            near = [pair for name, pair in self._held.items() if name.startswith(run.base.hex())]
        wanted = set(run.ticks)
        return {
            ticks: part
            for other, patches in near
            for ticks, part in zip(other.ticks, patches.view(len(other.ticks), -1, run.row), strict=True)
            if ticks in wanted
        }

    def put(self, run: Run, hint: str, patches: torch.Tensor) -> torch.Tensor | None:
        """Keep a run, on the device; None when that isn't worth it."""
        new = Entry(run.nbytes, hint, self._horizon.clock)
        with self._lock:
            if run.name in self._held:
                return self._held[run.name][1]
            victims = self._evictor.victims(new, self.budget, self._entries)
            if victims is None:
                self._count("bypassed")
                return None
            for name in victims:
                del self._entries[name], self._held[name]
                self._count("evicted")
            if self.device is not None:
                patches = patches.to(self.device)
            self._entries[run.name], self._held[run.name] = new, (run, patches)
            return patches


class FrameCache:
    """All tiers. Safe to use from several threads and processes.

    ``counts``: hits and misses in clips; tubelets reused (for clips of which others were decoded); entries damaged,
    evicted, bypassed (not kept, as what is there is used sooner); unwritten (failed writes).
    """

    def __init__(self, settings: CacheSettings, *, warn: Callable[[str], None] = _log.warning):
        s, self._warn = settings, warn
        self.settings, self.horizon, self.counts = settings, Horizon(), Counter[str]()
        self._lock = threading.Lock()
        self._memory: TensorTier | None = None
        self._gpu: TensorTier | None = None
        self._stores: list[Store] = []
        if s.host_bytes and s.host_folder is None:
            self._memory = TensorTier(s.host_bytes, self.horizon, self._count)
        elif s.host_bytes and s.host_folder is not None and self._ours(s.host_folder):
            self._stores.append(self._store(s.host_folder, s.host_bytes, keep=False, min_free=0))
        if s.disk_bytes and s.disk_folder is not None:
            self._stores.append(self._store(s.disk_folder, s.disk_bytes, keep=True, min_free=s.min_free))
        if s.gpu_bytes and s.device is not None:
            self._gpu = TensorTier(s.gpu_bytes, self.horizon, self._count, s.device)
        self._finalizer = weakref.finalize(self, _close, self._stores)

    def close(self) -> None:
        """Leave the folders. Patches handed out stay valid."""
        self._finalizer()

    def expect(self, order: Iterable[Path | str]) -> None:
        """The files that will be loaded next, in order, for as far as it is known (an epoch, or better two). Where
        several processes share the cache, of all of them.
        """
        self.horizon.expect(order)

    def fetch(self, run: Run, hint: str, decode: Callable[[list[int]], Decoded]) -> Fetched:
        """A run's patches, uint8 ``run.shape``.

        Args:
            hint: :func:`vrlt_fast.video.store.eviction.hint` of the path, as it is in :meth:`expect`.
            decode: gives the patches of the tubelets of these numbers; called at most once.
        """
        self.horizon.used(hint, run.nbytes)
        held = self._gpu.find(run) if self._gpu is not None else None
        if held is not None:
            self._count("hits")
            return Fetched(held, 0, True)
        fetched = self._from_host(run, hint, decode)
        if self._gpu is None:
            return fetched
        kept = self._gpu.put(run, hint, fetched.patches) if fetched.exact else None
        return fetched._replace(patches=fetched.patches.to(self._gpu.device) if kept is None else kept)

    def _from_host(self, run: Run, hint: str, decode: Callable[[list[int]], Decoded]) -> Fetched:
        """From host memory or disk, or decoded."""
        found = self._find(run)
        if found is None:
            writers = [store for store in self._stores if store.worth(run, hint)]
            waits = writers[0].claim(run, self.settings.wait_s) if writers else contextlib.nullcontext()
            with waits as claim:
                found = self._find(run) if writers else None
                if found is None:
                    return self._decode(run, decode, lambda part, x: self._keep(part, hint, x, writers, claim))
        self._count("hits")
        return Fetched(found, 0, True)

    def _decode(
        self, run: Run, decode: Callable[[list[int]], Decoded], keep: Callable[[Run, torch.Tensor], torch.Tensor]
    ) -> Fetched:
        have: dict[tuple[int, int], torch.Tensor] = {}
        for tier in self._host():
            have |= tier.tubelets(run)
        missing = [i for i, ticks in enumerate(run.ticks) if ticks not in have]
        exact = True
        if missing:
            self._count("misses")
            self._count("reused", len(run.ticks) - len(missing))
            part = run.part(missing) if have else run
            patches, exact = decode(missing)
            if patches.dtype != torch.uint8 or tuple(patches.shape) != part.shape:
                raise ValueError(f"decoded {patches.dtype} {tuple(patches.shape)}, not uint8 {part.shape}")
            if exact and self._host():
                kept = keep(part, patches.cpu().contiguous())
                patches = kept if patches.device == kept.device else patches
            if not have:
                return Fetched(patches, len(missing), exact)
            have |= zip(part.ticks, patches.view(len(missing), -1, run.row), strict=True)
        else:
            self._count("hits")
        whole = torch.empty(run.shape, dtype=torch.uint8)
        for slot, ticks in zip(whole.view(len(run.ticks), -1, run.row), run.ticks, strict=True):
            slot.copy_(have[ticks])
        return Fetched(whole, len(missing), exact)

    def _keep(
        self, run: Run, hint: str, patches: torch.Tensor, writers: Sequence[Store], claim: Claim | None
    ) -> torch.Tensor:
        """Write to all tiers that want it; the patches, from where they are best had from now on."""
        if self._memory is not None:
            self._memory.put(run, hint, patches)
        mapped = None
        for number, store in enumerate(writers):
            if number == 0 and claim is not None and claim.run == run.name:
                written = store.publish(claim, run, hint, patches)
            elif number == 0 and claim is None:
                continue  # another process is about to write it, or nothing can be written
            else:
                with store.claim(run, 0.0) as own:
                    written = own is not None and store.publish(own, run, hint, patches)
            if written and mapped is None and self._memory is None:
                mapped = store.find(run)
        return patches if mapped is None else mapped

    def _find(self, run: Run) -> torch.Tensor | None:
        for tier in self._host():
            found = tier.find(run)
            if found is not None:
                return found
        return None

    def _host(self) -> list[TensorTier | Store]:
        """All tiers but the device's, the fastest first."""
        memory = [] if self._memory is None else [self._memory]
        return [*memory, *self._stores]

    def _store(self, folder: Path, budget: int, *, keep: bool, min_free: int) -> Store:
        return Store(folder, budget, self.horizon, min_free=min_free, keep=keep, warn=self._warn, count=self._count)

    def _ours(self, folder: Path) -> bool:
        """Whether a folder in shared memory is fit for use: anybody can make one there. Warns when it is too small."""
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status, space = folder.lstat(), os.statvfs(folder)
        except OSError as error:
            self._warn(f"{folder}: no frame cache in shared memory ({error.strerror})")
            return False
        if folder.is_symlink() or not folder.is_dir() or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            self._warn(f"{folder}: no frame cache in shared memory (the folder is somebody else's, or open to others)")
            return False
        total = space.f_blocks * space.f_frsize
        if 0 < total < self.settings.host_bytes:
            self._warn(
                f"{folder}: shared memory has {total / 1e9:.2f} GB, less than the {self.settings.host_bytes / 1e9:.2f} "
                "GB of the frame cache, which uses what there is; containers take --shm-size"
            )
        return True

    def _count(self, what: str, by: int = 1) -> None:
        with self._lock:
            self.counts[what] += by


def _close(stores: Iterable[Store]) -> None:
    for store in stores:
        store.close()
