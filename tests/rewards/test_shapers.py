from __future__ import annotations

import pytest

from vrlt_fast.config_rl import RewardConfig
from vrlt_fast.data.sample import Sample
from vrlt_fast.rewards.base import Response, ResponseGroup
from vrlt_fast.rewards.shapers import make_shaper, rightness

SAMPLE = Sample("q", "v.mp4", 8.0, "videoqa", "What?", options=("a", "b"), answer="B")
NAN = float("nan")


def group(*lengths, cut=()):
    ends = ["length" if i in cut else "stop" for i in range(len(lengths))]
    return ResponseGroup(SAMPLE, tuple(Response("", n, end) for n, end in zip(lengths, ends, strict=True)))


def earned(*values, part="semantic"):
    return [{part: value, "format": 1.0} for value in values]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"semantic": 0.5, "temporal": 1.0}, 0.5),
        ({"semantic": 0.0, "temporal": 1.0, "format": 1.0}, 0.0),
        ({"temporal": 0.25, "format": 1.0}, 0.25),
        ({"spatial": 0.75}, 0.75),
        ({"instance": 1.0, "temporal": 0.2}, 0.2),
        ({"progress": 0.9}, 0.9),
        ({"format": 1.0, "user:mine:one": 3.0}, 0.0),
        ({}, 0.0),
    ],
)
def test_what_says_how_right_a_response_is(parts, expected):
    assert rightness(parts) == expected


@pytest.mark.parametrize(
    ("values", "lengths", "expected"),
    [
        ((1, 1), (320, 512), [1, 1]),  # both ends count
        ((1, 1), (319, 513), [0, 0]),
        ((1, 1), (400, 600), [1, 0]),
        ((1, 0), (400, 400), [0, 0]),  # one right response isn't enough
        ((1, 0, 1), (400, 400, 400), [1, 0, 1]),
        ((1, 1, 0), (100, 400, 400), [0, 1, 0]),
        ((0, 0), (400, 400), [0, 0]),
        ((0.1, 0.1), (400, 400), [0, 0]),  # not above 0.1
        ((0.11, 0.2), (400, 400), [1, 1]),
        ((0.1, 1, 1), (400, 400, 400), [0, 1, 1]),
        ((1,), (400,), [0]),
        ((), (), []),
        ((1, 1), (0, 0), [0, 0]),
        ((1, 1), (10**12, 400), [0, 1]),
        ((NAN, 1, 1), (400, 400, 400), [0, 1, 1]),
        ((-1, 1, 1), (400, 400, 400), [0, 1, 1]),
    ],
)
@pytest.mark.parametrize("part", ["semantic", "temporal", "progress"])
def test_length(values, lengths, expected, part):
    shape = make_shaper(RewardConfig(length=0.2), 1024)
    parts = earned(*values, part=part)
    before = [dict(p) for p in parts]
    shaped = shape(parts, group(*lengths), [])
    assert [p["length"] for p in shaped] == expected
    assert [{n: v for n, v in p.items() if n != "length"} for p in shaped] == parts == before


def test_another_range_and_threshold():
    shape = make_shaper(RewardConfig(length=1.0, length_range=(10, 10), earned=0.5), 1024)
    assert [p["length"] for p in shape(earned(0.6, 0.5, 0.9), group(10, 10, 11), [])] == [1, 0, 0]


@pytest.mark.parametrize(
    ("length", "limit", "buffer", "cut", "expected"),
    [
        (0, 1000, 100, False, 0),
        (1, 1000, 100, False, 0),
        (899, 1000, 100, False, 0),
        (900, 1000, 100, False, 0),
        (901, 1000, 100, False, -0.01),
        (925, 1000, 100, False, -0.25),
        (950, 1000, 100, False, -0.5),
        (999, 1000, 100, False, -0.99),
        (1000, 1000, 100, False, -1),  # its last token was the stop token
        (1000, 1000, 100, True, -1),
        (500, 1000, 100, True, -1),  # cut off for another reason
        (2000, 1000, 100, False, -1),
        (10**12, 1000, 100, False, -1),
        (999, 1000, 1, False, 0),
        (1000, 1000, 1, False, -1),
        (0, 100, 200, False, -0.5),  # a buffer longer than responses can be
        (50, 100, 100, False, -0.5),
    ],
)
def test_overlong(length, limit, buffer, cut, expected):
    shape = make_shaper(RewardConfig(overlong=1.0, overlong_buffer=buffer), limit)
    shaped = shape(earned(1.0, 0.0), group(length, 0, cut=(0,) if cut else ()), [])
    assert shaped[0] == {"semantic": 1.0, "format": 1.0, "overlong": pytest.approx(expected)}
    assert -1 <= shaped[1]["overlong"] <= 0


@pytest.mark.parametrize(
    ("ordered", "others", "expected"),
    [
        ((1, 1), [(1, 1)], [1, 1]),
        ((1, 0), [(0, 0)], [1, 0]),
        ((1, 0), [(1, 0)], [1, 0]),
        ((1, 0), [(1, 1)], [0, 0]),  # 0.5 < 0.8
        ((1, 1, 1, 1, 0), [(1, 1)], [1, 1, 1, 1, 0]),  # 0.8 of it is enough
        ((1, 1, 1, 0), [(1, 1)], [0, 0, 0, 0]),
        ((0, 0), [(0, 0)], [0, 0]),  # the test holds, but none is right
        ((0.1, 0.1), [(0, 0)], [0, 0]),  # not above 0.1
        ((0.2, 0.1), [(0, 0)], [1, 0]),
        ((0.5, 0.3), [(0.5, 0.5)], [1, 1]),
        ((0.5, 0.29), [(0.5, 0.5)], [0, 0]),
        ((1, 1), [], [0, 0]),  # no group to compare with
        ((1, 1), [()], [0, 0]),
        ((), [(1, 1)], []),
        ((1, 0), [(1,), (0, 0)], [1, 0]),  # several groups count as one
        ((NAN, 1), [(0, 0)], [0, 0]),
    ],
)
def test_shuffled(ordered, others, expected):
    shape = make_shaper(RewardConfig(shuffled=0.3), 1024)
    shaped = shape(earned(*ordered), group(*[5] * len(ordered)), [earned(*one) for one in others])
    assert [p["shuffled"] for p in shaped] == expected


def test_the_ratio_is_a_key():
    shape = make_shaper(RewardConfig(shuffled=0.3, shuffled_ratio=1.0, earned=0.6), 1024)
    assert [p["shuffled"] for p in shape(earned(1.0, 0.6), group(5, 5), [earned(0.8)])] == [1, 0]
    assert [p["shuffled"] for p in shape(earned(1.0, 0.5), group(5, 5), [earned(0.8)])] == [0, 0]


def test_each_adds_a_part_of_its_own():
    every = RewardConfig(shuffled=0.3, length=0.2, overlong=1.0)
    parts = earned(1.0, 1.0)
    shaped = make_shaper(every, 512)(parts, group(400, 500), [earned(0.0)])
    assert shaped[0] == {"semantic": 1, "format": 1, "length": 1, "overlong": pytest.approx(-16 / 128), "shuffled": 1}
    assert make_shaper(RewardConfig(), 512)(parts, group(400, 500), []) == parts
