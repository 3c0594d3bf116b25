"""Whole files or none: write aside, flush to disk, rename. And the coded errors of writes that fail."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vrlt_fast.errors import Problem, SetupError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def storage_error(error: OSError, path: Path) -> SetupError:
    """The coded error for a failed write: R03 when the disk, the quota or the file size limit is used up, else R02."""
    why = error.strerror or str(error)
    if error.errno in _FULL:
        fix = "free some space (older runs and checkpoints), then: vrlt train ... --resume"
        return SetupError(Problem("VRLT-R03", "no space left to write this", str(path), why, fix))
    fix = "make the folder writable or choose another one with --train.out"
    return SetupError(Problem("VRLT-R02", "this can't be written", str(path), why, fix))


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into the coded error."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def write_atomic(path: Path, content: Iterable[bytes]) -> None:
    """Write aside and rename, so that readers see the old file or the new one. Raises SetupError R02 or R03."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            with aside.open("wb") as file:
                for part in content:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8."""
    write_atomic(path, [text.encode("utf-8")])


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace ``path`` by one JSON object a line."""
    write_atomic(path, (json.dumps(r, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for r in records))
