"""Running statistics by hand, and the order that goes by them: shares of draws, windows, solved samples, resuming."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrlt_fast.select.running import FLOOR, KEEP, PRIOR, WINDOW, RunningStats, SelectedStream, without_solved

REWARDS = st.lists(st.floats(-2.0, 2.0), min_size=1, max_size=8)


def stats_of(*groups: list[list[float]], kinds: str | None = None) -> RunningStats:
    """Statistics after the groups of each sample, one list of them a sample."""
    stats = RunningStats(kinds or "q" * len(groups))
    for index, found in enumerate(groups):
        for rewards in found:
            stats.update(index, rewards)
    return stats


@pytest.mark.parametrize(
    ("groups", "count", "mean", "deviation"),
    [
        ([], 0.0, None, None),
        ([[1.0]], 1.0, 1.0, None),
        ([[0.0, 0.0]], 2.0, 0.0, 0.0),
        ([[0.0, 1.0]], 2.0, 0.5, math.sqrt(1 / 2)),
        ([[0.0, 0.0, 1.0, 1.0]], 4.0, 0.5, math.sqrt(1 / 3)),
        ([[0.0, 0.0, 0.0, 1.0]], 4.0, 0.25, math.sqrt(0.75 / 3)),
        ([[1.5, 1.5, 1.5]], 3.0, 1.5, 0.0),
        ([[0.1] * 6], 6.0, 0.1, 0.0),
        ([[-1.0, 1.0]], 2.0, 0.0, math.sqrt(2.0)),
        # never, then always solved: no deviation, and the newer group counts double
        ([[0.0, 0.0], [1.0, 1.0]], 3.0, 2 / 3, 0.0),
        ([[0.0, 1.0], [1.0, 1.0]], 3.0, (0.5 + 2.0) / 3, math.sqrt(0.25 / 1.5)),
        ([[1.0, 1.0], [0.0, 1.0]], 3.0, 2 / 3, math.sqrt(0.5 / 1.5)),
        ([[0.0, 1.0]] * 3, 3.5, 0.5, math.sqrt(0.5)),
        ([[0.2, 0.4, 0.6], [0.0]], 2.5, 1.5 * 0.4 / 2.5, math.sqrt(0.04 / 1.0)),
    ],
)
def test_by_hand(groups, count, mean, deviation):
    assert KEEP == 0.5
    stats = stats_of(groups)
    assert stats.counts[0] == pytest.approx(count)
    assert stats.mean(0) == pytest.approx(mean)
    assert stats.deviation(0) == pytest.approx(deviation)


def test_usual_variance_is_of_the_task():
    """v of a = (0.5 + 0) / (1 + 1) = 0.25; of b 0.02 / 1; of c 0, and one of c wasn't drawn."""
    stats = stats_of([[0.0, 1.0]], [[1.0, 1.0]], [[0.4, 0.6]], [[0.3, 0.3]], [], kinds="aabcc")
    assert PRIOR == 1.0
    expected = [(1 + 0.5 / 0.25) / 2, (1 + 0) / 2, (1 + 1) / 2, 1 / 2, 1.0]
    np.testing.assert_allclose(stats.relative() ** 2, expected, rtol=1e-12)


def test_without_rewards_all_are_alike():
    np.testing.assert_array_equal(RunningStats("aab").relative(), np.ones(3))


def test_flat_samples_fall_and_recover():
    stats = stats_of([], [[0.0, 1.0] * 4])
    seen = []
    for rewards in ([0.0] * 8, [0.0] * 8, [0.0] * 8, [0.0, 1.0] * 4):
        stats.update(0, rewards)
        seen.append(stats.relative()[0])
    assert seen[0] > seen[1] > seen[2] < seen[3]
    assert seen[3] > 2 * seen[2]


@given(st.lists(st.tuples(st.integers(0, 4), REWARDS), max_size=30))
def test_state_round_trip(updates):
    stats = RunningStats("aabbc")
    for index, rewards in updates:
        stats.update(index, rewards)
    again = RunningStats("aabbc")
    again.update(3, [0.1, 0.2])
    again.load(json.loads(json.dumps(stats.state())))
    for name in ("counts", "means", "squares", "freedom"):
        np.testing.assert_array_equal(getattr(again, name), getattr(stats, name))
    assert again.groups == stats.groups == len(updates)
    assert again.state()["seen"] == sorted({index for index, _ in updates})


@given(st.lists(REWARDS, min_size=1, max_size=5))
def test_as_a_weighted_sum(groups):
    """Each group by its age, all at once, gives what updates give."""
    stats = stats_of(groups)
    weights = [KEEP ** (len(groups) - 1 - place) for place in range(len(groups))]
    count = sum(w * len(g) for w, g in zip(weights, groups, strict=True))
    squares = sum(w * float(np.var(g)) * len(g) for w, g in zip(weights, groups, strict=True))
    assert stats.counts[0] == pytest.approx(count)
    assert stats.means[0] == pytest.approx(
        sum(w * sum(g) for w, g in zip(weights, groups, strict=True)) / count, abs=1e-12
    )
    assert stats.squares[0] == pytest.approx(squares, abs=1e-9)
    assert stats.freedom[0] == pytest.approx(sum(w * (len(g) - 1) for w, g in zip(weights, groups, strict=True)))


@pytest.mark.parametrize("rewards", [[], [math.nan], [0.0, math.inf]])
def test_refuses_what_is_no_reward(rewards):
    with pytest.raises(ValueError, match="no rewards"):
        RunningStats("a").update(0, rewards)


def test_refuses_states_of_more_samples():
    with pytest.raises(ValueError, match="no such samples"):
        RunningStats("aa").load(stats_of([], [], [[1.0]]).state())


@pytest.mark.parametrize(
    ("means", "highest", "share", "least", "expected"),
    [
        ([0.0, 0.5, 1.0], [1, 1, 1], 0.7, 1, [0, 1]),
        ([0.0, 0.5, 1.0], [1, 1, 1], 0.0, 1, [0, 1, 2]),
        ([0.0, 0.5, 1.0], [1, 1, 1], 0.5, 1, [0]),
        ([0.7, 0.69, 0.71], [1, 1, 1], 0.7, 1, [1]),
        ([1.4, 1.4, 1.4], [1.5, 2, 2.5], 0.7, 1, [2]),
        ([None, 1.0, None], [1, 1, 1], 0.7, 1, [0, 2]),
        ([1.0, 0.9, 0.8], [1, 1, 1], 0.7, 1, [2]),
        ([1.0, 0.9, 0.8], [1, 1, 1], 0.7, 2, [1, 2]),
        ([1.0, 0.9, 0.8], [1, 1, 1], 0.7, 9, [0, 1, 2]),
        ([1.0, 1.0, 1.0], [1, 1, 1], 0.7, 2, [0, 1]),
        ([1.0, 0.2, 1.0], [1, 1, 1], 0.7, 2, [0, 1]),
        ([1.0, 1.0, 0.0], [0, 1, 1], 0.7, 1, [0, 2]),
        ([1.5, 0.1, 0.1], [1, 1, 1], 1.0, 1, [1, 2]),
    ],
)
def test_solved_by_hand(means, highest, share, least, expected):
    stats = stats_of(*([] if mean is None else [[mean, mean]] for mean in means))
    assert without_solved(stats, highest, share, least=least) == expected


def test_solved_among_some():
    stats = stats_of([[1.0]], [[0.9]], [[0.8]], [[0.1]])
    assert without_solved(stats, [1] * 4, 0.7, among=[0, 1, 3]) == [3]
    assert without_solved(stats, [1] * 4, 0.7, among=[0, 1]) == [1]
    assert without_solved(stats, [1] * 4, 0.0, among=[0, 1]) == [0, 1]


SIZES = [(1, 1), (5, 2), (7, 7), (8, 4), (9, 4), (40, 6)]


@pytest.mark.parametrize(("n", "batch"), SIZES)
def test_evenly_every_index_comes_once_an_epoch(seed, n, batch):
    stream = SelectedStream(RunningStats("q" * n), batch, seed, weighted=False)
    flat = [index for _ in range(4 * n) for index in stream.next()]
    epochs = [flat[begin : begin + n] for begin in range(0, len(flat) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 20 or epochs[0] != epochs[1]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "batch"), SIZES)
def test_no_index_twice_in_a_batch(seed, n, batch, weighted):
    rng = np.random.default_rng(seed)
    stream = SelectedStream(RunningStats("q" * n), batch, seed, weighted=weighted)
    for _ in range(40):
        indices = stream.next()
        assert len(indices) == batch == len(set(indices))
        for index in indices:
            stream.stats.update(index, rng.random(4).tolist())


def test_fewer_samples_than_a_batch():
    for weighted in (False, True):
        stream = SelectedStream(RunningStats("aaa"), 7, 0, weighted=weighted)
        assert Counter(stream.next()).most_common()[-1][1] == 2


def test_weighted_windows_hold_no_index_twice(seed):
    n, batch = 40, 5
    stream = SelectedStream(RunningStats("q" * n), batch, seed)
    for _ in range(6):
        window = [index for _ in range(round(WINDOW * n) // batch) for index in stream.next()]
        assert len(set(window)) == len(window)


@pytest.mark.parametrize(
    ("groups", "squared"),
    [
        ([[], [[0.0, 1.0] * 2], [[0.0] * 4]], [1.0, (1 + 6.0) / 4, 1 / 4]),  # v is 1 / (3 + 3)
        ([[], [[0.0] * 100]], [1.0, 1 / 100]),
    ],
)
def test_draws_are_in_proportion_to_the_weights(seed, groups, squared):
    """First draws: 1 + FLOOR for what wasn't drawn before, the weight by hand for what was."""
    stats = stats_of(*groups)
    weights = np.sqrt(squared) + FLOOR
    counts = np.zeros(len(groups))
    for number in range(3000):
        counts[SelectedStream(stats, 1, seed + number).next()[0]] += 1
    np.testing.assert_allclose(counts / 3000, weights / weights.sum(), atol=0.035)


def test_samples_that_vary_come_more_often(seed):
    rng = np.random.default_rng(seed)
    stream = SelectedStream(RunningStats("q" * 60), 6, seed)
    drawn = np.zeros(60)
    for _ in range(300):
        for index in stream.next():
            drawn[index] += 1
            chance = 0.5 if index < 20 else float(index % 2)
            stream.stats.update(index, (rng.random(8) < chance).astype(float).tolist())
    assert drawn[:20].mean() > 2 * drawn[20:].mean()
    assert drawn.min() > 5


@pytest.mark.parametrize("weighted", [False, True])
def test_looking_ahead_moves_nothing_and_is_right(seed, weighted):
    stats = stats_of(*([[float(i % 3), 1.0]] for i in range(11)))
    stream = SelectedStream(stats, 4, seed, weighted=weighted, solved=0.9, highest=[2.0] * 11)
    for _ in range(5):
        stream.next()
    before = stream.state()
    ahead = list(itertools.islice(stream.ahead(), 12))
    assert stream.state() == before
    assert ahead == [stream.next() for _ in range(12)]


def test_looking_ahead_follows_the_rewards(seed):
    """One iterator for the whole run, two batches ahead as a prefetcher is: never behind, and with all rewards that
    there were when it was asked.
    """
    rng = np.random.default_rng(seed)
    right = 0
    for number in range(8):
        stream = SelectedStream(RunningStats("q" * 24), 2, seed + number, solved=0.9, highest=[1.0] * 24)
        ahead = stream.ahead()
        told = [next(ahead), next(ahead)]
        for step in range(60):
            given = stream.next()
            right += told[step] == given
            for index in given:
                stream.stats.update(index, (rng.random(8) < (1.0, 0.5)[index % 2]).astype(float).tolist())
            told.append(next(ahead))
            assert told[-1] == list(itertools.islice(stream.ahead(), 2))[-1]
    assert 400 < right < 480
    late = SelectedStream(RunningStats("q" * 30), 3, seed)
    ahead = late.ahead()
    next(ahead)
    late.next(), late.next(), late.next()
    assert next(ahead) == late.next()


@pytest.mark.parametrize(("weighted", "solved"), [(False, 0.0), (True, 0.0), (False, 0.6), (True, 0.6)])
def test_a_resumed_stream_goes_on_as_the_whole_one(seed, weighted, solved):
    n, batch, steps = 23, 4, 60

    def fresh() -> SelectedStream:
        return SelectedStream(
            RunningStats("ab" * 11 + "b"), batch, seed, weighted=weighted, solved=solved, highest=[1.0] * n
        )

    def step(stream: SelectedStream, number: int) -> list[int]:
        indices = stream.next()
        for index in indices:
            chance = np.random.default_rng([seed, number, index])
            stream.stats.update(index, (chance.random(4) < index / n).astype(float).tolist())
        return indices

    whole = fresh()
    expected, states = [], []
    for number in range(steps):
        states.append(json.dumps(whole.state()))
        expected.append(step(whole, number))
    for at in (0, 1, 7, 30, 59):
        resumed = fresh()
        list(itertools.islice(resumed.ahead(), 3))
        step(resumed, 99)
        resumed.load(json.loads(states[at]))
        assert [step(resumed, number) for number in range(at, steps)] == expected[at:]
        assert resumed.state() == whole.state()
    if solved:
        assert batch <= whole.left < n


def test_solved_samples_leave_after_the_epoch(seed):
    """Samples 0..4 of 10 are solved at once: they come in the first epoch only."""
    stream = SelectedStream(RunningStats("q" * 10), 5, seed, weighted=False, solved=0.7, highest=[1.0] * 10)
    seen = Counter()
    for number in range(6):
        for index in stream.next():
            seen[index] += 1
            stream.stats.update(index, [1.0, 1.0] if index < 5 else [0.0, 1.0])
        assert stream.left == (10 if number < 2 else 5)
    assert [seen[index] for index in range(10)] == [1] * 5 + [5] * 5


def test_where_all_is_solved_a_batch_stays(seed):
    stream = SelectedStream(RunningStats("q" * 6), 2, seed, weighted=False, solved=0.5, highest=[1.0] * 6)
    for _ in range(9):
        for index in stream.next():
            stream.stats.update(index, [0.9 - index / 100] * 2)
    assert stream.left == 2
    assert sorted(stream.next()) == [4, 5]


def test_what_left_stays_away(seed):
    """0 and 1 leave with 0.6; when 2 and 3 are solved too, with 1, these are still the ones that stay."""
    stream = SelectedStream(RunningStats("q" * 4), 2, seed, weighted=False, solved=0.5, highest=[1.0] * 4)
    for number in range(6):
        for index in stream.next():
            stream.stats.update(index, [0.6] * 2 if index < 2 else [float(number > 1)] * 2)
    assert sorted(stream.next()) == [2, 3]


def test_seeds_differ():
    first, same, other = (SelectedStream(RunningStats("q" * 50), 20, seed).next() for seed in (1, 1, 2))
    assert first == same != other


def test_refuses_impossible_sizes_and_states():
    with pytest.raises(ValueError, match="at least 1"):
        SelectedStream(RunningStats(""), 1, 0)
    with pytest.raises(ValueError, match="at least 1"):
        SelectedStream(RunningStats("a"), 0, 0)
    with pytest.raises(ValueError, match="1 highest rewards for 2"):
        SelectedStream(RunningStats("aa"), 1, 0, solved=0.5, highest=[1.0])
    stream = SelectedStream(RunningStats("a" * 9), 2, 0)
    good = stream.state()
    for wrong in ({"rest": 10}, {"rest": -1}, {"drawn": "ff"}, {"open": "0000"}, {"drawn": "ffff"}):
        with pytest.raises(ValueError, match="no such place"):
            stream.load(good | wrong)


def test_half_a_million_samples_are_no_wait():
    """A step of a large data file takes well under a second, and its state stays small."""
    from time import process_time

    stream = SelectedStream(RunningStats(["a", "b"] * 245_000), 8, 0)
    begin = process_time()
    for index in stream.next():
        stream.stats.update(index, [0.0, 1.0])
    assert process_time() - begin < 2.0
    assert len(json.dumps(stream.state())) < 300_000
