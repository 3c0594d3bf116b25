"""``vrlt select pick``: lines of a data file, chosen by their scores, into a new file, byte for byte, and a page."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vrlt_fast.errors import DataError, Problem
from vrlt_fast.files import storage_errors, write_atomic
from vrlt_fast.select.fingerprint import file_digest
from vrlt_fast.select.page import Example, write_page
from vrlt_fast.select.policies import CLASSES, Choice, Columns, Flags, columns, pick, uniforms
from vrlt_fast.select.scores import Table, read_tables

_EXAMPLES = 2
"""Examples on the page of each task, class and fate."""


@dataclass(frozen=True)
class Picked:
    """``kept`` of ``scored`` samples, by task too: task -> (kept, scored)."""

    kept: int
    scored: int
    by_task: dict[str, tuple[int, int]] = field(default_factory=dict)


def pick_file(
    scores: Sequence[Path],
    data: Path,
    out: Path,
    choice: Choice,
    *,
    report: Path | None = None,
    root: Path | None = None,
    parts: Sequence[str] = (),
    partial: bool = False,
) -> Picked:
    """Write the chosen lines of ``data`` to ``out``, in their order, and the page to ``report``.

    Args:
        scores: all files of a set.
        root: folder of the videos, for the page's pictures; None: the data file's.
        parts: of the reward, to count alone.
        partial: pick though samples have no score yet; they aren't picked.

    Raises:
        VrltError: as read_tables and pick; L01 the scores are of another data file; R02 or R03 nothing can be written.
    """
    table = read_tables(scores, parts=parts, partial=partial)
    with storage_errors(data):
        digest = file_digest(data)
    if digest != table.header.data["file"]:
        fix = f"name the file that was scored ({table.header.data['name']}), unchanged, or score again"
        what = "the scores are of another data file"
        raise DataError(Problem("VRLT-L01", what, str(data), fix=fix))
    _check_parts(parts, table)
    places = pick(table, choice)
    kept = np.zeros(len(table.ids), bool)
    kept[places] = True
    lines = set(table.lines[places].tolist())
    write_atomic(out, _chosen(data, lines))
    if report is not None:
        found = columns(table, choice.tau)
        examples = _examples(table, found, kept, data)
        write_page(report, table, found, kept, choice, examples=examples, root=root or data.parent, parts=parts)
    return _counted(table, kept)


def _check_parts(parts: Sequence[str], table: Table) -> None:
    unknown = sorted(set(parts) - set(table.header.weights))
    if unknown:
        why = f"parts are: {', '.join(table.header.weights)}"
        raise DataError(Problem("VRLT-L03", f"no part {unknown[0]} in these scores", "--parts", why))


def _chosen(data: Path, lines: Collection[int]) -> Iterator[bytes]:
    with data.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number in lines:
                yield raw if raw.endswith(b"\n") else raw + b"\n"


def _counted(table: Table, kept: Flags) -> Picked:
    mine = {name: table.tasks == task for task, name in enumerate(table.names)}
    by_task = {name: (int(kept[rows].sum()), int(rows.sum())) for name, rows in mine.items()}
    return Picked(int(kept.sum()), len(kept), by_task)


def _examples(table: Table, found: Columns, kept: Flags, data: Path) -> list[Example]:
    """Some samples of each task, class and fate, by random numbers of their own (the same for the same scores)."""
    order = np.argsort(uniforms(table.ids, -1))
    kinds = table.tasks[order].astype(np.int64) * 6 + found.classes[order] * 2 + kept[order]
    chosen: list[int] = []
    for kind in np.unique(kinds):
        chosen += order[np.flatnonzero(kinds == kind)[:_EXAMPLES]].tolist()
    wanted = {int(table.lines[place]): place for place in chosen}
    said: dict[int, dict[str, Any]] = {}
    with data.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number in wanted:
                said[number] = json.loads(raw.removeprefix(b"\xef\xbb\xbf"))
    return [
        Example(
            task=table.names[table.tasks[place]],
            kind=CLASSES[found.classes[place]],
            kept=bool(kept[place]),
            fields=said[line],
            mean=float(found.mean[place]),
            std=float(found.std[place]),
            rewards=[r for r in table.rewards[place].tolist() if r == r],
        )
        for line, place in sorted(wanted.items(), key=lambda pair: chosen.index(pair[1]))
    ]
