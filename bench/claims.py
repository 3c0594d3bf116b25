"""What the result files claim: listed, recomputed from their records, and put into README and docs as tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.harness import RESULTS, ROOT, BenchError, load_case, read_result, records_of

_MARKER = re.compile(r"<!-- bench:(?P<source>[\w.]+):(?P<table>[\w.-]+) -->\n(?P<body>.*?)<!-- /bench -->", re.DOTALL)
_MARKS = re.compile(r"<!-- /?bench\b[^>]*-->")


def all_results() -> list[dict[str, Any]]:
    return [read_result(path) for path in sorted(RESULTS.glob("*.json"))]


def list_claims() -> str:
    """A table of every claim of every result file; what falls short is marked."""
    rows = [("claim", "device", "value", "target", "", "statement")]
    for result in all_results():
        rows += [
            (
                claim["id"],
                result["device"],
                f"{claim['value']:.4g}",
                f"{claim['op']} {claim['target']:.4g}",
                "holds" if claim["holds"] else "FALLS SHORT",
                claim["statement"],
            )
            for claim in result["claims"]
        ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)] + [0]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    short = sum(row[4] == "FALLS SHORT" for row in rows)
    return "\n".join([*lines, f"{len(rows) - 1} claims, {short} fall short"])


def check_claims() -> list[str]:
    """Recompute the claims of every result file from its records. Returns the differences."""
    faults: list[str] = []
    owner: dict[str, str] = {}
    for path in sorted(RESULTS.glob("*.json")):
        try:
            result = read_result(path)
            claims = [claim.to_json() for claim in load_case(result["case"]).claims(records_of(result))]
        except BenchError as error:
            faults.append(str(error))
            continue
        faults += [f"{path.name}: {fault}" for fault in _differences(result["claims"], claims)]
        for claim in claims:
            other = owner.setdefault(f"{claim['id']} on {result['device']}", path.name)
            if other != path.name:
                faults.append(f"{path.name}: claim {claim['id']} is also in {other}")
    return faults


def update_tables(*, check: bool) -> list[str]:
    """Bring the marked tables of README.md and docs/*.md up to date.

    A table stands between ``<!-- bench:CASE:TABLE -->`` and ``<!-- /bench -->``; CASE.DEVICE instead of CASE where a
    case has results of several devices.

    Returns:
        What was changed; with ``check`` nothing is, and it is what is stale.

    Raises:
        BenchError: a marker without its end, or of an unknown case or table.
    """
    changed = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if not path.is_file():
            continue
        old = path.read_text(encoding="utf-8")
        new = _fill(old, path)
        if new != old:
            changed.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(new, encoding="utf-8")
    return changed


def _fill(text: str, path: Path) -> str:
    pieces, end, marks = [], 0, 0
    for match in _MARKER.finditer(text):
        where = f"{path.name}: {match['source']}:{match['table']}"
        pieces += [text[end : match.start("body")], _table(match["source"], match["table"], where)]
        end = match.end("body")
        marks += 2
    if marks != len(_MARKS.findall(text)):
        raise BenchError(f"{path.name}: a bench marker is malformed, nested or has no end (<!-- /bench -->)")
    return "".join([*pieces, text[end:]])


def _table(source: str, table: str, where: str) -> str:
    files = [path for path in sorted(RESULTS.glob("*.json")) if source in (path.stem, path.stem.partition(".")[0])]
    if len(files) != 1:
        raise BenchError(f"{where}: {len(files)} result files match, expected one (name it as CASE.DEVICE)")
    result = read_result(files[0])
    case = load_case(result["case"])
    tables = case.tables(result) if hasattr(case, "tables") else {}
    if table not in tables:
        raise BenchError(f"{where}: the case has no such table (it has: {', '.join(tables) or 'none'})")
    return f"{tables[table].strip()}\n"


def _differences(stored: list[dict[str, Any]], computed: list[dict[str, Any]]) -> Iterator[str]:
    if [claim["id"] for claim in stored] != [claim["id"] for claim in computed]:
        yield f"claims are {_ids(stored)}, computed from the records {_ids(computed)}"
        return
    for old, new in zip(stored, computed, strict=True):
        for key in new:
            same = old[key] == new[key]
            if key == "value":
                # The same arithmetic may round differently on another machine.
                same = math.isclose(old[key], new[key], rel_tol=1e-9, abs_tol=1e-12)
            if not same:
                yield f"claim {new['id']}: {key} is {json.dumps(old[key])}, computed {json.dumps(new[key])}"


def _ids(claims: list[dict[str, Any]]) -> str:
    return ", ".join(claim["id"] for claim in claims) or "none"
