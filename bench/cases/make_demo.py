"""make_demo: ``make demo`` in a fresh clone of the last commit, installation included: minutes, and what was learnt."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

from bench.cases.demo import metrics_of
from bench.harness import ROOT, BenchError, Claim, Record, median_of, summarize, write_result


def run(argv: Sequence[str]) -> None:
    """Write bench/results/make_demo.cpu.json."""
    measure("make_demo", "demo", claims, argv)


def measure(case: str, target: str, claims_of: Callable[[list[Record]], list[Claim]], argv: Sequence[str]) -> None:
    """Run ``make TARGET`` in a clone and write what it took and reached.

    Raises:
        BenchError: the command failed or left no report; the clone stays for a look.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench {case}")
    parser.add_argument("--clone", type=Path, default=None, help="folder for the clone (default: a new temporary one)")
    options = parser.parse_args(argv)
    clone = options.clone or Path(tempfile.mkdtemp(prefix=f"{case}-")) / "vrlt_fast"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    begin = perf_counter()
    done = subprocess.run(["make", target], cwd=clone, check=False)
    minutes = (perf_counter() - begin) / 60
    folder = clone / "runs" / target
    if done.returncode or not (folder / "report.html").is_file():
        raise BenchError(f"make {target} ended with {done.returncode} in {clone}")
    records = [summarize("make", target, "minutes", "min", [minutes])]
    records += [
        summarize(stage, target, metric, "share", [value])
        for stage in ("sft", "grpo")
        for metric, value in metrics_of(folder, stage).items()
    ]
    write_result(case, "cpu", records, claims_of, seed=0)


def greedy_gain(records: list[Record]) -> float:
    """Greedy mean tIoU, after GRPO less after SFT."""
    return median_of(records, metric="greedy_tiou", arm="grpo") - median_of(records, metric="greedy_tiou", arm="sft")


def claims(records: list[Record]) -> list[Claim]:
    minutes = median_of(records, metric="minutes", arm="make")
    return [Claim("demo.minutes", "make demo in a fresh clone on 2 cores, installation included", minutes, 15.0, "<=")]
