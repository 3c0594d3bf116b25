from __future__ import annotations

import time

import pytest

from vrlt_fast.data.sample import Sample
from vrlt_fast.rewards.base import Response, total
from vrlt_fast.rewards.dual import dual_reward
from vrlt_fast.rewards.text import parse

QA = Sample("q", "v.mp4", 8.0, "videoqa", "What?", options=("a", "b", "c"), answer="B")
TVG = Sample("g", "v.mp4", 8.0, "grounding", "When?", spans=((2.0, 4.0),))
GQA = Sample(
    "b", "v.mp4", 8.0, "grounded_qa", "What, when?", options=("a", "b"), answer="A", spans=((1.0, 2.0), (4.0, 5.0))
)


def earn(text, sample, *, think=False, reason="stop"):
    return dual_reward(think)(Response(text, len(text), reason), sample)


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
    ],
)
def test_parts_by_hand(text, sample, expected):
    assert earn(text, sample) == pytest.approx(expected)


def test_thinking_is_part_of_the_form():
    assert earn("<think>red</think>\n<answer>B</answer>", QA, think=True)["format"] == 1
    assert earn("<answer>B</answer>", QA, think=True)["format"] == 0
    assert earn("<think>a<think>b</think></think><answer>B</answer>", QA, think=True)["format"] == 0
    assert earn("<think>red</think><answer>B</answer>", QA)["format"] == 0


def test_a_truncated_response_is_not_well_formed():
    assert earn("<answer>B</answer>", QA, reason="length") == {"semantic": 1, "format": 0}


@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * 100_000,
        "<think>" * 100_000 + "</think>",
        "<answer>A</answer><glue>[" + "(1, 2), " * 200_000,
        "1" * 1_000_000 + " to ",
        "<think>" + "<" * 500_000 + "</think><answer>B</answer>",
        " " * 1_000_000,
    ],
)
def test_no_text_takes_long(text):
    for sample in (QA, TVG, GQA):
        for cut in (len(text), 19_999):
            begin = time.process_time()
            parse(text[:cut], sample, think=True)
            assert time.process_time() - begin < 0.25


def test_total_refuses_an_unknown_part():
    assert total({"semantic": 1.0, "format": 0.5}, {"semantic": 2.0, "format": 1.0}) == 2.5
    with pytest.raises(KeyError):
        total({"other": 1.0}, {"semantic": 2.0})
