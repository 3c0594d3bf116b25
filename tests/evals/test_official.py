"""Agreement with the benchmarks' own scoring loops, written again here from their definitions and file formats:
doc-doc/NExT-GQA code/TempGQA/eval_ground.py, ReXTime/ReXTime evaluation/rextime_eval.py and utils.py.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from vrlt_fast.data.sample import Sample
from vrlt_fast.evals.metrics import score, summarise
from vrlt_fast.rewards.base import Response

LETTERS = "ABCDE"


def nextgqa(annotated, predicted, right):
    """Percentages over the questions that have a predicted span; the others are passed over."""
    counts = dict.fromkeys(("acc@gqa", "miop", "iop@0.3", "iop@0.5", "miou", "iou@0.3", "iou@0.5"), 0.0)
    n = 0
    for key, moments in annotated.items():
        if key not in predicted:
            continue
        start, end = predicted[key]
        best_iou = best_iop = 0.0
        for low, high in moments:
            if start == end:
                iou, iop = 0.0, float(low <= start <= high)
            else:
                shared = min(high, end) - max(low, start)  # negative where they are apart
                hull = max(high, end) - min(low, start)
                iou = shared / hull if hull > 0 else 0.0
                iop = shared / (end - start) if end > start else 0.0
            best_iou, best_iop = max(best_iou, iou), max(best_iop, iop)
        n += 1
        counts["miou"] += best_iou
        counts["miop"] += best_iop
        for t in (0.3, 0.5):
            counts[f"iou@{t}"] += best_iou >= t
            counts[f"iop@{t}"] += best_iop >= t
        counts["acc@gqa"] += best_iop >= 0.5 and right[key]
    return {name: 100 * value / n for name, value in counts.items()}, n


def rextime(annotated, predicted, right):
    """Shares over all questions: first the window of the best IoU, then that pair's IoU again, over its hull."""
    with np.errstate(divide="ignore", invalid="ignore"):
        chosen, spans = [], []
        for key, windows in annotated.items():
            span = np.array(predicted[key], dtype=float)
            gt = np.array(windows, dtype=float)
            inter = np.clip(np.minimum(span[1], gt[:, 1]) - np.maximum(span[0], gt[:, 0]), 0, None)
            union = (span[1] - span[0]) + (gt[:, 1] - gt[:, 0]) - inter
            chosen.append(gt[np.argmax(inter / union)])
            spans.append(span)
    p, g = np.array(spans), np.array(chosen)
    inter = np.maximum(0, np.minimum(p[:, 1], g[:, 1]) - np.maximum(p[:, 0], g[:, 0]))
    hull = np.maximum(p[:, 1], g[:, 1]) - np.minimum(p[:, 0], g[:, 0])
    iou = np.divide(inter, hull, out=np.zeros_like(inter), where=hull != 0)
    hits = np.array([right[key] for key in annotated])
    out = {"miou": iou.mean(), "accuracy": hits.mean()}
    out |= {f"r1@{float(f'{t:.2f}')}": (iou >= float(f"{t:.2f}")).mean() for t in np.linspace(0.3, 0.95, 14)}
    return out | {f"gqa@{t}": ((iou >= t) & hits).mean() for t in (0.3, 0.5, 0.7)}


def questions(rng, count):
    """Samples with up to three spans of one decimal, and what a policy says: span (None: nothing) and letter."""
    samples, said = [], []
    for i in range(count):
        borders = sorted(rng.sample(range(0, 400), 2 * rng.choice((1, 1, 2, 3))))
        spans = tuple((a / 10, b / 10) for a, b in zip(borders[::2], borders[1::2], strict=True))
        answer = rng.choice(LETTERS)
        samples.append(Sample(str(i), "v.mp4", 40.0, "grounded_qa", "?", tuple(LETTERS), answer, spans))
        near = rng.choice(spans)
        start, end = (round(max(0.0, x + rng.gauss(0, 2)), 1) for x in near)
        span = {
            "near": (start, end),
            "same": near,
            "zero": (start, start),
            "border": (near[0], near[0]),
            "reversed": (max(start, end) + 1.0, min(start, end)),
            "wide": (0.0, 40.0),
            "none": None,
        }[rng.choice(("near", "near", "same", "zero", "border", "reversed", "wide", "none"))]
        said.append((span, rng.choice((answer, rng.choice(LETTERS)))))
    return samples, said


def text(span, letter):
    return f"<answer>{letter}</answer>" + (f"<glue>[({span[0]}, {span[1]})]</glue>" if span else "")


def scored(samples, said, convention):
    answers = [score(Response(text(*each), 9, "stop"), s, think=False) for s, each in zip(samples, said, strict=True)]
    return summarise(answers, convention)["grounded_qa"]


def loops(samples, said):
    annotated = {s.id: s.spans for s in samples}
    right = {s.id: letter == s.answer for s, (_, letter) in zip(samples, said, strict=True)}
    spans = {s.id: span for s, (span, _) in zip(samples, said, strict=True) if span is not None}
    return annotated, spans, right


@pytest.mark.parametrize("missing", [False, True])
def test_nextgqa(seed, missing):
    """Where a span is missing, the script's own numbers are of the others; ours are of all, the missing ones 0."""
    samples, said = questions(random.Random(seed), 2000)
    if not missing:
        said = [(span or (1.0, 2.0), letter) for span, letter in said]
    expected, n = nextgqa(*loops(samples, said))
    assert (n < 2000) is missing
    found = scored(samples, said, "nextgqa")
    assert {name: 100 * found[name] * 2000 / n for name in expected} == pytest.approx(expected, abs=1e-6)
    assert found["n"] == 2000
    assert found["miou_merged"] <= found["miou"]


@pytest.mark.parametrize("missing", [False, True])
def test_rextime(seed, missing):
    """The script wants a window of every question: what isn't said is one that overlaps with nothing."""
    samples, said = questions(random.Random(seed), 2000)
    if not missing:
        said = [(span or (1.0, 2.0), letter) for span, letter in said]
    annotated, spans, right = loops(samples, said)
    assert (len(spans) < 2000) is missing
    expected = rextime(annotated, {key: spans.get(key, (900.0, 901.0)) for key in annotated}, right)
    found = scored(samples, said, "rextime")
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert {f"r1@{k / 20}" for k in range(6, 20)} <= set(expected)


def test_one_span_each_has_the_same_iou_under_every_convention(seed):
    samples, said = questions(random.Random(seed), 500)
    one = [(s, each) for s, each in zip(samples, said, strict=True) if len(s.spans) == 1]
    found = [scored(*zip(*one, strict=True), convention) for convention in ("plain", "nextgqa", "rextime")]
    assert found[0]["miou"] == pytest.approx(found[1]["miou"]) == pytest.approx(found[2]["miou"])
    assert found[1]["miou_merged"] == pytest.approx(found[0]["miou"])
