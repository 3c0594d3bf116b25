from __future__ import annotations

from typing import get_args

import pytest

from vrlt_fast.config import PromptConfig
from vrlt_fast.data.grammars.named import GRAMMARS
from vrlt_fast.data.prompts import answer_text, messages, user_text
from vrlt_fast.data.sample import Box, Sample
from vrlt_fast.errors import DataError

QA = Sample("q", "a.mp4", 9.0, "videoqa", "Which?", options=("red", "blue"), answer="B")
MANY = Sample("q", "a.mp4", 9.0, "videoqa", "Which?", options=("red", "blue"), answer="A,B", line="t.jsonl:3")
TVG = Sample("g", "a.mp4", 9.0, "grounding", "When?", spans=((1.0, 2.0), (3.0, 4.5)))
GQA = Sample(
    "b",
    "a.mp4",
    9.0,
    "grounded_qa",
    "Which, when?",
    options=("red", "blue"),
    answer="A",
    spans=((1.0, 2.0), (3.0, 4.5)),
)
BOX = Sample("x", "a.mp4", 9.0, "boxes", "Where?", boxes=(Box(0.5, 0.1, 0.2, 0.3, 0.4), Box(2.25, 0, 0, 1, 1)))
INS = Sample("i", "a.mp4", 9.0, "instance", "Who?", spans=((1.0, 4.5),), object_id=3)
PRO = Sample("p", "a.mp4", 9.0, "progress", "How far?", progress=0.456)
NUM = Sample("n", "a.mp4", 9.0, "number", "How many?", answer=" 1_000 ")


@pytest.mark.parametrize(
    ("span", "text"),
    [
        ((1.0, 4.5), "1.0 to 4.5"),
        ((1.01, 1.04), "1.01 to 1.04"),
        ((2.0, 2.0001), "2.0000 to 2.0001"),
        ((2.0, 2.00000001), "2.000000 to 2.000001"),
    ],
)
def test_short_spans_do_not_become_empty(span: tuple[float, float], text: str):
    sample = Sample("a", "a.mp4", 9.0, "grounding", "When?", spans=(span,))
    assert answer_text(sample, PromptConfig(think=False)) == f"<answer>{text}</answer>"


@pytest.mark.parametrize(
    ("sample", "asked", "right"),
    [
        (
            QA,
            "Which?\nA. red\nB. blue\n{}Reply with the letter: <answer>letter</answer>",
            "<think>blue</think>\n<answer>B</answer>",
        ),
        (
            TVG,
            "When?\n{}Reply with the time span in seconds: <answer>start to end</answer>",
            "<think>from 1.0 to 2.0 seconds, from 3.0 to 4.5 seconds</think>\n<answer>1.0 to 4.5</answer>",
        ),
        (
            GQA,
            "Which, when?\nA. red\nB. blue\n{}Reply with the letter and the time spans in seconds: "
            "<answer>letter</answer><glue>[(start, end)]</glue>",
            "<think>red, from 1.0 to 2.0 seconds, from 3.0 to 4.5 seconds</think>\n"
            "<answer>A</answer><glue>[(1.0, 2.0), (3.0, 4.5)]</glue>",
        ),
    ],
)
def test_plain_texts_are_the_ones_that_published_results_were_made_with(sample: Sample, asked: str, right: str):
    think = "Think step by step between <think> and </think> first. "
    assert user_text(sample, PromptConfig()) == asked.format(think)
    assert user_text(sample, PromptConfig(think=False)) == asked.format("")
    assert answer_text(sample, PromptConfig()) == right
    assert answer_text(sample, PromptConfig(think=False)) == right.partition("\n")[2]


def test_nothing_tells_how_many_letters_are_right():
    for name, g in GRAMMARS.items():
        if "videoqa" in g.asks and not g.single:
            prompt = PromptConfig(grammar=name)
            assert user_text(QA, prompt) == user_text(MANY, prompt)
            assert "<answer>A,B</answer>" in answer_text(MANY, prompt)


@pytest.mark.parametrize(
    ("name", "sample", "right"),
    [
        ("plain", BOX, "<answer>[(0.100, 0.200, 0.300, 0.400), (0.000, 0.000, 1.000, 1.000)]</answer>"),
        ("videochat_r1", BOX, "<answer>[[0.100, 0.200, 0.300, 0.400], [0.000, 0.000, 1.000, 1.000]]</answer>"),
        ("plain", INS, "<answer>3, 1.0 to 4.5</answer>"),
        ("stvg_r1", INS, "<answer>Target ID: 3; Time range: 1.0 to 4.5</answer>"),
        ("plain", PRO, "<answer>46%</answer>"),
        ("sole_r1", PRO, "<answer>46%</answer>"),
        ("plain", NUM, "<answer>1000.0</answer>"),
        ("temporal_r1", TVG, '<answer>{"start_time": "1.0", "end_time": "4.5"}</answer>'),
        ("videochat_r1", GQA, "<answer>A</answer>\n<glue>[(1.0, 2.0), (3.0, 4.5)]</glue>"),
        ("boxed", QA, r"\boxed{B}"),
        ("tw_grpo", MANY, "<answer>A,B</answer>"),
    ],
)
def test_right_answers_of_each_form(name: str, sample: Sample, right: str):
    assert answer_text(sample, PromptConfig(grammar=name, think=False)) == right


def test_boxes_are_asked_for_at_the_samples_times():
    assert "at each of these seconds: 0.5, 2.25. " in user_text(BOX, PromptConfig())


def test_a_trace_is_the_timeline():
    text = answer_text(QA, PromptConfig(grammar="video_thinker"))
    assert text == ("<time>0.0 to 9.0</time>\n<caption>blue</caption>\n<think>blue</think>\n<answer>B</answer>")


def test_a_sample_without_a_form_is_an_error():
    for name in get_args(PromptConfig.model_fields["grammar"].annotation):
        prompt = PromptConfig(grammar=name)
        if "grounded_qa" not in GRAMMARS[name].asks:
            with pytest.raises(DataError, match="VRLT-D14 b"):
                user_text(GQA, prompt)
    with pytest.raises(DataError, match=r"VRLT-D14 t\.jsonl:3: grammar boxed"):
        messages(MANY, PromptConfig(grammar="boxed"))


def test_images_stand_before_the_video():
    found = messages(QA, PromptConfig(system="Be short."), images=2)
    assert found[0] == {"role": "system", "content": "Be short."}
    content = found[1]["content"]
    assert isinstance(content, list)
    assert [part["type"] for part in content] == ["image", "image", "video", "text"]
    assert messages(QA, PromptConfig(), video=False)[0]["content"] == [
        {"type": "text", "text": user_text(QA, PromptConfig())}
    ]
