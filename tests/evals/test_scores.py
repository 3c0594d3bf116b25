"""What one response earns, by hand, by brute force on a grid of frames."""

from __future__ import annotations

import math
import random

import pytest

from vrlt_fast.data.sample import Box, Instance, Sample
from vrlt_fast.evals.scores import best_of_spans, frame_overlaps, progress_error, relative_accuracy, viou
from vrlt_fast.rewards import boxes

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("predicted", "truth", "iou", "iop"),
    [
        ([(0, 10)], [(0, 10)], 1, 1),
        ([(2, 6)], [(0, 4)], 2 / 6, 0.5),
        ([(2, 4)], [(0, 10)], 0.2, 1),
        ([(0, 10)], [(2, 4)], 0.2, 0.2),
        ([(0, 2)], [(2, 4)], 0, 0),  # they touch
        ([(0, 2)], [(3, 4)], 0, 0),
        ([(3, 5)], [(0, 4), (4, 20)], 0.2, 0.5),  # of two annotated ones: 1/5 and 1/17; 1/2 both
        ([(0, 10)], [(0, 1), (4, 9)], 0.5, 0.5),
        ([(0, 3)], [(1, 2), (0, 9)], 1 / 3, 1),  # the maxima are of different spans
        ([(0, 1), (4, 9)], [(4, 9)], 0, 0),  # the first one counts
        ([(4, 9), (0, 1)], [(4, 9)], 1, 1),
        ([(3, 3)], [(0, 4)], 0, 1),  # length zero, inside
        ([(4, 4)], [(0, 4)], 0, 1),  # on the border
        ([(5, 5)], [(0, 4)], 0, 0),
        ([(5, 5)], [(0, 4), (5, 6)], 0, 1),
        ([(6, 2)], [(0, 10)], 0, 0),  # reversed
        ([(6, 2), (0, 10)], [(0, 10)], 0, 0),
        ([], [(0, 10)], 0, 0),
        ([(0, INF)], [(0, 10)], 0, 0),
        ([(NAN, 3)], [(0, 10)], 0, 0),
        ([(INF, INF)], [(0, 10)], 0, 0),
        ([(0, 1)], [], 0, 0),
    ],
)
def test_best_of_spans(predicted, truth, iou, iop):
    assert best_of_spans(predicted, truth) == pytest.approx((iou, iop))


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        (1.0, 1.0, 1.0),
        (0.5, 0.5, 1.0),
        (0.96, 1.0, 1.0),  # error .04 is below .05
        (0.95, 1.0, 0.9),  # .05 isn't
        (0.9, 1.0, 0.8),
        (0.89, 1.0, 0.8),
        (0.7, 1.0, 0.4),  # .30: below .50, .45, .40, .35
        (1.3, 1.0, 0.4),
        (0.51, 1.0, 0.1),
        (0.5, 1.0, 0.0),
        (0.0, 1.0, 0.0),
        (30.0, 20.0, 0.0),
        (29.0, 20.0, 0.1),  # .45 is below .50 alone
        (-0.9, -1.0, 0.8),
        (0.0, 0.0, 1.0),  # of nothing: nothing alone is right
        (0.01, 0.0, 0.0),
        (None, 0.5, 0.0),
        (None, 0.0, 0.0),
        (NAN, 0.5, 0.0),
        (INF, 0.5, 0.0),
    ],
)
def test_relative_accuracy(predicted, truth, expected):
    assert relative_accuracy(predicted, truth) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1, 100])
def test_relative_accuracy_has_no_unit(scale):
    """Shares and percent have the same, also where the error is on a threshold."""
    for percent in range(0, 101):
        expected = sum(20 * abs(percent - 80) < (20 - k) * 80 for k in range(10, 20)) / 10
        assert relative_accuracy(percent / 100 * scale, 0.8 * scale) == expected


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        (0.0, 0.0, 0),
        (1.0, 1.0, 0),
        (0.0, 1.0, 100),
        (1.0, 0.0, 100),
        (0.5, 0.25, 25),
        (0.25, 0.5, 25),
        (0.42, 0.4, 2),
        (0.4, 0.42, 2),
        (0.333, 0.3, 3.3),
        (None, 0.3, 70),
        (None, 0.8, 80),
        (None, 0.5, 50),
        (None, 0.0, 100),
        (NAN, 0.5, 50),
        (-INF, 0.9, 90),
        (7.0, 0.5, 100),
    ],
)
def test_progress_error(predicted, truth, expected):
    assert progress_error(predicted, truth) == pytest.approx(expected)


def box(time, x0=0.0, y0=0.0, x1=0.5, y1=0.5):
    return Box(time, x0, y0, x1, y1)


HALF = box(0, x1=0.25)  # half of box(0)
AWAY = box(0, x0=0.6, x1=0.9)


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        ([], [], []),
        ([], [box(0)], [0]),
        ([box(0)], [], []),
        ([box(0)], [box(0)], [1]),
        ([box(9)], [box(0)], [1]),  # times don't count
        ([HALF], [box(0)], [0.5]),
        ([box(0)], [HALF], [0.5]),
        ([AWAY], [box(0)], [0]),
        ([box(0, x0=0.5, x1=1.0)], [box(0)], [0]),  # they touch
        ([box(0, x0=0.25, x1=0.75)], [box(0)], [1 / 3]),
        ([box(0, x0=0.25, y0=0.25, x1=0.75, y1=0.75)], [box(0)], [1 / 7]),
        ([box(0, x0=0.5, x1=0.0)], [box(0)], [0]),  # reversed
        ([box(0, x1=0.0)], [box(0)], [0]),  # without area
        ([box(0, x1=NAN)], [box(0)], [0]),
        ([HALF], [box(0), box(1)], [0.5, 0]),
        ([HALF, box(1), AWAY], [box(0), box(1)], [0.5, 1]),
        ([AWAY, HALF], [box(0), box(1)], [0, 0.5]),
    ],
)
def test_frame_overlaps(predicted, truth, expected):
    assert frame_overlaps(predicted, truth) == pytest.approx(expected)


def tube(*, spans=((2.0, 6.0),), object_id=1, boxes=(), instances=()):
    return Sample(
        "i", "v.mp4", 10.0, "instance", "?", spans=spans, object_id=object_id, boxes=boxes, instances=instances
    )


STILL = tuple(box(t) for t in range(11))  # a box a second
ONE, TWO = Instance(1, STILL), Instance(2, tuple(box(t, x0=0.25, x1=0.75) for t in range(11)))
LATE = Instance(3, tuple(box(t) for t in range(5, 11)))
BOTH = tube(instances=(ONE, TWO, LATE))
MOVING = Instance(1, (box(0, x0=0.0, x1=0.2), box(10, x0=0.8, x1=1.0)))


@pytest.mark.parametrize(
    ("spans", "object_id", "sample", "expected"),
    [
        ([(2, 6)], 1, BOTH, 1),
        ([(2, 4)], 1, BOTH, 0.5),
        ([(0, 8)], 1, BOTH, 0.5),
        ([(4, 8)], 1, BOTH, 2 / 6),
        ([(7, 8)], 1, BOTH, 0),
        ([(2, 6)], 2, BOTH, 1 / 3),  # another object, which overlaps by a third
        ([(4, 8)], 2, BOTH, 2 / 6 / 3),
        ([(2, 6)], 3, BOTH, 2 / 5),  # seen at 5 and 6 of 2, 3, 4, 5, 6
        ([(2, 6)], 4, BOTH, 0),  # there is none
        ([(2, 6)], None, BOTH, 0),
        ([], 1, BOTH, 0),
        ([(6, 2)], 1, BOTH, 0),
        ([(2, 4), (4, 6)], 1, BOTH, 1),
        ([(2, 6)], 1, tube(boxes=tuple(box(t, x1=0.25) for t in range(2, 7)), instances=(ONE, TWO)), 0.5),
        ([(2.2, 2.4)], 1, BOTH, 0.05),  # no annotated time in it: taken at 2.3
        ([(2, 6)], 1, tube(), 1),  # numbers alone
        ([(4, 8)], 1, tube(), 2 / 6),
        ([(4, 8)], 2, tube(), 0),
        ([(2, 6)], 0, tube(object_id=0), 1),
        ([(2, 6)], 1, tube(boxes=(box(4, x0=0.3, x1=0.5),), instances=(MOVING,)), 0.18 / 0.22),  # there at .32
        ([(2, 6)], 1, tube(spans=((2.0, 4.0), (5.0, 6.0)), instances=(ONE,)), 0.75),
    ],
)
def test_viou(spans, object_id, sample, expected):
    assert viou(spans, object_id, sample) == pytest.approx(expected)


def test_viou_where_every_frame_is_annotated_is_that_of_the_frames(seed):
    """At 100 frames a second, both ways to count differ by the frames at the borders alone."""
    rng = random.Random(seed)
    for _ in range(20):
        tracks = {}
        for number in (1, 2):
            x, y, dx, dy = (rng.uniform(0, 0.3) for _ in range(4))
            tracks[number] = [
                Box(f / 100, x + dx * f / 1000, y, x + dx * f / 1000 + 0.4, y + dy + 0.1) for f in range(1001)
            ]
        truth, said = (tuple(sorted((rng.uniform(0, 10), rng.uniform(0, 10)))) for _ in range(2))
        number = rng.choice((1, 2))
        sample = tube(spans=(truth,), instances=tuple(Instance(n, tuple(track)) for n, track in tracks.items()))
        of_frames = [
            {f: tracks[n][f] for f in range(1001) if start <= f / 100 <= end}
            for n, (start, end) in ((number, said), (1, truth))
        ]
        assert viou([said], number, sample) == pytest.approx(boxes.viou(*of_frames), abs=0.02)
