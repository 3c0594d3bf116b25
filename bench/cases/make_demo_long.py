"""make_demo_long: ``make demo-long`` in a fresh clone: minutes, and how far GRPO gets with more steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.cases.make_demo import greedy_gain, measure
from bench.harness import Claim, Record, median_of, records_of


def run(argv: Sequence[str]) -> None:
    """Write bench/results/make_demo_long.cpu.json."""
    measure("make_demo_long", "demo-long", claims, argv)


def claims(records: list[Record]) -> list[Claim]:
    minutes = median_of(records, metric="minutes", arm="make")
    return [
        Claim("demo_long.minutes", "make demo-long in a fresh clone on 2 cores", minutes, 60.0, "<="),
        Claim("demo_long.greedy_gain", "greedy mean tIoU, GRPO over SFT, one seed", greedy_gain(records), 0.05),
    ]


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``reached``: minutes, and what was learnt in them."""
    records = records_of(result)
    minutes = median_of(records, metric="minutes", arm="make")
    names = ("sampled_tiou", "greedy_tiou", "greedy_accuracy", "sampled_well_formed")
    head = "| | sampled mean tIoU | greedy mean tIoU | VideoQA accuracy, greedy | well-formed, sampled |"
    lines = [head, "|---|---|---|---|---|"]
    for label, arm in (("after SFT", "sft"), (f"after GRPO, {minutes:.0f} minutes in all", "grpo")):
        cells = [f"{median_of(records, metric=name, arm=arm):.3f}" for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return {"reached": "\n".join(lines)}
