"""Videos to model-ready patches, beside qwen-vl-utils and transformers: wall time, CPU time, peak memory.

``python -m bench video --peers PYTHON`` measures the cells of `bench.video_run.cells` and writes
``bench/results/video.cpu.json``; docs/bench.md says how to read it. Without ``--peers`` only ours is measured, and
nothing is claimed. The peers get an interpreter of their own::

    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    peers/bin/pip install --no-deps torchvision==0.28.0 torchcodec==0.13.0 decord==0.6.0 qwen-vl-utils==0.0.14
    peers/bin/pip install transformers==5.23.0 numpy pillow requests

torchcodec finds FFmpeg in PyAV's wheel; torchvision is imported without its operators, which it doesn't need here.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import ROOT, BenchError, Claim, Record, records_of, write_result

SEED = 20240607
CASE = "video"
OURS, LIKE, CACHED = "ours", "ours, like for like", "ours, cached"
NOT_RUN, VERSIONS = "not run", "versions"
_MINE = (OURS, "machine", "file")
_NAMES = ("wall", "cpu", "peak")


def run(argv: Sequence[str]) -> None:
    """Measure; see --help."""
    parser = argparse.ArgumentParser(prog="python -m bench video", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="the interpreter in which peers are installed")
    parser.add_argument("--cells", metavar="NAMES", help="only these, e.g. A,C,F (all: A B C D E F G Gn Df Ef)")
    parser.add_argument("--runs", type=int, help="timed runs of every arm (default: 5)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes or threads of every arm")
    parser.add_argument("--work", type=Path, help="where the videos are made and kept (default: runs/bench-video)")
    parser.add_argument("--quick", action="store_true", help="small files: whether it works, not how fast it is")
    parser.add_argument("--out", type=Path, help="result file instead of bench/results/video.cpu.json")
    options = parser.parse_args(argv)
    if options.quick and options.out is None:
        options.out = Path(tempfile.gettempdir()) / f"video.cpu.{os.getpid()}.json"
    from bench.video_process import Programs
    from bench.video_run import Runner, cells

    wanted = options.cells.split(",") if options.cells else None
    known = {cell.name: cell for cell in cells(quick=options.quick)}
    if wanted and not set(wanted) <= set(known):
        raise BenchError(f"--cells {options.cells}: there are {', '.join(known)}")
    work = (options.work or ROOT / "runs" / "bench-video").resolve()
    work.mkdir(parents=True, exist_ok=True)
    programs = Programs(options.peers, work, options.workers)
    runner = Runner(programs, options.runs or (1 if options.quick else 5), SEED)
    records: list[Record] = []
    for name in wanted or known:
        sys.stderr.write(f"{known[name].shape} …\n")
        records += runner.measure(known[name])
        path = write_result(CASE, "cpu", records + notes(programs), claims, SEED, options.out)
    sys.stderr.write(f"{path}\n")


def notes(programs: Any) -> list[Record]:
    """What was installed, and what wasn't run and why."""
    found = [
        Record(f"{package} {version}", "peers", VERSIONS, "", 1.0, 1.0, 1.0, 1)
        for package, version in programs.versions.items()
        if not version.startswith("!")
    ]
    return found + [Record(arm, why, NOT_RUN, "", 0.0, 0.0, 0.0, 1) for arm, why in programs.missing.items()]


class _Values:
    """Medians by cell, arm and metric."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.medians = {(r.shape.split()[0], r.arm, r.metric): r.median for r in records if r.metric in _NAMES}
        self.shapes = dict.fromkeys(r.shape for r in records if r.metric == "wall")

    def of(self, cell: str, arm: str, metric: str) -> float | None:
        return self.medians.get((cell, arm, metric))

    def best(self, cell: str, metric: str) -> float | None:
        """The smallest of the peers."""
        values = [
            value
            for (name, arm, what), value in self.medians.items()
            if (name, what) == (cell, metric) and not arm.startswith(_MINE)
        ]
        return min(values, default=None)

    def gain(self, cell: str, metric: str, arm: str = OURS) -> float | None:
        """The best peer over ours."""
        theirs, mine = self.best(cell, metric), self.of(cell, arm, metric)
        return None if theirs is None or not mine else theirs / mine


_WHAT = {"wall": "times as fast as", "cpu": "times less CPU time than", "peak": "times less peak memory than"}
_TARGETS = (  # id, cell, metric, arm, target
    ("A", "A", "wall", OURS, 1.8),
    ("A_cpu", "A", "cpu", OURS, 1.8),
    ("B", "B", "wall", OURS, 1.8),
    ("B_cpu", "B", "cpu", OURS, 1.8),
    ("C", "C", "wall", OURS, 2.0),
    ("C_cpu", "C", "cpu", OURS, 2.2),
    ("C_rss", "C", "peak", OURS, 10.0),
    ("D", "D", "cpu", OURS, 1.3),
    ("E", "E", "cpu", OURS, 1.4),
    ("G", "G", "wall", OURS, 1.0),
    ("G_cpu", "G", "cpu", OURS, 1.0),
    ("Gn", "Gn", "wall", OURS, 1.0),
    ("Gn_cpu", "Gn", "cpu", OURS, 1.0),
    ("like_A", "A", "cpu", LIKE, 1.5),
    ("like_B", "B", "cpu", LIKE, 1.5),
    ("like_C", "C", "cpu", LIKE, 1.5),
    ("frames_D", "Df", "cpu", OURS, 1.3),
    ("frames_E", "Ef", "cpu", OURS, 1.4),
)


def claims(records: list[Record]) -> list[Claim]:
    """Those whose records are there: the best peer of the cell over ours, each metric by itself."""
    values = _Values(records)
    texts = {shape.split()[0]: shape.partition(" ")[2] for shape in values.shapes}
    found = []
    for name, cell, metric, arm, target in _TARGETS:
        gain = values.gain(cell, metric, arm)
        if gain is None:
            continue
        column = "like for like (fp32 resampler, normalised fp32)" if arm == LIKE else "default (uint8 patches)"
        column = "RGB frames" if cell.endswith("f") else column
        statement = f"{texts[cell]}, {column}: {_WHAT[metric]} the best peer"
        found.append(Claim(f"{CASE}.cpu.{name}", statement, gain, target))
    for name, arm in (("F", CACHED), ("F_process", f"{CACHED}, new process")):
        theirs, mine = values.best("C", "wall"), values.of("F", arm, "wall")
        if theirs is not None and mine:
            where = "in another process than the one that filled the cache" if "process" in name else "in one process"
            text = f"{texts['F']}, {where}: times as fast as the best peer decodes it"
            found.append(Claim(f"{CASE}.cpu.{name}", text, theirs / mine, 100.0))
    return found


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``default``, ``like-for-like`` and ``decoding``: ours beside the best peer; ``cached``; ``arms``: everything
    measured; ``not-run``.
    """
    records = records_of(result)
    values = _Values(records)
    shapes = list(values.shapes)
    pixels = [s for s in shapes if s.split()[0] not in ("F", "Df", "Ef")]
    rows = [f"| {r.arm} | {r.shape.replace('|', '/')} |" for r in records if r.metric == NOT_RUN]
    return {
        "default": _beside(values, pixels, OURS),
        "like-for-like": _beside(values, pixels, LIKE),
        "decoding": _beside(values, [s for s in shapes if s.split()[0] in ("Df", "Ef")], OURS),
        "cached": _cached(values, [s for s in shapes if s.startswith("F ")]),
        "arms": _arms(records),
        "not-run": "\n".join(["| arm | why it wasn't run |", "|---|---|", *rows]),
    }


def _beside(values: _Values, shapes: Sequence[str], arm: str) -> str:
    head = "| cell | wall, s | CPU, s | peak, GB | best peer's wall | CPU | peak | wall | CPU | peak |"
    lines = [head, f"|---|{'---:|' * 9}"]
    for shape in shapes:
        cell = shape.split()[0]
        mine = [values.of(cell, arm, metric) for metric in _NAMES]
        best = [values.best(cell, metric) for metric in _NAMES]
        gains = [values.gain(cell, metric, arm) for metric in _NAMES]
        scales = (1.0, 1.0, 1e-9)
        numbers = [_number(v, s) for row in (mine, best) for v, s in zip(row, scales, strict=True)]
        lines.append(f"| {shape} | {' | '.join(numbers + [f'{g:.2f}x' if g else '-' for g in gains])} |")
    return "\n".join(lines)


def _cached(values: _Values, shapes: Sequence[str]) -> str:
    lines = ["| cell | filling, s | hit, ms | hit in a new process, ms |", "|---|---:|---:|---:|"]
    for shape in shapes:
        arms = ("ours, filling", CACHED, f"{CACHED}, new process")
        found = [values.of("F", arm, "wall") for arm in arms]
        numbers = [_number(v, s) for v, s in zip(found, (1.0, 1e3, 1e3), strict=True)]
        lines.append(f"| {shape} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _arms(records: Sequence[Record]) -> str:
    lines = ["| cell | arm | wall, s | 20 % to 80 % | CPU, s | peak, GB |", "|---|---|---:|---:|---:|---:|"]
    found = {(r.shape, r.arm, r.metric): r for r in records}
    for (shape, arm, metric), r in found.items():
        if metric == "wall":
            others = [found.get((shape, arm, name)) for name in ("cpu", "peak")]
            cpu, peak = (_number(o.median if o else None, s) for o, s in zip(others, (1.0, 1e-9), strict=True))
            lines.append(f"| {shape} | {arm} | {r.median:.3g} | {r.p20:.3g} to {r.p80:.3g} | {cpu} | {peak} |")
    return "\n".join(lines)


def _number(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value * scale:.3g}"
