"""Questions turned round and options shuffled: hand-made cases, and what holds for every sample."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrlt_fast.data.invert import inverted, negated, prepared
from vrlt_fast.data.options import reordered, shuffled_options
from vrlt_fast.data.sample import LETTERS, Sample


def sample(options: tuple[str, ...] = ("pear", "plum", "fig"), answer: str = "B", **more: object) -> Sample:
    given = {"id": "q", "video": "v.mp4", "duration": 9.0, "task": "videoqa", "question": "What does he eat?"}
    return Sample(**{**given, "options": options, "answer": answer, **more})


def right(one: Sample) -> set[str]:
    return {one.options[LETTERS.index(letter)] for letter in one.answer.split(",")}


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What did the boy do?", "What didn't the boy do?"),
        ("why does the dog bark", "why doesn't the dog bark"),
        ("How do they cross the river?", "How don't they cross the river?"),
        ("What is in the box?", "What isn't in the box?"),
        ("Which colours are shown?", "Which colours aren't shown?"),
        ("Who was last?", "Who wasn't last?"),
        ("Where were the keys?", "Where weren't the keys?"),
        ("What can be seen?", "What can't be seen?"),
        ("What could happen next?", "What couldn't happen next?"),
        ("What will she do?", "What won't she do?"),
        ("What would break?", "What wouldn't break?"),
        ("Which step should follow?", "Which step shouldn't follow?"),
        ("Is the door open?", "Isn't the door open?"),
        ("What's on the table?", "What isn't on the table?"),
        ("Who\u2019s singing?", "Who isn't singing?"),
        ("At the end, what DOES it show, and is it red?", "At the end, what Doesn't it show, and is it red?"),
        ("Whose island is it?", "Whose island isn't it?"),
        ("The boy's dog: what does it want?", "The boy's dog: what doesn't it want?"),
        ("What happens first?", None),
        ("What didn't he do?", None),
        ("What is not in the box?", None),
        ("What does he never do?", None),
        ("What can\u2019t he do?", None),
        ("Disdain, doer, areas", None),
        ("", None),
    ],
)
def test_negation(question: str, expected: str | None):
    assert negated(question) == expected


def test_what_was_wrong_is_right():
    seen = set()
    for seed in range(200):
        made = inverted(sample(), seed)
        assert made is not None
        assert (made.id, made.question) == ("q-not", "What doesn't he eat?")
        assert "plum" in made.options
        assert right(made) == set(made.options) - {"plum"} != set()
        seen.add((made.options, made.answer))
    assert seen >= {
        (("plum", "pear"), "B"), (("pear", "plum"), "A"), (("plum", "fig"), "B"), (("fig", "plum"), "A"),
        (("pear", "plum", "fig"), "A,C"), (("plum", "fig", "pear"), "B,C"), (("fig", "pear", "plum"), "A,B"),
    }  # fmt: skip
    assert len(seen) == 4 + 6


def test_several_right_options_are_all_wrong_afterwards():
    for seed in range(50):
        made = inverted(sample(("a", "b", "c", "d"), "A,D"), seed)
        assert made is not None
        assert {"a", "d"} <= set(made.options)
        assert right(made) == set(made.options) - {"a", "d"}


@pytest.mark.parametrize(
    "one",
    [
        sample(question="What happens first?"),
        sample(("pear",), "A"),
        sample(("pear", "plum"), "A,B"),
        sample((), "3", task="number"),
        sample((), "", task="grounding", spans=((1.0, 2.0),)),
        sample(task="grounded_qa", spans=((1.0, 2.0),)),
    ],
)
def test_what_cannot_be_inverted(one: Sample):
    assert inverted(one, 0) is None
    assert prepared([one], shuffle_options=False, invert=1.0, seed=0) == [one]


def test_inversion_keeps_the_rest_and_drops_the_reasoning():
    one = sample(reasoning="He takes the plum.", source="orchard", images=("i.png",), difficulty=0.5, line="t.jsonl:3")
    made = inverted(one, 1)
    assert made is not None
    same = replace(
        made, id=one.id, question=one.question, options=one.options, answer=one.answer, reasoning=one.reasoning
    )
    assert (made.reasoning, same) == ("", one)


SAMPLES = st.builds(
    lambda name, options, letters: sample(
        tuple(options), ",".join(sorted(LETTERS[i % len(options)] for i in letters)), id=name
    ),
    st.text(min_size=1, max_size=8),
    st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=8, unique=True),
    st.integers(0, 7).map(lambda i: {i}),
)


@given(SAMPLES, st.integers(0, 2**31))
def test_shuffling_moves_the_answer_with_its_option(one: Sample, seed: int):
    made = shuffled_options(one, seed)
    assert sorted(made.options) == sorted(one.options)
    assert right(made) == right(one)
    assert made == shuffled_options(one, seed)
    assert replace(made, options=one.options, answer=one.answer) == one


@given(SAMPLES, st.integers(0, 2**31))
def test_inversion_swaps_right_and_wrong(one: Sample, seed: int):
    made = inverted(one, seed)
    assert made is not None
    assert made == inverted(one, seed)
    assert right(one) <= set(made.options) <= set(one.options)
    assert right(made) == set(made.options) - right(one) != set()
    assert made.answer.split(",") == sorted(made.answer.split(","))


def test_several_letters_move_together():
    made = reordered(sample(("a", "b", "c", "d"), "A,C"), (3, 2, 1, 0))
    assert (made.options, made.answer) == (("d", "c", "b", "a"), "B,D")


def test_shuffling_is_fair_and_depends_on_seed_and_id():
    ids = Counter(shuffled_options(sample(id=f"q{i}"), 0).options for i in range(1200))
    seeds = Counter(shuffled_options(sample(), seed).options for seed in range(1200))
    for counts in (ids, seeds):
        assert len(counts) == 6
        assert 140 < min(counts.values()) <= max(counts.values()) < 260


def test_samples_without_options_are_not_shuffled():
    one = sample((), "3", task="number")
    assert shuffled_options(one, 5) is one


def test_prepared_inverts_a_share():
    many = [sample(id=f"q{i}") for i in range(1000)]
    made = prepared(many, shuffle_options=False, invert=0.3, seed=7)
    turned = [one for one in made if one.id.endswith("-not")]
    assert 240 < len(turned) < 360
    assert all(one in many for one in made if one not in turned)
    assert made == prepared(many, shuffle_options=False, invert=0.3, seed=7)
    assert [one.id for one in made] != [one.id for one in prepared(many, shuffle_options=False, invert=0.3, seed=8)]
    # what becomes of a sample doesn't depend on the others
    assert made[500:] == prepared(many[500:], shuffle_options=False, invert=0.3, seed=7)


def test_prepared_at_its_ends():
    many = [sample(id=f"q{i}") for i in range(50)]
    assert prepared(many, shuffle_options=False, invert=0.0, seed=1) == many
    assert all(one.id.endswith("-not") for one in prepared(many, shuffle_options=True, invert=1.0, seed=1))
    assert prepared(many, shuffle_options=True, invert=0.0, seed=1) == [shuffled_options(one, 1) for one in many]
    assert prepared([], shuffle_options=True, invert=0.5, seed=1) == []
