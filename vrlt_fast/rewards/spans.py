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
    a, b = merge(predicted), merge(truth)
    inter = sum(max(0.0, min(e, y) - max(s, x)) for s, e in a for x, y in b)
    union = sum(e - s for s, e in a) + sum(e - s for s, e in b) - inter
    return inter / union if union > 0 else 0.0


def iop(predicted: Sequence[Span], truth: Sequence[Span]) -> float:
    """Intersection over the predicted length of two sets of spans, in 0..1; 0.0 when nothing valid was predicted."""
    a, b = merge(predicted), merge(truth)
    inter = sum(max(0.0, min(e, y) - max(s, x)) for s, e in a for x, y in b)
    length = sum(e - s for s, e in a)
    return inter / length if length > 0 else 0.0
