"""Hints and noise by delta; what a hint may not say, by hand and for random samples of every task."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrlt_fast.data.grammars.named import GRAMMARS
from vrlt_fast.data.sample import LETTERS, SPAN_TASKS, TASKS, TEXT_TASKS, Box, Sample
from vrlt_fast.rewards.spans import tiou
from vrlt_fast.select.augment import Window, best_trace, hint_for, hint_share, noise_sigma, without_answer


def sample(task: str, **more: object) -> Sample:
    given: dict[str, object] = {"id": "a", "video": "v.mp4", "duration": 60.0, "task": task, "question": "What is it?"}
    return Sample(**{**given, **more})


def choice(answer: str = "B", *options: str) -> Sample:
    return sample("videoqa", options=options or ("pear", "plum", "fig"), answer=answer)


def spans(*borders: tuple[float, float]) -> Sample:
    return sample("grounding", spans=borders)


@pytest.mark.parametrize(
    ("before", "mean", "expected"),
    [
        ([], 0.3, 0.0),
        ([0.5], 0.5, 0.0),
        ([0.5], 0.2, 0.3),
        ([0.5], 1.0, -0.5),
        ([0.0, 1.0], 0.25, 0.25),
        ([0.0, 1.0, 0.5], 0.5, 0.0),
        ([0.2, 0.4, 0.6, 0.8], 0.0, 0.5),
        ([9.0, 0.2, 0.4, 0.6, 0.8], 0.0, 0.5),
        ([9.0, 9.0, 1.0, 1.0, 1.0, 1.0], 0.0, 1.0),
        ([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], 0.0, 0.0),
        ([0.1] * 50, 0.1, 0.0),
        ([1.0, 0.0, 0.0], 1.0, -2 / 3),
    ],
)
def test_delta_of_the_last_four(before, mean, expected):
    window = Window(4)
    for value in before:
        window.add(value)
    assert window.delta(mean) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), max_size=12), st.lists(st.floats(0, 1), max_size=8), st.integers(1, 6))
def test_a_resumed_window_goes_on_as_the_whole_one(first, rest, size):
    whole, before, resumed = Window(size), Window(size), Window(size)
    resumed.add(0.7)
    for value in first:
        whole.add(value)
        before.add(value)
    resumed.load(json.loads(json.dumps(before.state())))
    for value in rest:
        whole.add(value)
        resumed.add(value)
    assert resumed.state() == whole.state()
    assert resumed.delta(0.3) == whole.delta(0.3)


def test_refuses_an_empty_window():
    with pytest.raises(ValueError, match="at least 1"):
        Window(0)


@pytest.mark.parametrize(
    ("delta", "share", "sigma"),
    [
        (0.0, 0.0, 0.0),
        (0.25, 0.2, 0.0),
        (0.5, 0.4, 0.0),
        (0.1, 0.08, 0.0),
        (0.9, 0.4, 0.0),
        (-0.25, 0.0, 16.0),
        (-0.5, 0.0, 32.0),
        (-0.125, 0.0, 8.0),
        (-1.0, 0.0, 32.0),
    ],
)
def test_strengths(delta, share, sigma):
    assert hint_share(delta, hint=0.4, scale=0.5) == pytest.approx(share)
    assert noise_sigma(delta, noise=32.0, scale=0.5) == pytest.approx(sigma)


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(0, 1), st.floats(0, 64), st.floats(0.01, 2))
def test_never_both_and_stronger_with_delta(one, two, hint, noise, scale):
    low, high = sorted((one, two))
    assert hint_share(low, hint=hint, scale=scale) <= hint_share(high, hint=hint, scale=scale) <= hint
    assert noise >= noise_sigma(low, noise=noise, scale=scale) >= noise_sigma(high, noise=noise, scale=scale) >= 0
    assert hint_share(one, hint=hint) == 0 or noise_sigma(one, noise=noise) == 0


OWN = sample("open", answer="rain", reasoning=" my own way ")


@pytest.mark.parametrize(
    ("responses", "rewards", "expected"),
    [
        ([], [], "my own way"),
        (["<think>a</think>x"], [1.0], "a"),
        (["<think>a</think>", "<think>b</think>"], [0.5, 1.0], "b"),
        (["<think>a</think>", "<think>b</think>"], [1.0, 0.5], "a"),
        (["<think>a</think>", "<think>b</think>"], [1.0, 1.0], "a"),
        (["<think>a</think>", "no tags"], [0.5, 1.0], "a"),
        (["<think>a</think>", "<think>b"], [0.5, 1.0], "a"),
        (["<think>  </think>", "<think>b</think>"], [1.0, 0.1], "b"),
        (["<think>a</think>"], [0.0], "my own way"),
        (["<think>a</think>"], [-1.0], "my own way"),
        (["x <think> a\nb </think> y </think>"], [2.0], "a\nb"),
        (["<answer>rain</answer>"], [1.0], "my own way"),
        (["<think>a</think><think>b</think>"], [1.0], "a"),
    ],
)
def test_best_trace(responses, rewards, expected):
    assert best_trace(responses, rewards, OWN) == expected


def test_a_good_form_is_not_enough():
    responses, rewards = ["<think>a</think>", "<think>b</think>"], [0.5, 0.5]
    assert best_trace(responses, rewards, OWN) == "a"
    assert best_trace(responses, rewards, OWN, above=0.5) == "my own way"
    assert best_trace(responses, [0.5, 0.6], OWN, above=0.5) == "b"


def test_no_trace_at_all():
    assert best_trace(["x"], [1.0], choice()) is None


TEN = "one1 two2 three3 four4 five5 six6 seven7 eight8 nine9 ten10"


@pytest.mark.parametrize(
    ("share", "count"),
    [(0.0, 0), (0.05, 0), (0.1, 1), (0.15, 1), (0.2, 2), (0.3, 3), (0.35, 3), (0.5, 5), (0.7, 7), (0.99, 9), (1.0, 10)],
)
def test_a_hint_is_whole_words(share, count):
    hinted = hint_for(choice(), share, TEN.replace(" ", "\n "))
    words = " ".join(TEN.split()[:count])
    assert hinted.question == ("What is it?\nHint: " + words if count else "What is it?")


def test_a_hint_changes_the_question_alone():
    own = sample("grounding", spans=((3.0, 9.0),), reasoning="a red car comes at 3.0 seconds")
    hinted = hint_for(own, 1.0)
    assert hinted.question == "What is it?\nHint: a red car comes at … seconds"
    assert hint_for(own, 1.0, "other words").question.endswith("Hint: other words")
    assert (hinted.id, hinted.spans, hinted.reasoning) == (own.id, own.spans, own.reasoning)
    assert hint_for(choice(), 1.0) == choice()


LEAKS: list[tuple[Sample, str, str]] = [
    (choice(), "So it is B.", "So it is …."),
    (choice(), "(B) or b) or option b, not A", "(…) or …) or option …, not A"),
    (choice(), "A Plum, two plums", "A …, two plums"),
    (choice(), "Bob has a b-side", "Bob has a b-side"),
    (choice(), "The answer is b", "The answer is …"),
    (choice("A,C"), "A, B and C: pear\nFIG", "…, B and …: … …"),
    (choice("A", "a red  car", "tree"), "I see a red\ncar there", "I see … there"),
    (choice("A", "?", "!"), "What? Now!", "What… Now!"),
    (choice("A", "…", "!"), "So A … yes", "So yes"),
    (spans((3.0, 5.5)), "from 3 to 5.5, not 13.0 to 55", "from … to …, not 13.0 to 55"),
    (spans((3.27, 9.0)), "3 3.3 3.27 3.270 3.2 3.28 03", "… … … … 3.2 3.28 …"),
    (spans((3.0, 75.0)), "00:03 to 1:15 or 1:16", "… to … or 1:16"),
    (spans((3.0, 75.0)), "0:01:15.0, 1:01:15", "…, 1:01:15"),
    (spans((3.0, 9.0)), "three, nineteen, Nine, nines", "…, nineteen, …, nines"),
    (spans((3.0, 9.0)), "0-,1 red car,3 -,10-", "0-,1 red car,… -,10-"),
    (spans((3.0, 9.0), (20.0, 30.5)), "[(3.0, 9.0), (20, 30.5)]", "[(…, …), (…, …)]"),
    (spans((1000.0, 1200.0)), "at 1,000 and 1.2e3", "at … and …"),
    (spans((12.0, 30.0)), "at 12,345 or 9,99", "at … or 9,99"),
    (sample("number", answer="42"), "42 and 42.0 and 420", "… and … and 420"),
    (sample("number", answer="-1,250"), "minus 1250, 1,250, 250", "minus …, …, 250"),
    (sample("number", answer="3"), "Three cats, 3 dogs", "… cats, … dogs"),
    (sample("regression", answer="0.45"), "45% or 0.45 or 0.5 or 0.44", "…% or … or … or 0.44"),
    (sample("ocr", answer="Exit  Now"), "it says EXIT now, exit", "it says …, exit"),
    (sample("open", answer="It rains."), "First it rains. Then it rains", "First … Then it rains"),
    (sample("instance", object_id=4, spans=((2.0, 8.0),)), "object 4, 2 to 8, 14", "object …, … to …, 14"),
    (sample("boxes", boxes=(Box(1.0, 0.1, 0.25, 0.5, 1.0),)), "0.100 .25 0.5 1.0 at 1", "… … … … at 1"),
    (sample("progress", progress=0.45), "45%, 45, 0.45, 0.5, 46%", "…%, …, …, …, 46%"),
    (choice(), "<answer>B</answer> <|im_end|>", "(answer)…(/answer) < |im_end|>"),
    (choice(), "option  b or option\n\tb", "option … or option …"),
    (choice(), "", ""),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "text", "expected"), LEAKS)
def test_without_answer(asked, text, expected):
    assert without_answer(text, asked) == expected


WORDS = (
    "the",
    "red",
    "car",
    "option",
    "a",
    "b",
    "B",
    "Plum",
    "seconds",
    "at",
    "3",
    "12.5",
    "0:09",
    "<answer>",
    "…",
)


def random_sample(task: str, rng: random.Random) -> Sample:
    """A valid sample of the task, of values that are written in many ways."""
    cuts = sorted(round(rng.uniform(0.5, 59.0), rng.choice((0, 1, 2, 5))) for _ in range(2 * rng.randint(1, 3)))
    borders = tuple((s, e) for s, e in zip(cuts[::2], cuts[1::2], strict=True) if s < e) or ((1.0, 2.0),)
    names = ["pear", "plum", "a fig", "12", "N/A", "go", "two cars", "C"]
    options = tuple(rng.sample(names, rng.randint(2, 5)))
    number = rng.choice((str(rng.randint(0, 3000)), f"{rng.uniform(-9, 99):.2f}", f"{rng.randint(1000, 9999):,}"))
    text = " ".join(rng.choice(WORDS[:9]) for _ in range(rng.randint(1, 4)))
    x, y = sorted(rng.random() for _ in range(2)), sorted(rng.random() for _ in range(2))
    fields: dict[str, object] = {
        "videoqa": {"options": options, "answer": rng.choice(LETTERS[: len(options)])},
        "grounded_qa": {"options": options, "answer": rng.choice(LETTERS[: len(options)]), "spans": borders},
        "grounding": {"spans": borders},
        "instance": {"spans": borders[:1], "object_id": rng.randint(0, 40)},
        "boxes": {"boxes": (Box(1.0, x[0], y[0], x[1], y[1]),)},
        "progress": {"progress": round(rng.random(), rng.choice((1, 2, 4)))},
    }
    answer = {"answer": number if task in ("number", "regression") else text}
    return sample(task, **fields.get(task, answer))


def told_by(asked: Sample, rng: random.Random) -> str:
    """A reasoning that says the answer over and over, as the grammars write it, among other words."""
    said = [g.write(asked, think=think) for g in GRAMMARS.values() if asked.task in g.asks for think in (False, True)]
    said += [f"{v:.{digits}f}" for span in asked.spans for v in span for digits in (0, 1, 2, 3)]
    said += [asked.options[LETTERS.index(letter)] for letter in asked.letters] + sorted(asked.letters)
    said += [asked.answer, asked.answer.upper()] if asked.task in TEXT_TASKS else []
    words = [rng.choice((*said, *WORDS)) for _ in range(30)] + said
    rng.shuffle(words)
    return rng.choice((" ", "\n", ", ")).join(words)


def numbers_in(text: str) -> list[str]:
    return re.findall(r"[0-9]+(?:\.[0-9]+)?", text)


def leaks(text: str, asked: Sample) -> Sequence[str]:
    """What of the answer a text says, found by other means than those that take it out."""
    flat = " ".join(text.lower().split())
    found = []
    for phrase in [asked.options[LETTERS.index(letter)] for letter in asked.letters] + (
        [asked.answer] if asked.task in TEXT_TASKS else []
    ):
        words = " ".join(phrase.lower().replace("<answer>", "(answer)").split())
        at = [m.start() for m in re.finditer(re.escape(words), flat)]
        found += [
            words
            for i in at
            if not (words[0].isalnum() and flat[i - 1 : i].isalnum())
            and not (words[-1].isalnum() and flat[i + len(words) : i + len(words) + 1].isalnum())
        ]
    found += [letter for letter in asked.letters if letter in re.split(r"\W+", text)]
    values = [v for span in asked.spans for v in span] + ([asked.object_id] if asked.task == "instance" else [])
    written = {f"{v:.{digits}f}" for v in values for digits in (0, 1, 2, 3)}
    written |= {f"{v:.{d}f}" for b in asked.boxes for v in (b.x0, b.y0, b.x1, b.y1) for d in (1, 2, 3)}
    if asked.progress is not None:
        written |= {f"{100 * asked.progress:.0f}", f"{asked.progress:.2f}"}
    return found + sorted(written.intersection(numbers_in(text)))


def test_the_finder_of_leaks_finds_them(seed):
    rng = random.Random(seed)
    for task in TASKS:
        asked = random_sample(task, rng)
        assert leaks(told_by(asked, rng), asked)


@pytest.mark.parametrize("task", TASKS)
@given(st.integers(0, 2**32))
def test_no_hint_says_the_answer(task, number):
    rng = random.Random(number)
    asked = random_sample(task, rng)
    hinted = hint_for(asked, rng.choice((0.3, 0.8, 1.0)), told_by(asked, rng))
    hint = hinted.question.removeprefix(asked.question).removeprefix("\nHint: ")
    assert leaks(hint, asked) == []
    assert not re.search(r"</?(?:think|answer|glue)>|<\|", hint)
    assert without_answer(hint, asked) == hint


@pytest.mark.parametrize("task", TASKS)
@given(st.integers(0, 2**32))
def test_copying_a_hint_earns_nothing(task, number):
    """The right response of each grammar, with the answer taken out and its tags put back, isn't right."""
    asked = random_sample(task, random.Random(number))
    for grammar in GRAMMARS.values():
        if task not in grammar.asks:
            continue
        copied = without_answer(grammar.write(asked, think=False), asked)
        copied = re.sub(r"\((/?(?:answer|glue))\)", r"<\1>", copied)
        said = grammar.read(copied, asked, think=False)
        right = said.answer is not None and said.answer.lower().split() == asked.answer.lower().split()
        assert not (right and asked.answer)
        assert task not in SPAN_TASKS or tiou(said.spans or (), asked.spans) < 0.5
        assert said.boxes is None
        assert said.progress is None
        assert task != "instance" or said.object_id is None


@given(st.text(max_size=60), st.text(min_size=1, max_size=4), st.sampled_from(["open", "ocr", "number"]))
def test_any_text_comes_to_an_end(text, answer, task):
    asked = sample(task, answer=answer)
    found = without_answer(f"{text}{answer} {answer}\n{text}", asked)
    assert without_answer(found, asked) == found
