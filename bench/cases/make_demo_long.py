"""make_demo_long: ``make demo-long`` in a fresh clone: minutes, and how far GRPO gets with more steps."""

from __future__ import annotations

from collections.abc import Sequence

from bench.cases.make_demo import greedy_gain, measure
from bench.harness import Claim, Record, median_of


def run(argv: Sequence[str]) -> None:
    """Write bench/results/make_demo_long.cpu.json."""
    measure("make_demo_long", "demo-long", claims, argv)


def claims(records: list[Record]) -> list[Claim]:
    minutes = median_of(records, metric="minutes", arm="make")
    return [
        Claim("demo_long.minutes", "make demo-long in a fresh clone on 2 cores", minutes, 60.0, "<="),
        Claim("demo_long.greedy_gain", "greedy mean tIoU, GRPO over SFT, one seed", greedy_gain(records), 0.05),
    ]
