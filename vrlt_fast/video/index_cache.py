"""Indices and content hashes of video files, kept on disk: a file is demuxed and hashed once, whichever process asks.

Nothing here can fail a run: what can't be read is made again, what can't be written isn't kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vrlt_fast.errors import SetupError
from vrlt_fast.files import write_atomic
from vrlt_fast.video.index import Packets, VideoIndex, probe, video_error

LOG = logging.getLogger("vrlt_fast")
_SCHEMA = 1
_MOST_BYTES = 1 << 28
_KEPT_HASHES = 1 << 16

_Identity = tuple[int, int, int, int, int]
_T = TypeVar("_T")


def _identity(path: Path) -> _Identity:
    """Device, inode, size, mtime and ctime, of which the last can't be set back.

    Raises:
        VideoError: V01, V02.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise video_error(
            "VRLT-V01", path, "video file missing", error.strerror or "", "check data.root, or remove its lines"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise video_error("VRLT-V02", path, "not a video file", "it is no regular file")
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(path: Path) -> bytes | None:
    """A regular file's content; None where it isn't one, is too large or can't be read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            return None
        with open(handle, "rb", closefd=False) as file:
            return file.read(_MOST_BYTES)
    except OSError:
        return None
    finally:
        os.close(handle)


def _pack(index: VideoIndex) -> bytes:
    """Safetensors, with a digest of everything else in its metadata."""
    from safetensors.numpy import save

    p = index.packets
    arrays = {"frames": index.ticks, "ticks": p.ticks, "key": p.key, "droppable": p.droppable, "shown": p.shown}
    about = {
        "schema": _SCHEMA,
        "height": index.height,
        "width": index.width,
        "time_base": str(index.time_base),
        "codec": index.codec,
        "pixels": index.pixels,
        "rotation": index.rotation,
        "stream": index.stream,
        "container": index.container,
        "flags": sorted(index.flags),
        "matrix": index.matrix,
        "full_range": index.full_range,
        "duration": index.duration,
    }
    text = json.dumps(about, sort_keys=True)
    return save(arrays, metadata={"index": text, "digest": _digest(text, arrays)})


def _digest(text: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"\n{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _unpack(content: bytes, path: Path) -> VideoIndex:
    """Raises whatever a damaged or foreign entry makes it raise."""
    from safetensors.numpy import load

    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    arrays = load(content)
    if metadata["digest"] != _digest(metadata["index"], arrays):
        raise ValueError("digest differs")
    about: dict[str, Any] = json.loads(metadata["index"])
    if about.pop("schema") != _SCHEMA:
        raise ValueError("foreign schema")
    base, ticks = Fraction(about.pop("time_base")), arrays["frames"]
    return VideoIndex(
        path=path,
        ticks=ticks,
        times=(ticks - ticks[0]).astype(np.float64) * float(base),
        time_base=base,
        packets=Packets(arrays["ticks"], arrays["key"], arrays["droppable"], arrays["shown"]),
        flags=frozenset(about.pop("flags")),
        **about,
    )


def _format_hash(sha256: str, identity: _Identity) -> bytes:
    check = hashlib.sha256(f"{identity} {sha256}".encode()).hexdigest()
    return json.dumps({"file": identity, "sha256": sha256, "check": check}).encode()


def _parse_hash(content: bytes, identity: _Identity) -> str:
    sha256 = str(json.loads(content)["sha256"])
    if content != _format_hash(sha256, identity):
        raise ValueError("not what was written")
    return sha256


class IndexCache:
    """A folder of indices, or with None nothing but content hashes in memory. Safe in threads and processes.

    A file changed less than ``settle_s`` seconds ago isn't remembered: it may change again within one tick of the file
    system's clock, which nothing would show.

    Counters: ``hits`` (indices found), ``probed`` (files demuxed), ``hashed`` (files read whole), ``replaced`` (entries
    found damaged).
    """

    def __init__(self, folder: Path | None = None, *, settle_s: float = 0.1):
        self.folder, self.settle_s = folder, settle_s
        self.hits = self.probed = self.hashed = self.replaced = 0
        self._hashes: OrderedDict[_Identity, str] = OrderedDict()
        self._lock = threading.Lock()
        self._warned = False

    def content_hash(self, path: Path) -> str:
        """SHA-256 of the file's bytes, in hex. Remembered as long as device, inode, size, mtime and ctime stay.

        Raises:
            VideoError: V01 missing, V02 unreadable or changed meanwhile.
        """
        identity = _identity(path)
        settled = self._settled(identity)
        with self._lock:
            known = self._hashes.get(identity)
        if known:
            return known
        name = f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:40]}.hash"
        known = self._load(name, lambda content: _parse_hash(content, identity))
        if not known:
            known = self._hash(path)
            if _identity(path) != identity:
                raise video_error("VRLT-V02", path, "video file changed while it was read", fix="try again")
            if settled:
                self._store(name, _format_hash(known, identity))
        if settled:
            with self._lock:
                self._hashes[identity] = known
                if len(self._hashes) > _KEPT_HASHES:
                    self._hashes.popitem(last=False)
        return known

    def probe(self, path: Path) -> VideoIndex:
        """The index of a file, as :func:`vrlt_fast.video.index.probe` gives it.

        Raises:
            VideoError: V01 to V04, V07. Failures aren't kept.
        """
        if self.folder is None:
            return self._probe(path)
        before = _identity(path)
        name = self._entry_name(self.content_hash(path))
        index = self._load(name, lambda content: _unpack(content, path))
        if index is not None:
            with self._lock:
                self.hits += 1
            return index
        index = self._probe(path)
        if self._settled(before) and _identity(path) == before:
            self._store(name, _pack(index))
        return index

    def _settled(self, identity: _Identity) -> bool:
        return time.time_ns() - max(identity[3:]) >= self.settle_s * 1e9

    @staticmethod
    def _entry_name(digest: str) -> str:
        import av

        # what FFmpeg makes of a file may depend on its version
        version = "-".join(str(part) for part in av.library_versions["libavformat"])
        return f"{digest}-{_SCHEMA}-{version}.index"

    def _probe(self, path: Path) -> VideoIndex:
        with self._lock:
            self.probed += 1
        return probe(path)

    def _hash(self, path: Path) -> str:
        with self._lock:
            self.hashed += 1
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise video_error("VRLT-V02", path, "video file can't be read", error.strerror or str(error)) from None

    def _load(self, name: str, parse: Callable[[bytes], _T]) -> _T | None:
        if self.folder is None or (content := _read(self.folder / name)) is None:
            return None
        try:
            return parse(content)
        except Exception as error:
            LOG.warning("%s: damaged (%s), made again", self.folder / name, error)
            with self._lock:
                self.replaced += 1
            return None

    def _store(self, name: str, content: bytes) -> None:
        if self.folder is None:
            return
        with self._lock:  # two threads would write aside under one name
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomic(self.folder / name, [content])
            except (OSError, SetupError) as error:
                if not self._warned:
                    LOG.warning("video indices can't be kept in %s: %s", self.folder, str(error).splitlines()[0])
                self._warned = True


_SHARED = IndexCache()


def content_hash(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex, remembered in this process: :meth:`IndexCache.content_hash`.

    Raises:
        VideoError: V01, V02.
    """
    return _SHARED.content_hash(path)
