"""rollout: tokens a second of the group engine beside transformers' generate, and what reading a prefix once is worth.

On a CPU with toy models, prompts of 1k and 4k tokens; on CUDA (bench/gpu_check.sh rollout) with random weights
of Qwen2.5-VL's shapes and prompts of 16k. Rows per prompt G = 8; encoding and prefill are part of the time. Before
anything is timed on the CPU the engine's log-probs must equal a full forward pass, and greedy tokens generate's (fp32).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.harness import Claim, Record, read_result, records_of, write_cells

CASE = "rollout"
SEED = 11
GROUP = 8


def run(argv: Sequence[str]) -> None:
    """Measure; see --help.

    Raises:
        BenchError: an arm's log-probs or tokens are wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m bench rollout", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each arm (CPU)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024, 4096], help="prompt tokens (CPU)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128], help="response tokens (CPU)")
    parser.add_argument("--sizes", nargs="+", default=["toy", "demo"], help="models (CPU): toy, demo")
    parser.add_argument("--minutes", type=float, default=6.0, help="no cell begins later than this (CUDA)")
    parser.add_argument("--keep", action="store_true", help="keep what the file has of other cells (CPU)")
    parser.add_argument("--small", action="store_true", help="whether it works, not how fast it is")
    parser.add_argument("--out", type=Path, help="folder of the result file instead of bench/results")
    options = parser.parse_args(argv)
    from bench import measure, rollout_run

    device, path, records = measure.begin(CASE, options)
    if options.keep:
        kept = records_of(read_result(path))
        again = {f"{s}, prompt {rollout_run.short(p)}, {n} tokens" for s, p, n in _cells(options)}
        records += [r for r in kept if r.arm != "device" and r.shape not in again]
    if device.type == "cpu" and not options.small:
        cells = _cells(options)
        steps: Iterator[list[Record]] = (rollout_run.cpu_cell(*cell, GROUP, options.rounds, SEED) for cell in cells)
    else:
        steps = rollout_run.gpu_cells(device, GROUP, SEED, small=options.small)
    limit = 60 * options.minutes if device.type == "cuda" else math.inf
    write_cells(CASE, records, steps, claims, SEED, path=path, limit_s=limit)


def _cells(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Model, prompt tokens and response tokens of the CPU's cells."""
    return [(s, p, n) for s in options.sizes for p in options.prompts for n in options.lengths]


def claims(records: list[Record]) -> list[Claim]:
    """Those whose records are there."""
    table = {(r.arm, r.shape, r.metric): r.median for r in records}
    cpu = any(r.metric == "memory" and r.shape == "cpu" for r in records)
    return _cpu_claims(table) if cpu else _gpu_claims(table)


def _cpu_claims(table: dict[tuple[str, str, str], float]) -> list[Claim]:
    """The least ratio of all models and lengths that were measured with a prompt."""
    found = []
    for label, target in (("1k", 3.0), ("4k", 5.0)):
        ratios = []
        for (arm, shape, metric), ours in table.items():
            if (arm, metric) == ("group engine", "rate") and f"prompt {label}," in shape:
                theirs = [v for (a, s, m), v in table.items() if a.startswith("HF") and (s, m) == (shape, metric)]
                ratios.append(ours / max(theirs))
        if ratios:
            what = f"prompt of {label}, {GROUP} rows, prefill included, least cell"
            text = f"tokens/s over HF generate's better cache, {what}"
            found.append(Claim(f"rollout.cpu.{label}", text, min(ratios), target))
    return found


def _gpu_claims(table: dict[tuple[str, str, str], float]) -> list[Claim]:
    found = []
    for groups, target in ((1, 1.2), (4, 1.8)):
        shape = f"7b, prompt 16k, {groups} groups"
        ours, theirs = (table.get((arm, shape, "step")) for arm in ("group engine", "prefix read per row"))
        if ours and theirs:
            text = f"decode step over per-row prefix reads, 16k, {groups} resident groups"
            found.append(Claim(f"rollout.gpu.decode_16k_{groups}g", text, theirs / ours, target))
    ours, theirs = (
        table.get((arm, "7b heads, prompt 16k, 4 groups", "attention")) for arm in ("group_decode", "per row")
    )
    if ours and theirs:
        text = "attention of a decode step alone over per-row prefix reads, 16k, 4 groups"
        found.append(Claim("rollout.gpu.attention_16k", text, theirs / ours, 4.0))
    step, floor = (table.get(("group engine", "7b, prompt 16k, 1 groups", metric)) for metric in ("step", "floor"))
    if step and floor:
        text = "share of the bandwidth floor (weights, prefix once, suffixes) in a decode step, 16k, 1 group"
        found.append(Claim("rollout.gpu.decode_floor", text, floor / step, 0.7))
    ours = table.get(("group engine", "7b, prompt 16k, 1 groups", "rate"))
    rates = [v for (arm, s, m), v in table.items() if arm.startswith("HF") and s.startswith("7b") and m == "rate"]
    if ours and rates:
        text = "tokens/s over HF generate at its best, 16k, prefill included"
        found.append(Claim("rollout.gpu.vs_hf", text, ours / max(rates), 5.0))
    return found


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``cells``: everything measured but the device."""
    rows = [
        f"| {r.shape} | {r.arm} | {r.metric} | {r.median:.4g} {r.unit} |"
        for r in records_of(result)
        if r.arm != "device"
    ]
    return {"cells": "\n".join(["| cell | arm | what | median |", "|---|---|---|---|", *rows])}
