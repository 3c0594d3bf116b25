"""Responses with spans, boxes and percentages, and what each grammar reads in them, worked out by hand."""

from __future__ import annotations

import pytest

from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.grammars.named import grammar
from vrlt_fast.data.sample import Box, Sample

QA = Sample("q", "v.mp4", 8.0, "videoqa", "What?", options=("a", "b", "c"), answer="B")
TVG = Sample("g", "v.mp4", 8.0, "grounding", "When?", spans=((2.0, 4.0),))
GQA = Sample("b", "v.mp4", 8.0, "grounded_qa", "What?", options=("a", "b"), answer="A", spans=((1.0, 2.0), (4.0, 5.0)))
NUM = Sample("n", "v.mp4", 8.0, "number", "How many?", answer="5")
OPEN = Sample("o", "v.mp4", 8.0, "open", "Why?", answer="a dog")
BOX = Sample("x", "v.mp4", 8.0, "boxes", "Where?", boxes=(Box(0.5, 0.1, 0.2, 0.3, 0.4), Box(1.0, 0.5, 0.5, 0.75, 1.0)))
INS = Sample("i", "v.mp4", 8.0, "instance", "Who?", spans=((1.0, 4.0),), object_id=3)
PRO = Sample("p", "v.mp4", 8.0, "progress", "How far?", progress=0.45)
TWO = (Box(0.5, 0.1, 0.2, 0.3, 0.4), Box(1.0, 0.5, 0.5, 0.75, 1.0))
SPANS = ((1.0, 2.0), (4.0, 5.0))
GLUE = "<glue>[(1.0, 2.0), (4.0, 5.0)]</glue>"


def said(answer=None, *, spans=None, boxes=None, id=None, progress=None, ok=True):
    return Parsed(answer, spans, boxes, id, progress, ok)


NOTHING = said(ok=False)
EMPTY = said()


def check(name, text, sample, expected, *, think):
    assert grammar(name).read(text, sample, think=think) == expected


@pytest.mark.parametrize(
    ("text", "sample", "expected"),
    [
        ("<answer>B</answer>", QA, said("B")),
        ("\n <answer>B</answer> \n", QA, said("B")),
        ("<answer>A,C</answer>", QA, said("A,C")),
        ("<answer>C, A</answer>", QA, said("A,C")),
        ("<answer>A,A</answer>", QA, NOTHING),
        ("<answer>A,D</answer>", QA, said("A,D", ok=False)),
        ("<answer>(B) b</answer>", QA, said("B", ok=False)),
        ("<answer>b</answer>", QA, NOTHING),
        ("<ANSWER>B</ANSWER>", QA, NOTHING),
        ("<answer>A</answer><answer>B</answer>", QA, said("B", ok=False)),
        ("<answer><answer>B</answer></answer>", QA, said("B", ok=False)),
        ("<answer>B</answer> done", QA, said("B", ok=False)),
        ("<answer>2.0 to 4.0</answer>", TVG, said(spans=((2, 4),))),
        ("<answer>4.0 to 2.0</answer>", TVG, said(spans=((4, 2),), ok=False)),
        ("<answer>2.0 to 2.0</answer>", TVG, said(spans=((2, 2),), ok=False)),
        ("<answer>nan to inf</answer>", TVG, NOTHING),
        ("<answer>\u0662.0 to \u0664.0</answer>", TVG, NOTHING),
        ("<answer>from 2 - 4 s</answer>", TVG, said(spans=((2, 4),), ok=False)),
        ("<answer>A</answer>" + GLUE, GQA, said("A", spans=SPANS)),
        ("<answer>A</answer>\n<glue>[(1, 2), (2, 3)]</glue>", GQA, said("A", spans=((1, 2), (2, 3)))),
        ("<answer>A</answer><glue>[]</glue>", GQA, said("A", ok=False)),
        ("<answer>5</answer>", NUM, said("5")),
        ("<answer>-1,234.5</answer>", NUM, said("-1,234.5")),
        ("<answer>about 5 of them</answer>", NUM, said("5", ok=False)),
        ("<answer>5 or 6</answer>", NUM, NOTHING),
        ("<answer>nan</answer>", NUM, NOTHING),
        ("<answer>1e999</answer>", NUM, NOTHING),
        ("<answer>\u0665</answer>", NUM, NOTHING),
        ("<answer>a < b\nc</answer>", OPEN, said("a < b\nc")),
        ("<answer> </answer>", OPEN, NOTHING),
        ("<answer>a</answer> b</answer>", OPEN, said("a</answer> b", ok=False)),
        ("<answer>[(0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.75, 1)]</answer>", BOX, said(boxes=TWO)),
        ("<answer>[0.1, 0.2, 0.3, 0.4] [0.5,0.5,0.75,1]</answer>", BOX, said(boxes=TWO, ok=False)),
        ("<answer>[(0.1, 0.2, 0.3, 0.4)]</answer>", BOX, NOTHING),
        (
            "<answer>[(0.3, 0.2, 0.1, 0.4), (0.5, 0.5, 0.75, 1)]</answer>",
            BOX,
            said(boxes=(Box(0.5, 0.3, 0.2, 0.1, 0.4), TWO[1]), ok=False),
        ),
        ("<answer>3, 1.0 to 4.0</answer>", INS, said(spans=((1, 4),), id=3)),
        ("<answer>object 3 from 1 to 4</answer>", INS, said(spans=((1, 4),), id=3, ok=False)),
        ("<answer>3, 4.0 to 1.0</answer>", INS, said(spans=((4, 1),), id=3, ok=False)),
        ("<answer>1.0 to 4.0</answer>", INS, NOTHING),
        ("<answer>45%</answer>", PRO, said(progress=0.45)),
        ("<answer>about 45.5 %</answer>", PRO, said(progress=0.455, ok=False)),
        ("<answer>101%</answer>", PRO, NOTHING),
        ("<answer>-5%</answer>", PRO, NOTHING),
    ],
)
def test_plain(text, sample, expected):
    check("plain", text, sample, expected, think=False)
    check("plain", f"<think>red</think>\n{text.strip()}", sample, expected, think=True)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("<think>red</think><answer>B</answer>", True),
        ("<answer>B</answer>", False),
        ("<think>a<think>b</think></think><answer>B</answer>", False),
        ("<THINK>red</THINK><answer>B</answer>", False),
        ("red</think><answer>B</answer>", False),
        ("<think>a</think><think>b</think><answer>B</answer>", False),
    ],
)
def test_thinking_of_plain(text, form):
    check("plain", text, QA, said("B", ok=form), think=True)


def json_span(start, end):
    return f'<think>x</think>\n<answer>{{"start_time": {start}, "end_time": {end}}}</answer>'


@pytest.mark.parametrize(
    ("text", "sample", "expected"),
    [
        (json_span('"2.0"', '"4.0"'), TVG, said(spans=((2, 4),))),
        (json_span('"4.0"', '"2.0"'), TVG, said(spans=((4, 2),))),
        (json_span('"2"', '"2"'), TVG, said(spans=((2, 2),))),
        (json_span("2.0", "4"), TVG, said(spans=((2, 4),), ok=False)),
        (json_span('"1.2.3"', '"4.0"'), TVG, EMPTY),
        (json_span('"-1"', '"4"'), TVG, said(spans=((-1, 4),), ok=False)),
        (json_span("NaN", "Infinity"), TVG, NOTHING),
        (json_span('"nan"', '"inf"'), TVG, NOTHING),
        (json_span('"\u0662"', '"\u0664"'), TVG, NOTHING),
        (json_span('"2.0"', '"4.0"') + "\n", TVG, said(spans=((2, 4),), ok=False)),
        (" " + json_span('"2.0"', '"4.0"'), TVG, said(spans=((2, 4),), ok=False)),
        (json_span('"2.0"', '"4.0"') + " done", TVG, said(spans=((2, 4),), ok=False)),
        (json_span('"2.0"', '"4.0"').replace("<think>x</think>\n", ""), TVG, said(spans=((2, 4),), ok=False)),
        (json_span('"2.0"', '"4.0"').replace("answer", "ANSWER"), TVG, NOTHING),
        (json_span('"2.0"', '"4.0"').replace("x", "<think>x</think>"), TVG, said(spans=((2, 4),))),
        ("<think>x</think><answer>2.0 to 4.0</answer>", TVG, NOTHING),
        ('<think>x</think><answer>{"start_time": "2", "end_time": "4"} s</answer>', TVG, NOTHING),
        ('<think>x</think><answer>[["2", "4"]]</answer>', TVG, NOTHING),
        (
            '<think>x</think><answer>{"end_time" : "4" ,\n"start_time":"2"}</answer>',
            TVG,
            said(spans=((2, 4),), ok=False),
        ),
        ('<think>x</think><answer>\n{"start_time" :"2" ,\n"end_time":"4"} </answer>', TVG, said(spans=((2, 4),))),
        (
            '<think><answer>{"start_time": "1", "end_time": "2"}</answer></think>' + json_span('"3"', '"4"')[16:],
            TVG,
            said(spans=((1, 2),)),
        ),
        ("<think>x</think>\n<answer>B</answer>", QA, said("B")),
        ("<think>x</think><answer> (b)\t</answer>", QA, said("B")),
        ("<think>x</think><answer>A, C</answer>", QA, said("A,C")),
        ("<think>x</think><answer>B. dog</answer>", QA, EMPTY),
        ("<think>x</think><answer>A</answer><answer>B</answer>", QA, said("A")),
        ("<think>x</think><answer>\nA</answer><answer>B</answer>", QA, said("B")),
        ("b", QA, said("B", ok=False)),
        ("<think>x</think><answer>B</answer>\n", QA, said("B", ok=False)),
        ("<think>x</think><answer>A</answer>" + GLUE, GQA, said("A", spans=SPANS)),
        ("<think>x</think><answer>A</answer><glue>[(2, 1)]</glue>", GQA, said("A", ok=False)),
        ("<think>x</think><answer>A</answer>" + GLUE + "\n", GQA, said("A", spans=SPANS, ok=False)),
    ],
)
def test_temporal_r1(text, sample, expected):
    check("temporal_r1", text, sample, expected, think=True)


def test_temporal_r1_without_thinking():
    bare = json_span('"2"', '"4"').removeprefix("<think>x</think>\n")
    check("temporal_r1", bare, TVG, said(spans=((2, 4),)), think=False)
    check("temporal_r1", "\n" + bare, TVG, said(spans=((2, 4),), ok=False), think=False)
    check("temporal_r1", json_span('"2"', '"4"'), TVG, said(spans=((2, 4),), ok=False), think=False)
    check("temporal_r1", "<answer>A</answer> " + GLUE, GQA, said("A", spans=SPANS), think=False)


def glued(body, answer="A"):
    return f"<think>x</think><answer>{answer}</answer><glue>{body}</glue>"


EIGHT = "[[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.75, 1.0]]"


@pytest.mark.parametrize(
    ("text", "sample", "expected"),
    [
        (glued("[(1.0, 2.0), (4.0, 5.0)]"), GQA, said("A", spans=SPANS)),
        ("\n" + glued("[(1,2),(2,3),]") + "\n", GQA, said("A", spans=((1, 2), (2, 3)))),
        (glued("[]"), GQA, said("A", spans=())),
        (glued("[(2, 2)]"), GQA, said("A", spans=((2, 2),))),
        (glued("[(3, 2)]"), GQA, said("A", ok=False)),
        (glued("[(1, 2), (4, 3)]"), GQA, said("A", ok=False)),
        (glued(" [(1, 2)]"), GQA, said("A", ok=False)),
        (glued("[(1, 2)]\n"), GQA, said("A", spans=((1, 2),))),
        (glued("[( 1, 2)]"), GQA, said("A", ok=False)),
        (glued("[[1, 2]]"), GQA, said("A", ok=False)),
        (glued("[(01, 2)]"), GQA, said("A", ok=False)),
        (glued("[(nan, 2)]"), GQA, said("A", ok=False)),
        (glued("[(\u0661, 2)]"), GQA, said("A", ok=False)),
        (glued("[(1, 2)]", "The best answer is (B)"), GQA, said("B", spans=((1, 2),))),
        (glued("[(1, 2)]", "Both"), GQA, said("B", spans=((1, 2),))),
        (glued("[(1, 2)]", "a"), GQA, said(spans=((1, 2),))),
        (glued("[(1, 2)]") + " done", GQA, said("A", spans=((1, 2),), ok=False)),
        (glued("[(1, 2)]") + "<glue>[]</glue>", GQA, said("A", spans=((1, 2),))),
        ("<answer>A</answer><glue>[(1, 2)]</glue>", GQA, said("A", spans=((1, 2),), ok=False)),
        ("<think>x</think><glue>[(1, 2)]</glue><answer>A</answer>", GQA, said("A", spans=((1, 2),), ok=False)),
        ("<think>x</think><answer>2.0 to 4.0</answer>", TVG, said(spans=((2, 4),))),
        ("<think>x</think><answer>1 to 2, no: 2. AND 4 s</answer>", TVG, said(spans=((2, 4),))),
        ("<think>x</think><answer>1.2.0 to 4.0</answer>", TVG, said(spans=((2, 4),))),
        ("<think>x</think><answer>4.0 to 2.0</answer>", TVG, said(spans=((4, 2),))),
        ("<think>x</think><answer>2.0  to 4.0</answer>", TVG, EMPTY),
        ("<think>x</think><answer>1 to 2</answer><answer>2 to 4</answer>", TVG, said(spans=((2, 4),))),
        ("<think>x</think><answer>1 to 2<answer>2 to 4</answer>", TVG, said(spans=((2, 4),))),
        ("<think>x</think><ANSWER>2 to 4</ANSWER>", TVG, NOTHING),
        (f"<think>x</think><answer>{EIGHT}</answer>", BOX, said(boxes=TWO)),
        (f"<think>x</think><answer>\n{EIGHT}\n</answer>", BOX, said(boxes=TWO)),
        (f"<think>x</think><answer>{EIGHT.replace('[[', '[').replace(']]', ']')}</answer>", BOX, NOTHING),
        ("<think>x</think><answer>[[0.1, 0.2, 0.3, 0.4]]</answer>", BOX, NOTHING),
        ("<think>x</think><answer>[[0.1, 0.2, 0.3, nan], [0.5, 0.5, 0.75, 1]]</answer>", BOX, NOTHING),
        ("<think>x</think><answer>The answer is B</answer>", QA, said("B")),
        ("<think>x</think><answer></answer>", QA, EMPTY),
    ],
)
def test_videochat_r1(text, sample, expected):
    check("videochat_r1", text, sample, expected, think=True)


def test_videochat_r1_without_thinking():
    check("videochat_r1", "<answer>A</answer>\n<glue>[(1, 2)]</glue>", GQA, said("A", spans=((1, 2),)), think=False)
    check("videochat_r1", glued("[(1, 2)]"), GQA, said("A", spans=((1, 2),), ok=False), think=False)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Target ID: 3; Time range: 1.0 to 4.0", said(spans=((1, 4),), id=3)),
        ("target id:3\ntime RANGE: 1.and4", said(spans=((1, 4),), id=3)),
        ("Time range: 1 to 4, Target ID: 3", said(spans=((1, 4),), id=3)),
        ("Target ID: 3; Time range: 4.0 to 1.0", said(spans=((4, 1),), id=3)),
        ("Target ID: 3; Time range: 2 to 2", said(spans=((2, 2),), id=3)),
        ("Target ID: 3", EMPTY),
        ("Time range: 1 to 4", EMPTY),
        ("Target ID: 3; Time range: nan to 4", EMPTY),
        ("Target ID: \u0663; Time range: 1 to 4", EMPTY),
        ("Target ID: 99999999999; Time range: 1 to 4", EMPTY),
        ("Target ID: 3; Time range: 1 - 4", EMPTY),
        ("Target ID: 3; Target ID: 4; Time range: 1 to 4", said(spans=((1, 4),), id=3)),
        ("", EMPTY),
        ("Target ID: 1; Time range: 1 to 2</answer><answer>Target ID: 3", EMPTY),
        (
            "Target ID: 1; Time range: 1 to 2</answer><answer>Target ID: 3; Time range: 1 to 4",
            said(spans=((1, 4),), id=3),
        ),
    ],
)
def test_stvg_r1(answer, expected):
    check("stvg_r1", f"\n<think>x</think> <answer>{answer}</answer>\n", INS, expected, think=True)
    check("stvg_r1", f"<answer>{answer}</answer>", INS, expected, think=False)
    unformed = Parsed(spans=expected.spans, object_id=expected.object_id)
    check("stvg_r1", f"<answer>{answer}</answer>", INS, unformed, think=True)
    check("stvg_r1", f"<think>x</think><answer>{answer}</answer> so", INS, unformed, think=True)


@pytest.mark.parametrize(
    ("text", "sample", "expected"),
    [
        ("<answer>B</answer>", QA, said("B")),
        ("<answer>D</answer>", QA, said("D", ok=False)),
        ("<answer>B.</answer>", QA, said("B", ok=False)),
        ("<answer>Bob</answer>", QA, NOTHING),
        ("<answer>2.0 to 4.0</answer>", TVG, said(spans=((2, 4),))),
        ("<answer>4 to 2</answer>", TVG, said(spans=((4, 2),), ok=False)),
        ("<answer>2.0 to 2.0</answer>", TVG, said(spans=((2, 2),), ok=False)),
        ("<answer>\u0662 to 4</answer>", TVG, NOTHING),
        ("<answer>NaN to 4</answer>", TVG, NOTHING),
        ("<answer></answer>", TVG, NOTHING),
        ("<answer>1 to 2</answer><answer>2 to 4</answer>", TVG, said(spans=((2, 4),), ok=False)),
        ("<answer><answer>2 to 4</answer></answer>", TVG, said(spans=((2, 4),), ok=False)),
        ("<answer>2 to 4</answer>.", TVG, said(spans=((2, 4),), ok=False)),
        ("<Answer>2 to 4</Answer>", TVG, NOTHING),
        ("<answer>[(0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.75, 1)]</answer>", BOX, said(boxes=TWO)),
        ("<answer>[]</answer>", BOX, NOTHING),
        ("<answer>A</answer>" + GLUE, GQA, NOTHING),
    ],
)
def test_scene_r1(text, sample, expected):
    check("scene_r1", text, sample, expected, think=False)
    check("scene_r1", f"<think>x</think>{text}", sample, expected, think=True)
    check("scene_r1", f"{text}", sample, Parsed(expected.answer, expected.spans, expected.boxes), think=True)
