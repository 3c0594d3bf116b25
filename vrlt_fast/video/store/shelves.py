"""The files of a cache folder: 256 shelves of entries, files being written, and a quarantine.

Nothing in the folder is trusted: names follow a pattern or are left alone, links are never followed, and what isn't a
regular file is never read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from vrlt_fast.video.store.eviction import Entry, Horizon

READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
"""Opens no link, and doesn't wait for the other end of a FIFO."""

_NAME = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}\.vrlt")
_ASIDE = re.compile(r"\.[0-9a-f]{64}\.tmp")
_SHELF = re.compile(r"[0-9a-f]{2}")
_QUARANTINE = "quarantine"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_GRAIN_NS = 100_000_000


def try_lock(file: int, operation: int, wait_s: float) -> bool:
    """flock within ``wait_s`` seconds. Raises OSError where the file system has no locks."""
    deadline, step = time.monotonic() + wait_s, 0.002
    while True:
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(step)
        step = min(2 * step, 0.05)


def still_named(file: int, name: str, folder: int) -> bool:
    """Whether an open file still has its name."""
    try:
        there = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(file), there)


def aside_name(run: str) -> str:
    """Of the file in which a run's entry is written."""
    return f".{run}.tmp"


def entry_name(run: str, hint: str) -> str:
    return f"{run}-{hint}.vrlt"


class Shelves:
    """Lists and removes; callers hold one lock around all of it. Methods raise OSError unless they say otherwise."""

    def __init__(self, folder: Path, horizon: Horizon):
        self.folder, self._horizon = folder, horizon
        self._shelves: dict[str, tuple[int, dict[str, Entry]]] = {}

    @contextlib.contextmanager
    def shelf(self, name: str, make: bool = False) -> Iterator[int]:
        """The open folder that the entry of a name (or of a run, or the aside of one) is in."""
        path = self.folder / name.lstrip(".")[:2]
        if make:
            with contextlib.suppress(FileExistsError):
                path.mkdir()
        folder = os.open(path, _FOLDER)
        try:
            yield folder
        finally:
            os.close(folder)

    def entry(self, name: str) -> Entry | None:
        """What is known of an entry, without looking."""
        return self._shelves.get(name[:2], (0, {}))[1].get(name)

    def named(self, prefix: str) -> list[str]:
        """The names of entries that begin with these digits, at least two; none where the shelf can't be read."""
        try:
            return [name for name in self._refresh(prefix[:2]) if name.startswith(prefix)]
        except OSError:
            return []

    def entries(self) -> tuple[dict[str, Entry], int]:
        """All entries, and the bytes of files that are being written or in quarantine."""
        entries, others = {}, sum(size for _, size in self._quarantined())
        with os.scandir(self.folder) as items:
            shelves = {item.name for item in items if _SHELF.fullmatch(item.name)}
        for shelf in shelves.union(self._shelves):
            with contextlib.suppress(NotADirectoryError):
                for name, entry in self._refresh(shelf).items():
                    if name[0] == ".":
                        others += entry.size
                    else:
                        entries[name] = entry
        return entries, others

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError), self.shelf(name) as folder:
                os.unlink(name, dir_fd=folder)
            self._shelves.get(name[:2], (0, {}))[1].pop(name, None)

    def remove_abandoned(self) -> None:
        """Remove what writers that died have left: a writer that lives has its file locked."""
        self.entries()
        for name in [name for _, names in self._shelves.values() for name in names if name[0] == "."]:
            with contextlib.suppress(OSError), self.shelf(name) as folder:
                file = os.open(name, READ, dir_fd=folder)
                try:
                    if try_lock(file, fcntl.LOCK_EX, 0.0) and still_named(file, name, folder):
                        os.unlink(name, dir_fd=folder)
                        self._shelves[name[1:3]][1].pop(name, None)
                finally:
                    os.close(file)

    def oldest_first(self) -> list[str]:
        """Names of the entries by time of writing."""
        times = []
        for name in self.entries()[0]:
            with contextlib.suppress(FileNotFoundError), self.shelf(name) as folder:
                times.append((os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime_ns, name))
        return [name for _, name in sorted(times)]

    def quarantine(self, name: str) -> None:
        """Move an entry out of the way. Raises nothing: where it can't be moved it stays."""
        with contextlib.suppress(OSError):
            with contextlib.suppress(FileExistsError):
                (self.folder / _QUARANTINE).mkdir()
            aside = os.open(self.folder / _QUARANTINE, _FOLDER)
            try:
                with self.shelf(name) as folder:
                    os.rename(name, f"{name}.{time.time_ns()}", src_dir_fd=folder, dst_dir_fd=aside)
            finally:
                os.close(aside)

    def purge(self) -> None:
        """Empty the quarantine of all but folders."""
        for name, _ in self._quarantined():
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                (self.folder / _QUARANTINE / name).unlink()

    def _quarantined(self) -> list[tuple[str, int]]:
        """Names and bytes."""
        try:
            folder = os.open(self.folder / _QUARANTINE, _FOLDER)
        except OSError:
            return []
        try:
            with os.scandir(folder) as items:
                return [
                    (item.name, item.stat(follow_symlinks=False).st_size)
                    for item in items
                    if not item.is_dir(follow_symlinks=False)
                ]
        finally:
            os.close(folder)

    def _refresh(self, shelf: str) -> dict[str, Entry]:
        """The files of a shelf; listed again only when it changed."""
        changed, known = self._shelves.get(shelf, (-1, {}))
        try:
            folder = os.open(self.folder / shelf, _FOLDER)
        except FileNotFoundError:
            self._shelves.pop(shelf, None)
            return {}
        try:
            now, at = time.time_ns(), os.fstat(folder).st_mtime_ns
            if at == changed:
                return known
            found = {}
            with os.scandir(folder) as items:
                for item in items:
                    if _NAME.fullmatch(item.name) or _ASIDE.fullmatch(item.name):
                        with contextlib.suppress(FileNotFoundError):
                            size = item.stat(follow_symlinks=False).st_size
                            last = known[item.name].last if item.name in known else self._horizon.clock
                            found[item.name] = Entry(size, item.name[65:81], last)
        finally:
            os.close(folder)
        # a change within the clock's grain after the listing leaves the folder's time as it is; and a file being
        # written grows without a change of its folder
        stable = now - at > _GRAIN_NS and not any(name[0] == "." for name in found)
        self._shelves[shelf] = (at if stable else -1, found)
        return found
