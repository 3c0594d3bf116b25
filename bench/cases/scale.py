"""scale: one long group on 1, 2 and 4 processes: seconds, memory and bytes received, against frames.

Each process computes with one thread. ``received`` is what the process with most got from the others in one pass over
the layers, over (sp - 1) / sp of the prompt's keys and values. The last cell is a whole run, from the video file on.
On a GPU: one process, and what bench/scale_model.py makes of it for eight.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.harness import Claim, Record, records_of, write_cells

CASE = "scale"
SEED = 23
LONG = 4096


def run(argv: Sequence[str]) -> None:
    """Measure; see --help.

    Raises:
        BenchError: a process failed.
    """
    parser = argparse.ArgumentParser(prog="python -m bench scale", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--minutes", type=float, default=60.0, help="no cell begins later than this")
    parser.add_argument("--small", action="store_true", help="whether it works, not how fast it is")
    parser.add_argument("--out", type=Path, help="folder of the result file instead of bench/results")
    options = parser.parse_args(argv)
    from bench import measure, scale_run

    device, path, records = measure.begin(CASE, options)

    def cells() -> Iterator[list[Record]]:
        if device.type == "cpu":
            with tempfile.TemporaryDirectory() as work:
                yield scale_run.whole_run(64 if options.small else LONG, 2, Path(work) / "work")
        for cell in _cells(device.type, small=options.small):
            yield scale_run.measure(cell)

    limit = 60 * options.minutes
    write_cells(CASE, records, cells(), claims, SEED, path=path, limit_s=limit)


def _cells(kind: str, *, small: bool) -> list[dict[str, Any]]:
    cell = {"device": kind, "size": "demo", "rows": 8, "length": 32, "shard": False, "rounds": 1}
    if small:
        return [cell | {"frames": 8, "processes": n, "rows": 3, "length": 4} for n in (1, 2)]
    if kind == "cuda":
        big = cell | {"size": "7b", "processes": 1, "length": 256, "rounds": 2}
        return [big | {"frames": frames} for frames in (256, 1024, LONG)]
    shards = cell | {"frames": 256, "processes": 2, "shard": True, "rounds": 3}
    counts = [(frames, processes) for frames in (64, 256, 1024, LONG) for processes in (1, 2, 4)]
    return [shards, *(cell | {"frames": f, "processes": n, "rounds": 3 if f < 1024 else 1} for f, n in counts)]


def claims(records: list[Record]) -> list[Claim]:
    """Those whose records are there."""
    found = []
    ratios = [r.median for r in records if r.metric.startswith("received: ")]
    if ratios:
        found.append(Claim("scale.received", "bytes received over the formula's, most", max(ratios), 1.05, "<="))
    table = {(r.arm, r.shape, r.metric): r.median for r in records}
    for processes in (2, 4):
        for metric, name in (("peak memory of the update", "memory"), ("keys and values of the rollout", "kv")):
            key = (f"{processes} processes", f"demo, {LONG} frames, 8 x 32", metric)
            one = table.get(("1 processes", *key[1:]))
            if one and key in table:
                text = f"{metric}, {LONG} frames, {processes} processes, over one's and over 1 / {processes}"
                found.append(Claim(f"scale.{name}_{processes}", text, table[key] / one * processes, 1.5, "<="))
    peak = table.get(("2 processes", f"vrlt train, {LONG} frames", "peak memory of all processes"))
    if peak:
        found.append(Claim("scale.run", f"GB of a run of {LONG} frames on 2 processes", peak / 1e9, 20.0, "<="))
    return found


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``cells``: a line a cell and number of processes."""
    records = [r for r in records_of(result) if r.arm != "device"]
    table = {(r.arm, r.shape, r.metric): r.median for r in records}
    head = "| cell | processes | prompt | encode | prefill | decode | update | KV each | update's memory each |"
    lines = [head, "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name, shape, metric in table:
        if metric != "update" or (name, shape, "tokens of the prompt") not in table:
            continue
        row = {m: table[name, shape, m] for (a, s, m) in table if (a, s) == (name, shape)}
        seconds = " | ".join(f"{row[m]:.3g} s" for m in ("encode", "prefill", "generate", "update"))
        sizes = " | ".join(
            f"{row[m] / 1e6:.4g} MB" for m in ("keys and values of the rollout", "peak memory of the update")
        )
        count = name.removesuffix(" processes").replace(" processes", "")
        lines.append(f"| {shape} | {count} | {row['tokens of the prompt']:.0f} | {seconds} | {sizes} |")
    return {"cells": "\n".join(lines)}
