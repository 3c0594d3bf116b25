"""Metrics by hand and by brute force."""

from __future__ import annotations

import random

import pytest

from vrlt_fast.data.sample import Sample
from vrlt_fast.evals.metrics import best_constant_span, flatten, score, summarise
from vrlt_fast.evals.run import pick_samples
from vrlt_fast.rewards.base import Response

QA = Sample("q", "v.mp4", 10.0, "videoqa", "What?", options=("a", "b", "c"), answer="B")
TVG = Sample("g", "v.mp4", 10.0, "grounding", "When?", spans=((0.0, 10.0),))
GQA = Sample("b", "v.mp4", 10.0, "grounded_qa", "Both?", options=("a", "b"), answer="A", spans=((0.0, 4.0),))


def scored(text, sample, reason="stop"):
    return score(Response(text, 5, reason), sample, think=False)


def test_thresholds_are_inclusive():
    ends = (2.9, 3.0, 5.0, 6.9, 7.0)
    found = summarise([scored(f"<answer>0.0 to {end}</answer>", TVG) for end in ends])["grounding"]
    assert found == pytest.approx(
        {"n": 5, "well_formed": 1, "miou": 0.496, "r1@0.3": 0.8, "r1@0.5": 0.6, "r1@0.7": 0.2}
    )


def test_grounded_accuracy_asks_for_both():
    answers = [
        "<answer>A</answer><glue>[(2.0, 6.0)]</glue>",  # right, half of the prediction inside
        "<answer>A</answer><glue>[(2.1, 6.1)]</glue>",  # right, less than half inside
        "<answer>B</answer><glue>[(0.0, 4.0)]</glue>",  # wrong, all inside
        "<answer>A</answer>",  # right, no span
    ]
    found = summarise([scored(a, GQA) for a in answers])["grounded_qa"]
    assert found["acc@gqa"] == 0.25
    assert found["accuracy"] == 0.75
    assert found["well_formed"] == 0.75
    assert found["miou"] == pytest.approx((2 / 6 + 1.9 / 6.1 + 1) / 4)


def test_what_cannot_be_read_counts_as_wrong():
    found = summarise([scored("no idea", s) for s in (QA, TVG, GQA)] + [scored("<answer>B</answer>", QA)])
    assert found["all"] == {"n": 4, "well_formed": 0.25, "tiou": 0.0}
    assert found["videoqa"] == {"n": 2, "accuracy": 0.5, "well_formed": 0.5}
    assert found["grounding"]["miou"] == found["grounding"]["r1@0.3"] == 0.0
    assert found["grounded_qa"]["acc@gqa"] == found["grounded_qa"]["accuracy"] == 0.0


def test_all_holds_tiou_over_questions_with_spans_only():
    found = summarise([scored("<answer>B</answer>", QA), scored("<answer>0.0 to 5.0</answer>", TVG)])
    assert found["all"] == {"n": 2, "well_formed": 1.0, "tiou": 0.5}
    assert "grounded_qa" not in found
    assert flatten(found)["grounding/miou"] == 0.5
    assert "tiou" not in summarise([scored("<answer>B</answer>", QA)])["all"]


def test_a_truncated_answer_is_read_but_not_well_formed():
    cut = scored("<answer>B</answer>", QA, reason="length")
    assert (cut.correct, cut.well_formed) == (True, False)
    assert (cut.tiou, cut.iop) == (None, None)
    assert cut.to_json() == {
        "text": "<answer>B</answer>",
        "answer": "B",
        "spans": None,
        "well_formed": False,
        "tiou": None,
        "correct": True,
    }


def test_best_constant_span_by_brute_force(seed):
    rng = random.Random(seed)
    samples = [QA]
    for i in range(12):
        duration = rng.uniform(4, 30)
        start = rng.uniform(0, duration - 1)
        spans = ((start, rng.uniform(start + 0.5, duration)),)
        samples.append(Sample(str(i), "v.mp4", duration, "grounding", "When?", spans=spans))

    def mean(low, high):
        total = 0.0
        for s in samples[1:]:
            (a, b), (c, d) = s.spans[0], (low * s.duration, high * s.duration)
            inter = max(0.0, min(b, d) - max(a, c))
            total += inter / (b - a + d - c - inter)
        return total / 12

    (low, high), value = best_constant_span(samples, grid=0.1)
    pairs = [(i / 10, j / 10) for i in range(10) for j in range(i + 1, 11)]
    assert value == pytest.approx(max(mean(*pair) for pair in pairs))
    assert mean(low, high) == pytest.approx(value)


def test_picks_are_even_and_deterministic(seed):
    rng = random.Random(seed)
    counts = {"videoqa": 30, "grounding": 4, "grounded_qa": 30}
    samples = [Sample(f"{task}{i}", "v.mp4", 9.0, task, "?") for task, n in counts.items() for i in range(n)]
    rng.shuffle(samples)
    picked = pick_samples(samples, 24, seed)
    assert {t: sum(s.task == t for s in picked) for t in counts} == {"videoqa": 10, "grounding": 4, "grounded_qa": 10}
    assert [s for s in samples if s in picked] == picked
    assert pick_samples(samples, 24, seed) == picked
    assert pick_samples(samples, 24, seed + 1) != picked
    assert pick_samples(samples, 0, seed) == pick_samples(samples, 999, seed) == samples
    assert len(pick_samples(samples, 1, seed)) == 1
