"""Responses with letters, numbers, texts and percentages, and what each grammar reads in them, worked out by hand."""

from __future__ import annotations

import pytest

from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.grammars.named import grammar
from vrlt_fast.data.sample import Sample

QA = Sample("q", "v.mp4", 8.0, "videoqa", "What?", options=("a", "b", "c"), answer="B")
EIGHT = Sample("q", "v.mp4", 8.0, "videoqa", "What?", options=tuple("abcdefgh"), answer="H")
NUM = Sample("n", "v.mp4", 8.0, "number", "How many?", answer="5")
REG = Sample("r", "v.mp4", 8.0, "regression", "How far?", answer="5.5")
OCR = Sample("t", "v.mp4", 8.0, "ocr", "What is written?", answer="EXIT")
PRO = Sample("p", "v.mp4", 8.0, "progress", "How far?", progress=0.45)
TVG = Sample("g", "v.mp4", 8.0, "grounding", "When?", spans=((2.0, 4.0),))


def said(answer=None, *, progress=None, ok=True):
    return Parsed(answer, progress=progress, well_formed=ok)


def check(name, text, sample, expected, *, think=True):
    assert grammar(name).read(text, sample, think=think) == expected


def thought(body):
    return f"<think>x</think>\n<answer>{body}</answer>"


@pytest.mark.parametrize(
    ("text", "sample", "expected"),
    [
        (thought("B"), QA, said("B")),
        (thought(" B\n"), QA, said("B")),
        (thought("b"), QA, said()),
        (thought("B."), QA, said()),
        (thought("A,C"), QA, said("A,C")),
        (thought("A, C"), QA, said()),
        (thought("C,A"), QA, said()),
        (thought("A</answer><answer>B"), QA, said("A")),
        (thought("<answer>B</answer>"), QA, said()),
        (thought("B") + "\n", QA, said("B", ok=False)),
        (thought("B") + " done", QA, said("B", ok=False)),
        (thought("B").replace("answer", "ANSWER"), QA, said(ok=False)),
        ("<answer>B</answer>", QA, said("B", ok=False)),
        ("<think>x</think> so <answer>B</answer>", QA, said("B", ok=False)),
        ("<think>a<think>b</think></think><answer>B</answer>", QA, said("B")),
        ("B", QA, said(ok=False)),
        (thought("5"), NUM, said("5")),
        (thought("1,000.5"), NUM, said("1,000.5")),
        (thought("5 dogs"), NUM, said()),
        (thought("nan"), NUM, said()),
        (thought("inf"), REG, said()),
        (thought("\u0665"), REG, said()),
        (thought("1e999"), REG, said()),
        (thought("-.5"), REG, said("-.5")),
        (thought("EXIT <b>"), OCR, said("EXIT <b>")),
        (thought(""), OCR, said()),
        (thought("2 to 4"), TVG, said(ok=False)),
    ],
)
def test_video_r1(text, sample, expected):
    check("video_r1", text, sample, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (thought("B"), said("B")),
        ("Well. " + thought("B") + " !! \n", said("B")),
        (thought("A, C"), said("A,C")),
        (thought("C,A,C"), said("A,C")),
        (thought("A,"), said()),
        (thought("A and C"), said()),
        (thought("AC"), said()),
        (thought("b"), said()),
        (thought(""), said()),
        (thought("B") + ".", said("B", ok=False)),
        (thought("B") + " done", said("B", ok=False)),
        (thought("A</answer><answer>B"), said("A", ok=False)),
        (thought("<answer>B</answer>"), said(ok=False)),
        ("<think>y</think>" + thought("B"), said("B", ok=False)),
        ("<think>a<think>b</think></think><answer>B</answer>", said("B", ok=False)),
        ("<answer>B</answer>", said("B", ok=False)),
        ("<answer>A</answer><think>x</think>", said("A", ok=False)),
        ("A,C", said("A,C", ok=False)),
        (thought("B").replace("answer", "Answer"), said(ok=False)),
        (thought("\uff22"), said()),
    ],
)
def test_tw_grpo(text, expected):
    check("tw_grpo", text, QA, expected)


def test_tw_grpo_without_thinking():
    check("tw_grpo", "So <answer>A,B</answer>!", QA, said("A,B"), think=False)
    check("tw_grpo", "<answer>A</answer> or", QA, said("A", ok=False), think=False)


@pytest.mark.parametrize(
    ("text", "sample", "expected"),
    [
        (thought("B"), QA, said("B")),
        (thought("B."), QA, said("B")),
        (thought("B. cut the onion"), QA, said("B")),
        (thought("Because"), QA, said("B")),
        (thought("(B)"), QA, said()),
        (thought("b"), QA, said()),
        (thought("The answer is B"), QA, said()),
        (thought("A,C"), QA, said("A")),
        (thought(" \n B"), QA, said("B")),
        (thought(""), QA, said()),
        (thought("H"), EIGHT, said("H")),
        (thought("B") + " and more", QA, said("B")),
        (thought("A") + thought("B"), QA, said("A")),
        (thought("<answer>B</answer>"), QA, said()),
        (" " + thought("B"), QA, said("B", ok=False)),
        ("<answer>B</answer>", QA, said("B", ok=False)),
        ("<think>x</think><answer>B", QA, said(ok=False)),
        (thought("B").replace("answer", "ANSWER"), QA, said(ok=False)),
        (thought("\uff22"), QA, said()),
        ("B", QA, said(ok=False)),
    ],
)
def test_seed_bench_r1(text, sample, expected):
    check("seed_bench_r1", text, sample, expected)


TIME = "<time>0.0 to 2.0</time><caption>a dog</caption>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TIME + thought("B"), said("B")),
        (f"\n{TIME}\n{TIME} " + thought("B") + "\n", said("B")),
        (f"{TIME}<think>a</think>{TIME}" + thought("B"), said("B")),
        (TIME + thought(" B\n"), said("B")),
        (TIME + thought("A,C"), said("A,C")),
        (TIME + thought("B. dog"), said()),
        (TIME + thought("\uff22"), said()),
        (TIME + thought("A</answer><answer>B"), said("A", ok=False)),
        (TIME + thought("<answer>B</answer>"), said(ok=False)),
        (TIME + "<think>a<think>b</think></think><answer>B</answer>", said("B", ok=False)),
        (TIME + thought("B") + " done", said("B", ok=False)),
        (TIME + "so " + thought("B"), said("B", ok=False)),
        (TIME + "<answer>B</answer>", said("B", ok=False)),
        (thought("B"), said("B", ok=False)),
        ("<caption>a</caption><time>0 to 2</time>" + thought("B"), said("B", ok=False)),
        ("<time>0 to 2</time>" + thought("B"), said("B", ok=False)),
        (TIME.replace("time", "TIME") + thought("B"), said("B", ok=False)),
        (thought("B") + TIME, said("B", ok=False)),
        ("", said(ok=False)),
    ],
)
def test_video_thinker(text, expected):
    check("video_thinker", text, QA, expected)


def test_video_thinker_without_thinking():
    check("video_thinker", "<answer>B</answer>\n", QA, said("B"), think=False)
    check("video_thinker", TIME + "<answer>B</answer>", QA, said("B", ok=False), think=False)


def planned(body, order=("planning", "observation", "reasoning")):
    parts = "\n".join(f"<{tag}>a {tag}</{tag}>" for tag in order)
    return f"<think>\n{parts}\n</think>\n<answer>{body}</answer>"


@pytest.mark.parametrize(
    ("text", "sample", "expected"),
    [
        (planned("45%"), PRO, said(progress=0.45)),
        (planned("45"), PRO, said(progress=0.45)),
        (planned(" ~45.5 %\n"), PRO, said(progress=0.455)),
        (planned("45\uff05"), PRO, said(progress=0.45)),
        (planned("100%"), PRO, said(progress=1.0)),
        (planned("0%"), PRO, said(progress=0.0)),
        (planned("110%"), PRO, said()),
        (planned("-5%"), PRO, said()),
        (planned("nan%"), PRO, said()),
        (planned("\u0664\u0665%"), PRO, said()),
        (planned("about half"), PRO, said()),
        (planned("45%").replace(">\n<", "><"), PRO, said(progress=0.45)),
        (planned("45%") + "\n", PRO, said(progress=0.45, ok=False)),
        (planned("45%", ("observation", "planning", "reasoning")), PRO, said(progress=0.45, ok=False)),
        (planned("45%", ("planning", "observation")), PRO, said(progress=0.45, ok=False)),
        (planned("45%").replace("<think>\n", "<think>so "), PRO, said(progress=0.45, ok=False)),
        (planned("45%").replace("planning", "PLANNING"), PRO, said(progress=0.45, ok=False)),
        (thought("45%"), PRO, said(progress=0.45, ok=False)),
        ("<answer>45%</answer>", PRO, said(progress=0.45, ok=False)),
        (planned("40%</answer><answer>50%"), PRO, said(progress=0.4)),
        (planned("b"), QA, said("B")),
        (planned("(B)"), QA, said()),
        (planned("5"), NUM, said("5")),
        (planned("50%"), NUM, said("0.5")),
        (planned("\u22485.5"), REG, said("5.5")),
        (planned("five"), REG, said()),
        (planned("EXIT"), OCR, said("EXIT")),
    ],
)
def test_primo_r1(text, sample, expected):
    check("primo_r1", text, sample, expected)


def test_primo_r1_keeps_stages_that_a_sample_brings():
    own = "<planning>a</planning><observation>b</observation> <reasoning>c</reasoning>"
    sample = Sample("p", "v.mp4", 8.0, "progress", "How far?", progress=0.5, reasoning=own)
    assert grammar("primo_r1").write(sample, think=True) == f"<think>\n{own}\n</think>\n<answer>50%</answer>"
    assert grammar("primo_r1").write(sample, think=False) == "<answer>50%</answer>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (thought("45%"), said(progress=0.45)),
        ("\n" + thought(" 45 % ") + "\n", said(progress=0.45)),
        (thought("0%"), said(progress=0.0)),
        (thought("+45%"), said(progress=0.45)),
        (thought("100%"), said(progress=1.0)),
        (thought("250%"), said(progress=1.0)),
        (thought("45"), said(progress=0.45, ok=False)),
        (thought("-5%"), said(ok=False)),
        (thought("45.5%"), said(ok=False)),
        (thought("nan%"), said(ok=False)),
        (thought("\u0664\u0665%"), said(ok=False)),
        (thought("about 45%"), said(ok=False)),
        (thought("40%</answer><answer>50%"), said(progress=0.4)),
        (thought("<answer>45%</answer>"), said(ok=False)),
        (thought("45%") + " done", said(progress=0.45, ok=False)),
        (thought("45%").replace("answer", "ANSWER"), said(ok=False)),
        ("<answer>45%</answer>", said(progress=0.45, ok=False)),
        ("45%", said(ok=False)),
        (thought("1" * 5_000 + "%"), said(ok=False)),
    ],
)
def test_sole_r1(text, expected):
    check("sole_r1", text, PRO, expected)


@pytest.mark.parametrize(
    ("text", "sample", "expected"),
    [
        (r"<think>x</think>\boxed{B}", QA, said("B")),
        (r"<think>x</think> The answer is \boxed{B}.", QA, said("B")),
        (r"<think>x</think>\boxed{(B) dog}", QA, said("B")),
        (r"<think>x</think>\boxed{\text{B}}", QA, said("B")),
        (r"<think>x</think>\boxed{b}", QA, said(ok=False)),
        (r"<think>x</think>\boxed{Bob}", QA, said(ok=False)),
        (r"<think>x</think>\boxed{}", QA, said(ok=False)),
        (r"<think>x</think>\boxed{F}", QA, said(ok=False)),
        (r"<think>x</think>\boxed{H}", EIGHT, said("H")),
        (r"<think>x</think>\boxed{A} or \boxed{B}", QA, said("A", ok=False)),
        (r"<think>\boxed{A}</think>\boxed{B}", QA, said("A", ok=False)),
        (r"<think>x</think>\boxed{B} done", QA, said("B", ok=False)),
        (r"\boxed{B}", QA, said("B", ok=False)),
        (r"<think>x</think>\Boxed{B}", QA, said("B", ok=False)),
        (r"<think>x</think>\boxed{B", QA, said("B", ok=False)),
        ("<think>I see A dog</think> B", QA, said("A", ok=False)),
        ("<think>x</think>\uff22", QA, said(ok=False)),
        (r"<think>a<think>b</think></think>\boxed{B}", QA, said("B", ok=False)),
        (r"<think>x</think>\boxed{5}", NUM, said("5")),
        (r"<think>x</think>\boxed{ 1,000.5 }", NUM, said("1,000.5")),
        (r"<think>x</think>\boxed{nan}", NUM, said(ok=False)),
        ("<think>x</think>\\boxed{\u0665}", NUM, said(ok=False)),
        ("<think>x</think>5", NUM, said(ok=False)),
    ],
)
def test_boxed(text, sample, expected):
    check("boxed", text, sample, expected)


def test_boxed_without_thinking():
    check("boxed", r"So it is \boxed{B}", QA, said("B"), think=False)
