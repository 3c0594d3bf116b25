"""Embeddings on disk: one safetensors file an entry, in a folder that processes may share, under a byte budget.

A file is read only after its header has been found to be exactly the one that this module would write for the key and
the tower that are asked for; every byte of it and of the tensors is under a digest. Names follow a pattern or are left
alone, links are never followed.

All changes are made under the folder's lock, which dies with its process, so that a file being written whose lock is
free belongs to nobody. Readers need no lock: an open file outlives its eviction.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vrlt_fast.video.store.entry import checksums
from vrlt_fast.video.store.shelves import READ, aside_name, still_named, try_lock

FORMAT = "vrlt-embeds-1"
LOCK_S = 5.0
"""Seconds to wait for another process that writes; then the entry isn't written."""
MIN_FREE = 1 << 30
"""Bytes that stay free on the file system."""

Tensors = tuple[torch.Tensor, ...]
Spec = tuple[str, tuple[int, ...]]
"""Name of a dtype in safetensors, and a shape."""

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_ASIDE = re.compile(r"\.[0-9a-f]{64}\.tmp")
_LONGEST = 1 << 16
_WRITE = 64 << 20
_SPOILED = {errno.EIO, errno.ELOOP, errno.ENXIO}
"""What opening or reading says of bad sectors, links, and sockets."""
_IN_THE_WAY = {errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY}
"""What writing says of something foreign under this one name."""


class Damaged(ValueError):
    """A file that isn't the entry that its name says, or no longer what was written."""


class Stale(ValueError):
    """An entry of another format or of another tower."""


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, uint8 [nbytes], on the same memory."""
    return tensor.view(-1).view(torch.uint8)


def _size(spec: Spec) -> int:
    size = DTYPES[spec[0]].itemsize
    for side in spec[1]:
        size *= side
    return size


def _header(key: str, vision: str, specs: Sequence[Spec], digest: str) -> bytes:
    """The first bytes of an entry; as long for any digest."""
    metadata = {"format": FORMAT, "key": key, "vision": vision, "digest": digest}
    content: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for number, spec in enumerate(specs):
        start, end = end, end + _size(spec)
        content[str(number)] = {"dtype": spec[0], "shape": list(spec[1]), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _digest(key: str, vision: str, specs: Sequence[Spec], tensors: Tensors) -> str:
    """32 hexadecimal digits over all that an entry says. ``tensors`` on the CPU, contiguous."""
    digest = hashlib.blake2b(_header(key, vision, specs, "0" * 32), digest_size=16)
    for tensor in tensors:
        digest.update(checksums(flat_bytes(tensor)).tobytes())
    return digest.hexdigest()


def _parse(text: bytes) -> tuple[dict[str, str], list[Spec]]:
    """Metadata and tensors of a header that nothing is known of. Raises Damaged."""
    try:
        content = json.loads(text)
        metadata = content["__metadata__"]
        specs = [(content[str(i)]["dtype"], tuple(content[str(i)]["shape"])) for i in range(len(content) - 1)]
        told = {name: metadata[name] for name in ("format", "key", "vision", "digest")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged("its header is damaged") from None
    sound = all(
        isinstance(dtype, str) and dtype in DTYPES and shape and all(type(side) is int and side > 0 for side in shape)
        for dtype, shape in specs
    )
    if not specs or not sound or not all(isinstance(value, str) for value in told.values()):
        raise Damaged("its header is damaged")
    return told, specs


def read_entry(file: int, key: str, vision: str) -> Tensors:
    """The tensors of an open file, on the CPU.

    Raises:
        Damaged: not a regular file, cut short, changed, or another key's.
        Stale: of another format or tower.
        OSError: it can't be read.
    """
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise Damaged("not a regular file")
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if not 0 < length <= min(_LONGEST, status.st_size - 8):
        raise Damaged("its header is damaged")
    text = os.pread(file, length, 8)
    told, specs = _parse(text)
    if told["format"] != FORMAT or told["vision"] != vision:
        raise Stale("of another format or tower")
    header = _header(key, vision, specs, told["digest"])
    if header[8:] != text or status.st_size != len(header) + sum(map(_size, specs)):
        raise Damaged("its header is another entry's")
    at, tensors = len(header), []
    for dtype, shape in specs:
        tensor = torch.empty(shape, dtype=DTYPES[dtype])
        _read_into(file, flat_bytes(tensor), at)
        at += tensor.nbytes
        tensors.append(tensor)
    if _digest(key, vision, specs, tuple(tensors)) != told["digest"]:
        raise Damaged("its tensors are damaged")
    return tuple(tensors)


def _read_into(file: int, target: torch.Tensor, at: int) -> None:
    content, done = target.numpy().data, 0
    while done < len(content):
        read = os.preadv(file, [content[done:]], at + done)
        if read == 0:
            raise Damaged("cut short")
        done += read


def _write(file: int, content: memoryview) -> None:
    done = 0
    while done < len(content):
        done += os.write(file, content[done : done + _WRITE])


class DiskTier:
    """A folder of entries; the least recently used make room. No method raises OSError.

    What fails counts as not found or not written. When the folder can't be written, or is full, one warning says so and
    nothing is written any more. The order of use is that of the files' times, so it outlives the process; of what
    other processes have used meanwhile it is known when their entries would be evicted.

    Args:
        folder: made where missing.
        budget: most bytes of all entries in it, of this process and others, one being written included.
        vision: fingerprint of the tower; entries of another one are dropped.
        warn: called with one line, once.
        count: called with the name of what happened: damaged, stale, evicted_disk, unwritten.
    """

    def __init__(
        self,
        folder: Path,
        budget: int,
        vision: str,
        *,
        min_free: int = MIN_FREE,
        warn: Callable[[str], None],
        count: Callable[[str], None],
    ):
        self.folder, self.budget, self.vision, self.min_free = folder, budget, vision, min_free
        self._warn, self._count = warn, count
        self._files: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._used = self._now = 0
        self._folder = self._seen = -1
        self.writable = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(TimeoutError), self._alone():
                self._make_room(0)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Leave the folder; nothing is found or written afterwards."""
        folder, self._folder, self.writable = self._folder, -1, False
        if folder >= 0:
            os.close(folder)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, as this process last knew them."""
        return self._used

    def get(self, key: str) -> Tensors | None:
        """The tensors of a key, on the CPU; what isn't right is removed."""
        if self._folder < 0:
            return None
        name = f"{key}.safetensors"
        try:
            file = os.open(name, READ, dir_fd=self._folder)
        except OSError as error:
            if error.errno in _SPOILED:
                self._drop(name, None, "damaged")
            return None
        try:
            found = read_entry(file, key, self.vision)
        except (Damaged, Stale) as error:
            self._drop(name, file, "stale" if isinstance(error, Stale) else "damaged")
            return None
        except OSError as error:
            if error.errno in _SPOILED:
                self._drop(name, file, "damaged")
            return None
        finally:
            os.close(file)
        self.touch(key)
        return found

    def touch(self, key: str) -> None:
        """A key is used now, wherever it was found."""
        name = f"{key}.safetensors"
        if self._folder < 0:
            return
        with contextlib.suppress(OSError):
            now = self._tick()
            os.utime(name, ns=(now, now), dir_fd=self._folder, follow_symlinks=False)
            if name in self._files:
                self._files[name] = self._files[name][0], now
                self._files.move_to_end(name)

    def put(self, key: str, tensors: Tensors) -> bool:
        """Write an entry unless it is there; False when it doesn't fit or can't be written.

        Args:
            tensors: on the CPU, contiguous, of the dtypes in ``DTYPES``.
        """
        name = f"{key}.safetensors"
        specs = [(_NAMES[x.dtype], tuple(x.shape)) for x in tensors]
        size = len(_header(key, self.vision, specs, "0" * 32)) + sum(map(_size, specs))
        if not self.writable or size > self.budget:
            return False
        try:
            with self._alone():
                if self._is_there(name, size):
                    self.touch(key)
                    return True
                if not self._make_room(size):
                    return False
                header = _header(key, self.vision, specs, _digest(key, self.vision, specs, tensors))
                self._publish(key, name, [header, *(flat_bytes(x).numpy().data for x in tensors)])
                self._files[name] = size, self._now
                self._used += size
                return True
        except TimeoutError:
            self._count("unwritten")
        except OSError as error:
            if error.errno in _IN_THE_WAY:
                self._count("unwritten")
            else:
                self._fail(error)
        return False

    def _publish(self, key: str, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """A whole file under its name, or none."""
        aside, now = aside_name(key), self._tick()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        file = os.open(aside, flags, 0o666, dir_fd=self._folder)
        try:
            for part in parts:
                _write(file, memoryview(part))
            os.utime(file, ns=(now, now))
            os.fsync(file)
            os.rename(aside, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside, dir_fd=self._folder)
            raise
        finally:
            os.close(file)

    def _is_there(self, name: str, size: int) -> bool:
        """Whether a file of this name and size is there; one of another size is removed."""
        try:
            status = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            self._forget(name)
            return False
        if stat.S_ISREG(status.st_mode) and status.st_size == size:
            return True
        self._unlink(name)
        return False

    def _drop(self, name: str, file: int | None, why: str) -> None:
        """Remove what isn't an entry, unless another process has replaced it. Where it can't be removed, it stays."""
        self._count(why)
        with contextlib.suppress(OSError), self._alone():
            if file is None or still_named(file, name, self._folder):
                self._unlink(name)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The folder's lock. Its file counts the changes, so that the folder is listed again only after another
        process's. Raises TimeoutError when another process keeps it, OSError where there are no locks.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(".lock", flags, 0o666, dir_fd=self._folder)
        try:
            if not try_lock(file, fcntl.LOCK_EX, LOCK_S):
                raise TimeoutError(errno.ETIMEDOUT, "another process keeps the folder locked", str(self.folder))
            changes = int.from_bytes(os.pread(file, 8, 0), "little")
            if changes != self._seen:
                self._list()
            # before the change: one that is cut short is then seen by the others, and by this process
            self._seen, changes = -1, (changes + 1) % (1 << 64)
            os.pwrite(file, changes.to_bytes(8, "little"), 0)
            yield
            self._seen = changes
        finally:
            os.close(file)

    def _list(self) -> None:
        """See what is in the folder; remove what writers that died have left."""
        found = []
        with os.scandir(self._folder) as items:
            for item in items:
                if _ASIDE.fullmatch(item.name):
                    with contextlib.suppress(OSError):
                        os.unlink(item.name, dir_fd=self._folder)
                elif _ENTRY.fullmatch(item.name) and item.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        status = item.stat(follow_symlinks=False)
                        found.append((status.st_mtime_ns, item.name, status.st_size))
        self._files = OrderedDict((name, (size, used)) for used, name, size in sorted(found))
        self._used = sum(size for size, _ in self._files.values())

    def _make_room(self, size: int) -> bool:
        """Evict until ``size`` bytes fit; False, and nothing evicted, when they never do."""
        space = os.statvfs(self._folder)
        room = min(self.budget, self._used + space.f_bavail * space.f_frsize - self.min_free)
        if size > max(room, 0):
            return False
        while self._files and self._used + size > room:
            name, (known, used) = next(iter(self._files.items()))
            try:
                last = os.stat(name, dir_fd=self._folder, follow_symlinks=False).st_mtime_ns
            except FileNotFoundError:
                self._forget(name)
                continue
            if last > used:  # by another process
                self._files[name] = known, last
                self._files.move_to_end(name)
                continue
            self._unlink(name)
            self._count("evicted_disk")
        return True

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(name, dir_fd=self._folder)
        self._forget(name)

    def _forget(self, name: str) -> None:
        self._used -= self._files.pop(name, (0, 0))[0]

    def _tick(self) -> int:
        """Now, in nanoseconds; never the same twice."""
        self._now = max(time.time_ns(), self._now + 1)
        return self._now

    def _fail(self, error: OSError) -> None:
        self._count("unwritten")
        if self.writable:
            self.writable = False
            self._warn(f"{self.folder}: embeddings can't be written ({error.strerror or error}); going on without")
