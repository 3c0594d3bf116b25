from __future__ import annotations

import math
import time
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vrlt_fast.rewards.spans import boundary_iou, hull_iou, iop, merge, merged_iou, tiou

NAN, INF = float("nan"), float("inf")
HUGE = 1e300

# predicted, truth, then by function: tiou, merged_iou, iop, hull_iou
BY_HAND = [
    ([(0, 2)], [(0, 2)], 1, 1, 1, 1),
    ([(0, 2)], [(1, 3)], 1 / 3, 1 / 3, 1 / 2, 1 / 3),
    ([(0, 1)], [(2, 3)], 0, 0, 0, 0),
    ([(0, 1)], [(1, 2)], 0, 0, 0, 0),  # touching
    ([(0, 4)], [(1, 2)], 1 / 4, 1 / 4, 1 / 4, 1 / 4),
    ([(1, 2)], [(0, 4)], 1 / 4, 1 / 4, 1, 1 / 4),
    ([(3, 1)], [(1, 3)], 0, 0, 0, 0),  # start > end
    ([(3, 1), (1, 3)], [(1, 3)], 1, 0, 1, 0),  # the first one is reversed, the second is right
    ([(1, 1)], [(0, 2)], 0, 0, 0, 0),  # zero length
    ([(1, 1)], [(1, 1)], 0, 1, 0, 0),
    ([], [(0, 2)], 0, 0, 0, 0),
    ([], [], 0, 1, 0, 0),
    ([(0, 2)], [], 0, 0, 0, 0),
    ([(NAN, 2)], [(0, 2)], 0, 0, 0, 0),
    ([(0, NAN)], [(0, 2)], 0, 0, 0, 0),
    ([(0, INF)], [(0, 2)], 0, 0, 0, 0),
    ([(-INF, INF)], [(0, 2)], 0, 0, 0, 0),
    ([(0, 1), (1, 2)], [(0, 2)], 1, 1, 1, 1 / 2),  # touching ones are one span
    ([(0, 1.5), (1, 2)], [(0, 2)], 1, 1, 1, 3 / 4),  # overlapping ones don't count twice
    ([(1, 2), (1, 2)], [(1, 2)], 1, 1, 1, 1),
    ([(0, 1), (3, 4)], [(0, 1)], 1 / 2, 1 / 2, 1 / 2, 1),
    ([(3, 4), (0, 1)], [(0, 1), (3, 4)], 1, 1, 1, 0),  # the order matters to those that take the first
    ([(0, 2), (4, 6)], [(1, 5)], 2 / 6, 2 / 6, 2 / 4, 1 / 5),
    ([(-1, 1)], [(0, 1)], 1 / 2, 1 / 2, 1 / 2, 1 / 2),
    ([(0, HUGE)], [(0, 1)], 0, 0, 0, 0),
    ([(-1.7 * 10**308, 1.7 * 10**308)], [(-1.7 * 10**308, 1.7 * 10**308)], 0, 0, 0, 0),  # longer than floats go
]
ROWS = [
    (function, predicted, truth, expected[place])
    for place, function in enumerate((tiou, merged_iou, iop, hull_iou))
    for predicted, truth, *expected in BY_HAND
]


@pytest.mark.parametrize(("function", "predicted", "truth", "expected"), ROWS)
def test_by_hand(function, predicted, truth, expected):
    assert function(predicted, truth) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("predicted", "truth", "duration", "expected"),
    [
        ([(2, 4)], [(2, 4)], 10, 1.0),
        ([(2, 5)], [(2, 4)], 10, 2 / 3 * 0.9),
        ([(1, 4)], [(2, 4)], 10, 2 / 3 * 0.9),
        ([(1, 5)], [(2, 4)], 10, 1 / 2 * 0.9 * 0.9),
        ([(3, 5)], [(2, 4)], 10, 1 / 3 * 0.9 * 0.9),
        ([(4, 6)], [(2, 4)], 10, 0.0),  # touching
        ([(0, 1)], [(2, 4)], 10, 0.0),
        ([(0, 10)], [(2, 4)], 10, 0.2 * 0.8 * 0.4),
        ([(0, 40)], [(2, 4)], 10, 0.0),  # the end is more than T away: the factor is 0, not negative
        ([(-20, 40)], [(2, 4)], 10, 0.0),  # and two negative factors would be positive
        ([(4, 2)], [(2, 4)], 10, 0.0),
        ([(3, 3)], [(2, 4)], 10, 0.0),
        ([], [(2, 4)], 10, 0.0),
        ([(2, 4)], [], 10, 0.0),
        ([(2, 4)], [(2, 4)], 0, 0.0),
        ([(2, 4)], [(2, 4)], -1, 0.0),
        ([(2, 4)], [(2, 4)], NAN, 0.0),
        ([(2, 4)], [(2, 4)], INF, 0.0),
        ([(NAN, 4)], [(2, 4)], 10, 0.0),
        ([(2, INF)], [(2, 4)], 10, 0.0),
        ([(2, 4), (0, 9)], [(2, 4), (5, 6)], 10, 1.0),  # the first ones alone
        ([(0, HUGE)], [(0, 1)], 10, 0.0),
    ],
)
def test_closeness_of_both_borders(predicted, truth, duration, expected):
    assert boundary_iou(predicted, truth, duration) == pytest.approx(expected, abs=1e-12)


GRID = 24
SPANS = st.lists(st.tuples(st.integers(0, GRID), st.integers(0, GRID)), max_size=5)


def cells(spans):
    return {cell for s, e in spans for cell in range(s, e)}


def share(part, whole):
    return float(Fraction(len(part), len(whole))) if whole else 0.0


@settings(max_examples=1000, deadline=None)
@given(SPANS, SPANS)
def test_sets_of_spans_against_counted_cells(a, b):
    """Borders on the grid (eighths of a second, so that floats are exact), reversed and empty spans among them."""
    p, t = ([(s / 8, e / 8) for s, e in spans] for spans in (a, b))
    in_a, in_b = cells(a), cells(b)
    assert tiou(p, t) == tiou(t, p) == share(in_a & in_b, in_a | in_b)
    assert iop(p, t) == share(in_a & in_b, in_a)
    valid = all(s <= e for s, e in a)
    assert merged_iou(p, t) == (share(in_a & in_b, in_a | in_b) if in_a | in_b else 1.0) * valid
    merged = merge(p)
    assert all(x[1] < y[0] for x, y in pairwise(merged))
    assert cells([(round(s * 8), round(e * 8)) for s, e in merged]) == in_a
    if a and b and all(s < e for s, e in (a[0], b[0])):
        first, second = cells(a[:1]), cells(b[:1])
        hull = range(min(a[0][0], b[0][0]), max(a[0][1], b[0][1]))
        assert hull_iou(p, t) == share(first & second, hull)
        assert hull_iou(p, t) == tiou(p[:1], t[:1])


@settings(max_examples=300, deadline=None)
@given(*[st.lists(st.tuples(st.floats(), st.floats()), max_size=4)] * 2, st.floats())
def test_no_floats_leave_the_range(a, b, duration):
    for value in (tiou(a, b), merged_iou(a, b), iop(a, b), hull_iou(a, b), boundary_iou(a, b, duration)):
        assert 0.0 <= value <= 1.0 + 1e-12
        assert math.isfinite(value)


def test_a_thousand_spans_are_fast():
    spans = [(float(i), i + 0.5) for i in range(1000)]
    begin = time.process_time()
    assert tiou(spans, [(0.0, 1000.0)]) == 0.5
    assert time.process_time() - begin < 0.05
