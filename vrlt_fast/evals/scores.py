"""What one response earns under the definitions of the benchmarks' own scripts, question by question."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace

from vrlt_fast.data.sample import Box, Sample, Span
from vrlt_fast.rewards.boxes import box_iou
from vrlt_fast.rewards.spans import hull_iou, iop, merge, tiou

MRA_THRESHOLDS = tuple(i / 20 for i in range(10, 20))
"""0.50, 0.55 .. 0.95."""
_DIGITS = 9  # of relative errors: 0.1 is not below 1 - 0.9, though its floats are


def best_of_spans(predicted: Sequence[Span], truth: Sequence[Span]) -> tuple[float, float]:
    """IoU and IoP of the first predicted span, each with the annotated span where it is largest (0..1).

    NExT-GQA's ``eval_ground.py`` (doc-doc/NExT-GQA) takes both maxima on their own, ReXTime's ``rextime_eval.py``
    (ReXTime/ReXTime) takes the window of the best IoU and the first of the predicted ones. A prediction of length zero
    has IoU 0, and IoP 1 where it lies inside an annotated span or on its border; a reversed or missing one has 0 and 0.
    """
    if not predicted or not truth:
        return 0.0, 0.0
    first = predicted[0]
    if first[0] == first[1]:
        return 0.0, float(any(start <= first[0] <= end for start, end in truth))
    return max(hull_iou([first], [one]) for one in truth), max(iop([first], [one]) for one in truth)


def relative_accuracy(predicted: float | None, truth: float) -> float:
    """MRA of one number, 0..1: of the thresholds .50, .55 .. .95 the share t where ``|p - g| / |g| < 1 - t``.

    VSI-Bench (arXiv 2412.14171). Where g is 0 the relative error of any other number is infinite: 1.0 for 0 itself,
    else 0.0. None (not said) and numbers that aren't finite are 0.0.
    """
    if predicted is None or not math.isfinite(predicted):
        return 0.0
    if truth == 0:
        return float(predicted == 0)
    error = round(abs(predicted - truth) / abs(truth), _DIGITS)
    return sum(error < round(1 - t, _DIGITS) for t in MRA_THRESHOLDS) / len(MRA_THRESHOLDS)


def progress_error(predicted: float | None, truth: float) -> float:
    """Absolute error of a progress (0..1 both) in percent points, 0..100; one that isn't said has the largest that a
    said one could have.
    """
    if predicted is None or not math.isfinite(predicted):
        return 100 * max(truth, 1 - truth)
    return 100 * min(abs(predicted - truth), 1.0)


def frame_overlaps(predicted: Sequence[Box], truth: Sequence[Box]) -> list[float]:
    """IoU of each annotated box with the predicted one at its place in the order; 0.0 where there is none. What is
    predicted beyond the annotated ones doesn't count.
    """
    return [box_iou(predicted[i], box) if i < len(predicted) else 0.0 for i, box in enumerate(truth)]


def viou(spans: Sequence[Span], object_id: int | None, sample: Sample) -> float:
    """vIoU of a predicted tube, 0..1: IoU of boxes, summed over the time in both the predicted and the annotated spans,
    over the time in either (VidSTG, arXiv 2001.06891).

    The predicted boxes are those of the instance with the predicted number, the annotated ones ``sample.boxes``, else
    those of the instance with the right number; between their times both go in straight lines. IoUs are taken at the
    annotated times of each common interval (at its middle where it has none), and weighted with its length. An instance
    has no box before its first and after its last time. A sample without boxes of the right object has 1.0 for the
    right number and 0.0 for others as its IoU of boxes: vIoU is tIoU then, or 0.
    """
    if object_id is None or not spans:
        return 0.0
    tracks = {one.id: _track(one.boxes) for one in sample.instances}
    truth = _track(sample.boxes) or tracks.get(sample.object_id if sample.object_id is not None else -1, [])
    if not truth:
        return tiou(spans, sample.spans) if object_id == sample.object_id else 0.0
    return _tube_overlap(spans, sample.spans, tracks.get(object_id, []), truth)


def _tube_overlap(spans: Sequence[Span], truth_spans: Sequence[Span], track: list[Box], truth: list[Box]) -> float:
    a, b = merge(spans), merge(truth_spans)
    common = [(max(s, x), min(e, y)) for s, e in a for x, y in b if max(s, x) < min(e, y)]
    inter = sum(end - start for start, end in common)
    union = sum(e - s for s, e in a) + sum(e - s for s, e in b) - inter
    times = [box.time for box in truth]
    total = 0.0
    for start, end in common:
        inside = times[bisect_left(times, start) : bisect_right(times, end)] or [(start + end) / 2]
        overlaps = [_overlap_at(time, track, truth) for time in inside]
        total += (end - start) * sum(overlaps) / len(overlaps)
    return total / union if union > 0 else 0.0


def _overlap_at(time: float, track: list[Box], truth: list[Box]) -> float:
    if not track or not track[0].time <= time <= track[-1].time:
        return 0.0
    return box_iou(_box_at(time, track), _box_at(time, truth))


def _track(boxes: Sequence[Box]) -> list[Box]:
    return sorted(boxes, key=lambda box: box.time)


def _box_at(time: float, track: list[Box]) -> Box:
    """The box of a track at a time, in a straight line between its neighbours; the nearest one outside of it."""
    place = bisect_left(track, time, key=lambda box: box.time)
    if place == 0 or place == len(track):
        return track[min(place, len(track) - 1)]
    low, high = track[place - 1], track[place]
    share = (time - low.time) / (high.time - low.time) if high.time > low.time else 1.0

    def between(a: float, b: float) -> float:
        return a + share * (b - a)

    return replace(
        low,
        time=time,
        x0=between(low.x0, high.x0),
        y0=between(low.y0, high.y0),
        x1=between(low.x1, high.x1),
        y1=between(low.y1, high.y1),
    )
