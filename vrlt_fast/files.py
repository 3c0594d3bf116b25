"""Whole files or none: write aside, flush to disk, rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vrlt_fast.errors import Problem, SetupError


def storage_error(error: OSError, path: Path) -> SetupError:
    """The coded error for a write that failed: R03 where space ran out, R02 for everything else."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return SetupError(
            Problem("VRLT-R03", "no space left", str(path), str(error), "free space, then: vrlt train ... --resume")
        )
    return SetupError(
        Problem("VRLT-R02", "can't be written", str(path), str(error), "choose another folder with --train.out")
    )


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns OSError of the block into the coded error."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from None


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8), complete or not at all. Raises SetupError R02 or R03."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace ``path`` by one JSON object a line."""
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
