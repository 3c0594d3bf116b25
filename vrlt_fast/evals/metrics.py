"""Metrics of scored answers: accuracy, mean tIoU, R1 at thresholds, and grounded accuracy.

An answer that can't be read counts as wrong and as tIoU 0. R1@t counts tIoU >= t. acc@gqa counts answers that are
right and whose predicted spans lie at least half inside the annotated ones (IoP >= 0.5), as NExT-GQA's official
script does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vrlt_fast.data.sample import TASKS, Sample, Span
from vrlt_fast.rewards.base import Response
from vrlt_fast.rewards.spans import iop, tiou
from vrlt_fast.rewards.text import parse

THRESHOLDS = (0.3, 0.5, 0.7)
Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Scored:
    """One answer to one question; ``tiou``, ``iop`` and ``correct`` are None where the task has no such part."""

    task: str
    text: str
    answer: str | None
    spans: tuple[Span, ...] | None
    well_formed: bool
    tiou: float | None
    iop: float | None
    correct: bool | None

    def to_json(self) -> dict[str, Any]:
        """The entry of eval/LABEL.jsonl."""
        return {
            "text": self.text,
            "answer": self.answer,
            "spans": None if self.spans is None else [list(s) for s in self.spans],
            "well_formed": self.well_formed,
            "tiou": self.tiou,
            "correct": self.correct,
        }


def score(response: Response, sample: Sample, *, think: bool) -> Scored:
    """Score one response against its sample."""
    parsed = parse(response.text, sample, think=think)
    spans = parsed.spans or ()
    return Scored(
        task=sample.task,
        text=response.text,
        answer=parsed.answer,
        spans=parsed.spans,
        well_formed=parsed.well_formed and response.finish_reason == "stop",
        tiou=tiou(spans, sample.spans) if sample.wants_spans else None,
        iop=iop(spans, sample.spans) if sample.wants_spans else None,
        correct=parsed.answer == sample.answer if sample.wants_answer else None,
    )


def summarise(scored: Sequence[Scored]) -> Metrics:
    """Metrics a task, and ``all``: ``well_formed`` and ``tiou`` over every question that has the part."""
    out: Metrics = {"all": {"n": float(len(scored)), "well_formed": _mean(s.well_formed for s in scored)}}
    tious = [s.tiou for s in scored if s.tiou is not None]
    if tious:
        out["all"]["tiou"] = _mean(tious)
    for task in TASKS:
        of_task = [s for s in scored if s.task == task]
        if of_task:
            out[task] = _of_task(of_task)
    return out


def _of_task(scored: Sequence[Scored]) -> dict[str, float]:
    out = {"n": float(len(scored)), "well_formed": _mean(s.well_formed for s in scored)}
    right = [s.correct for s in scored if s.correct is not None]
    tious = [s.tiou for s in scored if s.tiou is not None]
    if right:
        out["accuracy"] = _mean(right)
    if tious:
        out["miou"] = _mean(tious)
        out |= {f"r1@{t}": _mean(x >= t for x in tious) for t in THRESHOLDS}
    if right and tious:
        out["acc@gqa"] = _mean(bool(s.correct) and (s.iop or 0.0) >= 0.5 for s in scored)
    return out


def best_constant_span(samples: Iterable[Sample], grid: float = 0.05) -> tuple[Span, float]:
    """The span in shares of the duration, the same for all, with the highest mean tIoU, and that mean: what blind
    answers reach.
    """
    grounded = [s for s in samples if s.wants_spans]
    steps = round(1 / grid)
    best: tuple[Span, float] = ((0.0, 1.0), -1.0)
    for i in range(steps):
        for j in range(i + 1, steps + 1):
            share = (i * grid, j * grid)
            value = _mean(tiou([(share[0] * s.duration, share[1] * s.duration)], s.spans) for s in grounded)
            if value > best[1]:
                best = (share, value)
    return best


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


def flatten(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """``{"grounding/miou": 0.4, ...}``."""
    return {f"{task}/{name}": value for task, values in metrics.items() for name, value in values.items()}
