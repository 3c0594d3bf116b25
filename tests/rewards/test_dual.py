from __future__ import annotations

import time

import pytest

from vrlt_fast.config import PromptConfig
from vrlt_fast.config_rl import RewardConfig
from vrlt_fast.data.grammars.named import GRAMMARS
from vrlt_fast.data.sample import TASKS, Box, Sample
from vrlt_fast.errors import ConfigError
from vrlt_fast.rewards.base import Response, total
from vrlt_fast.rewards.dual import PARTS, make_reward, weights

QA = Sample("q", "v.mp4", 8.0, "videoqa", "What?", options=("a", "b", "c"), answer="B")
SEVERAL = Sample("s", "v.mp4", 8.0, "videoqa", "Which?", options=("a", "b", "c", "d"), answer="A,C")
TVG = Sample("g", "v.mp4", 8.0, "grounding", "When?", spans=((2.0, 4.0),))
GQA = Sample(
    "b", "v.mp4", 8.0, "grounded_qa", "What, when?", options=("a", "b"), answer="A", spans=((1.0, 2.0), (4.0, 5.0))
)
NUMBER = Sample("n", "v.mp4", 8.0, "number", "How many?", answer="3")
REGRESSION = Sample("r", "v.mp4", 8.0, "regression", "How far?", answer="10")
OCR = Sample("o", "v.mp4", 8.0, "ocr", "Read it.", answer="EXIT ON LEFT SIDE")
OPEN = Sample("w", "v.mp4", 8.0, "open", "What happens?", answer="a dog")
BOXES = Sample("x", "v.mp4", 8.0, "boxes", "Where?", boxes=(Box(1.0, 0, 0, 1, 1), Box(2.0, 0, 0, 0.5, 1)))
INSTANCE = Sample("i", "v.mp4", 8.0, "instance", "Which?", object_id=3, spans=((2.0, 4.0),))
PROGRESS = Sample("p", "v.mp4", 8.0, "progress", "How far along?", progress=0.5)
ALL = (QA, TVG, GQA, NUMBER, REGRESSION, OCR, OPEN, BOXES, INSTANCE, PROGRESS)


def earn(text, sample, *, think=False, reason="stop", grammar="plain", **reward):
    score = make_reward(RewardConfig(**reward), PromptConfig(think=think, grammar=grammar), tasks=[sample.task])
    return score(Response(text, len(text), reason), sample)


@pytest.mark.parametrize(
    ("text", "sample", "expected"),
    [
        ("<answer>B</answer>", QA, {"semantic": 1, "format": 1}),
        ("<answer>A</answer>", QA, {"semantic": 0, "format": 1}),
        ("<answer>D</answer>", QA, {"semantic": 0, "format": 0}),
        ("<answer>(B) b</answer>", QA, {"semantic": 1, "format": 0}),
        ("<answer>B dog</answer>", QA, {"semantic": 0, "format": 0}),
        ("<answer>Bob</answer>", QA, {"semantic": 0, "format": 0}),
        ("<answer>b</answer>", QA, {"semantic": 0, "format": 0}),
        ("B", QA, {"semantic": 0, "format": 0}),
        ("", QA, {"semantic": 0, "format": 0}),
        ("<answer>A</answer><answer>B</answer>", QA, {"semantic": 1, "format": 0}),
        ("<answer><answer>B</answer></answer>", QA, {"semantic": 1, "format": 0}),
        ("<answer>B</answer> done", QA, {"semantic": 1, "format": 0}),
        ("<answer>B</answer><|im_start|>", QA, {"semantic": 1, "format": 0}),
        ("<answer>A,C</answer>", SEVERAL, {"semantic": 1, "format": 1}),
        ("<answer>A</answer>", SEVERAL, {"semantic": 0, "format": 1}),
        ("<answer>2.0 to 4.0</answer>", TVG, {"temporal": 1, "format": 1}),
        ("<answer>2 to 4</answer>", TVG, {"temporal": 1, "format": 1}),
        ("<answer>3.0 to 5.0</answer>", TVG, {"temporal": 1 / 3, "format": 1}),
        ("<answer>4.0 to 2.0</answer>", TVG, {"temporal": 0, "format": 0}),
        ("<answer>2.0 to 2.0</answer>", TVG, {"temporal": 0, "format": 0}),
        ("<answer>from 2.0 to 4.0 s</answer>", TVG, {"temporal": 1, "format": 0}),
        ("<answer>2.0</answer>", TVG, {"temporal": 0, "format": 0}),
        ("<answer>nan to inf</answer>", TVG, {"temporal": 0, "format": 0}),
        ("<answer>\u0662.0 to \u0664.0</answer>", TVG, {"temporal": 0, "format": 0}),
        ("<answer>-2.0 to 4.0</answer>", TVG, {"temporal": 1, "format": 0}),
        ("<answer>A</answer><glue>[(1.0, 2.0), (4.0, 5.0)]</glue>", GQA, {"semantic": 1, "temporal": 1, "format": 1}),
        ("<answer>A</answer><glue>[(1.0, 2.0)]</glue>", GQA, {"semantic": 1, "temporal": 0.5, "format": 1}),
        ("<answer>B</answer><glue>[(1, 2), (2, 3)]</glue>", GQA, {"semantic": 0, "temporal": 1 / 3, "format": 1}),
        ("<answer>A</answer><glue>[]</glue>", GQA, {"semantic": 1, "temporal": 0, "format": 0}),
        ("<answer>A</answer><glue>[(2.0, 1.0)]</glue>", GQA, {"semantic": 1, "temporal": 0, "format": 0}),
        ("<glue>[(1.0, 2.0)]</glue><answer>A</answer>", GQA, {"semantic": 1, "temporal": 0.5, "format": 0}),
        ("<answer>3</answer>", NUMBER, {"semantic": 1, "format": 1}),
        ("<answer>4</answer>", NUMBER, {"semantic": 0, "format": 1}),
        ("<answer>3.0</answer>", NUMBER, {"semantic": 0, "format": 1}),
        ("<answer>3 dogs</answer>", NUMBER, {"semantic": 1, "format": 0}),
        ("3", NUMBER, {"semantic": 0, "format": 0}),
        ("<answer>9</answer>", REGRESSION, {"semantic": 0.9, "format": 1}),
        ("<answer>nan</answer>", REGRESSION, {"semantic": 0, "format": 0}),
        ("<answer>EXIT ON LEFT</answer>", OCR, {"semantic": 0.75, "format": 1}),
        ("<answer></answer>", OCR, {"semantic": 0, "format": 0}),
        ("<answer>a cat</answer>", OPEN, {"semantic": 1 / 3, "format": 1}),
        ("<answer>[(0, 0, 1, 1), (0, 0, 1, 1)]</answer>", BOXES, {"spatial": 0.75, "format": 1}),
        ("<answer>[(0, 0, 1, 1)]</answer>", BOXES, {"spatial": 0, "format": 0}),
        ("<answer>3, 3.0 to 5.0</answer>", INSTANCE, {"instance": 1, "temporal": 1 / 3, "format": 1}),
        ("<answer>2, 2.0 to 4.0</answer>", INSTANCE, {"instance": 0, "temporal": 1, "format": 1}),
        ("<answer>3</answer>", INSTANCE, {"instance": 0, "temporal": 0, "format": 0}),
        ("<answer>2.0 to 4.0</answer>", INSTANCE, {"instance": 0, "temporal": 0, "format": 0}),
        ("<answer>40%</answer>", PROGRESS, {"progress": 0.9, "format": 1}),
        ("<answer>140%</answer>", PROGRESS, {"progress": 0, "format": 0}),
    ],
)
def test_parts_by_hand(text, sample, expected):
    assert earn(text, sample) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '<think>x</think>\n<answer>{"start_time": "3.0", "end_time": "5.0"}</answer>',
            {"temporal": 1 / 3, "format": 1},
        ),
        ('<think>x</think><answer>{"start_time": 3.0, "end_time": 5.0}</answer>', {"temporal": 1 / 3, "format": 0}),
        ('<think>x</think><answer>{"start_time": "5", "end_time": "3"}</answer>', {"temporal": 0, "format": 1}),
        ('<think>x</think><answer>{"start_time": "3", "end_time": "5"}</answer>\n', {"temporal": 1 / 3, "format": 0}),
        ("<think>x</think><answer>3.0 to 5.0</answer>", {"temporal": 0, "format": 0}),
    ],
)
def test_another_grammar_is_read(text, expected):
    assert earn(text, TVG, think=True, grammar="temporal_r1", overlap="hull") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        ("tiou", 2 / 6),
        ("merged", 2 / 6),
        ("hull", 2 / 4),
        ("boundary", 2 / 4 * (1 - 1 / 8) * (1 - 1 / 8)),
        ("iop", 2 / 6),
    ],
)
def test_kinds_of_overlap(overlap, expected):
    """One span of a video of 8 s is annotated, two of twice its length are predicted."""
    sample = Sample("b", "v.mp4", 8.0, "grounded_qa", "?", options=("a", "b"), answer="A", spans=((1.0, 3.0),))
    text = "<answer>A</answer><glue>[(0.0, 4.0), (5.0, 7.0)]</glue>"
    assert earn(text, sample, overlap=overlap)["temporal"] == pytest.approx(expected)
    assert earn("<answer>A</answer>", sample, overlap=overlap)["temporal"] == 0
    backwards = earn("<answer>A</answer><glue>[(0.0, 4.0), (7.0, 5.0)]</glue>", sample, overlap=overlap)["temporal"]
    assert (backwards > 0) is (overlap != "merged")


def test_part_of_the_right_letters_counts_in_part():
    assert earn("<answer>A</answer>", SEVERAL, choice="soft")["semantic"] == 0.5
    assert earn("<answer>A,B</answer>", SEVERAL, choice="soft")["semantic"] == 0


def test_numbers_in_boxes_are_compared_by_value():
    assert earn(r"\boxed{3.0}", NUMBER, grammar="boxed") == {"semantic": 1, "format": 1}
    assert earn("<answer>3.0</answer>", NUMBER, grammar="video_r1")["semantic"] == 0


def test_what_is_given_scores_answers_in_own_words():
    seen = []

    def grade(answer, sample):
        seen.append((answer, sample.answer))
        return 0.25

    reward = make_reward(RewardConfig(open="judge"), PromptConfig(think=False), open_answer=grade)
    assert reward(Response("<answer>a cat</answer>", 3, "stop"), OPEN) == {"semantic": 0.25, "format": 1}
    assert reward(Response("a cat", 3, "stop"), OPEN) == {"semantic": 0, "format": 0}
    assert seen == [("a cat", "a dog")]
    with pytest.raises(ConfigError, match="VRLT-C04"):
        make_reward(RewardConfig(open="scorer"), PromptConfig())
    make_reward(RewardConfig(open="scorer"), PromptConfig(), tasks=["videoqa"])


def test_thinking_is_part_of_the_form():
    assert earn("<think>red</think>\n<answer>B</answer>", QA, think=True)["format"] == 1
    assert earn("<answer>B</answer>", QA, think=True)["format"] == 0
    assert earn("<think>a<think>b</think></think><answer>B</answer>", QA, think=True)["format"] == 0
    assert earn("<think>red</think><answer>B</answer>", QA)["format"] == 0


def test_a_truncated_response_is_not_well_formed():
    assert earn("<answer>B</answer>", QA, reason="length") == {"semantic": 1, "format": 0}


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("think", [False, True])
def test_what_the_warm_up_writes_earns_everything(name, think):
    grammar = GRAMMARS[name]
    reward = make_reward(RewardConfig(), PromptConfig(grammar=name, think=think))
    for sample in ALL:
        if sample.task in grammar.asks:
            text = grammar.write(sample, think=think)
            parts = reward(Response(text, len(text), "stop"), sample)
            assert parts == pytest.approx(dict.fromkeys(parts, 1.0)), (sample.task, text)
            assert len(parts) >= 2


def test_every_part_has_a_weight():
    reward = RewardConfig(semantic=2.0, overlong=0.5, user=("mine:one", "mine:two"), user_weights=(0.25, 3.0))
    found = weights(reward)
    assert found == {
        "semantic": 2.0, "temporal": 1.0, "spatial": 1.0, "instance": 1.0, "progress": 1.0, "format": 0.5,
        "length": 0.0, "overlong": 0.5, "shuffled": 0.0, "user:mine:one": 0.25, "user:mine:two": 3.0,
    }  # fmt: skip
    assert weights(RewardConfig(user=("mine:one",)))["user:mine:one"] == 1.0
    given = {part for sample in ALL for part in earn("", sample)}
    assert given == {*PARTS} - {"length", "overlong", "shuffled"}
    assert {sample.task for sample in ALL} == {*TASKS}


@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * 125_000,
        "<think>" * 140_000 + "</think>",
        "<answer>A</answer><glue>[" + "(1, 2), " * 120_000,
        "1" * 1_000_000 + " to ",
        "<think>" + "<" * 1_000_000 + "</think><answer>B</answer>",
        " " * 1_000_000,
        "<answer>" + "a b " * 4_900 + "</answer>",
    ],
)
@pytest.mark.parametrize("grammar", ["plain", "temporal_r1", "videochat_r1"])
def test_no_text_takes_long(text, grammar):
    reward = make_reward(RewardConfig(), PromptConfig(grammar=grammar))
    for sample in ALL:
        if sample.task in GRAMMARS[grammar].asks:
            for cut in (len(text), 19_999):
                begin = time.process_time()
                reward(Response(text[:cut], 100, "stop"), sample)
                assert time.process_time() - begin < 0.25


def test_total_refuses_an_unknown_part():
    assert total({"semantic": 1.0, "format": 0.5}, {"semantic": 2.0, "format": 1.0}) == 2.5
    with pytest.raises(KeyError):
        total({"other": 1.0}, {"semantic": 2.0})
