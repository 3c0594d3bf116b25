"""The replay of groups with signal: priorities by hand, what is kept, chances of draws, resuming."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrlt_fast.select.replay import Replay, priority


@pytest.mark.parametrize(
    ("advantages", "alpha", "expected"),
    [
        ([], 1.0, 0.0),
        ([0.0, 0.0], 1.0, 0.0),
        ([0.0, 0.0], 0.0, 0.0),
        ([1.0, -1.0], 1.0, 1.0),
        ([2.0, -2.0], 1.0, 2.0),
        ([1.0, -1.0, 0.0, 0.0], 1.0, 0.5),
        ([0.5, 0.5, 0.5, -1.5], 1.0, 0.75),
        ([2.0, -2.0], 2.0, 4.0),
        ([4.0, -4.0], 0.5, 2.0),
        ([3.0, -3.0], 0.0, 1.0),
        ([-0.25], 1.0, 0.25),
        ([0.1, -0.1], 2.0, 0.01),
        ([1e-9, -1e-9], 1.0, 1e-9),
    ],
)
def test_priorities(advantages, alpha, expected):
    assert priority(advantages, alpha) == pytest.approx(expected)


def filled(size: int = 3, seed: int = 0, steps: int = 5) -> Replay[str]:
    """Entries a, b, c, ... of steps 1, 2, 3, ..., of priority 1."""
    replay: Replay[str] = Replay(size, seed)
    for step in range(1, steps + 1):
        replay.add("abcdefghij"[step - 1], 1.0, step)
    return replay


@pytest.mark.parametrize(
    ("size", "steps", "step", "count", "expected"),
    [
        (3, 0, 1, 2, ""),
        (0, 5, 9, 2, ""),
        (3, 1, 2, 1, "a"),
        (3, 1, 1, 1, ""),
        (3, 3, 4, 3, "abc"),
        (3, 3, 4, 9, "abc"),
        (3, 3, 4, 0, ""),
        (3, 3, 4, -1, ""),
        (3, 3, 3, 9, "ab"),
        (3, 3, 2, 9, "a"),
        (3, 5, 6, 9, "cde"),
        (1, 5, 6, 2, "e"),
        (3, 5, 4, 9, "c"),
    ],
)
def test_what_is_there_to_take(size, steps, step, count, expected):
    assert "".join(sorted(filled(size, steps=steps).take(count, step))) == expected


def test_groups_without_signal_are_not_kept():
    replay = filled(2, steps=2)
    replay.add("x", priority([0.0, 0.0]), 3)
    assert list(replay.entries().values()) == ["a", "b"]


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_refuses_what_is_no_priority(wrong):
    with pytest.raises(ValueError, match="priority"):
        Replay(2, 0).add("x", wrong, 1)


def test_refuses_a_size_below_none():
    with pytest.raises(ValueError, match="size"):
        Replay(-1, 0)


def test_draws_are_in_proportion_to_priorities(seed):
    """First and second draws of priorities 1, 2, 5, the second among those left."""
    replay: Replay[int] = Replay(3, seed)
    weights = np.array([1.0, 2.0, 5.0])
    for entry, weight in enumerate(weights):
        replay.add(entry, float(weight), 1)
    pairs = Counter(tuple(replay.take(2, 2)) for _ in range(4000))
    p = weights / weights.sum()
    for first in range(3):
        for second in {0, 1, 2} - {first}:
            expected = p[first] * p[second] / (1 - p[first])
            assert pairs[first, second] / 4000 == pytest.approx(expected, abs=0.035)


def test_drawing_keeps_the_entries(seed):
    replay = filled(3, seed)
    assert [len(replay.take(2, 9)) for _ in range(5)] == [2] * 5
    assert len(replay) == 3


def test_the_seed_fixes_the_draws(seed):
    one, two, other = (filled(5, s) for s in (seed, seed, seed + 1))
    drawn = [[r.take(3, 9) for _ in range(20)] for r in (one, two, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(d) for d in drawn[0]}) > 5


EVENTS = st.lists(st.tuples(st.sampled_from(["add", "take"]), st.floats(0.0, 3.0), st.integers(0, 4)), max_size=30)


def run(replay: Replay[str], events: list[tuple[str, float, int]], first: int) -> list[list[str]]:
    taken = []
    for step, (kind, weight, count) in enumerate(events, first):
        if kind == "add":
            replay.add(f"group {step}", weight, step)
        else:
            taken.append(replay.take(count, step))
    return taken


@given(EVENTS, st.integers(0, 30), st.integers(1, 4))
def test_a_resumed_replay_goes_on_as_the_whole_one(events, cut, size):
    whole: Replay[str] = Replay(size, 7)
    expected = run(whole, events, 1)
    before: Replay[str] = Replay(size, 7)
    done = run(before, events[:cut], 1)
    resumed: Replay[str] = Replay(size, 7)
    resumed.add("gone", 1.0, 1)
    resumed.load(json.loads(json.dumps(before.state())), before.entries())
    assert done + run(resumed, events[cut:], 1 + len(events[:cut])) == expected
    assert resumed.state() == whole.state()
    assert resumed.entries() == whole.entries()
    assert len(whole) <= size
    assert all(len(set(group)) == len(group) for group in expected)


def test_state_and_entries_must_fit():
    replay = filled()
    entries = replay.entries()
    entries.pop(min(entries))
    with pytest.raises(ValueError, match="3 replayed groups in the state, 2 beside it"):
        Replay(3, 0).load(replay.state(), entries)


def test_a_smaller_replay_takes_the_newest():
    replay: Replay[str] = Replay(2, 0)
    whole = filled()
    replay.load(whole.state(), whole.entries())
    assert list(replay.entries().values()) == ["d", "e"]
