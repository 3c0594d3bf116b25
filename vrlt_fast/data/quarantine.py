"""Lines of a file of samples that a run leaves out: ``vrlt data check --quarantine OUT`` writes the list, the key
``data.quarantine`` names it.

A line is known by its content, so that the list holds while lines come, go and change places; a line that was mended is
taken again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vrlt_fast.errors import DataError, Problem
from vrlt_fast.files import write_lines


def line_digest(raw: bytes) -> str:
    """Names the content of a line: 32 hexadecimal digits."""
    return hashlib.blake2b(raw.removeprefix(b"\xef\xbb\xbf").strip(), digest_size=16).hexdigest()


def write_quarantine(path: Path, data: Path, rejected: Mapping[int, Sequence[str]]) -> int:
    """Write the list of the lines ``rejected`` (number from 1 to the codes of its problems) of the file ``data``.

    Returns how many they are. The list replaces an older one, whole or not at all.
    """
    rows = []
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
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return frozenset(str(json.loads(line)["digest"]) for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        fix = "vrlt data check FILE --quarantine OUT writes one; or empty data.quarantine"
        raise DataError(Problem("VRLT-D01", "can't read the quarantine list", str(path), str(error), fix)) from None
    except (ValueError, KeyError, TypeError) as error:
        fix = "vrlt data check FILE --quarantine OUT writes it anew"
        raise DataError(Problem("VRLT-D02", "not a quarantine list", str(path), repr(error), fix)) from None
