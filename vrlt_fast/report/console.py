"""The terminal: progress bars with ETA, the step line, the table of metrics. Plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vrlt_fast.report.numbers import (
    METRIC_NAMES,
    change,
    clock,
    metric_of,
    number,
    official,
    ordered,
    score,
    short,
    tasks_of,
    tone,
)

_PART_NAMES = {"semantic": "sem", "temporal": "tmp", "format": "fmt"}
_PHASE_NAMES = {"generate": "gen", "reference": "ref", "update": "upd", "encode": "enc", "decode": "dec"}
_PLAIN_SECONDS = 10.0
_PLAIN_WIDTH = 120

Advance = Callable[[int], None]


class Console:
    """Everything that a command prints: results to stdout, warnings to stderr. Texts are printed as they are.

    ``file`` and ``errors`` replace stdout and stderr; ``clock`` (seconds) paces the plain progress lines.
    """

    def __init__(
        self,
        file: IO[str] | None = None,
        errors: IO[str] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._out = RichConsole(file=file, markup=False, highlight=False, emoji=False)
        self._err = RichConsole(file=errors, stderr=errors is None, markup=False, highlight=False, emoji=False)
        if not self._out.is_terminal:
            self._out.width = _PLAIN_WIDTH
        self._clock = clock
        self._bars: Progress | None = None
        self._recent: dict[str, deque[float]] = {}

    def message(self, text: str) -> None:
        """A line on stdout."""
        self._out.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line on stderr."""
        self._err.print(Text("warning ", style="yellow") + Text(text), soft_wrap=True)

    @contextmanager
    def progress(self, description: str, total: int, *, plain: bool = True) -> Iterator[Advance]:
        """Yields ``advance(n)``. A bar with ETA on a terminal; elsewhere a line at most every 10 s and one at the end.

        ``plain=False`` prints no such lines, for loops that print step lines anyway. Calls may nest.
        """
        if self._out.is_terminal:
            with self._bar(description, total) as advance:
                yield advance
        else:
            lines = _PlainProgress(self.message if plain else None, description, total, self._clock)
            yield lines.advance
            lines.end()

    @contextmanager
    def _bar(self, description: str, total: int) -> Iterator[Advance]:
        outermost = self._bars is None
        bars = self._bars or Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA", style="dim"),
            TimeRemainingColumn(compact=True),
            console=self._out,
            transient=True,
        )
        if outermost:
            self._bars = bars
            bars.start()
        task = bars.add_task(description, total=total)
        try:
            yield lambda n: bars.advance(task, n)
        finally:
            bars.remove_task(task)
            if outermost:
                self._bars = None
                bars.stop()

    def step(self, record: dict[str, Any]) -> None:
        """The line of one training step (a ``train`` record of metrics.jsonl), with the ETA of its stage."""
        recent = self._recent.setdefault(str(record.get("stage")), deque(maxlen=20))
        recent.append(number(record.get("seconds")) or 0.0)
        left = int(record.get("steps", 0)) - int(record.get("step", 0))
        self.message(step_line(record, left * sum(recent) / len(recent)))

    def eval_table(self, records: Sequence[dict[str, Any]]) -> None:
        """Metrics per task and label (``eval`` records of metrics.jsonl), greedy and sampled, with the last change."""
        self._out.print(metrics_table(records))

    def suite_table(self, title: str, columns: Sequence[str], rows: Sequence[tuple[str, dict[str, float]]]) -> None:
        """Metrics of a suite: see :func:`suite_table`."""
        self._out.print(suite_table(title, columns, rows))


class _PlainProgress:
    def __init__(self, say: Callable[[str], None] | None, description: str, total: int, clock: Callable[[], float]):
        self._say, self._description, self._total, self._clock = say, description, total, clock
        self._start = self._said = clock()
        self._done = 0

    def advance(self, n: int) -> None:
        self._done += n
        now = self._clock()
        if self._say and self._done < self._total and now - self._said >= _PLAIN_SECONDS:
            self._said = now
            eta = (now - self._start) / max(1, self._done) * (self._total - self._done)
            share = 100 * self._done // max(1, self._total)
            self._say(f"{self._description} {self._done}/{self._total} ({share} %)  ETA {clock(eta)}")

    def end(self) -> None:
        if self._say:
            self._say(f"{self._description} {self._done}/{self._total}  took {clock(self._clock() - self._start)}")


def step_line(record: dict[str, Any], eta: float) -> str:
    """One aligned line for a ``train`` record; ``eta`` in seconds. Fields that the record lacks are left out."""
    steps = str(record.get("steps", "?"))
    fields = [f"{record.get('stage', '?')} {record.get('step', '?')!s:>{len(steps)}}/{steps}"]
    if record.get("stage") == "grpo":
        fields += _policy_fields(record)
    fields += _named(record, (("loss", "loss", ".3f"), ("grad_norm", "gnorm", ".2f")))
    if record.get("stage") != "grpo":
        fields += _named(record, (("lr", "lr", ".1e"),))
    if (rate := number(record.get("tokens_s"))) is not None:
        fields.append(f"{short(rate):>5} tok/s")
    if (peak := number(record.get("peak_gb"))) is not None:
        fields.append(f"peak {peak:.1f}G")
    fields += _phase_fields(record)
    trained, logical = number(record.get("tokens_trained")), number(record.get("tokens_logical"))
    if trained and logical:
        fields.append(f"shared {logical / trained:.1f}x")
    rows, at_once = number(record.get("responses")), number(record.get("most_rows"))
    if rows and at_once and at_once < rows:
        fields.append(f"rows {at_once:.0f}/{rows:.0f}")
    if (gap := number((record.get("mismatch") or {}).get("max"))) is not None:
        fields.append(f"mismatch {gap:.0e}")
    if record.get("zero_signal_groups"):
        fields.append(f"zero-signal {record['zero_signal_groups']}")
    if record.get("replayed_groups"):
        fields.append(f"replayed {record['replayed_groups']}")
    if record.get("responses_dropped"):
        fields.append(f"dropped {record['responses_dropped']}")
    if record.get("out_of_memory"):
        fields.append(f"out of memory {record['out_of_memory']}")
    if record.get("reward_failures"):
        fields.append(f"rewards failed {sum(record['reward_failures'].values())}")
    if record.get("skipped"):
        fields.append("skipped")
    if record.get("failed_videos"):
        fields.append(f"failed videos {record['failed_videos']}")
    return "  ".join([*fields, f"ETA {clock(eta)}"])


def _policy_fields(record: dict[str, Any]) -> list[str]:
    fields = []
    if (reward := number(record.get("reward"))) is not None:
        spread = number(record.get("reward_std"))
        parts = " ".join(
            f"{_PART_NAMES.get(name, name)} {value:.2f}"
            for name, part in (record.get("parts") or {}).items()
            if (value := number(part)) is not None
        )
        fields.append(
            f"rwd {reward:.3f}" + (f"±{spread:.2f}" if spread is not None else "") + (f" ({parts})" if parts else "")
        )
    fields += _named(record, (("kl", "kl", ".4f"), ("clip_share", "clip", "3.0%"), ("entropy", "ent", ".2f")))
    return fields + _named(record, (("length", "len", "3.0f"), ("truncated", "trunc", "3.0%")))


def _named(record: dict[str, Any], names: Sequence[tuple[str, str, str]]) -> list[str]:
    return [f"{name} {value:{form}}" for key, name, form in names if (value := number(record.get(key))) is not None]


def _phase_fields(record: dict[str, Any]) -> list[str]:
    phases, seconds = record.get("phases") or {}, number(record.get("seconds"))
    if not seconds:
        return []
    shares = [
        f"{name} {value / seconds:3.0%}"
        for phase, name in _PHASE_NAMES.items()
        if (value := number(phases.get(phase))) is not None
    ]
    return [" ".join(shares)] if shares else []


def metrics_table(records: Sequence[dict[str, Any]]) -> Table:
    """A rich table: a block a task, one row a metric; a column an evaluation, greedy and sampled. Fits 80 columns."""
    by_label = {str(record.get("label")): record for record in records}
    labels = ordered(list(by_label))
    evals = [by_label[label] for label in labels]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for kind in ("greedy", "sampled"):
        for label in labels:
            table.add_column(f"{kind}\n{label}", justify="right", no_wrap=True)
        if len(labels) > 1:
            table.add_column("\nchange", justify="right", no_wrap=True)
    for task, metrics in tasks_of(evals):
        counts = [count for each in evals if (count := metric_of(each, "greedy", task, "n")) is not None]
        table.add_row(Text(task, style="bold"), Text(f"n={counts[-1]:.0f}" if counts else "", style="dim"))
        for metric in metrics:
            cells = [Text("  " + METRIC_NAMES.get(metric, metric))]
            for kind in ("greedy", "sampled"):
                values = [metric_of(each, kind, task, metric) for each in evals]
                cells += [Text(score(metric, value)) for value in values]
                if len(labels) > 1:
                    cells.append(_change_cell(metric, values[-2], values[-1]))
            table.add_row(*cells)
    return table


def _change_cell(metric: str, before: float | None, after: float | None) -> Text:
    if before is None or after is None:
        return Text("")
    text = change(metric, after - before)
    return Text(text, style={"good": "green", "bad": "red", "same": ""}[tone(metric, text)])


def suite_table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, dict[str, float]]]) -> Table:
    """A rich table: the suite's metrics in their official order and units (times 100), a row a kind of answers or a
    group of questions, with the number of answers ``n``.
    """
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0), title_style="bold")
    table.add_column("", no_wrap=True)
    for name in ("n", *columns):
        table.add_column(METRIC_NAMES.get(name, name), justify="right", no_wrap=True)
    for label, values in rows:
        cells = [official(name, number(values.get(name))) for name in columns]
        table.add_row(label, f"{values.get('n', 0):.0f}", *cells)
    return table
