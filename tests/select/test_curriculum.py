"""Schedules by hand and what holds for all of them; partial annotations found by an answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrlt_fast.config import PromptConfig
from vrlt_fast.data.grammars.named import GRAMMARS
from vrlt_fast.data.prompts import user_text
from vrlt_fast.data.sample import SPAN_TASKS, TASKS, Instance, Sample
from vrlt_fast.select.curriculum import find_partial, frames_at, is_partial, masked_share, reflection_prompt


@pytest.mark.parametrize(
    ("step", "difficulty", "start", "steps", "expected"),
    [
        (1, 1.0, 0.8, 400, 0.8),
        (1, None, 0.8, 400, 0.8),
        (1, 0.0, 0.8, 400, 0.0),
        (1, 0.5, 0.8, 400, 0.4),
        (201, 1.0, 0.8, 400, 0.4),
        (201, 0.25, 0.8, 400, 0.1),
        (101, None, 1.0, 400, 0.75),
        (400, 1.0, 1.0, 400, 1 / 400),
        (401, 1.0, 1.0, 400, 0.0),
        (9999, 1.0, 1.0, 400, 0.0),
        (1, 1.0, 1.0, 0, 0.0),
        (1, 1.0, 0.0, 400, 0.0),
        (1, 1.0, 0.6, 1, 0.6),
        (2, 1.0, 0.6, 1, 0.0),
        (1, 1.7, 0.6, 10, 0.6),
        (1, -0.3, 0.6, 10, 0.0),
    ],
)
def test_masked_share(step, difficulty, start, steps, expected):
    assert masked_share(step, difficulty=difficulty, start=start, steps=steps) == pytest.approx(expected)


@given(st.integers(1, 300), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 200))
def test_masks_shrink_with_steps_and_ease(step, one, two, start, steps):
    easy, hard = sorted((one, two))
    now = masked_share(step, difficulty=hard, start=start, steps=steps)
    assert 0.0 <= masked_share(step + 1, difficulty=hard, start=start, steps=steps) <= now <= start
    assert masked_share(step, difficulty=easy, start=start, steps=steps) <= now


@pytest.mark.parametrize(
    ("step", "first", "last", "steps", "by", "expected"),
    [
        (1, 80, 280, 200, 20, 80),
        (20, 80, 280, 200, 20, 80),
        (21, 80, 280, 200, 20, 100),
        (101, 80, 280, 200, 20, 180),
        (200, 80, 280, 200, 20, 260),
        (201, 80, 280, 200, 20, 280),
        (5000, 80, 280, 200, 20, 280),
        (1, 16, 64, 0, 8, 64),
        (1, 64, 64, 100, 8, 64),
        (1, 8, 15, 4, 4, 8),
        (2, 8, 15, 4, 4, 8),
        (3, 8, 15, 4, 4, 12),
        (5, 8, 15, 4, 4, 15),
        (3, 8, 100, 2, 50, 100),
        (2, 8, 100, 2, 50, 58),
    ],
)
def test_frames(step, first, last, steps, by, expected):
    assert frames_at(step, first=first, last=last, steps=steps, by=by) == expected


@given(st.integers(2, 300), st.integers(0, 300), st.integers(0, 100), st.integers(1, 90))
def test_frames_climb_from_first_to_last(first, more, steps, by):
    found = [frames_at(step, first=first, last=first + more, steps=steps, by=by) for step in range(1, steps + 3)]
    assert found == sorted(found)
    assert found[-1] == found[-2] == first + more
    assert steps == 0 or found[0] == first
    assert all((value - first) % by == 0 or value == first + more for value in found)


@pytest.mark.parametrize(("first", "last", "by"), [(1, 8, 2), (8, 4, 2), (8, 16, 0)])
def test_frames_refuse_no_way(first, last, by):
    with pytest.raises(ValueError, match="no way"):
        frames_at(1, first=first, last=last, steps=10, by=by)


@pytest.mark.parametrize(
    ("predicted", "annotated", "expected"),
    [
        ([], [(2, 5)], False),
        ([(2, 5)], [(2, 5)], False),
        ([(10, 14)], [(2, 5)], True),
        ([(2, 5), (10, 14)], [(2, 5)], True),
        ([(1, 6)], [(2, 5)], False),  # 2 of 5 seconds outside
        ([(2, 8)], [(2, 5)], True),  # half of it outside
        ([(2, 7.9)], [(2, 5)], False),
        ([(10, 10.9)], [(2, 5)], False),  # too short
        ([(10, 11)], [(2, 5)], True),
        ([(14, 10)], [(2, 5)], False),
        ([(10, 14)], [(2, 5), (9, 15)], False),
        ([(10, 14)], [(2, 5), (10, 11)], True),
        ([(10, 10.6), (10.5, 11.2)], [(2, 5)], True),  # one, once merged
        ([(19.5, 40)], [(2, 5)], False),  # half a second of it is in the video
        ([(18, 40)], [(2, 5)], True),
        ([(30, 40)], [(2, 5)], False),
        ([(-9, 1.5)], [(2, 5)], True),
        ([(float("nan"), 12), (4, float("inf"))], [(2, 5)], True),  # to the end of the video
    ],
)
def test_partial_in_a_video_of_20_seconds(predicted, annotated, expected):
    assert is_partial(predicted, annotated, 20.0) is expected


def test_partial_by_other_thresholds():
    assert is_partial([(1, 6)], [(2, 5)], 20.0, outside=0.4)
    assert not is_partial([(1, 6)], [(2, 5)], 20.0, outside=0.4, seconds=2.5)
    assert is_partial([(10, 10.5)], [(2, 5)], 20.0, seconds=0.5)


SPANS = st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20)), max_size=4)


@given(SPANS, SPANS)
def test_what_lies_inside_is_never_partial(inside, annotated):
    predicted = [(max(s, x), min(e, y)) for s, e in inside for x, y in annotated]
    assert not is_partial(predicted, annotated, 20.0)


def sample(task: str = "grounding", **more: object) -> Sample:
    given = {"id": "a", "video": "v.mp4", "duration": 20.0, "task": task, "question": "When is it dark?"}
    return Sample(**{**given, "spans": ((2.0, 5.25),), **more})


def test_find_partial():
    samples = [sample(id=name) for name in "dcba"]
    answers = {"a": [(10.0, 15.0)], "b": [(2.0, 5.0)], "d": [(2.0, 5.0), (16.0, 19.0)], "x": [(1.0, 19.0)]}
    assert find_partial(answers, samples) == ["d", "a"]
    assert find_partial(answers, samples, seconds=4.0) == ["a"]
    assert find_partial({}, samples) == []


def test_reflection_prompt():
    original = sample("grounded_qa", options=("red", "blue"), answer="B", question="Which one, and when?")
    asked = reflection_prompt(original)
    assert (asked.id, asked.task, asked.options, asked.answer) == ("a-reflect", "grounding", (), "")
    assert (asked.video, asked.duration, asked.spans) == ("v.mp4", 20.0, ((2.0, 5.25),))
    seen = {"images": ("i.png",), "instances": (Instance(3, ()),)}
    again = reflection_prompt(sample(**seen))
    assert (again.images, again.instances) == tuple(seen.values())
    assert '"Which one, and when?" (answer: blue)' in asked.question
    assert "2.0 to 5.2" in asked.question
    assert "outside" in asked.question
    several = reflection_prompt(sample(spans=((2.0, 5.0), (7.0, 9.0))))
    assert "2.0 to 5.0, 7.0 to 9.0" in several.question
    assert "answer:" not in several.question


@pytest.mark.parametrize("task", SPAN_TASKS)
@pytest.mark.parametrize("name", [name for name, g in GRAMMARS.items() if "grounding" in g.asks])
def test_reflection_prompts_can_be_asked_and_answered(task, name):
    """With every grammar for spans; repeating what is known, as the prompt says, is no further time."""
    options = {"options": ("red", "blue"), "answer": "A"} if task == "grounded_qa" else {}
    original = sample(task, object_id=3 if task == "instance" else None, **options)
    asked = reflection_prompt(original)
    prompt = PromptConfig(grammar=name, think=False)
    assert asked.question in user_text(asked, prompt)
    same = GRAMMARS[name].read(GRAMMARS[name].write(asked, think=False), asked, think=False)
    assert find_partial({original.id: same.spans or ()}, [original]) == []
    further = GRAMMARS[name].write(sample(spans=((11.0, 15.0),)), think=False)
    read = GRAMMARS[name].read(further, asked, think=False)
    assert find_partial({original.id: read.spans or ()}, [original]) == [original.id]


@pytest.mark.parametrize("task", [task for task in TASKS if task not in SPAN_TASKS])
def test_reflection_needs_spans(task):
    with pytest.raises(ValueError, match="no annotated spans"):
        reflection_prompt(sample(task, spans=()))
