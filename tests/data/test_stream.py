from __future__ import annotations

import itertools
import json
import random

import pytest

from tests.conftest import seed_of
from vrlt_fast.data.stream import BatchStream

SEED = seed_of("test_stream")


def draws(count: int = 60):
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    for _ in range(count):
        yield rng.randint(1, 40), rng.randint(1, 40), rng.randrange(1000)


def test_every_index_comes_once_an_epoch():
    for n, batch, seed in draws():
        stream = BatchStream(n, batch, seed)
        flat = [index for _ in range(5 * n) for index in stream.next()]
        for epoch in range(5):
            assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n)), (n, batch, seed, epoch)


def test_no_index_twice_in_a_batch():
    for n, batch, seed in draws():
        stream = BatchStream(max(n, batch), min(n, batch), seed)
        for _ in range(30):
            indices = stream.next()
            assert len(indices) == min(n, batch)
            assert len(set(indices)) == len(indices), (n, batch, seed)


def test_a_batch_larger_than_the_data_wraps_around():
    stream = BatchStream(3, 7, 0)
    assert sorted(stream.next()[:6]) == [0, 0, 1, 1, 2, 2]


def test_resumes_exactly_from_its_state():
    for n, batch, seed in draws():
        stream = BatchStream(n, batch, seed)
        for _ in range(random.Random(seed).randrange(25)):
            stream.next()
        state = json.loads(json.dumps(stream.state()))
        assert set(state) == {"epoch", "offset"}
        resumed = BatchStream(n, batch, seed)
        resumed.next()
        resumed.load(state)
        assert [resumed.next() for _ in range(20)] == [stream.next() for _ in range(20)], (n, batch, seed)


def test_seed_and_epoch_change_the_order():
    a, b = BatchStream(50, 50, 1), BatchStream(50, 50, 2)
    first = a.next()
    assert first != b.next()
    assert first != a.next()
    assert first == BatchStream(50, 50, 1).next()


def test_refuses_impossible_sizes_and_states():
    with pytest.raises(ValueError, match="at least 1"):
        BatchStream(0, 4, 0)
    with pytest.raises(ValueError, match="at least 1"):
        BatchStream(4, 0, 0)
    with pytest.raises(ValueError, match="no such place"):
        BatchStream(4, 2, 0).load({"epoch": 0, "offset": 5})


@pytest.mark.parametrize("n", [3, 7, 8])
def test_looking_ahead_moves_nothing(seed: int, n: int) -> None:
    stream, twin = BatchStream(n, 4, seed), BatchStream(n, 4, seed)
    stream.next()
    twin.next()
    ahead = list(itertools.islice(stream.ahead(), 9))
    assert stream.state() == twin.state()
    assert ahead == [stream.next() for _ in range(9)] == [twin.next() for _ in range(9)]
