from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from tests.conftest import seed_of
from vrlt_fast.data.clips import plan_clips
from vrlt_fast.data.footage import HELDOUT, TRAIN, find_footage
from vrlt_fast.data.questions import ask
from vrlt_fast.data.sample import LETTERS

SEED = seed_of("test_questions")
TASKS = ("videoqa", "grounding", "grounded_qa")


@pytest.fixture(scope="module")
def plans():
    print(f"seed {SEED}")
    footage = find_footage()
    return {split: plan_clips(split, count, footage, SEED) for split, count in ((TRAIN, 900), (HELDOUT, 200))}


@pytest.fixture(scope="module")
def samples(plans):
    return {split: ask(clips, find_footage(), SEED) for split, clips in plans.items()}


def right(sample):
    return sample.options[LETTERS.index(sample.answer)]


def test_events_lie_on_half_seconds_and_keep_apart(plans):
    for clip in plans[TRAIN] + plans[HELDOUT]:
        assert 6 <= clip.duration <= 10
        assert (2 * clip.duration).is_integer()
        for event in clip.events:
            assert (2 * event.start).is_integer()
            assert 1.5 <= event.end - event.start <= 4.5
            assert 0 <= event.start < event.end <= clip.duration
        if len(clip.events) == 2:
            first, second = clip.events
            assert second.start - first.end >= 0.5
            assert first.kind != second.kind


def test_background_never_shows_the_footage_of_an_insert(plans):
    for clip in plans[TRAIN] + plans[HELDOUT]:
        for event in clip.events:
            if event.kind == "insert":
                assert {shot.source for shot in clip.inserts} == {event.source}
                assert len({shot.source for shot in clip.shots} | {event.source}) == 2


def test_enough_questions_of_every_task(samples):
    counts = {split: Counter(sample.task for sample in some) for split, some in samples.items()}
    assert min(counts[HELDOUT][task] for task in TASKS) >= 100
    assert len(samples[HELDOUT]) >= 450
    assert min(counts[TRAIN][task] for task in TASKS) >= 500
    assert len({sample.id for some in samples.values() for sample in some}) == sum(map(len, samples.values()))


def test_every_answer_of_a_question_is_equally_often_right(samples):
    by_type = defaultdict(Counter)
    letters = defaultdict(Counter)
    for sample in samples[TRAIN]:
        if sample.wants_answer:
            by_type[sample.task, sample.question][right(sample)] += 1
            letters[sample.task, len(sample.options)][sample.answer] += 1
    assert len(by_type) == 10
    for question, counts in by_type.items():
        mean = sum(counts.values()) / len(counts)
        if "What happens" in question[1]:
            assert set(counts.values()) == {mean}
        elif "footage" not in question[1]:  # drawn, not dealt: a dozen or two
            assert all(0.6 * mean - 2 <= count <= 1.4 * mean + 2 for count in counts.values()), (question, counts)
    for (_, options), counts in letters.items():
        mean = sum(counts.values()) / len(counts)
        if options == 4:  # three are those about footage
            assert all(0.7 * mean - 2 <= count <= 1.3 * mean + 2 for count in counts.values()), counts


def test_text_alone_does_not_answer(samples):
    """The options that were right most often in training, picked by question, are near chance on held-out clips."""
    shown, won = Counter(), Counter()
    for sample in samples[TRAIN]:
        if sample.wants_answer:
            shown.update((sample.question, option) for option in sample.options)
            won[sample.question, right(sample)] += 1
    asked = [sample for sample in samples[HELDOUT] if sample.wants_answer]
    hits = [max(s.options, key=lambda o, q=s.question: won[q, o] / max(1, shown[q, o])) == right(s) for s in asked]
    chance = sum(1 / len(sample.options) for sample in asked) / len(asked)
    assert sum(hits) / len(asked) < chance + 0.12


def test_spans_name_the_event_that_is_asked_for(plans, samples):
    events = {clip.id: clip.events for clip in plans[TRAIN]}
    for sample in samples[TRAIN]:
        spans = [(event.start, event.end) for event in events[sample.id.rpartition("-")[0]]]
        assert all(span in spans for span in sample.spans)
        assert len(sample.spans) == (0 if sample.task == "videoqa" else 1)
        if sample.task == "grounding":
            (start, end), middle = sample.spans[0], sample.duration * 8 // 2 / 8
            assert sample.progress == pytest.approx(min(1, max(0, (middle - start) / (end - start))), abs=1e-4)
        assert bool(sample.boxes) == (sample.object_id is not None)
