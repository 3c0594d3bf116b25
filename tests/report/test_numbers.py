"""How metrics of every task look."""

from __future__ import annotations

import io
import json

import pytest

from vrlt_fast.report import choose
from vrlt_fast.report.console import Console
from vrlt_fast.report.numbers import DASH, MINUS, change, official, score, tone
from vrlt_fast.report.run_folder import load_run
from vrlt_fast.report.samples import sample_cards


@pytest.mark.parametrize(
    ("metric", "value", "plain", "paper"),
    [
        ("miou", 0.5234, "0.523", "52.3"),
        ("m_viou", 0.391, "0.391", "39.1"),
        ("miop", 0.25, "0.250", "25.0"),
        ("iou@0.5", 0.613, "61.3 %", "61.3"),
        ("viou@0.3", 0.667, "66.7 %", "66.7"),
        ("acc@gqa", 0.28, "28.0 %", "28.0"),
        ("mra", 0.829, "82.9 %", "82.9"),
        ("mae", 15.52, "15.5", "15.5"),
        ("score", 0.5, "0.500", "50.0"),
        ("miou", None, DASH, DASH),
    ],
)
def test_scores(metric, value, plain, paper):
    assert score(metric, value) == plain
    assert official(metric, value) == paper


@pytest.mark.parametrize(
    ("metric", "value", "text", "mood"),
    [
        ("mae", -2.0, f"{MINUS}2.0", "good"),
        ("mae", 2.0, "+2.0", "bad"),
        ("mae", 0.01, "±0", "same"),
        ("miou", 0.1, "+0.100", "good"),
        ("miou", -0.1, f"{MINUS}0.100", "bad"),
        ("accuracy", 0.02, "+2.0", "good"),
        ("accuracy", 0.0, "±0", "same"),
    ],
)
def test_changes(metric, value, text, mood):
    assert change(metric, value) == text
    assert tone(metric, text) == mood


def test_the_table_of_a_suite():
    out = io.StringIO()
    rows = [("greedy", {"n": 5553.0, "acc@gqa": 0.281, "miou": 0.373}), ("  short", {"n": 3.0, "miou": 1.0})]
    Console(out).suite_table("NExT-GQA, mine", ("acc@gqa", "miou"), rows)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines == [
        ["NExT-GQA,", "mine"],
        ["n", "Acc@GQA", "mIoU"],
        ["greedy", "5553", "28.1", "37.3"],
        ["short", "3", DASH, "100.0"],
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"greedy": {"correct": True}}, 1.0),
        ({"greedy": {"correct": False}}, 0.0),
        ({"greedy": {"correct": None, "values": {"score": 0.25}}}, 0.25),
        ({"greedy": {"values": {"mae": 20.0, "mra": 0.5}}}, 0.5),
        ({"spans": [[1, 2]], "greedy": {"tiou": 0.6, "correct": True, "values": {"viou": 0.2}}}, 0.6),
        ({"greedy": {"values": {"box_iou": 0.4, "success@0.5": 1.0}}, "sampled": [{"values": {"box_iou": 0.0}}]}, 0.2),
    ],
)
def test_questions_of_every_task_are_chosen_by_their_score(line, expected):
    assert choose.score(line) == pytest.approx(expected)


def test_cards_show_the_truth_of_tasks_without_options(make_run):
    run = make_run(questions=4)
    truths = [
        {"task": "progress", "progress": 0.8, "answer": ""},
        {"task": "instance", "object_id": 7, "answer": "", "spans": [[1.0, 2.0]]},
        {"task": "ocr", "answer": "mind <the> gap"},
        {"task": "videoqa", "options": ["one", "two", "three"], "answer": "A,C"},
    ]
    for path in (run / "eval").iterdir():
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        changed = [line | {"options": [], "spans": []} | truth for line, truth in zip(lines, truths, strict=True)]
        path.write_text("".join(json.dumps(line) + "\n" for line in changed), "utf-8")
    html = sample_cards(load_run(run))
    for text in ("80 %", "object 7", "mind &lt;the&gt; gap"):
        assert f"<dt>right</dt><dd>{text}</dd>" in html
    assert html.count('<li class="right">') == 2
    assert "Spatio-temporal grounding" in html
