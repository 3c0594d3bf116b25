"""Simulated samples for the stopping rule: how many responses it saves, and how many decisions it changes."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from vrlt_fast.select.stopping import Stopping, class_of

BATCH = 32
Task = tuple[float, float, float, tuple[float, float]]
"""Share of the samples; of these the shares that are never and always right; Beta of the chance p of the others."""

MIXTURE: dict[str, Task] = {
    "videoqa": (0.3, 0.25, 0.25, (1.0, 1.0)),
    "grounding": (0.4, 0.12, 0.02, (1.2, 1.2)),
    "grounded_qa": (0.3, 0.10, 0.02, (1.0, 1.0)),
}
"""A mixed file. Questions with options are right or wrong: a quarter never and a quarter always (LongVILA-R1 drops such
from 10 responses each); a span earns its overlap, which is never twice the same, but 0 where the model finds nothing;
grounded answers earn both."""


@dataclass(frozen=True)
class Found:
    """Shares: responses that weren't drawn, samples whose class isn't that of all responses, and of the samples in the
    upper half by all responses' deviation those that are in the upper half by the responses that were drawn.
    """

    saved: float
    changed: float
    same_half: float


def simulate(mixture: Mapping[str, Task], *, samples: int, repeats: int, first: int, error: float, seed: int) -> Found:
    """Run the rule over random samples as the scorer does, batch by batch."""
    rng = random.Random(seed)
    rule = Stopping(repeats, first, error)
    drawn = changed = 0
    spreads: list[tuple[float, float]] = []
    names, weights = list(mixture), [task[0] for task in mixture.values()]
    for start in range(0, samples, BATCH):
        seen = []
        for _ in range(min(BATCH, samples - start)):
            name = rng.choices(names, weights)[0]
            full = _rewards(rng, name, mixture[name], repeats)
            clear = rule.clear(name, full[:first], rng.randrange(2**32))
            known = full[:first] if clear else full
            drawn += len(known)
            changed += class_of(known, repeats) != class_of(full, repeats)
            spreads.append((_variance(full), _variance(known)))
            seen.append((name, known))
        for name, known in seen:
            rule.learn(name, known)
    return Found(1 - drawn / (samples * repeats), changed / samples, _same_half(spreads))


def _rewards(rng: random.Random, name: str, task: Task, k: int) -> list[float]:
    _, never, always, (a, b) = task
    kind = rng.random()
    p = 0.0 if kind < never else 1.0 if kind < never + always else rng.betavariate(a, b)
    hits = [float(rng.random() < p) for _ in range(k)]
    if name == "videoqa":
        return hits
    spread = 4.0 if 0.0 < p < 1.0 else 0.0
    overlaps = [rng.betavariate(spread * p + 0.05, spread * (1 - p) + 0.05) if spread else p for _ in range(k)]
    return overlaps if name == "grounding" else [(h + o) / 2 for h, o in zip(hits, overlaps, strict=True)]


def _variance(rewards: list[float]) -> float:
    mean = sum(rewards) / len(rewards)
    return sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)


def _same_half(spreads: list[tuple[float, float]]) -> float:
    half = len(spreads) // 2
    by_full, by_known = (set(sorted(range(len(spreads)), key=lambda i: -spreads[i][which])[:half]) for which in (0, 1))
    return len(by_full & by_known) / half
