"""Metrics of each task by hand, from texts in the plain grammar."""

from __future__ import annotations

import pytest

from vrlt_fast.data.grammars.named import grammar
from vrlt_fast.data.sample import TASKS, Box, Instance, Sample
from vrlt_fast.evals.metrics import score, summarise
from vrlt_fast.rewards.base import Response

BOXES = tuple(Box(t, 0.0, 0.0, 0.5, 0.5) for t in (1.0, 2.0))
INSTANCES = (Instance(1, BOXES), Instance(2, tuple(Box(t, 0.25, 0.0, 0.75, 0.5) for t in (1.0, 2.0))))


def sample(task, **fields):
    return Sample("s", "v.mp4", 10.0, task, "?", **fields)


SEVERAL = sample("videoqa", options=("a", "b", "c"), answer="A,C")
GQA = sample("grounded_qa", options=("a", "b"), answer="A", spans=((0.0, 4.0), (6.0, 8.0)))
NUMBER, GUESS = sample("number", answer="12"), sample("regression", answer="20")
OCR, OPEN = sample("ocr", answer="mind the gap"), sample("open", answer="a red car stops")
BOXED = sample("boxes", boxes=BOXES)
TUBE = sample("instance", spans=((1.0, 3.0),), object_id=1, instances=INSTANCES)
DONE = sample("progress", progress=0.8)
ONE_EACH = {
    "videoqa": SEVERAL, "grounding": sample("grounding", spans=((1.0, 2.0),)), "grounded_qa": GQA, "number": NUMBER,
    "regression": GUESS, "ocr": OCR, "open": OPEN, "boxes": BOXED, "instance": TUBE, "progress": DONE,
}  # fmt: skip


def scored(text, about, tag=True):
    return score(Response(f"<answer>{text}</answer>" if tag else text, 5, "stop"), about, think=False)


def of(about, *texts):
    return summarise([scored(text, about) for text in texts])[about.task]


@pytest.mark.parametrize(
    ("text", "right"),
    [("A,C", True), ("C,A", True), ("A, C", True), ("A", False), ("C", False), ("A,B,C", False), ("B", False)],
)
def test_several_letters_are_all_or_nothing(text, right):
    assert scored(text, SEVERAL).correct is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("12", True), ("about 12", True), ("12 apples", True), ("012", True), ("1,2", False), ("12.0", False),
        ("12.00", False), ("13", False), ("-12", False), ("11 or 12", False), ("twelve", False), ("", False),
    ],
)  # fmt: skip
def test_numbers_are_right_or_wrong(text, right):
    assert scored(text, NUMBER).correct is right
    assert of(NUMBER, text)["accuracy"] == right


@pytest.mark.parametrize(
    ("text", "value", "mra"),
    [("20", 1, 1), ("19", 0.95, 0.9), ("10", 0.5, 0), ("25", 0.75, 0.5), ("30", 0.5, 0), ("90", 0, 0), ("none", 0, 0)],
)
def test_estimates(text, value, mra):
    assert of(GUESS, text) == pytest.approx({"n": 1, "well_formed": float(text != "none"), "score": value, "mra": mra})


@pytest.mark.parametrize(
    ("text", "value"),
    [("mind the gap", 1), ("mind a gap", 2 / 3), ("Mind The Gap", 0), ("mind the gap please", 2 / 3), ("gap", 1 / 3)],
)
def test_text_to_read_is_scored_by_words(text, value):
    assert of(OCR, text)["score"] == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a red car stops", 1),
        ("a red cars stop", 1),  # stemmed
        ("a red car", (6 / 7 + 4 / 5 + 6 / 7) / 3),
        ("nothing of it", 0),
    ],
)
def test_open_answers_have_the_mean_of_three_rouges(text, value):
    assert of(OPEN, text)["score"] == pytest.approx(value)


def test_boxes():
    right, half, away = "(0.0, 0.0, 0.5, 0.5)", "(0.0, 0.0, 0.25, 0.5)", "(0.6, 0.6, 0.9, 0.9)"
    found = of(BOXED, f"[{right}, {right}]", f"[{right}, {half}]", f"[{right}, {away}]", f"[{right}]")
    assert found == pytest.approx({"n": 4, "well_formed": 0.75, "box_iou": 2.25 / 4, "success@0.5": 0.5})


def test_objects():
    found = of(TUBE, "1, 1.0 to 3.0", "1, 2.0 to 4.0", "2, 1.0 to 3.0", "1", "3.0 to 1.0")
    assert found.pop("well_formed") == pytest.approx(0.6)
    # boxes are annotated at 1 and 2 s; 1 s of 3 s is common to both in the second answer, and its box is that of 2 s
    assert found == pytest.approx(
        {
            "n": 5,
            "id_accuracy": 3 / 5,
            "m_tiou": (1 + 1 / 3 + 1) / 5,
            "m_viou": (1 + 1 / 3 + 1 / 3) / 5,
            "viou@0.3": 3 / 5,
            "viou@0.5": 1 / 5,
        }
    )


def test_progress():
    found = of(DONE, "80%", "60%", "100%", "0%", "mostly done")
    relative = (1 + 0.5 + 0.5 + 0 + 0) / 5
    assert found == pytest.approx({"n": 5, "well_formed": 0.8, "mae": (0 + 20 + 20 + 80 + 80) / 5, "mra": relative})


def test_conventions_of_grounded_questions():
    """Both annotated spans said, one of them, both in one: merged sets see what is left out, official ones don't."""
    both, one, hull = "[(0.0, 4.0), (6.0, 8.0)]", "[(6.0, 8.0)]", "[(0.0, 8.0)]"
    answers = [scored(f"<answer>A</answer><glue>{glue}</glue>", GQA, tag=False) for glue in (both, one, hull)]
    plain, nextgqa, rextime = (summarise(answers, c)["grounded_qa"] for c in ("plain", "nextgqa", "rextime"))
    assert plain["miou"] == nextgqa["miou_merged"] == rextime["miou_merged"] == pytest.approx((1 + 2 / 6 + 6 / 8) / 3)
    assert nextgqa["miou"] == rextime["miou"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert nextgqa["miop"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert (nextgqa["iou@0.5"], nextgqa["iop@0.5"], nextgqa["acc@gqa"]) == (1, 1, 1)
    assert (rextime["r1@0.5"], rextime["r1@0.55"], rextime["gqa@0.5"], rextime["gqa@0.7"]) == (1, 2 / 3, 1, 2 / 3)
    assert plain["acc@gqa"] == 1
    assert not {"iou@0.5", "gqa@0.5", "miou_merged"} & set(plain)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_scores_its_own_right_answer_and_nothing(task):
    about = ONE_EACH[task]
    right = grammar("plain").write(about, think=True)
    best, worst = (summarise([score(Response(t, 9, "stop"), about, think=True)])[task] for t in (right, ""))
    assert best == pytest.approx({name: float(name != "mae") for name in best})
    assert worst == pytest.approx({name: {"n": 1.0, "mae": 80.0}.get(name, 0.0) for name in worst})
    assert len(best) > 2


def test_a_line_says_what_was_read():
    line = scored("1, 1.0 to 3.0", TUBE).to_json()
    assert line["object_id"] == 1
    assert line["values"] == {"viou": 1.0}
    assert (line["iou"], line["iop"], line["tiou"]) == (1.0, 1.0, 1.0)
    assert scored("80%", DONE).to_json()["progress"] == 0.8
    assert len(scored("[(0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.5, 0.5)]", BOXED).to_json()["boxes"]) == 2


def test_the_grammar_is_the_one_that_is_named():
    with pytest.raises(KeyError):
        score(Response("", 0, "stop"), DONE, think=False, grammar="none of them")
