"""metrics.jsonl and completions.jsonl: appended line by line, cut back on resume, read leniently by the report."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from vrlt_fast.errors import Problem, SetupError
from vrlt_fast.files import storage_error, write_atomic
from vrlt_fast.report.writers import open_writers

Record = dict[str, Any]

METRICS = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _line(record: Record) -> bytes:
    text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"
    # A lone surrogate, which UTF-8 can't hold, turns into its JSON escape.
    return text.encode("utf-8", "backslashreplace")


class _Appender:
    """Appends whole lines with one write(); a write that fails midway leaves the file as it was."""

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise storage_error(error, path) from error

    def append(self, lines: bytes) -> None:
        start = os.fstat(self._file.fileno()).st_size
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), start)
            raise storage_error(error, self.path) from error

    def close(self) -> None:
        self._file.close()


class RunLog:
    """Appends to metrics.jsonl and completions.jsonl of a run folder and feeds the optional writers.

    ``writers`` are names from ``tensorboard``, ``trackio`` and ``wandb``; a missing package raises VRLT-E01 here,
    before anything is written. Every record has left the process when the call returns, so that a kill loses nothing.
    Raises SetupError VRLT-R03 (disk full) and VRLT-R02 (not writable).
    """

    def __init__(self, run_dir: Path, writers: Sequence[str] = (), project: str = "vrlt"):
        self._writers = open_writers(writers, run_dir, project)
        self._metrics = _Appender(run_dir / METRICS)
        self._completions = _Appender(run_dir / COMPLETIONS)

    def train(self, record: Record) -> None:
        """One optimizer step; adds ``kind`` and ``time`` (unix seconds)."""
        self._append("train", record)

    def eval(self, record: Record) -> None:
        """One evaluation; adds ``kind`` and ``time`` (unix seconds)."""
        self._append("eval", record)

    def completions(self, records: Iterable[Record]) -> None:
        """Responses, one line each, in one write."""
        lines = b"".join(map(_line, records))
        if lines:
            self._completions.append(lines)

    def _append(self, kind: str, record: Record) -> None:
        record = {"kind": kind, **record, "time": round(time.time(), 3)}
        self._metrics.append(_line(record))
        for writer in self._writers:
            writer.write(record)

    def close(self) -> None:
        """Closes the files and the writers; may be called twice."""
        self._metrics.close()
        self._completions.close()
        for writer in self._writers:
            writer.close()
        self._writers = []

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parsed(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Lines with their records. An unreadable last line is left out (the writer was killed); one before it is R04."""
    broken = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if broken:
                raise SetupError(
                    Problem(
                        "VRLT-R04",
                        "this line is not a JSON object",
                        f"{path}:{broken}",
                        "the file was edited or damaged; only a last line may be incomplete",
                        f"remove line {broken} of {path}",
                    )
                )
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                yield line, record
            elif line.strip():
                broken = number


def read_jsonl_tolerant(path: Path) -> list[Record]:
    """Records of a JSONL file that may still be written to: a half-written last line is left out.

    Raises FileNotFoundError, and SetupError VRLT-R04 for a damaged line before the last.
    """
    return [record for _, record in _parsed(path)]


def read_jsonl_tail(path: Path, max_bytes: int = 8_000_000) -> list[Record]:
    """As :func:`read_jsonl_tolerant`, but only the last ``max_bytes`` of the file, from the first whole line on."""
    records: list[Record] = []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            file.seek(size - max_bytes)
            file.readline()
        for line in file:
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict):
                    records.append(record)
    return records


def truncate_after(run_dir: Path, stage_order: Sequence[str], stage: str, step: int) -> set[str]:
    """Cuts the logs back to the checkpoint (``stage``, ``step``), so that a resumed run logs no step twice.

    Drops half-written last lines and all records of later steps from metrics.jsonl and completions.jsonl, each file
    atomically, and the answers (eval/LABEL.jsonl) of evaluations that are dropped. What stays keeps its bytes. Returns
    the labels of the evaluations that stay: they need not be repeated. Missing files are fine. Raises SetupError R02,
    R03, R04.
    """
    order = {name: index for index, name in enumerate(stage_order)}
    last = (order[stage], step)

    def stays(record: Record) -> bool:
        return (order.get(record.get("stage", ""), -1), int(record.get("step", 0))) <= last

    evals: dict[bool, set[str]] = {True: set(), False: set()}
    for name in (METRICS, COMPLETIONS):
        path = run_dir / name
        if path.exists():
            write_atomic(path, _kept(path, stays, evals))
    for label in evals[False] - evals[True]:
        (run_dir / "eval" / f"{label}.jsonl").unlink(missing_ok=True)
    return evals[True]


def _kept(path: Path, stays: Callable[[Record], bool], evals: dict[bool, set[str]]) -> Iterator[bytes]:
    for line, record in _parsed(path):
        keep = stays(record)
        if record.get("kind") == "eval":
            evals[keep].add(str(record.get("label", "")))
        if keep:
            yield line if line.endswith(b"\n") else line + b"\n"
