"""Embeddings of clips, kept: on the GPU, in host memory, on disk; each under its budget, least recently used ones out
first.

Which embeddings are good is decided by the key: the clip's key (content, frame times, geometry, how pixels were made)
and the version of the tower's weights. A frozen tower's version is :func:`vision_fingerprint`, and its embeddings hold
from run to run. A trained tower's are never kept: its weights change with every step.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers

from vrlt_fast.config import Config
from vrlt_fast.model.embed_store import DTYPES, DiskTier, Tensors, flat_bytes
from vrlt_fast.model.embed_tiers import PageTier, TensorTier
from vrlt_fast.model.load import VideoLM
from vrlt_fast.video.cache import INEXACT

COUNTERS = (
    *(f"{what}_{tier}" for what in ("hits", "evicted") for tier in ("gpu", "host", "disk")),
    *("misses", "bypassed", "damaged", "stale", "unwritten"),
)
"""``bypassed``: fits no tier; ``damaged``, ``stale``: found, and dropped; ``unwritten``: writes to disk that failed."""

_GB = 10**9
_KEY = re.compile(r"[0-9a-f]{64}")
_CHUNK = 64 << 20
_NOT_OF_THE_TOWER = {"architectures", "dtype", "torch_dtype", "transformers_version"}


def embedding_key(clip_key: str, vision_version: str) -> str:
    """64 hexadecimal digits for a clip and a tower. The key of an inexact clip keeps its mark and is never cached."""
    digest = hashlib.blake2b(digest_size=32)
    for part in (clip_key.encode(), vision_version.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest() + (INEXACT if clip_key.endswith(INEXACT) else "")


def vision_fingerprint(tower: torch.nn.Module, *, mean: Sequence[float] = (), std: Sequence[float] = ()) -> str:
    """SHA-256 of all that decides a tower's embeddings but its rounding: weights with names, dtypes and shapes,
    configuration, normalisation, version of transformers. The same on any device, folded or not; one piece of 64 MB
    of the weights is copied at a time.
    """
    config: Any = getattr(tower, "config", None)
    told = {} if config is None else config.to_dict()
    kept = {name: value for name, value in told.items() if name[0] != "_" and name not in _NOT_OF_THE_TOWER}
    said = {"config": kept, "mean": [*mean], "std": [*std], "transformers": transformers.__version__}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content = flat_bytes(tensor.detach().contiguous())
        for piece in content.split(_CHUNK):
            digest.update(piece.cpu().numpy().data)
    return digest.hexdigest()


class EmbeddingCache:
    """Keeps entries: tuples of tensors [n, ...] of one leading length. What comes back equals what was put, bit by bit.

    A new entry goes to the GPU, else to host memory; what the GPU evicts goes to host memory. On disk is everything
    that fits there. An entry that is found is taken to the fastest tier. What goes wrong in a tier is a miss and never
    raises; only a device without memory for what comes back does. Safe to use from several threads, of one
    CUDA stream.

    Tensors that come back may be the cache's own: they are to be read only. An entry that was written to in place is
    dropped when it is asked for next (not when it was written to past torch, through ``numpy()`` or a raw pointer).

    Args:
        gpu_gb, host_gb, disk_gb: budgets, GB of 10^9 bytes; of tensors, except on disk (files) and in host memory of a
            CUDA device (pages). Without a GPU there is no GPU tier.
        folder: of the files; None: none.
        device: of the tensors that come back.
        fingerprint: of the frozen tower.
        warn: called with one line where a tier can't be used.
    """

    def __init__(
        self,
        *,
        gpu_gb: float,
        host_gb: float,
        disk_gb: float,
        folder: Path | None,
        device: torch.device,
        fingerprint: str,
        warn: Callable[[str], None],
    ):
        self.device, self.version, self.counts = torch.device(device), fingerprint, Counter[str]()
        self._lock, self._open = threading.RLock(), True
        self._gpu: TensorTier | None = None
        self._host: TensorTier | PageTier | None = None
        self._disk: DiskTier | None = None
        on_gpu, gpu, host, disk = self.device.type == "cuda", *(int(x * _GB) for x in (gpu_gb, host_gb, disk_gb))
        if gpu and on_gpu:
            self._gpu = TensorTier(gpu, self._to_host, self.device)
        if host and on_gpu:
            self._host = PageTier(host, self._off_host, self.device, warn=warn)
        elif host:
            self._host = TensorTier(host, self._off_host, self.device)
        if disk and folder is not None:
            self._disk = DiskTier(folder, disk, fingerprint, warn=warn, count=self._count)

    def __enter__(self) -> EmbeddingCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything but the files. Entries handed out stay valid; nothing is found or kept afterwards."""
        with self._lock:
            self._open = False
            self._forget()
            if self._disk is not None:
                self._disk.close()

    def key(self, clip_key: str) -> str:
        """:func:`embedding_key` of a clip with the tower as it is now."""
        return embedding_key(clip_key, self.version)

    def get(self, key: str) -> Tensors | None:
        """The tensors of a key, on the device. Raises ValueError for what isn't an :func:`embedding_key`."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            found = self._find(key) if self._keeps(key) else None
            if found is None:
                self._count("misses")
            return found

    def put(self, key: str, tensors: Tensors) -> None:
        """Keep an entry; its tensors are copied. A key that is there is replaced (on disk: stays).

        Args:
            tensors: bf16, fp16 or fp32 without gradients, at least one, of one leading length, none empty. What a
                trained tower gives in an update has a graph and isn't for the cache.

        Raises:
            ValueError: not such tensors, or not an :func:`embedding_key`.
        """
        _check(tensors)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._keeps(key):
                kept = self._place(key, tensors, own=False)
                written = self._write(key, tensors)
                self.counts["bypassed"] += not (kept or written)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes that each tier has."""
        tiers = {"gpu": self._gpu, "host": self._host, "disk": self._disk}
        return {name: 0 if tier is None else tier.nbytes for name, tier in tiers.items()}

    def stats(self) -> dict[str, int]:
        """All of ``COUNTERS``, and ``bytes_gpu``, ``bytes_host``, ``bytes_disk``."""
        with self._lock:
            counted = {name: self.counts[name] for name in COUNTERS}
            return counted | {f"bytes_{name}": nbytes for name, nbytes in self.nbytes.items()}

    def _find(self, key: str) -> Tensors | None:
        for name, tier in (("gpu", self._gpu), ("host", self._host)):
            if tier is None or key not in tier:
                continue
            found = tier.get(key)
            if found is None:
                tier.remove(key)
                self._count("damaged")
                continue
            self._count(f"hits_{name}")
            if self._disk is not None:
                self._disk.touch(key)
            if tier is not self._gpu and self._gpu is not None:
                self._gpu.put(key, found, own=True)
            return found
        read = self._disk.get(key) if self._disk is not None else None
        if read is None:
            return None
        self._count("hits_disk")
        read = tuple(x.to(self.device) for x in read)
        self._place(key, read, own=True)
        return read

    def _place(self, key: str, tensors: Tensors, *, own: bool) -> bool:
        """Into the fastest tier that it fits; out of the others, whose copies may be older."""
        placed = False
        for tier in (self._gpu, self._host):
            if tier is None:
                continue
            if placed:
                tier.remove(key)
            else:
                placed = tier.put(key, tensors, own=own)
        return placed

    def _write(self, key: str, tensors: Tensors) -> bool:
        if self._disk is None or not self._disk.writable:
            return False
        return self._disk.put(key, tuple(x.cpu().contiguous() for x in tensors))

    def _to_host(self, key: str, tensors: Tensors | None) -> None:
        self._count("evicted_gpu")
        if self._host is None:
            return
        if key in self._host:
            self._host.touch(key)
        elif tensors is not None:
            self._host.put(key, tensors, own=True)

    def _off_host(self, key: str, tensors: Tensors | None) -> None:
        self._count("evicted_host")

    def _keeps(self, key: str) -> bool:
        if not key.endswith(INEXACT) and _KEY.fullmatch(key) is None:
            raise ValueError(f"{key!r} is no embedding key")
        return self._open and not key.endswith(INEXACT)

    def _forget(self) -> None:
        for tier in (self._gpu, self._host):
            if tier is not None:
                tier.clear()

    def _count(self, what: str) -> None:
        self.counts[what] += 1


def _check(tensors: Tensors) -> None:
    if not tensors or any(x.dim() == 0 or x.numel() == 0 or len(x) != len(tensors[0]) for x in tensors):
        raise ValueError(f"shapes {[tuple(x.shape) for x in tensors]} have no leading length in common")
    if any(x.dtype not in DTYPES.values() for x in tensors):
        raise ValueError(f"dtypes {[x.dtype for x in tensors]} are not all of {[*DTYPES.values()]}")
    if any(x.requires_grad for x in tensors):
        raise ValueError("embeddings with a graph can't be cached: they are of one update")


def from_config(config: Config, lm: VideoLM, run_dir: Path | None, warn: Callable[[str], None]) -> EmbeddingCache:
    """The cache of ``[embed_cache]`` for a model whose tower is frozen.

    Args:
        run_dir: where the files go when the configuration names no folder; None: nowhere then.
    """
    keys, tower = config.embed_cache, lm.module.model.visual
    folder = Path(keys.folder) if keys.folder else run_dir and run_dir / "embeddings"
    return EmbeddingCache(
        gpu_gb=keys.gpu_gb,
        host_gb=keys.host_gb,
        disk_gb=keys.disk_gb,
        folder=folder,
        device=lm.device,
        fingerprint=vision_fingerprint(tower, mean=lm.info.mean, std=lm.info.std),
        warn=warn,
    )
