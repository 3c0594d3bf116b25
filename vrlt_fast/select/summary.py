"""A readable summary of scores: by task how rewards vary, what is always right or wrong, what early stopping saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vrlt_fast.files import write_text
from vrlt_fast.report.numbers import DASH
from vrlt_fast.select import variance
from vrlt_fast.select.policies import CLASSES, Columns, Flags, columns
from vrlt_fast.select.scores import Table, read_tables


def summary_path(out: Path) -> Path:
    """SCORES.jsonl's is SCORES.summary.txt."""
    return out.with_name(f"{out.stem}.summary.txt")


def write_summary(scores: Sequence[Path], out: Path) -> str:
    """Write the summary of these files, complete or not, beside ``out``; returns its text."""
    text = summarise(read_tables(scores, partial=True))
    write_text(summary_path(out), text)
    return text


def summarise(table: Table) -> str:
    """The text. Means are shares of the highest reward; ``std`` is the root of the unbiased variance as such a share
    (10, 50 and 90 % quantiles), ``+-`` the standard error of a sample's variance, averaged; ``saved`` the share of
    responses that weren't drawn.
    """
    found = columns(table, 0.5)
    heads = ["task", "n", "mean", "std 10%", "50%", "90%", "+- of variance", *CLASSES, "saved"]
    groups = [(name, table.tasks == i) for i, name in enumerate(table.names)]
    rows = [heads, *(_row(name, mine, table, found) for name, mine in groups)]
    if len(groups) != 1:
        rows.append(_row("all", np.ones(len(table.ids), bool), table, found))
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    header = table.header
    lines += [
        "",
        f"{len(table.ids)} of {header.samples} samples scored, {header.repeats} responses each"
        + (f", {header.first} of them first" if header.first else ""),
    ]
    lines += [f"failed: {count} with {code}" for code, count in sorted(table.failed.items())]
    lines.append(f"model {header.model['name']}, data {header.data['name']}, recipe {header.recipe['digest'][:12]}")
    return "\n".join(lines) + "\n"


def _row(name: str, mine: Flags, table: Table, found: Columns) -> list[str]:
    n = int(mine.sum())
    if not n:
        return [name, "0", *[DASH] * 9]
    errors = variance.variance_errors(table.shares[mine])
    errors = errors[np.isfinite(errors)]
    error = f"{float(np.sqrt(max(float(errors.mean()), 0.0))):.3f}" if len(errors) else DASH
    quantiles = [f"{float(q):.3f}" for q in np.nanquantile(found.raw[mine], (0.1, 0.5, 0.9))]
    shares = [f"{100 * float((found.classes[mine] == kind).mean()):.1f} %" for kind in range(len(CLASSES))]
    saved = 1 - float(found.n[mine].sum()) / (n * table.header.repeats)
    return [name, str(n), f"{float(found.mean[mine].mean()):.3f}", *quantiles, error, *shares, f"{100 * saved:.1f} %"]
