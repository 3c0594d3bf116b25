"""Which charts a run has: one group a stage, and the recall curves of the held-out questions."""

from __future__ import annotations

from collections.abc import Sequence

from vrlt_fast.report.metrics import Record
from vrlt_fast.report.numbers import LABELS, PHASES, number
from vrlt_fast.report.run_folder import RunFolder
from vrlt_fast.report.svg import Point, Series, line_chart, stacked_chart

PART_COLOURS = {"semantic": "c5", "temporal": "c1", "format": "c3"}
PHASE_COLOURS = dict(zip(PHASES, ("c7", "c3", "c6", "c1", "c4", "c5", "c2"), strict=True))
LABEL_COLOURS = {"start": "start", "sft": "before", "grpo": "after"}
_SPARE = ("c4", "c7", "c6", "c2")


def _points(records: Sequence[Record], key: str, group: str = "") -> list[Point]:
    found = []
    for record in records:
        holder = record.get(group) if group else record
        value = number(holder.get(key)) if isinstance(holder, dict) else None
        if value is not None:
            found.append((float(record["step"]), value))
    return found


def _one(records: Sequence[Record], key: str, name: str, colour: str = "c1") -> list[Series]:
    return [Series(name, colour, _points(records, key))]


def _keys(records: Sequence[Record], group: str) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record.get(group) or {}))


def stage_charts(stage: str, records: Sequence[Record]) -> str:
    """The figures of one stage in reading order: what was learned, how the policy moved, what it cost."""
    names = _keys(records, "parts")
    parts = [
        Series(name, PART_COLOURS.get(name, _SPARE[index % len(_SPARE)]), _points(records, name, "parts"))
        for index, name in enumerate(names)
    ]
    zero = (0.0, None)
    earned = [value for record in records for part in (record.get("parts") or {}).values() if (value := number(part))]
    least = min([0.0, *earned])  # a penalty is below 0
    unit = "nats a token" if stage == "sft" else "policy and KL"
    figures = [
        line_chart("Reward", _one(records, "reward", "mean"), unit="weighted sum of the parts"),
        line_chart("Reward parts", parts, unit="mean, at most 1", bounds=(1.05 * least, 1.05)),
        line_chart("Reward spread", _one(records, "reward_std", "std"), unit="within groups", bounds=zero),
        line_chart(
            "Groups without signal",
            _one(records, "zero_signal_groups", "equal rewards", "c7"),
            unit="groups a step",
            bounds=zero,
        ),
        line_chart("KL", _one(records, "kl", "k3", "c4"), unit="nats a token, to the start of the stage", bounds=zero),
        line_chart("Entropy", _one(records, "entropy", "policy", "c5"), unit="nats a token", bounds=zero),
        line_chart("Response length", _one(records, "length", "mean", "c3"), unit="tokens", bounds=zero),
        line_chart(
            "Clipped and truncated",
            [
                Series("ratio clipped", "c4", _points(records, "clip_share")),
                Series("cut at the longest length", "c6", _points(records, "truncated")),
            ],
            unit="share",
            bounds=zero,
            percent=True,
        ),
        line_chart(
            "Loss", _one(records, "loss", "loss", "c2"), unit=unit, bounds=zero if stage == "sft" else (None, None)
        ),
        line_chart("Gradient norm", _one(records, "grad_norm", "before clipping", "c2"), bounds=zero),
        line_chart("Learning rate", _one(records, "lr", "AdamW", "c6"), bounds=zero, smooth=False),
        line_chart("Throughput", _one(records, "tokens_s", "trained", "c3"), unit="tokens/s", bounds=zero),
        line_chart("Step time", _one(records, "seconds", "wall", "c6"), unit="seconds", bounds=zero),
        stacked_chart("Where the time goes", _phase_shares(records), unit="share of the phases' time"),
        line_chart("Peak memory", _one(records, "peak_gb", "peak", "c6"), unit="GB", bounds=zero),
    ]
    return "".join(figures)


def _phase_shares(records: Sequence[Record]) -> list[Series]:
    lines: dict[str, list[Point]] = {name: [] for name in [*PHASES, *_keys(records, "phases")]}
    for record in records:
        phases = {name: number(value) or 0.0 for name, value in (record.get("phases") or {}).items()}
        total = sum(phases.values())
        if total > 0:
            for name, points in lines.items():
                points.append((float(record["step"]), phases.get(name, 0.0) / total))
    return [Series(name, PHASE_COLOURS.get(name, "c4"), points) for name, points in lines.items()]


def recall_charts(run: RunFolder) -> str:
    """Share of the questions with spans whose answer overlaps at least as much as the threshold on the x axis."""
    figures, unit = [], "share of answers with at least this tIoU; the dot is R1@0.5"
    for kind, title in (("greedy", "Recall over tIoU, greedy"), ("sampled", "Recall over tIoU, sampled")):
        series = []
        for label, lines in run.answers.items():
            overlaps = [
                number(answer.get("tiou")) or 0.0
                for line in lines.values()
                if line.get("spans")
                for answer in ([line.get("greedy")] if kind == "greedy" else line.get("sampled") or [])
                if isinstance(answer, dict)
            ]
            if overlaps:
                series.append(Series(LABELS.get(label, label), LABEL_COLOURS.get(label, "c4"), _recall(overlaps)))
        whole = (0.0, 1.0)
        figures.append(
            line_chart(title, series, unit=unit, x_label="tIoU", bounds=whole, percent=True, smooth=False, read_at=0.5)
        )
    return "".join(figures)


def _recall(overlaps: Sequence[float]) -> list[Point]:
    return [(t / 20, sum(overlap >= t / 20 for overlap in overlaps) / len(overlaps)) for t in range(1, 21)]
