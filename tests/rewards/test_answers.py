from __future__ import annotations

import math
import random
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vrlt_fast.errors import SetupError
from vrlt_fast.rewards import answers

WER, ROUGE, MATH = answers.word_accuracy(), answers.rouge(), answers.mathematics()
ARABIC = "\u0663"  # 3


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("3", "3", 1),
        (" 3\n", "3", 1),
        ("4", "3", 0),
        ("3.0", "3", 0),  # one of the two has a point
        ("3", "3.0", 0),
        ("3.0", "3.00", 1),
        ("3.004", "3.00", 1),
        ("3.006", "3.00", 0),
        ("1,000", "1000.0", 1),  # a comma counts as a point here
        ("1,000", "1000", 0),
        ("1,234.5", "1234.50", 1),
        ("-2", "-2", 1),
        ("-2", "2", 0),
        ("+2", "2", 1),
        ("1e3", "1000", 1),
        (".5", "0.5", 1),
        ("5.", "5.0", 1),
        ("50%", "50", 0),
        ("50%", "50%", 0),
        ("3 m", "3", 0),
        ("nan", "nan", 0),
        ("inf", "inf", 0),
        ("1e999", "1e999", 0),
        ("9" * 400, "9" * 400, 0),
        ("1_0", "10", 0),
        (ARABIC, "3", 0),
        ("", "3", 0),
        ("", "", 0),
        ("three", "3", 0),
        ("0", "-0", 1),
    ],
)
def test_number(answer, truth, expected):
    assert answers.number(answer, truth) == expected


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("10", "10", 1 - 1e-10),
        ("9", "10", 0.9),
        ("11", "10", 0.9),
        ("5", "10", 0.5),
        ("0", "10", 0),
        ("20", "10", 0),
        ("25", "10", 0),
        ("-10", "10", 0),
        ("-9", "-10", 0.9),
        ("10.0", "10", 1 - 1e-10),
        ("1,000", "1000", 1),
        ("0", "0", 0),  # as released: both terms are 1e-9
        ("1", "0", 0),
        ("0.75", "1", 0.75),
        ("nan", "10", 0),
        ("inf", "10", 0),
        ("10", "inf", 0),
        ("1e308", "-1e308", 0),
        ("10%", "10", 0),
        (ARABIC, "3", 0),
        ("", "10", 0),
        ("about 10", "10", 0),
    ],
)
def test_regression(answer, truth, expected):
    assert answers.regression(answer, truth) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("EXIT", "EXIT", 1),
        ("exit", "EXIT", 0),  # case counts
        ("a b c d", "a b c d", 1),
        ("a b c", "a b c d", 3 / 4),
        ("a b x d", "a b c d", 3 / 4),
        ("b a", "a b", 0),
        ("a b c d e", "a b c d", 3 / 4),
        ("a b c d", "a", 0),  # more errors than words
        ("a  b", " a b ", 1),
        ("a\nb", "a b", 1),
        ("", "a b", 0),
        ("", "", 1),
        ("a", "", 0),
        ("50%", "50%", 1),
        ("50", "50%", 0),
        ("1,000 m", "1000 m", 1 / 2),
        ("\u00e9t\u00e9", "\u00e9t\u00e9", 1),
        (ARABIC, "3", 0),
        ("nan", "nan", 1),
        ("9" * 400, "9" * 400, 1),
    ],
)
def test_words_that_are_read(answer, truth, expected):
    assert WER(answer, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("a dog runs", "a dog runs", 1),
        ("A DOG runs!", "a dog runs", 1),
        ("dogs", "dog", 2 / 3),  # stemmed; a single word has no pair
        ("dog", "cat", 0),
        ("a dog", "a cat", (1 / 2 + 0 + 1 / 2) / 3),
        ("a dog jumps", "dogs jump", (4 / 5 + 2 / 3 + 4 / 5) / 3),
        ("runs dog a", "a dog runs", (1 + 0 + 1 / 3) / 3),
        ("a b c d", "a b", (2 / 3 + 1 / 2 + 2 / 3) / 3),
        ("a b", "a b c d", (2 / 3 + 1 / 2 + 2 / 3) / 3),
        ("a a a", "a", (1 / 2 + 0 + 1 / 2) / 3),
        ("the man opens a door", "the man closes a door", (4 / 5 + 2 / 4 + 4 / 5) / 3),
        ("", "a", 0),
        ("a", "", 0),
        ("", "", 0),
        ("...", "...", 0),
        ("50 %", "50%", 2 / 3),
        ("1,000", "1000", 0),  # "1" and "000"
        (ARABIC, ARABIC, 0),  # no ASCII letter or digit
        ("caf\u00e9 x", "caf x", 1),
        ("nan inf", "nan inf", 1),
    ],
)
def test_answers_in_own_words(answer, truth, expected):
    assert ROUGE(answer, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("3", "3.0", 1),
        ("1/2", "0.5", 1),
        (r"\frac{1}{2}", "0.5", 1),
        (r"$\frac{1}{2}$", "1/2", 1),
        (r"\boxed{4}", "4", 1),
        (r"\sqrt{4}", "2", 1),
        ("2^10", "1024", 1),
        ("2^{10}", "1023", 0),
        ("1,000", "1000", 1),
        ("50%", "0.5", 1),
        ("-1", "1", 0),
        ("1/3", "0.33", 0),
        ("1/0", "1", 0),
        ("B", "B", 1),
        ("(B) dog", "B", 1),
        ("Bob", "B", 0),
        ("A or B", "B", 0),  # the first letter that stands alone
        ("dog", "B", 0),
        ("Cat", "cat", 1),
        ("cat", "dog", 0),
        ("", "3", 0),
        ("3", "", 0),
        ("nan", "nan", 1),
        (ARABIC, "3", 0),
        ("9" * 64, "9" * 64, 1),
        ("9" * 400, "9" * 400, 1),
        ("9^9^9^9", "9^9^9^9", 1),  # the same text; what it is nobody computes
        ("9^9^9^9", "1", 0),
        ("9**9**9", "1", 0),
        ("(9^{99})^99", "1", 0),
        ("10!", "3628800", 0),
        (r"\int_0^1 x dx", "0.5", 0),
    ],
)
def test_mathematics(answer, truth, expected):
    begin = time.process_time()
    assert MATH(answer, truth) == expected
    assert time.process_time() - begin < 2


PIECES = ["^9", "^{99}", "**", "%", r"\frac{", r"\sqrt{", r"\times", r"\pi", r"\boxed{", "9" * 20, *"0123.,+-*/() {}$"]


def test_no_term_takes_long(seed):
    rng = random.Random(seed)
    asked, slowest = 0, 0.0
    while asked < 400:
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 30)))
        if len(text) <= 64:
            begin = time.process_time()
            assert MATH(text, "1/3") in (0.0, 1.0)
            asked, slowest = asked + 1, max(slowest, time.process_time() - begin)
    assert slowest < 3


LONG = ["9" * 1_000_000, "a b " * 250_000, "," * 1_000_000, " " * 1_000_000, "((" * 500_000, "a" * 1_000_000]
REWARDS = [answers.number, answers.regression, WER, ROUGE, MATH]


@pytest.mark.parametrize("reward", REWARDS)
def test_long_texts_are_fast(reward):
    for text in LONG:
        begin = time.process_time()
        assert reward(text, "a b") == 0
        assert time.process_time() - begin < 0.25
        for cut in (answers.LONGEST, answers.LONGEST + 1):
            begin = time.process_time()
            reward(text[:cut], "a man in a red shirt opens the door of the car " * 2)
            assert time.process_time() - begin < 0.5


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_no_text_leaves_the_range(answer, truth):
    for reward in REWARDS:
        value = reward(answer, truth)
        assert 0.0 <= value <= 1.0
        assert math.isfinite(value)


@pytest.mark.parametrize(
    ("make", "package"), [("word_accuracy", "jiwer"), ("rouge", "rouge-score"), ("mathematics", "math-verify")]
)
def test_a_missing_package_is_named(make, package, monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] in ("jiwer", "rouge_score", "math_verify"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(SetupError, match=f"{package} is not installed") as raised:
        getattr(answers, make)()
    assert raised.value.code == "VRLT-E01"
    assert raised.value.problems[0].fix == "pip install 'vrlt-fast[rewards]'"


def test_packages_are_loaded_when_they_are_needed():
    code = (
        "import sys; from vrlt_fast.rewards import answers, dual; assert answers.number('1', '1') == 1;"
        "assert not {'jiwer', 'rouge_score', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
