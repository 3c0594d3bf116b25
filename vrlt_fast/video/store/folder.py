"""A folder of entries, shared by processes, under a byte budget. It may fail, be full or be hostile: reads find nothing
then, writes are left out, and one warning says so.

An entry is written aside under a lock on the file itself. The lock says which process decodes the clip; it dies with
that process, and whoever finds a file without a lock removes it. The file is then flushed and renamed. Readers map
entries and need no lock: a mapping outlives the entry's eviction.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vrlt_fast.video.store.entry import Damaged, Run, file_size, map_patches, preamble, read_head
from vrlt_fast.video.store.eviction import Entry, Evictor, Horizon
from vrlt_fast.video.store.shelves import READ, Shelves, aside_name, entry_name, still_named, try_lock

PAUSE_S = 60.0
"""Seconds without writes after one failed."""
LOCK_S = 5.0
"""Seconds to wait for the folder's lock, which is never held while decoding or writing."""
_WRITE = 64 << 20
_SPOILED = {errno.EIO, errno.ELOOP, errno.ENXIO}
"""What opening or reading says of bad sectors, links, and sockets."""


@dataclass
class Claim:
    """The right to write the entry of one run: its file, open and locked, not yet under its name, in an open folder."""

    run: str
    shelf: int
    file: int
    aside: str


class Store:
    """One tier: a folder.

    Args:
        folder: made where missing.
        budget: most bytes of all files in it, of this process and others.
        min_free: bytes that stay free on its file system.
        keep: whether entries outlive the last process that uses the folder.
        warn: called with one line, once.
        count: called with the name of what happened: damaged, bypassed, evicted, unwritten.
    """

    def __init__(
        self,
        folder: Path,
        budget: int,
        horizon: Horizon,
        *,
        min_free: int = 0,
        keep: bool = True,
        warn: Callable[[str], None],
        count: Callable[[str], None],
    ):
        self.folder, self.budget, self.min_free = folder, budget, min_free
        self._horizon, self._evictor, self._shelves = horizon, Evictor(horizon), Shelves(folder, horizon)
        self._keep, self._warn, self._count = keep, warn, count
        self._lock = threading.RLock()
        self._live: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()
        self._verified: set[tuple[str, int, int]] = set()
        self._bad: set[tuple[str, int]] = set()
        self._warned, self._paused, self._users, self._pid = False, float("-inf"), -1, os.getpid()
        try:
            folder.mkdir(mode=0o777 if keep else 0o700, parents=True, exist_ok=True)
            self._users = os.open(folder / ".users", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try_lock(self._users, fcntl.LOCK_SH, LOCK_S)
            with self._alone():
                self._shelves.remove_abandoned()
                self._trim()
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Leave the folder; the last one to leave empties it, unless entries are kept."""
        users, self._users = self._users, -1
        if users < 0:
            return
        # a fork shares its parent's lock, and mustn't take it away
        if not self._keep and os.getpid() == self._pid:
            with contextlib.suppress(OSError), self._lock:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._shelves.remove_abandoned()
                self._shelves.remove(self._shelves.entries()[0])
                self._shelves.purge()
        os.close(users)

    @property
    def nbytes(self) -> int:
        """Bytes of all files now, of all processes."""
        with self._lock, contextlib.suppress(OSError):
            entries, others = self._shelves.entries()
            return sum(entry.size for entry in entries.values()) + others
        return 0

    def find(self, run: Run) -> torch.Tensor | None:
        """The patches of exactly this run, mapped."""
        live = self._live.get(run.name)
        if live is not None:
            return live
        for name in self._named(run.name):
            opened = self._open(name, lambda other: other == run)
            if opened is not None:
                return opened[1]
        return None

    def tubelets(self, run: Run) -> dict[tuple[int, int], torch.Tensor]:
        """What there is of a run in entries of the same video and geometry, mapped: ticks to uint8 [h * w, row]."""
        found: dict[tuple[int, int], torch.Tensor] = {}
        wanted = set(run.ticks)

        def useful(other: Run) -> bool:
            same = (other.base, other.height, other.width, other.row) == (run.base, run.height, run.width, run.row)
            return same and not (wanted - found.keys()).isdisjoint(other.ticks)

        for name in self._named(run.base.hex()):
            opened = self._open(name, useful)
            if opened is not None:
                parts = opened[1].view(len(opened[0].ticks), -1, run.row)
                found |= {ticks: part for ticks, part in zip(opened[0].ticks, parts, strict=True) if ticks in wanted}
        return found

    def worth(self, run: Run, hint: str) -> bool:
        """Whether the run would be kept, as far as is known before it is decoded."""
        size = file_size(run)
        if size > self.budget or time.monotonic() < self._paused:
            return False
        with self._lock:
            try:
                return self._victims(Entry(size, hint, self._horizon.clock), admitted=False) is not None
            except OSError as error:
                return self._fail(error)

    @contextlib.contextmanager
    def claim(self, run: Run, wait_s: float) -> Iterator[Claim | None]:
        """The right to write a run's entry, once no other process or thread has it; None after ``wait_s`` seconds, or
        where nothing can be written. Look again for the entry then: the other one may have written it.
        """
        claim, deadline = None, time.monotonic() + wait_s
        try:
            while claim is None and time.monotonic() >= self._paused:
                claim = self._try_claim(run, max(deadline - time.monotonic(), 0.0))
                if claim is None and time.monotonic() >= deadline:
                    break
        except OSError as error:
            self._fail(error)
        try:
            yield claim
        finally:
            if claim is not None:
                with contextlib.suppress(OSError):
                    if still_named(claim.file, claim.aside, claim.shelf):
                        os.unlink(claim.aside, dir_fd=claim.shelf)
                os.close(claim.file)
                os.close(claim.shelf)

    def publish(self, claim: Claim, run: Run, hint: str, patches: torch.Tensor) -> bool:
        """Write the run's entry, after making room; False when that isn't worth it or fails.

        Args:
            patches: uint8 ``run.shape``, contiguous.
        """
        new = Entry(file_size(run), hint, self._horizon.clock)
        try:
            with self._alone():
                victims = self._victims(new, admitted=True)
                if victims is None:
                    self._count("bypassed")
                    return False
                self._shelves.remove(victims)
                for _ in victims:
                    self._count("evicted")
                os.ftruncate(claim.file, new.size)  # from now on others count it
            head = preamble(run, patches)
            content = patches.reshape(-1).numpy().data
            os.pwrite(claim.file, head, 0)
            done = 0
            while done < len(content):
                done += os.pwrite(claim.file, content[done : done + _WRITE], len(head) + done)
            os.fsync(claim.file)
            name = entry_name(run.name, hint)
            os.rename(claim.aside, name, src_dir_fd=claim.shelf, dst_dir_fd=claim.shelf)
            status = os.fstat(claim.file)
            with self._lock:
                self._verified.add((name, status.st_ino, status.st_mtime_ns))
            return True
        except OSError as error:
            return self._fail(error)

    def _try_claim(self, run: Run, wait_s: float) -> Claim | None:
        aside = aside_name(run.name)
        with contextlib.ExitStack() as undo:
            shelf = os.dup(undo.enter_context(self._shelves.shelf(run.name, make=True)))
            undo.callback(os.close, shelf)
            file = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=shelf)
            undo.callback(os.close, file)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", aside)
            # the writer before us may have renamed or removed the very file that we waited for
            if not try_lock(file, fcntl.LOCK_EX, wait_s) or not still_named(file, aside, shelf):
                return None
            os.ftruncate(file, 0)
            claim = Claim(run.name, os.dup(shelf), os.dup(file), aside)
        return claim

    def _named(self, prefix: str) -> list[str]:
        with self._lock:
            return self._shelves.named(prefix)

    def _open(self, name: str, wanted: Callable[[Run], bool]) -> tuple[Run, torch.Tensor] | None:
        """An entry, checked once a process; what is damaged goes to quarantine."""
        inode = -1
        try:
            with self._shelves.shelf(name) as shelf:
                inode = os.stat(name, dir_fd=shelf, follow_symlinks=False).st_ino
                if (name, inode) in self._bad:
                    return None
                file = os.open(name, READ, dir_fd=shelf)
        except OSError as error:
            self._unreadable(name, inode, error)
            return None
        try:
            head = read_head(file)
            if not name.startswith(head.run.name):
                raise Damaged("its header names another run")
            if not wanted(head.run):
                return None
            check = (name, inode, os.fstat(file).st_mtime_ns)
            patches = map_patches(file, head, verify=check not in self._verified)
        except (ValueError, OSError) as error:
            self._unreadable(name, inode, error)
            return None
        finally:
            os.close(file)
        with self._lock:
            self._verified.add(check)
            self._live[head.run.name] = patches
            entry = self._shelves.entry(name)
            if entry is not None:
                entry.last = self._horizon.clock
        return head.run, patches

    def _unreadable(self, name: str, inode: int, error: Exception) -> None:
        """Quarantine what is damaged; not what is gone, or what this process alone can't open or map now."""
        if isinstance(error, OSError) and error.errno not in _SPOILED:
            return
        self._count("damaged")
        with self._lock:
            self._bad.add((name, inode))  # for where it can't be moved away
            self._shelves.quarantine(name)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The folder's lock. Raises OSError when another process keeps it."""
        with self._lock:
            file = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            try:
                if not try_lock(file, fcntl.LOCK_EX, LOCK_S):
                    raise TimeoutError(errno.ETIMEDOUT, "another process keeps the folder locked", str(self.folder))
                yield
            finally:
                os.close(file)

    def _room(self, used: int) -> int:
        """Bytes that the folder may have, when it has ``used`` now."""
        space = os.statvfs(self.folder)
        return min(self.budget, used + space.f_bavail * space.f_frsize - self.min_free)

    def _victims(self, new: Entry, *, admitted: bool) -> list[str] | None:
        entries, others = self._shelves.entries()
        used = sum(entry.size for entry in entries.values())
        if others and used + others + new.size > self._room(used + others):
            self._shelves.purge()
            entries, others = self._shelves.entries()
        return self._evictor.victims(new, self._room(used + others) - others, entries, admitted=admitted)

    def _trim(self) -> None:
        """Bring a folder under a budget that became smaller."""
        entries, others = self._shelves.entries()
        used = sum(entry.size for entry in entries.values())
        excess, surplus = used - (self._room(used + others) - others), []
        for name in self._shelves.oldest_first() if excess > 0 else []:
            if excess <= 0:
                break
            surplus.append(name)
            excess -= entries[name].size
        self._shelves.remove(surplus)

    def _fail(self, error: OSError) -> bool:
        """Go on without writing for a while; says why once."""
        self._count("unwritten")
        self._paused = time.monotonic() + PAUSE_S
        if not self._warned:
            self._warned = True
            self._warn(f"{self.folder}: the frame cache can't be written ({error.strerror or error}); going on without")
        return False
