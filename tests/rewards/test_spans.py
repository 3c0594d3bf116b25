from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy as np
import pytest

from vrlt_fast.rewards.spans import iop, merge, tiou

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        ([(0, 2)], [(0, 2)], 1.0),
        ([(0, 2)], [(1, 3)], 1 / 3),
        ([(0, 1)], [(2, 3)], 0.0),
        ([(0, 1)], [(1, 2)], 0.0),
        ([(0, 4)], [(1, 2)], 0.25),
        ([(3, 1)], [(1, 3)], 0.0),
        ([(1, 1)], [(0, 2)], 0.0),
        ([], [(0, 2)], 0.0),
        ([(NAN, 2)], [(0, 2)], 0.0),
        ([(0, INF)], [(0, 2)], 0.0),
        ([(0, 1), (1, 2)], [(0, 2)], 1.0),
        ([(0, 1.5), (1, 2)], [(0, 2)], 1.0),
        ([(0, 1), (3, 4)], [(0, 1)], 0.5),
        ([(0, 1), (3, 4)], [(0, 1), (3, 4)], 1.0),
        ([(-1, 1)], [(0, 1)], 0.5),
    ],
)
def test_tiou_by_hand(predicted, truth, expected):
    assert tiou(predicted, truth) == pytest.approx(expected, abs=1e-12)


def test_against_a_fine_grid(seed):
    rng = random.Random(seed)
    cells = np.arange(400) / 100 + 0.005

    def draw():
        spans = [tuple(sorted((rng.randrange(401) / 100, rng.randrange(401) / 100))) for _ in range(rng.randint(1, 4))]
        covered = np.zeros(400, dtype=bool)
        for s, e in spans:
            covered |= (cells > s) & (cells < e)
        return spans, covered

    for _ in range(1000):
        (a, in_a), (b, in_b) = draw(), draw()
        union, inter = (in_a | in_b).sum(), (in_a & in_b).sum()
        assert tiou(a, b) == pytest.approx(inter / union if union else 0.0, abs=1e-9)
        assert iop(a, b) == pytest.approx(inter / in_a.sum() if in_a.any() else 0.0, abs=1e-9)
        merged = merge(a)
        assert all(x[1] < y[0] for x, y in pairwise(merged))
        assert math.isclose(sum(e - s for s, e in merged), in_a.sum() / 100, abs_tol=1e-9)
