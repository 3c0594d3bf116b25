"""demo_steps: seconds of the demo's steps, warm-up and GRPO, beside those of an older checkout on the same machine.

git worktree add /tmp/older COMMIT && python -m bench demo_steps --against /tmp/older --model CHECKPOINT --data FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import ROOT, BenchError, Claim, Record, records_of, summarize, write_result

STAGES = {"sft": "warm-up step", "grpo": "GRPO step"}
NOW, THEN = "now", "older checkout"


def run(argv: Sequence[str]) -> None:
    """Write bench/results/demo_steps.cpu.json.

    Raises:
        BenchError: a checkout's steps failed.
    """
    parser = argparse.ArgumentParser(prog="python -m bench demo_steps", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", type=Path, required=True, help="the other checkout")
    parser.add_argument("--model", type=Path, required=True, help="model after the warm-up, as of runs/bench-demo")
    parser.add_argument("--data", type=Path, required=True, help="what vrlt data demo has made")
    parser.add_argument("--steps", type=int, default=8, help="of each stage and turn")
    parser.add_argument("--turns", type=int, default=3, help="both checkouts a turn, in changing order")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(argv)
    found: dict[tuple[str, str, str], list[float]] = {}
    for turn in range(options.turns):
        for name, folder in ((NOW, ROOT), (THEN, options.against))[:: 1 if turn % 2 else -1]:
            for stage in STAGES:
                for line in _steps(folder, stage, options):
                    for metric, value in line.items():
                        found.setdefault((name, STAGES[stage], metric), []).append(value)
    records = [summarize(arm, shape, metric, "s", values) for (arm, shape, metric), values in found.items()]
    write_result("demo_steps", "cpu", records, claims, seed=0, path=options.out)


def _steps(folder: Path, stage: str, options: argparse.Namespace) -> list[dict[str, float]]:
    worker = ROOT / "bench" / "demo_step_worker.py"
    command = [sys.executable, str(worker), stage, str(options.steps), str(options.data), str(options.model)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(folder / "kernels")])}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{stage} in {folder}: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def claims(records: list[Record]) -> list[Claim]:
    """Steps are not slower than in the older checkout."""
    table = {(r.arm, r.shape, r.metric): r.median for r in records}
    return [
        Claim(f"demo_steps.{stage}", f"demo: a {shape} over the older checkout's", *_ratio(table, shape), op=">=")
        for stage, shape in STAGES.items()
    ]


def _ratio(table: dict[tuple[str, str, str], float], shape: str) -> tuple[float, float]:
    return table[THEN, shape, "wall"] / table[NOW, shape, "wall"], 1.0


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``steps``: seconds a step in both checkouts."""
    table = {(r.arm, r.shape, r.metric): r.median for r in records_of(result)}
    rows = [
        f"| {shape} | {table[THEN, shape, 'wall']:.2f} s | {table[NOW, shape, 'wall']:.2f} s | "
        f"{_ratio(table, shape)[0]:.2f} |"
        for shape in STAGES.values()
    ]
    head = ["| demo, 2 CPU cores | padded, prompt and responses in two passes | packed, group engine | times as fast |"]
    return {"steps": "\n".join([*head, "|---|---|---|---|", *rows])}
