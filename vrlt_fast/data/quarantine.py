"""Lines of a file of samples that a run leaves out: ``vrlt data check --quarantine OUT`` and ``vrlt select reflect``
write the list, the key ``data.quarantine`` names it.

A line is known by its content, so that the list holds while lines come, go and change places; a line that was mended is
taken again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vrlt_fast.errors import DataError, Problem
from vrlt_fast.files import write_lines


def line_digest(raw: bytes) -> str:
    """Names the content of a line: 32 hexadecimal digits."""
    return hashlib.blake2b(raw.removeprefix(b"\xef\xbb\xbf").strip(), digest_size=16).hexdigest()


def write_quarantine(path: Path, data: Path, rejected: Mapping[int, Sequence[str]], *, kept: Path | None = None) -> int:
    """Write the list of the lines ``rejected`` (number from 1 to the codes of its problems) of the file ``data``.

    Returns how many lines it has. The list replaces an older one, whole or not at all.

    Args:
        kept: a list whose lines, of whatever file, come first.

    Raises:
        DataError: as :func:`read_quarantine`, of ``kept``.
    """
    rows = _rows(kept) if kept is not None else []
    with data.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number in rejected:
                rows.append({"line": number, "digest": line_digest(raw), "codes": list(rejected[number])})
    write_lines(path, rows)
    return len(rows)


def read_quarantine(path: Path) -> frozenset[str]:
    """Digests of the lines to leave out.

    Raises:
        DataError: D01 the list is missing, D02 it isn't one.
    """
    return frozenset(row["digest"] for row in _rows(path))


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [{**row, "digest": str(row["digest"])} for row in rows]
    except (OSError, UnicodeDecodeError) as error:
        fix = "vrlt data check FILE --quarantine OUT writes one; or empty data.quarantine"
        raise DataError(Problem("VRLT-D01", "can't read the quarantine list", str(path), str(error), fix)) from None
    except (ValueError, KeyError, TypeError) as error:
        fix = "vrlt data check FILE --quarantine OUT writes it anew"
        raise DataError(Problem("VRLT-D02", "not a quarantine list", str(path), repr(error), fix)) from None
