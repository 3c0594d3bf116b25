"""Questions of the further tasks: true by the plan, not to be answered by their text, readable as they are written."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from vrlt_fast.config import PromptConfig
from vrlt_fast.data.clips import FPS, HEIGHT, WIDTH, plan_clips
from vrlt_fast.data.footage import HELDOUT, TRAIN, find_footage
from vrlt_fast.data.grammars.named import grammar
from vrlt_fast.data.more_questions import ask_more
from vrlt_fast.data.prompts import answer_text
from vrlt_fast.data.questions import HAPPENS, ask
from vrlt_fast.data.readers import read_jsonl, write_jsonl
from vrlt_fast.data.sample import LETTERS, TASKS

TYPES = ("boxes", "instance", "progress", "number", "regression", "open", "several", "picture")
FOOTAGE = find_footage()


@pytest.fixture(scope="module")
def plans(session_seed):
    print(f"VRLT_TEST_SEED={session_seed}")
    return {split: plan_clips(split, count, FOOTAGE, session_seed) for split, count in ((TRAIN, 600), (HELDOUT, 200))}


@pytest.fixture(scope="module")
def samples(plans, session_seed):
    return {split: ask_more(clips, FOOTAGE, session_seed) for split, clips in plans.items()}


@pytest.fixture(scope="module")
def by_type(samples):
    found = defaultdict(list)
    for sample in samples[TRAIN]:
        found[sample.id.rpartition("-")[2]].append(sample)
    return found


@pytest.fixture(scope="module")
def clips(plans):
    return {clip.id: clip for some in plans.values() for clip in some}


def of(sample, clips):
    return clips[sample.id.rpartition("-")[0]]


def pasted(sample, clips):
    return next(event for event in of(sample, clips).events if event.kind == "object")


def asked_about(sample, clips):
    """The event that a question names: the one whose words are in it, else the only one."""
    marks = {
        "object": "{0.colour} {0.shape}", "tint": "tinted {0.tone}", "dark": "dark", "negative": "inverted",
        "grey": "black and white", "zoom": "enlarged", "freeze": "still", "reverse": "backwards",
    }  # fmt: skip
    found = [
        event
        for event in of(sample, clips).events
        if (marks[event.kind].format(event) if event.kind in marks else FOOTAGE[event.source].words)
        in sample.question + sample.answer
    ]
    assert len(found) == 1, sample
    return found[0]


def frame_of(image):
    clip, frame = re.fullmatch(r"images/(\w+-\d+)-f(\d{3})\.png", image).groups()
    return clip, int(frame)


def test_there_are_enough_of_every_task_and_the_ids_are_new(samples, plans, session_seed):
    ids = []
    for split, some in samples.items():
        counts = Counter(sample.id.rpartition("-")[2] for sample in some)
        assert set(counts) == set(TYPES)
        assert min(counts.values()) >= 0.25 * len(plans[split])
        first = ask(plans[split], FOOTAGE, session_seed)
        ids += [sample.id for sample in first + some]
        assert {sample.task for sample in first + some} == set(TASKS) - {"ocr"}
        places = [int(sample.id.split("-")[1]) for sample in some]
        assert places == sorted(places)
    assert len(ids) == len(set(ids))


def test_a_dozen_clips_have_every_task():
    for split, count in ((TRAIN, 12), (HELDOUT, 6)):
        some = ask_more(plan_clips(split, count, FOOTAGE, 3), FOOTAGE, 3)
        assert {sample.id.rpartition("-")[2] for sample in some} == set(TYPES)
    assert ask_more([], FOOTAGE, 3) == []


def test_the_seed_fixes_them(plans, samples, session_seed):
    assert ask_more(plans[HELDOUT], FOOTAGE, session_seed) == samples[HELDOUT]
    other = ask_more(plans[HELDOUT], FOOTAGE, session_seed + 1)
    assert [sample.object_id for sample in other] != [sample.object_id for sample in samples[HELDOUT]]


def test_they_are_read_as_they_were_written(samples, tmp_path):
    for split, some in samples.items():
        write_jsonl(some, tmp_path / f"{split}.jsonl")
        assert [replace(s, line="") for s in read_jsonl(tmp_path / f"{split}.jsonl", check_files=False)] == some


@pytest.mark.parametrize("think", [False, True])
def test_the_right_reply_is_well_formed_and_says_the_truth(samples, think):
    prompt = PromptConfig(grammar="plain", think=think)
    for sample in samples[HELDOUT]:
        parsed = grammar("plain").read(answer_text(sample, prompt), sample, think=think)
        assert parsed.well_formed
        assert parsed.answer == (sample.answer or None)
        assert parsed.object_id == sample.object_id
        assert parsed.progress == sample.progress
        assert parsed.spans == (sample.spans or None)
        assert len(parsed.boxes or ()) == len(sample.boxes)
        for said, true in zip(parsed.boxes or (), sample.boxes, strict=True):
            assert (said.x0, said.y0, said.x1, said.y1) == pytest.approx((true.x0, true.y0, true.x1, true.y1), abs=1e-3)


def where(event, time):
    (x, y), r = event.centre(round(time * FPS)), event.radius
    return (x - r) / WIDTH, (y - r) / HEIGHT, (x + r) / WIDTH, (y + r) / HEIGHT


def test_boxes_are_those_of_the_object_at_four_times_at_which_it_is_seen(by_type, clips):
    for sample in by_type["boxes"]:
        event = pasted(sample, clips)
        assert f"the {event.colour} {event.shape}?" in sample.question
        times = [box.time for box in sample.boxes]
        assert len(set(times)) == 4
        assert times == sorted(times)
        for box in sample.boxes:
            assert event.start <= box.time < event.end
            assert (2 * box.time).is_integer()
            assert (box.x0, box.y0, box.x1, box.y1) == pytest.approx(where(event, box.time), abs=1e-5)


def test_one_of_three_numbered_objects_is_the_one_that_moves(by_type, clips):
    numbers = Counter()
    for sample in by_type["instance"]:
        event, clip = pasted(sample, clips), of(sample, clips)
        assert sample.spans == ((event.start, event.end),)
        assert len({one.id for one in sample.instances}) == 3
        for one in sample.instances:
            assert 1 <= one.id <= 9
            frames = [round(box.time * FPS) for box in one.boxes]
            assert frames == list(range(frames[0], frames[-1] + 1))
            assert frames[-1] < clip.frames
            assert len(frames) in (16, 24)
            if one.id == sample.object_id:
                assert (frames[0] / FPS, (frames[-1] + 1) / FPS) == (event.start, event.end)
                for box in one.boxes:
                    assert (box.x0, box.y0, box.x1, box.y1) == pytest.approx(where(event, box.time), abs=1e-5)
            else:
                for box in one.boxes:
                    assert (box.x0, box.y0) == pytest.approx((one.boxes[0].x0, one.boxes[0].y0), abs=2e-5)
                    assert (box.x1, box.y1) == pytest.approx((one.boxes[0].x1, one.boxes[0].y1), abs=2e-5)
        numbers[sample.object_id] += 1
        assert sample.object_id in [one.id for one in sample.instances]
    assert len(numbers) == 9
    assert max(numbers.values()) < 0.22 * sum(numbers.values())


def test_progress_is_the_share_of_the_time_that_is_over(by_type, clips):
    told, shown = Counter(), Counter()
    for sample in by_type["progress"]:
        event = asked_about(sample, clips)
        if sample.images:
            (first, start), (second, now) = map(frame_of, sample.images)
            assert first == second == of(sample, clips).id
            assert start == event.frames[0]
            assert now in event.frames
            moment = now / FPS
            shown[sample.progress] += 1
        else:
            moment = float(re.search(r"at ([\d.]+) seconds", sample.question)[1])
            told[sample.progress] += 1
        assert sample.progress == pytest.approx((moment - event.start) / (event.end - event.start))
    for counts, values in ((told, 11), (shown, 3)):
        assert len(counts) == values
        assert max(counts.values()) - min(counts.values()) <= 1


def test_numbers_follow_from_the_plan(by_type, clips):
    for sample in by_type["number"] + by_type["regression"]:
        clip, question = of(sample, clips), sample.question
        busy = sum(event.end - event.start for event in clip.events)
        if "How many things" in question:
            expected = len(clip.events)
        elif "something happen" in question:
            expected = busy
        elif "nothing happen" in question:
            expected = clip.duration - busy
        else:
            event = asked_about(sample, clips)
            begin = re.match("From|For|Until|At", question)[0]
            length = event.end - event.start
            expected = {"From": event.start, "For": length, "Until": event.end, "At": event.start + length / 2}[begin]
        assert float(sample.answer) == expected
        assert sample.task == "number" or expected > 0


def test_the_most_frequent_number_is_seldom_right(by_type):
    for kind, most in (("number", 0.25), ("regression", 0.18)):
        answers = Counter(sample.answer for sample in by_type[kind])
        assert max(answers.values()) < most * len(by_type[kind])
        questions = defaultdict(Counter)
        for sample in by_type[kind]:
            general = re.match(r"How many|For how many seconds does (?:some|no)|From|Until|At|For", sample.question)[0]
            questions[general][sample.answer] += 1
        for counts in questions.values():
            even = sum(counts.values()) / len(counts)
            assert max(counts.values()) < 1.6 * even + 2


def test_what_happens_at_a_second_is_what_the_plan_has_then(by_type, clips):
    kinds = Counter()
    for sample in by_type["open"]:
        event = asked_about(replace(sample, question=""), clips)
        moment = float(re.search(r"at ([\d.]+) seconds", sample.question)[1])
        assert event.start < moment < event.end
        kinds[event.kind] += 1
    assert max(kinds.values()) <= min(kinds.values()) + 3


def test_several_things_happen_and_the_options_alone_do_not_say_which(by_type, clips):
    shown, right, answers = Counter(), Counter(), Counter()
    for sample in by_type["several"]:
        chosen = {sample.options[LETTERS.index(letter)] for letter in sample.letters}
        assert chosen == {HAPPENS[event.kind] for event in of(sample, clips).events}
        assert len(sample.options) == 4
        shown.update(sample.options)
        right.update(chosen)
        answers[len(chosen), sample.answer] += 1
    assert len(shown) == 9
    shares = [right[option] / shown[option] for option in shown]
    assert max(shares) < min(shares) + 0.15
    assert max(answers.values()) < 0.25 * sum(answers.values())
    assert min(sum(n for (size, _), n in answers.items() if size == k) for k in (1, 2)) > 0.35 * sum(answers.values())


def test_pictures_are_of_the_part_that_the_answer_says(by_type, clips):
    answers = {"belongs": Counter(), "when": Counter()}
    for sample in by_type["picture"]:
        clip = of(sample, clips)
        (image,) = sample.images
        name, frame = frame_of(image)
        said = sample.options[LETTERS.index(sample.answer)]
        if sample.options == ("yes", "no"):
            answers["belongs"][said] += 1
            assert (name == clip.id) == (said == "yes")
            assert frame < clips[name].frames
            if said == "no":
                sources = [{shot.source for shot in (*c.shots, *c.inserts)} for c in (clip, clips[name])]
                assert not sources[0] & sources[1]
        else:
            answers["when"][said] += 1
            event = asked_about(sample, clips)
            place = (frame >= event.frames.start) + (frame >= event.frames.stop)
            assert name == clip.id
            assert sample.options[place] == said
            assert all(one.kind != "reverse" for one in clip.events)
    for counts in answers.values():
        assert max(counts.values()) <= 1.3 * min(counts.values()) + 2
    assert list(map(len, answers.values())) == [2, 3]
