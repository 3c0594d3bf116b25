"""Files that made a decoder crash or hang, remembered from run to run so that they cost their deadline once."""

from __future__ import annotations

import json
import os
import shlex
import threading
import time
import warnings
from pathlib import Path

from vrlt_fast.video.index import video_error

Identity = tuple[str, int, int]


def _identity(path: Path) -> Identity | None:
    """Absolute path, size and time of change: a file that was mended is another file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return str(path.absolute()), stat.st_size, stat.st_mtime_ns


class PoisonList:
    """A file of JSON lines, one for each poisoned file; shared by all processes that name the same one.

    Without ``file`` the list lasts as long as this object. A list that can't be written warns once and goes on in
    memory.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self._entries: dict[Identity, tuple[int, str]] = {}
        self._read: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self._warned = False

    def check(self, path: Path) -> None:
        """Let a file pass.

        Raises:
            VideoError: V09 when it is on the list.
        """
        with self._lock:
            self._refresh()
            identity = _identity(path)
            entry = self._entries.get(identity) if identity is not None else None
        if entry is None:
            return
        line, why = entry
        fix = "re-encode the file (a changed file is tried again), or remove its lines"
        if line and self.file is not None:
            fix += f"; to try it as it is: sed -i {line}d {shlex.quote(str(self.file))}"
        raise video_error("VRLT-V09", path, f"file is on the poisoned list {self.file or ''}".rstrip(), why, fix)

    def add(self, path: Path, why: str) -> None:
        """Put a file on the list."""
        identity = _identity(path)
        if identity is None:
            return
        name, size, mtime_ns = identity
        with self._lock:
            self._refresh()
            if identity in self._entries:
                return
            self._entries[identity] = (0, why)
            if self.file is None:
                return
            record = {"path": name, "size": size, "mtime_ns": mtime_ns, "why": why, "time": round(time.time())}
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    # one write to a file opened for appending: lines of several processes don't mix
                    os.write(descriptor, json.dumps(record).encode() + b"\n")
                finally:
                    os.close(descriptor)
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    warnings.warn(f"the list of poisoned files {self.file} can't be written: {error}", stacklevel=2)

    def _refresh(self) -> None:
        if self.file is None:
            return
        try:
            stat = self.file.stat()
            if self._read == (stat.st_size, stat.st_mtime_ns):
                return
            lines = self.file.read_bytes().splitlines()
        except OSError:
            self._drop_read()
            return
        self._drop_read()
        self._read = stat.st_size, stat.st_mtime_ns
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                identity = str(record["path"]), int(record["size"]), int(record["mtime_ns"])
                self._entries[identity] = number, str(record["why"])
            except (ValueError, TypeError, KeyError):
                continue  # a line that someone edited

    def _drop_read(self) -> None:
        """Forget what came from the file: an entry that was taken out of it is no longer poisoned."""
        self._read = None
        self._entries = {identity: entry for identity, entry in self._entries.items() if not entry[0]}
