from __future__ import annotations

import time

import pytest

from vrlt_fast.rewards.choice import exact, soft


@pytest.mark.parametrize(
    ("answer", "right", "all_or_none", "in_part"),
    [
        ("B", "B", 1, 1),
        ("A", "B", 0, 0),
        ("A,C", "AC", 1, 1),
        ("C,A", "AC", 1, 1),
        ("A,A,C", "AC", 1, 1),
        ("A", "AC", 0, 1 / 2),
        ("A,A", "AC", 0, 1 / 2),
        ("B", "ABC", 0, 1 / 3),
        ("A,B", "ABC", 0, 2 / 3),
        ("A,D", "ABC", 0, 0),  # a wrong one costs all
        ("A,B,C,D", "ABC", 0, 0),
        ("", "B", 0, 0),
        (None, "B", 0, 0),
        (",", "B", 0, 0),
        ("b", "B", 0, 0),
        ("B ", "B", 0, 0),
        ("AB", "AB", 0, 0),  # letters are divided by commas
        ("I", "I", 0, 0),  # no letter of options
        ("\u0391", "A", 0, 0),  # a Greek alpha
        ("A", "", 0, 0),
        (None, "", 0, 0),
    ],
)
def test_by_hand(answer, right, all_or_none, in_part):
    assert exact(answer, frozenset(right)) == all_or_none
    assert soft(answer, frozenset(right)) == pytest.approx(in_part)


@pytest.mark.parametrize("text", ["A," * 500_000, "A" * 1_000_000, "," * 1_000_000])
def test_long_texts_are_fast(text):
    begin = time.process_time()
    exact(text, frozenset("A"))
    soft(text, frozenset("A"))
    assert time.process_time() - begin < 0.25
