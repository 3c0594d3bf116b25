from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vrlt_fast.data.sample import Box
from vrlt_fast.rewards.boxes import box_iou, mean_iou, right_instance, viou
from vrlt_fast.rewards.progress import progress

NAN, INF = float("nan"), float("inf")


def box(x0, y0, x1, y1, time=0.0):
    return Box(time, x0, y0, x1, y1)


UNIT, RIGHT = box(0, 0, 1, 1), box(0.5, 0, 1.5, 1)
HALF, FAR = box(0, 0, 0.5, 1), box(2, 2, 3, 3)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (UNIT, UNIT, 1),
        (UNIT, box(0, 0, 1, 1, time=9.0), 1),
        (UNIT, HALF, 1 / 2),
        (UNIT, RIGHT, 1 / 3),
        (UNIT, FAR, 0),
        (UNIT, box(1, 0, 2, 1), 0),  # touching
        (UNIT, box(1, 1, 2, 2), 0),
        (UNIT, box(0.5, 0.5, 1.5, 1.5), 0.25 / 1.75),
        (UNIT, box(0.25, 0.25, 0.75, 0.75), 1 / 4),
        (UNIT, box(-1, -1, 1, 1), 1 / 4),
        (UNIT, box(1, 1, 0, 0), 0),  # corners in the wrong order
        (UNIT, box(1, 0, 0, 1), 0),
        (box(1, 1, 0, 0), box(1, 1, 0, 0), 0),
        (UNIT, box(0.5, 0, 0.5, 1), 0),  # no width
        (box(0, 0, 0, 0), box(0, 0, 0, 0), 0),
        (UNIT, box(NAN, 0, 1, 1), 0),
        (UNIT, box(0, 0, INF, 1), 0),
        (UNIT, box(-INF, -INF, INF, INF), 0),
        (UNIT, box(0, 0, 1e200, 1e200), 0),
        (box(0, 0, 2, 1), box(0, 0, 1, 2), 1 / 3),
    ],
)
def test_box_iou(a, b, expected):
    assert box_iou(a, b) == box_iou(b, a) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        ([UNIT], [UNIT], 1),
        ([UNIT, UNIT], [UNIT, UNIT], 1),
        ([UNIT, FAR], [UNIT, UNIT], 1 / 2),
        ([UNIT, HALF], [UNIT, UNIT], 3 / 4),
        ([HALF, UNIT], [UNIT, HALF], 1 / 2),
        ([FAR, UNIT], [UNIT, FAR], 0),  # in order, not the best match
        ([UNIT] * 8, [UNIT] * 8, 1),
        ([UNIT] * 7, [UNIT] * 8, 0),  # the wrong number of boxes
        ([UNIT] * 9, [UNIT] * 8, 0),
        ([UNIT, RIGHT], [UNIT, UNIT], 2 / 3),
        ([], [UNIT], 0),
        (None, [UNIT], 0),
        ([], [], 0),
        (None, [], 0),
        ([UNIT], [], 0),
        ([box(NAN, 0, 1, 1), UNIT], [UNIT, UNIT], 1 / 2),
        ([box(1, 1, 0, 0)], [UNIT], 0),
        ([box(0, 0, INF, 1)], [UNIT], 0),
    ],
)
def test_boxes_at_the_asked_times(predicted, truth, expected):
    assert mean_iou(predicted, truth) == pytest.approx(expected, abs=1e-12)


def tube(first, last, one=UNIT):
    return dict.fromkeys(range(first, last), one)


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        (tube(0, 4), tube(0, 4), 1),
        (tube(0, 4), tube(2, 6), 2 / 6),
        (tube(0, 4), tube(4, 8), 0),  # touching
        (tube(0, 4, HALF), tube(0, 4), 1 / 2),
        (tube(0, 4, HALF), tube(2, 6), 1 / 6),
        (tube(0, 4, FAR), tube(0, 4), 0),
        (tube(1, 2), tube(0, 4), 1 / 4),
        (tube(0, 8), tube(2, 4), 2 / 8),
        (tube(0, 2) | tube(2, 4, FAR), tube(0, 4), 1 / 2),
        (tube(0, 2) | tube(6, 8), tube(0, 8), 4 / 8),
        ({}, tube(0, 4), 0),
        (tube(0, 4), {}, 0),
        ({}, {}, 0),
        (tube(4, 0), tube(0, 4), 0),
        (tube(0, 4, box(NAN, 0, 1, 1)), tube(0, 4), 0),
        (tube(0, 4, box(1, 1, 0, 0)), tube(0, 4), 0),
        ({10**12: UNIT}, {10**12: UNIT}, 1),
    ],
)
def test_tubes(predicted, truth, expected):
    assert viou(predicted, truth) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        (3, 3, 1), (0, 0, 1), (3, 4, 0), (0, 1, 0), (-3, 3, 0), (None, 3, 0), (3, None, 0), (None, None, 0),
        (None, 0, 0), (0, None, 0), (10**30, 10**30, 1), (10**30, 3, 0), (33, 3, 0), (1, 1, 1), (2, 20, 0),
    ],
)  # fmt: skip
def test_the_right_object(predicted, truth, expected):
    assert right_instance(predicted, truth) == expected


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        (0.5, 0.5, 1), (0.4, 0.5, 0.9), (0.6, 0.5, 0.9), (0.0, 1.0, 0), (1.0, 0.0, 0), (0.0, 0.0, 1), (1.0, 1.0, 1),
        (0.25, 1.0, 0.25), (1.5, 1.0, 0.5), (-0.5, 0.0, 0.5), (2.5, 0.5, 0), (-9.0, 0.5, 0), (75.0, 0.75, 0),
        (None, 0.5, 0), (0.5, None, 0), (None, None, 0), (NAN, 0.5, 0), (0.5, NAN, 0), (INF, 0.5, 0), (INF, INF, 0),
        (1e308, -1e308, 0),
    ],
)  # fmt: skip
def test_progress(predicted, truth, expected):
    assert progress(predicted, truth) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(*[st.builds(Box, *[st.floats()] * 5)] * 2, st.floats(), st.floats())
def test_no_floats_leave_the_range(a, b, p, g):
    for value in (box_iou(a, b), mean_iou([a], [b]), viou({0: a}, {0: b}), progress(p, g)):
        assert 0.0 <= value <= 1.0 + 1e-12
        assert math.isfinite(value)
