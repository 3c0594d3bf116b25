"""Metrics of scored answers, a task at a time; docs/eval.md has the definitions and where they come from.

An answer that can't be read counts as wrong, as IoU 0 and as the largest error. Thresholds are inclusive (``>=``),
except where a benchmark's own are not: MRA's ``<`` and GOT-10k's success rate ``>``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

from vrlt_fast.data.grammars import named, pieces
from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.sample import TASKS, Sample, Span
from vrlt_fast.evals import scores
from vrlt_fast.rewards import answers, boxes, choice
from vrlt_fast.rewards.base import Response
from vrlt_fast.rewards.spans import tiou

THRESHOLDS = (0.3, 0.5, 0.7)
REXTIME_THRESHOLDS = tuple(i / 20 for i in range(6, 20))
Metrics = dict[str, dict[str, float]]
Convention = Literal["plain", "nextgqa", "rextime"]


@dataclass(frozen=True)
class Scored:
    """One answer to one question.

    ``tiou`` is of the merged sets of spans, ``iou`` and ``iop`` are those of :func:`scores.best_of_spans`; these and
    ``correct`` (letters, number or object) are None where the task has no such part. ``values`` are further ones of
    the task, by name.
    """

    task: str
    text: str
    parsed: Parsed
    well_formed: bool
    tiou: float | None = None
    iou: float | None = None
    iop: float | None = None
    correct: bool | None = None
    source: str = ""
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def answer(self) -> str | None:
        return self.parsed.answer

    @property
    def spans(self) -> tuple[Span, ...] | None:
        return self.parsed.spans

    def to_json(self) -> dict[str, Any]:
        """The entry of eval/LABEL.jsonl; what the task has no part for is left out, but for the first six keys."""
        said = self.parsed
        found = None if said.boxes is None else [asdict(box) for box in said.boxes]
        further = {
            "iou": self.iou,
            "iop": self.iop,
            "boxes": found,
            "object_id": said.object_id,
            "progress": said.progress,
            "values": dict(self.values) or None,
        }
        return {
            "text": self.text,
            "answer": said.answer,
            "spans": None if said.spans is None else [list(s) for s in said.spans],
            "well_formed": self.well_formed,
            "tiou": self.tiou,
            "correct": self.correct,
            **{name: value for name, value in further.items() if value is not None},
        }


def score(response: Response, sample: Sample, *, think: bool, grammar: str = "plain") -> Scored:
    """Score one response against its sample, read by the grammar of this name."""
    parsed = named.grammar(grammar).read(response.text, sample, think=think)
    spans = parsed.spans or ()
    iou, iop = scores.best_of_spans(spans, sample.spans) if sample.wants_spans else (None, None)
    return Scored(
        task=sample.task,
        text=response.text,
        parsed=parsed,
        well_formed=parsed.well_formed and response.finish_reason == "stop",
        tiou=tiou(spans, sample.spans) if sample.wants_spans else None,
        iou=iou,
        iop=iop,
        correct=_correct(parsed, sample),
        source=sample.source,
        values=_VALUES[sample.task](parsed, sample) if sample.task in _VALUES else {},
    )


def _correct(parsed: Parsed, sample: Sample) -> bool | None:
    if sample.wants_answer:
        return choice.exact(parsed.answer, sample.letters) == 1
    if sample.task == "number":
        return answers.number(parsed.answer or "", sample.answer) == 1
    if sample.task == "instance":
        return boxes.right_instance(parsed.object_id, sample.object_id) == 1
    return None


def _of_boxes(parsed: Parsed, sample: Sample) -> dict[str, float]:
    overlaps = scores.frame_overlaps(parsed.boxes or (), sample.boxes)
    return {"box_iou": _mean(overlaps), "success@0.5": _mean(o > 0.5 for o in overlaps)}


def _of_progress(parsed: Parsed, sample: Sample) -> dict[str, float]:
    truth = sample.progress or 0.0
    error = scores.progress_error(parsed.progress, truth)
    return {"mae": error, "mra": scores.relative_accuracy(parsed.progress, truth)}


def _of_regression(parsed: Parsed, sample: Sample) -> dict[str, float]:
    said, truth = ((text or "").replace(",", "") for text in (parsed.answer, sample.answer))
    mra = scores.relative_accuracy(pieces.number(said), pieces.number(truth) or 0.0)
    return {"score": answers.regression(said, truth), "mra": mra}


def _of_text(make: Callable[[], answers.TextReward]) -> Callable[[Parsed, Sample], dict[str, float]]:
    """The packages behind these are imported with the first answer, and are optional."""
    made = cache(make)
    return lambda parsed, sample: {"score": made()(parsed.answer or "", sample.answer)}


_VALUES: dict[str, Callable[[Parsed, Sample], dict[str, float]]] = {
    "regression": _of_regression,
    "ocr": _of_text(answers.word_accuracy),
    "open": _of_text(answers.rouge),
    "boxes": _of_boxes,
    "instance": lambda parsed, sample: {"viou": scores.viou(parsed.spans or (), parsed.object_id, sample)},
    "progress": _of_progress,
}


def summarise(scored: Sequence[Scored], convention: Convention = "plain") -> Metrics:
    """Metrics a task, and ``all``: ``well_formed`` and ``tiou`` over every question that has the part.

    ``convention``: whose IoU spans have. plain: that of the merged sets, as the reward; nextgqa and rextime: those of
    the official scripts, in their names, with the merged one as ``miou_merged``.
    """
    out: Metrics = {"all": {"n": float(len(scored)), "well_formed": _mean(s.well_formed for s in scored)}}
    tious = [s.tiou for s in scored if s.tiou is not None]
    if tious:
        out["all"]["tiou"] = _mean(tious)
    for task in TASKS:
        of_task = [s for s in scored if s.task == task]
        if of_task:
            out[task] = _of_task(task, of_task, convention)
    return out


def _of_task(task: str, scored: Sequence[Scored], convention: Convention) -> dict[str, float]:
    out = {"n": float(len(scored)), "well_formed": _mean(s.well_formed for s in scored)}
    right = [s.correct for s in scored if s.correct is not None]
    if right:
        out["id_accuracy" if task == "instance" else "accuracy"] = _mean(right)
    for name in scored[0].values:
        out["m_viou" if name == "viou" else name] = _mean(s.values[name] for s in scored)
    if task == "instance":
        out["m_tiou"] = _mean(s.tiou or 0.0 for s in scored)
        out |= {f"viou@{t}": _mean(s.values["viou"] >= t for s in scored) for t in THRESHOLDS[:2]}
    elif scored[0].tiou is not None:
        out |= _of_spans(scored, convention)
    return out


def _of_spans(scored: Sequence[Scored], convention: Convention) -> dict[str, float]:
    ious = [(s.tiou if convention == "plain" else s.iou) or 0.0 for s in scored]
    iops = [s.iop or 0.0 for s in scored]
    grounded = [bool(s.correct) for s in scored if s.correct is not None]
    out = {"miou": _mean(ious)}
    if convention == "nextgqa":
        out |= {f"iou@{t}": _mean(x >= t for x in ious) for t in THRESHOLDS[:2]}
        out |= {"miop": _mean(iops)} | {f"iop@{t}": _mean(x >= t for x in iops) for t in THRESHOLDS[:2]}
    else:
        thresholds = REXTIME_THRESHOLDS if convention == "rextime" else THRESHOLDS
        out |= {f"r1@{t}": _mean(x >= t for x in ious) for t in thresholds}
    if grounded and convention == "rextime":
        both = [[right and x >= t for right, x in zip(grounded, ious, strict=True)] for t in THRESHOLDS]
        out |= {f"gqa@{t}": _mean(hits) for t, hits in zip(THRESHOLDS, both, strict=True)}
    elif grounded:
        out["acc@gqa"] = _mean(right and x >= 0.5 for right, x in zip(grounded, iops, strict=True))
    if convention != "plain":
        out["miou_merged"] = _mean(s.tiou or 0.0 for s in scored)
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
