"""Files of scores: JSONL, a header and a line a sample; appended to, cut where the last line is torn, read as arrays.

A file belongs to one model, recipe and data file, whose digests stand in its header; with others it is refused. Several
files (shards) are one set when their headers agree on all but the shard.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrlt_fast.errors import DataError, Problem
from vrlt_fast.files import storage_errors

FORMAT = 1
SYNC_SECONDS = 5.0
"""Lines are handed to the system one by one, and to the disk at most this much later while more of them come."""


@dataclass(frozen=True)
class Header:
    """What the scores are of. ``model``, ``recipe`` and ``data`` have a ``digest`` each, and what a reader may want to
    know; ``samples`` is the number in all shards, ``shard`` (i, n) with i from 1; ``weights`` are those of the parts.
    """

    model: dict[str, Any]
    recipe: dict[str, Any]
    data: dict[str, Any]
    samples: int
    shard: tuple[int, int]
    repeats: int
    first: int
    weights: dict[str, float]
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        return {"scores": asdict(self) | {"shard": list(self.shard)}}


def read_header(path: Path) -> Header:
    """The first line of a file. Raises DataError L02 where it is none, SetupError R02 where it can't be read."""
    with storage_errors(path), path.open("rb") as file:
        return _header(file.readline(), path)


def _header(line: bytes, path: Path) -> Header:
    try:
        said = json.loads(line)["scores"]
        if said["format"] != FORMAT:
            raise ValueError(f"format {said['format']}, this version reads {FORMAT}")
        return Header(**said | {"shard": (int(said["shard"][0]), int(said["shard"][1]))})
    except (ValueError, KeyError, TypeError, IndexError) as error:
        fix = "name a file that vrlt select score wrote, or choose another --out"
        raise DataError(Problem("VRLT-L02", "not a file of scores", f"{path}:1", repr(error)[:200], fix)) from None


def check_same(expected: Header, found: Header, path: Path, *, shards: bool = False) -> None:
    """Raises DataError L01 naming all that differs; with ``shards`` the two may be different parts of one set."""
    differ = [name for name in ("model", "data") if getattr(expected, name)["digest"] != getattr(found, name)["digest"]]
    if expected.recipe["digest"] != found.recipe["digest"]:
        before, after = (_flat(h.recipe["keys"]) for h in (found, expected))
        keys = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
        differ.append("recipe (" + ", ".join(f"{k}: {before.get(k)} there, {after.get(k)} here" for k in keys) + ")")
    names = (
        ("samples", "repeats", "first", "weights") if shards else ("samples", "repeats", "first", "weights", "shard")
    )
    differ += [name for name in names if getattr(expected, name) != getattr(found, name)]
    if shards and expected.shard[1] != found.shard[1]:
        differ.append(f"shard (of {found.shard[1]} there, of {expected.shard[1]} here)")
    if differ:
        what = f"these scores are of another {', '.join(differ)}"
        fix = "scores can't be mixed: choose another --out, or use the model, recipe and data that the file is of"
        raise DataError(Problem("VRLT-L01", what, str(path), fix=fix))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a file, in its order. Raises DataError L02 at a line that is none."""
    with storage_errors(path), path.open("rb") as file:
        file.readline()
        for number, raw in enumerate(file, 2):
            try:
                line = json.loads(raw)
                if not isinstance(line, dict) or not isinstance(line["id"], str):
                    raise ValueError("no id")
            except (ValueError, KeyError) as error:
                fix = "the end of a file that was cut off is mended by running the same vrlt select score again"
                raise DataError(
                    Problem("VRLT-L02", "damaged line", f"{path}:{number}", repr(error)[:200], fix)
                ) from None
            yield line


class ScoreFile:
    """A file of scores that is being written, by this process alone.

    Args:
        header: of what is to be scored; a new file begins with it, an old one must have the same.

    Raises:
        DataError: L01 the file is of something else, L02 it isn't a file of scores, or another process writes it.
        SetupError: R02 or R03 it can't be written.
    """

    def __init__(self, path: Path, header: Header):
        self.path, self._synced = path, time.monotonic()
        with storage_errors(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self._open(header)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(self, *_: object) -> None:
        with storage_errors(self.path):
            os.fsync(self._file)
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what, fix = "another process is writing this file", "wait for it, or choose another --out"
            raise DataError(Problem("VRLT-L02", what, str(self.path), fix=fix)) from None
        except OSError:
            return  # a file system without locks: the user's own care

    def _open(self, header: Header) -> None:
        kept = self._whole_lines()
        if kept:
            check_same(header, read_header(self.path), self.path)
        else:
            self.append(header.to_json())

    def _whole_lines(self) -> int:
        """Cut what stands behind the last line break; returns what is left, in bytes."""
        with storage_errors(self.path):
            end = size = os.fstat(self._file).st_size
            while end:
                begin = max(0, end - (1 << 16))
                found = os.pread(self._file, end - begin, begin).rfind(b"\n")
                end = begin + found + 1 if found >= 0 else begin
                if found >= 0:
                    break
            if end < size:
                os.ftruncate(self._file, end)
            return end

    def append(self, line: dict[str, Any]) -> None:
        """Write one line, whole or (where the machine stops) torn, never twice."""
        raw = json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"
        with storage_errors(self.path):
            while raw:
                raw = raw[os.write(self._file, raw) :]
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()


@dataclass
class Table:
    """Scores of many samples as columns. ``shares`` fp64 [n, k] are rewards over the highest of their task (NaN where
    a sample has fewer than k), ``rewards`` the rewards themselves, ``tasks`` numbers into ``names``, ``lines`` the
    numbers of the samples' lines in the data file; ``failed`` counts samples without scores by code.
    """

    header: Header
    ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    tasks: NDArray[np.int16] = field(default_factory=lambda: np.zeros(0, np.int16))
    lines: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    rewards: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    shares: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    failed: dict[str, int] = field(default_factory=dict)


def highest(parts: Sequence[str], weights: dict[str, float]) -> float:
    """The most that a response can earn in these parts, each being 1 at most; penalties (overlong) add nothing."""
    return sum(max(weights.get(name, 0.0), 0.0) for name in parts if name != "overlong")


def read_tables(paths: Sequence[Path], *, parts: Sequence[str] = (), partial: bool = False) -> Table:
    """The scores of all files of a set.

    Args:
        parts: count these parts of the reward alone, and leave samples without any of them out, counted under
            "no PART" as those that failed are; () the reward as it was.
        partial: accept that samples or shards are missing.

    Raises:
        DataError: L01 the files don't belong together, L02 they are damaged, incomplete or have a sample twice.
    """
    headers = [read_header(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):
        check_same(headers[0], header, path, shards=True)
    rows = _Rows(headers[0], parts)
    for path in paths:
        for line in lines_of(path):
            rows.add(line, path)
    table = rows.table()
    missing = headers[0].samples - len(table.ids) - sum(table.failed.values())
    if missing > 0 and not partial:
        shards = sorted({h.shard[0] for h in headers})
        what = f"{missing} of {headers[0].samples} samples have no score (shards {shards} of {headers[0].shard[1]})"
        fix = "run vrlt select score until it ends, name all shards, or pick from what there is with --partial"
        raise DataError(Problem("VRLT-L02", what, str(paths[0]), fix=fix))
    return table


class _Rows:
    """Lines into columns, without keeping the lines."""

    def __init__(self, header: Header, parts: Sequence[str]):
        self._header, self._parts = header, tuple(parts)
        self._places: dict[str, int] = {}
        self._tasks: list[int] = []
        self._names: dict[str, int] = {}
        self._lines: list[int] = []
        self._failed: dict[str, str] = {}
        self._tops: dict[tuple[str, ...], float] = {}
        self._rewards = np.full((1024, header.repeats), np.nan)
        self._highest = np.ones(1024)

    def add(self, line: dict[str, Any], path: Path) -> None:
        name = line["id"]
        if name in self._places:
            raise DataError(Problem("VRLT-L02", f"sample {name[:80]!r} is there twice", str(path)))
        if "failed" in line:
            self._failed[name] = str(line["failed"])
            return
        if self._parts and not set(self._parts) & line["parts"].keys():
            self._failed[name] = f"no {', '.join(self._parts)}"
            return
        self._failed.pop(name, None)
        place = self._places[name] = len(self._places)
        if place == len(self._rewards):
            self._rewards = np.concatenate([self._rewards, np.full_like(self._rewards, np.nan)])
            self._highest = np.concatenate([self._highest, np.ones_like(self._highest)])
        parts = tuple(line["parts"])
        rewards = line["rewards"]
        if self._parts:
            parts = tuple(p for p in parts if p in self._parts)
            weights = self._header.weights
            rewards = [sum(weights[p] * line["parts"][p][i] for p in parts) for i in range(len(rewards))]
        if parts not in self._tops:
            self._tops[parts] = highest(parts, self._header.weights)
        self._rewards[place, : len(rewards)] = rewards
        self._highest[place] = self._tops[parts] or 1.0
        self._tasks.append(self._names.setdefault(line["task"], len(self._names)))
        self._lines.append(line["line"])

    def table(self) -> Table:
        n = len(self._places)
        failed: dict[str, int] = {}
        for code in self._failed.values():
            failed[code] = failed.get(code, 0) + 1
        rewards = self._rewards[:n]
        return Table(
            self._header,
            list(self._places),
            list(self._names),
            np.array(self._tasks, np.int16),
            np.array(self._lines, np.int64),
            rewards,
            np.clip(rewards / self._highest[:n, None], 0.0, 1.0),
            failed,
        )
