"""The stopping rule: exact where it says so, within its error in simulation, and worth it."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from bench.select_stop import MIXTURE, simulate
from vrlt_fast.select.policies import CLASSES, classes
from vrlt_fast.select.stopping import AUDIT, INFORMATIVE, RIGHT, WRONG, Stopping, class_of


def test_classes():
    assert class_of([0.0] * 8, 8) == WRONG
    assert class_of([1 / 3] * 8, 8) == WRONG  # well-formed and nothing else
    assert class_of([1.0] * 8, 8) == RIGHT
    assert class_of([0.97, 0.98, 0.96, 0.97], 4) == RIGHT
    assert class_of([0.0] * 7 + [1.0], 8) == INFORMATIVE


def test_informative_is_certain(seed):
    """Whatever comes after, a sample that is informative after the first wave is so at the end."""
    rng = np.random.default_rng(seed)
    for first in itertools.product((0.0, 0.3, 0.33, 1.0), repeat=4):
        if class_of(first, 8) == INFORMATIVE:
            for rest in (np.full(4, np.mean(first)), np.zeros(4), np.ones(4), rng.random(4)):
                assert class_of([*first, *rest], 8) == INFORMATIVE


def test_columns_have_the_same_classes(seed):
    rng = np.random.default_rng(seed)
    shares = np.round(rng.random((500, 8)) * rng.choice([0.0, 0.05, 0.2, 1.0], size=(500, 1)), 2)
    shares[::3] = 1.0 - shares[::3]
    shares[::2, 4:] = np.nan
    expected = [class_of([v for v in row if v == v], 8) for row in shares.tolist()]
    assert [CLASSES[c] for c in classes(shares, 8)] == expected
    assert set(expected) == set(CLASSES)


def test_flat_samples_stop_only_where_few_decisions_change():
    rule = Stopping(8, 4, 0.02)
    assert not rule.clear("videoqa", [0.0] * 4, ticket=1)
    assert rule.clear("videoqa", [0.0, 0.0, 1.0, 0.0], ticket=1)
    for number in range(100):
        rule.learn("videoqa", [0.0] * 8 if number % 2 else [0.0, 1.0] * 4)
    c = 0.5 / 51
    assert rule.chance(("videoqa", WRONG)) == pytest.approx(c + math.sqrt(c * (1 - c) / 52))
    assert 0.5 * rule.chance(("videoqa", WRONG)) < 0.02
    assert rule.clear("videoqa", [0.0] * 4, ticket=1)
    assert not rule.clear("videoqa", [0.0] * 4, ticket=AUDIT)
    assert not rule.clear("videoqa", [1.0] * 4, ticket=1)
    assert not rule.clear("grounding", [0.0] * 4, ticket=1)
    rule.learn("videoqa", [0.0] * 7 + [1.0])
    rule.learn("videoqa", [0.0] * 7 + [1.0])
    assert 0.5 * rule.chance(("videoqa", WRONG)) > 0.02
    assert not rule.clear("videoqa", [0.0] * 4, ticket=1)


def test_kinds_share_the_allowed_error():
    """Two kinds of which each alone would be within it, but not both: the surer one stops."""
    rule = Stopping(8, 4, 0.02)
    for number in range(400):
        right = [1.0] * (8 if number % 40 else 7) + [0.0] * (not number % 40)
        rule.learn("videoqa", right if number % 2 == 0 else [0.0] * 8 if number % 80 > 1 else [0.0] * 7 + [1.0])
    costs = {side: rule.chance(("videoqa", side)) / 2 for side in (RIGHT, WRONG)}
    assert costs[WRONG] < costs[RIGHT]
    rule = dataclasses.replace(rule, error=costs[RIGHT] * 1.01, _stopped=None)
    assert rule.stopped() == {("videoqa", WRONG)}
    assert dataclasses.replace(rule, error=sum(costs.values()) * 1.01, _stopped=None).stopped() == set(rule.flat)


def test_samples_that_stopped_or_were_informative_teach_no_chance():
    rule = Stopping(8, 4, 0.02)
    rule.learn("videoqa", [0.0] * 4)
    rule.learn("videoqa", [0.0, 1.0] * 4)
    assert not any(rule.tried.values())
    assert (rule.seen, rule.flat["videoqa", WRONG]) == (2, 1)


def test_saves_30_percent_at_2_percent_changed_decisions(seed):
    found = simulate(MIXTURE, samples=12_000, repeats=8, first=4, error=0.02, seed=seed)
    assert found.saved >= 0.30
    assert found.changed <= 0.02


@pytest.mark.parametrize("never", [0.2, 0.5, 0.9])
def test_changed_decisions_stay_within_the_error_for_other_mixtures(seed, never):
    """Zeros and ones with a share that is never right, and chances anywhere else."""
    mixture = {"videoqa": (1.0, never, 0.0, (1.0, 1.0))}
    found = simulate(mixture, samples=12_000, repeats=8, first=4, error=0.02, seed=seed)
    assert found.changed <= 0.02
