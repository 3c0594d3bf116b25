"""step: whole GRPO steps, from video files to new weights, beside the same steps as replicated practice does them.

The demo's recipe on its own videos. ``ours`` is the trainer's stage. ``practice`` decodes and encodes a row at a time,
samples with transformers' generate, scores and trains row by row with the logits of the whole row
(:class:`bench.step_arms.Practice`). Random weights, all responses of one length, so both arms have the same tokens; the
reference pass, the optimizer and the decoder are the same. Nothing is timed before rewards, loss and every gradient on
the same responses agree. On CUDA shapes of Qwen2.5-VL-7B, frames of the same videos made larger.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import Claim, Record, records_of, write_cells

CASE = "step"
SEED = 19
CPU = "demo, 8 x 8, R=16, 4704 pixels"
GPU = "7b, 1 x 8, R=512, 1254400 pixels"


def run(argv: Sequence[str]) -> None:
    """Measure; see --help.

    Raises:
        BenchError: the arms don't agree.
    """
    parser = argparse.ArgumentParser(prog="python -m bench step", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each arm, after one that isn't")
    parser.add_argument("--minutes", type=float, default=30.0, help="no cell begins later than this")
    parser.add_argument("--data", type=Path, help="what vrlt data demo has made; default: --clips new ones")
    parser.add_argument("--clips", type=int, default=24, help="videos that are made")
    parser.add_argument("--small", action="store_true", help="whether it works, not how fast it is")
    parser.add_argument("--out", type=Path, help="folder of the result file instead of bench/results")
    options = parser.parse_args(argv)
    from bench import measure, step_run

    device, path, records = measure.begin(CASE, options)
    rounds, clips = (1, 4) if options.small else (options.rounds, options.clips)
    shapes = _shapes(device.type, small=options.small)
    cells = (step_run.cell(shape, device, rounds, SEED, options.data, clips) for shape in shapes)
    write_cells(CASE, records, cells, claims, SEED, path=path, limit_s=60 * options.minutes)


def _shapes(kind: str, *, small: bool) -> list[Any]:
    """Most important first. Of a film of 10 s the GPU's have about 16k and 2k tokens."""
    from bench.step_arms import Shape

    if small:
        return [Shape("demo", 2, 2, 4, 4704)]
    if kind == "cpu":
        return [Shape("demo", 8, 8, 16, 4704)]
    return [Shape("7b", 1, 8, 512, 1_254_400), Shape("7b", 1, 8, 512, 156_800)]


def claims(records: list[Record]) -> list[Claim]:
    """Those whose records are there."""
    table = {(r.arm, r.shape, r.metric): r.median for r in records}
    found = []
    for kind, shape in (("cpu", CPU), ("gpu", GPU)):
        ours = table.get(("ours", shape, "step"))
        if ours:
            text = f"seconds of a step of replicated practice over ours, {shape}"
            found.append(Claim(f"step.{kind}.vs_practice", text, table["practice", shape, "step"] / ours, 2.0))
            text = f"response tokens a second of whole steps, {shape}; no target"
            found.append(Claim(f"step.{kind}.tokens_s", text, table["ours", shape, "rate"], 0.0, ">"))
    return found


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``phases``: seconds of each phase in both arms."""
    table = {(r.arm, r.shape, r.metric): r for r in records_of(result)}
    lines = ["| cell | phase | practice, s | ours, s | ratio |", "|---|---|---:|---:|---:|"]
    for (arm, shape, metric), record in table.items():
        if arm == "ours" and record.unit == "s":
            ours, theirs = record.median, table["practice", shape, metric].median
            ratio = f"{theirs / ours:.2f}" if ours else ""
            lines.append(f"| {shape} | {metric} | {theirs:.3g} | {ours:.3g} | {ratio} |")
    return {"phases": "\n".join(lines)}
