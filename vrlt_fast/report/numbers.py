"""How numbers look, on the console and in the report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

DASH, MINUS = "\u2013", "\u2212"
LABELS = {"start": "start", "sft": "after SFT", "grpo": "after GRPO"}
TASK_NAMES = {
    "all": "All questions",
    "videoqa": "VideoQA",
    "grounding": "Temporal grounding",
    "grounded_qa": "Grounded VideoQA",
    "number": "Numbers",
    "regression": "Estimates",
    "ocr": "Text to read",
    "open": "Open answers",
    "boxes": "Boxes",
    "instance": "Spatio-temporal grounding",
    "progress": "Progress",
}
METRIC_NAMES = {
    "tiou": "mean tIoU",
    "miou": "mIoU",
    "r1@0.3": "R1@0.3",
    "r1@0.5": "R1@0.5",
    "r1@0.7": "R1@0.7",
    "r1@0.95": "R1@0.95",
    "accuracy": "accuracy",
    "well_formed": "well-formed",
    "acc@gqa": "Acc@GQA",
    "miou_merged": "mIoU merged",
    "iou@0.3": "IoU@0.3",
    "iou@0.5": "IoU@0.5",
    "miop": "mIoP",
    "iop@0.3": "IoP@0.3",
    "iop@0.5": "IoP@0.5",
    "gqa@0.3": "GQA@0.3",
    "gqa@0.5": "GQA@0.5",
    "gqa@0.7": "GQA@0.7",
    "score": "mean score",
    "mra": "MRA",
    "mae": "MAE (points)",
    "box_iou": "mean IoU",
    "success@0.5": "success@0.5",
    "id_accuracy": "right object",
    "m_tiou": "m_tIoU",
    "m_viou": "m_vIoU",
    "viou@0.3": "vIoU@0.3",
    "viou@0.5": "vIoU@0.5",
}
_MEANS = ("tiou", "miou", "miou_merged", "miop", "box_iou", "m_tiou", "m_viou", "score")
_LESS_IS_BETTER = ("mae",)
PHASES = ("decode", "encode", "prefill", "generate", "reward", "reference", "update")


def number(value: Any) -> float | None:
    """A finite number or None; booleans and texts are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def is_share(metric: str) -> bool:
    """Whether a metric reads best in percent: mean overlaps and scores are plain numbers and MAE is in points, the rest
    are shares of questions.
    """
    return metric not in _MEANS and metric not in _LESS_IS_BETTER


def less_is_better(metric: str) -> bool:
    """Whether a metric is an error."""
    return metric in _LESS_IS_BETTER


def score(metric: str, value: float | None) -> str:
    """``0.523`` for overlaps, ``61.3 %`` for shares, ``12.5`` for points, an en dash for nothing."""
    if value is None:
        return DASH
    if metric in _LESS_IS_BETTER:
        return f"{value:.1f}"
    return f"{100 * value:.1f} %" if is_share(metric) else f"{value:.3f}"


def official(metric: str, value: float | None) -> str:
    """As papers' tables have it: all but MAE, which is in points already, times 100 and without the sign."""
    if value is None:
        return DASH
    return f"{value:.1f}" if metric in _LESS_IS_BETTER else f"{100 * value:.1f}"


def change(metric: str, value: float | None) -> str:
    """A difference of two scores, signed; shares in percentage points."""
    if value is None:
        return DASH
    if metric in _LESS_IS_BETTER:
        text = f"{value:+.1f}"
    else:
        text = f"{100 * value:+.1f}" if is_share(metric) else f"{value:+.3f}"
    return "±0" if float(text) == 0 else text.replace("-", MINUS)


def tone(metric: str, text: str) -> str:
    """Whether a :func:`change` is good, bad or the same."""
    if text[0] not in f"+{MINUS}":
        return "same"
    return "good" if (text[0] == "+") is not less_is_better(metric) else "bad"


def short(value: float) -> str:
    """About three significant digits, for axes and legends: ``0.0041``, ``12.9k``, ``1.2e-06``."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 999_500:
        return f"{value / 1e6:.3g}M"
    if size >= 999.5:
        return f"{value / 1e3:.3g}k"
    if size < 1e-4:
        return f"{value:.1e}"
    if size >= 99.95:
        return f"{value:.0f}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """``12s``, ``3m12s``, ``6h12m``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def ordered(labels: list[str]) -> list[str]:
    """Labels of evaluations in the order of the run: start, sft, grpo, then others as they came."""
    known = [label for label in LABELS if label in labels]
    return known + [label for label in dict.fromkeys(labels) if label not in LABELS]


def metric_of(record: dict[str, Any], kind: str, task: str, metric: str) -> float | None:
    """One number of an eval record (``kind``: greedy or sampled), None where it is missing."""
    node: Any = record.get("metrics")
    for key in (kind, task, metric):
        node = node.get(key) if isinstance(node, dict) else None
    return number(node)


def accuracy(record: dict[str, Any], kind: str) -> float | None:
    """Accuracy over all questions that have options: the mean of the tasks' accuracies, weighted by their questions."""
    pairs = []
    for task in ("videoqa", "grounded_qa"):
        value, count = metric_of(record, kind, task, "accuracy"), metric_of(record, kind, task, "n")
        if value is not None and count:
            pairs.append((value, count))
    total = sum(count for _, count in pairs)
    return sum(value * count for value, count in pairs) / total if total else None


def tasks_of(evals: Iterable[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Tasks of ``eval`` records with their metrics, without the count ``n``, both in the order of the records."""
    names: dict[str, dict[str, None]] = {}
    for record in evals:
        for kind in ("greedy", "sampled"):
            for task, values in ((record.get("metrics") or {}).get(kind) or {}).items():
                names.setdefault(task, {}).update(dict.fromkeys(values))
    return [(task, [metric for metric in metrics if metric != "n"]) for task, metrics in names.items()]
