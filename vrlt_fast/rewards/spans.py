"""Interval arithmetic on spans in seconds: the one implementation behind rewards and metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from vrlt_fast.data.sample import Span


def merge(spans: Iterable[Span]) -> list[Span]:
    """Sorted, disjoint spans with the same union. Spans with start >= end or a non-finite border are left out."""
    out: list[Span] = []
    for start, end in sorted((s, e) for s, e in spans if math.isfinite(s) and math.isfinite(e) and s < e):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def tiou(predicted: Sequence[Span], truth: Sequence[Span]) -> float:
    """Temporal intersection over union of two sets of spans, in 0..1; 0.0 when nothing valid was predicted.

    Both sets are merged first, so overlapping spans don't count twice. For one span each this is the usual tIoU.
    """
    inter, length, other = _measure(predicted, truth)
    union = length + other - inter
    return inter / union if 0 < union < math.inf else 0.0


def merged_iou(predicted: Sequence[Span], truth: Sequence[Span]) -> float:
    """:func:`tiou` as VideoChat-R1's released code has it (OpenGVLab/VideoChat-R1, grounded QA): 1.0 where both unions
    are of length 0, as of two empty lists, and 0.0 where a predicted span has start > end or a non-finite border.
    """
    if not all(math.isfinite(s) and math.isfinite(e) and s <= e for s, e in predicted):
        return 0.0
    return tiou(predicted, truth) if merge(predicted) or merge(truth) else 1.0


def iop(predicted: Sequence[Span], truth: Sequence[Span]) -> float:
    """Intersection over the predicted length of two sets of spans, in 0..1; 0.0 when nothing valid was predicted."""
    inter, length, _ = _measure(predicted, truth)
    return inter / length if 0 < length < math.inf else 0.0


def hull_iou(predicted: Sequence[Span], truth: Sequence[Span]) -> float:
    """Intersection of the first span of each over their hull, in 0..1, as Temporal-R1's released code has it
    (appletea233/Temporal-R1, ``tvg.py``).

    The same as :func:`tiou` of two spans. 0.0 where either list is empty, a border isn't finite, start > end, or the
    hull has no length. Predictions aren't clamped to the video.
    """
    if not predicted or not truth:
        return 0.0
    (s, e), (x, y) = predicted[0], truth[0]
    if not all(map(math.isfinite, (s, e, x, y))):
        return 0.0
    hull = max(e, y) - min(s, x)
    return max(0.0, min(e, y) - max(s, x)) / hull if 0 < hull < math.inf else 0.0


def boundary_iou(predicted: Sequence[Span], truth: Sequence[Span], duration: float) -> float:
    """:func:`hull_iou` times ``(1 - |ds| / T) (1 - |de| / T)``, in 0..1: ds and de are how far start and end of the
    first spans are apart, T is the ``duration`` of the video in seconds (Time-R1, arXiv 2503.13377).

    A factor isn't below 0; a duration that isn't finite and above 0 gives 0.0.
    """
    overlap = hull_iou(predicted, truth)
    if overlap == 0 or not 0 < duration < math.inf:
        return 0.0
    closeness = (max(0.0, 1 - abs(a - b) / duration) for a, b in zip(predicted[0], truth[0], strict=True))
    return overlap * math.prod(closeness)


def _measure(predicted: Sequence[Span], truth: Sequence[Span]) -> tuple[float, float, float]:
    """Length of the intersection, and of each merged set."""
    a, b = merge(predicted), merge(truth)
    inter = sum(max(0.0, min(e, y) - max(s, x)) for s, e in a for x, y in b)
    return inter, sum(e - s for s, e in a), sum(e - s for s, e in b)
