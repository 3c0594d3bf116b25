"""update: seconds of one GRPO update with prompts computed once a group, beside the ways in which others compute it.

Teacher-forced ragged responses on videos of random pictures, everything trained, the same head, loss and checkpointing
in all arms, and no time is recorded before loss and every gradient of all arms agree with replicated rows.
``replicated``: a response behind its prompt, one at a time, tower included (EasyR1, verl). ``strong``: the same rows
packed without padding at their best micro-batch, tower once a clip. Where they are installed: ``PrefixGrouper``, its
attention in the same model; in the text-only cell ``TRL``, GRPOTrainer's own loss at its best micro-batch.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.harness import Claim, Record, read_result, records_of, write_cells

CASE = "update"
SEED = 17
CPU = "toy, P=1024, R=32, 1 x 8"
GPU = "7b, P=16384, R=1024, 1 x 8, recompute"


def run(argv: Sequence[str]) -> None:
    """Measure; see --help.

    Raises:
        BenchError: the arms don't agree.
    """
    parser = argparse.ArgumentParser(prog="python -m bench update", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each arm")
    parser.add_argument("--minutes", type=float, default=30.0, help="no cell begins later than this")
    parser.add_argument("--redo", action="store_true", help="measure chosen cells that the file has anew")
    chosen = parser.add_mutually_exclusive_group()
    what = "others than the default ones, as [SIZE:]PxRxGROUPS[:text]: 4096x32x1 3b:2048x512x1"
    chosen.add_argument("--cells", nargs="+", type=_cell, help=what)
    chosen.add_argument("--small", action="store_true", help="whether it works, not how fast it is; replaces the file")
    parser.add_argument("--out", type=Path, help="folder of the result file instead of bench/results")
    options = parser.parse_args(argv)
    from bench import measure, update_run

    device, path, records = measure.begin(CASE, options)
    shapes = {shape.label(recompute): (shape, recompute) for shape, recompute in _chosen(options, device.type)}

    def cells(labels: Sequence[str]) -> Iterator[list[Record]]:
        for shape, recompute in map(shapes.__getitem__, labels):
            yield update_run.cell(shape, device, options.rounds, SEED, recompute=recompute)

    if options.small:
        write_cells(CASE, records, cells(list(shapes)), claims, SEED, path=path)
        return
    began, there = time.monotonic(), {r.shape for r in _kept(path)}
    for label in shapes:
        if label in there and not options.redo:
            sys.stdout.write(f"{label}: in {path} already; --redo measures it anew\n")
        elif time.monotonic() - began > 60 * options.minutes:
            sys.stdout.write(f"{label}: left, {options.minutes:g} minutes were over\n")
        else:
            others = [r for r in _kept(path) if r.shape != label]
            write_cells(CASE, [*records, *others], cells([label]), claims, SEED, path=path)


def _kept(path: Path) -> list[Record]:
    """What the file has of cells. Raises BenchError for one that is damaged."""
    return [r for r in records_of(read_result(path)) if r.arm != "device"] if path.is_file() else []


def _shapes(kind: str, *, small: bool) -> list[tuple[Any, bool]]:
    """Shapes, most important first, and whether activations are computed again."""
    from bench.update_arms import Shape

    if small:
        return [(Shape("demo", 150, 6, 2, 3), False), (Shape("demo", 60, 6, 2, 3, text=True), False)]
    if kind == "cpu":
        wanted = [(1024, 32, 1), (1024, 128, 1), (1024, 32, 2), (256, 32, 1)]
        shapes = [Shape("toy", p, r, groups, 8) for p, r, groups in wanted]
        return [(shape, False) for shape in [*shapes, Shape("toy", 1024, 32, 1, 8, text=True)]]
    big = [(size, 16384, 1024) for size in ("7b", "3b")] + [(size, 2048, 512) for size in ("7b", "3b")]
    shapes = [Shape(size, p, r, 1, 8) for size, p, r in big]
    return [(shape, True) for shape in [*shapes, Shape("7b", 2048, 512, 1, 8, text=True)]]


def _cell(text: str) -> tuple[str, int, int, int, bool]:
    """Model ("": the device's), prompt tokens, response tokens, groups, and whether there are no videos."""
    found = re.fullmatch(r"(?:(\w+):)?(\d+)x(\d+)x(\d+)(:text)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} isn't [SIZE:]PxRxGROUPS[:text]")
    size, prompt, response, groups, only_text = found.groups()
    return size or "", int(prompt), int(response), int(groups), bool(only_text)


def _chosen(options: argparse.Namespace, kind: str) -> list[tuple[Any, bool]]:
    """The cells that were asked for, else the device's."""
    from bench.update_arms import Shape

    if not options.cells:
        return _shapes(kind, small=options.small)
    default, recompute = ("toy", False) if kind == "cpu" else ("7b", True)
    return [(Shape(size or default, p, r, groups, 8, text), recompute) for size, p, r, groups, text in options.cells]


def claims(records: list[Record]) -> list[Claim]:
    """Those whose records are there."""
    table = {(r.arm, r.shape, r.metric): r.median for r in records}
    found = []
    for kind, shape, most, strong in (("cpu", CPU, 4.0, 2.5), ("gpu", GPU, 4.2, 2.5)):
        ours = table.get(("packed", shape, "step"))
        if not ours:
            continue
        what = f"seconds of an update over those with prompts computed once, {shape}"
        for arm, target in (("replicated", most), ("strong", strong)):
            ratio = table[arm, shape, "step"] / ours
            found.append(Claim(f"update.{kind}.vs_{arm}", f"{arm} baseline's {what}", ratio, target))
        peaks = [table.get((arm, shape, "peak memory")) for arm in ("packed", "strong")]
        if peaks[0] and peaks[1]:
            text = f"peak memory over the strong baseline's, {shape}"
            found.append(Claim(f"update.{kind}.memory", text, peaks[0] / peaks[1], 1.0, "<="))
    return found


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``cells``: a line an arm and shape."""
    records = [r for r in records_of(result) if r.arm != "device"]
    table = {(r.arm, r.shape, r.metric): r.median for r in records}
    lines = ["| cell | arm | seconds a step | times ours | peak memory |", "|---|---|---:|---:|---:|"]
    for arm, shape, metric in table:
        if metric == "step":
            ours, spent = table["packed", shape, "step"], table[arm, shape, "step"]
            most = table.get((arm, shape, "peak memory"))
            peak = f"{most / 1e9:.2f} GB" if most else ""
            lines.append(f"| {shape} | {arm} | {spent:.3g} | {spent / ours:.2f} | {peak} |")
    return {"cells": "\n".join(lines)}
