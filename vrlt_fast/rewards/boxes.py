"""Boxes and numbered objects: overlap of boxes, of tracks and of tubes, and whether the right object was named."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vrlt_fast.data.sample import Box


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in 0..1; their times don't count, and nothing is clamped to the frame.

    A box without area, with corners in the wrong order or with one that isn't finite overlaps with nothing.
    """
    sizes = [(box.x1 - box.x0, box.y1 - box.y0) for box in (a, b)]
    if not all(0 < side < math.inf for size in sizes for side in size):
        return 0.0
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    inter = max(0.0, width) * max(0.0, height)
    union = sum(w * h for w, h in sizes) - inter
    return inter / union if 0 < union < math.inf else 0.0


def mean_iou(predicted: Sequence[Box] | None, truth: Sequence[Box]) -> float:
    """Mean IoU of boxes in the order of the asked times, in 0..1; 0.0 where their number is wrong or none is asked.

    VideoChat-R1's reward of tracking (OpenGVLab/VideoChat-R1), which asks for eight.
    """
    if not predicted or len(predicted) != len(truth):
        return 0.0
    return sum(map(box_iou, predicted, truth)) / len(truth)


def viou(predicted: Mapping[int, Box], truth: Mapping[int, Box]) -> float:
    """vIoU of two tubes, boxes by frame number, in 0..1: the sum of their IoU over frames that both have, over the
    number of frames that either has; 0.0 where both are empty (HC-STVG, arXiv 2011.05049).
    """
    union = len(predicted.keys() | truth.keys())
    inter = sum(box_iou(predicted[frame], truth[frame]) for frame in predicted.keys() & truth.keys())
    return inter / union if union else 0.0


def right_instance(predicted: int | None, truth: int | None) -> float:
    """1.0 where the number of the object is right, else 0.0, also where none is known.

    STVG-R1's spatial reward (XiaowZhang00/stvg-r1): its code doesn't ask whether the object is seen in the span.
    """
    return float(predicted is not None and predicted == truth)
