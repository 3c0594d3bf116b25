"""Chooses the held-out questions for the report: gains, typical ones and failures, by rule and seed, not by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vrlt_fast.report.metrics import Record
from vrlt_fast.report.numbers import number
from vrlt_fast.report.run_folder import RunFolder

KINDS = {"improved": "largest gains", "typical": "typical", "failed": "lowest scores"}
_TASKS = ("grounding", "grounded_qa", "videoqa")
_OWN = ("score", "box_iou", "viou", "mra")
_PER_KIND = 2
_LEAST = 12


@dataclass(frozen=True)
class Shown:
    """A question with its lines in the eval files ``before`` (may be missing) and ``after``, and why it was chosen."""

    kind: str
    after: Record
    before: Record | None
    score: float
    gain: float


def score(line: Record) -> float:
    """How good the answers to one question are, 0..1: mean over greedy and sampled of tIoU, correctness and the task's
    own score, each once.

    The greedy answer counts as much as all sampled ones together.
    """
    sampled = [_answer_score(line, answer) for answer in line.get("sampled") or [] if isinstance(answer, dict)]
    greedy = [_answer_score(line, line["greedy"])] if isinstance(line.get("greedy"), dict) else []
    halves = [sum(values) / len(values) for values in (greedy, sampled) if values]
    return sum(halves) / len(halves) if halves else 0.0


def _answer_score(line: Record, answer: Record) -> float:
    values = []
    if line.get("spans"):
        values.append(number(answer.get("tiou")) or 0.0)
    if line.get("options") or isinstance(answer.get("correct"), bool):
        values.append(1.0 if answer.get("correct") is True else 0.0)
    own = answer.get("values")
    if isinstance(own, dict):
        values += [value for name in _OWN if (value := number(own.get(name))) is not None]
    return sum(values) / len(values) if values else 0.0


def choose(run: RunFolder, seed: int = 0) -> list[Shown]:
    """Per task: two of the largest gains, two around the median score, two of the lowest scores; at least 12 in all.

    Ties and the choice inside each tenth go by the seed. A set with fewer than 12 questions is shown whole.
    """
    labels = [label for label, lines in run.answers.items() if lines]
    if not labels:
        return []
    before = run.answers[labels[-2]] if len(labels) > 1 else {}
    every: dict[str, list[Shown]] = {}
    for name, line in run.answers[labels[-1]].items():
        old = before.get(name)
        now = score(line)
        every.setdefault(str(line.get("task")), []).append(Shown("", line, old, now, now - score(old) if old else 0.0))
    per_kind = max(_PER_KIND, -(-_LEAST // (len(KINDS) * len(every))))
    tasks = sorted(every, key=lambda task: (_TASKS.index(task) if task in _TASKS else len(_TASKS), task))
    chosen = [shown for task in tasks for shown in _of_task(every[task], per_kind, random.Random(seed))]
    return _filled(chosen, [shown for task in every.values() for shown in task])


def _of_task(questions: Sequence[Shown], count: int, rng: random.Random) -> list[Shown]:
    left = list(questions)
    rng.shuffle(left)
    median = sorted(shown.score for shown in left)[len(left) // 2]
    picked: list[Shown] = []
    for kind in KINDS:
        if kind == "improved":
            pool = sorted((shown for shown in left if shown.gain > 0), key=lambda shown: -shown.gain)
        elif kind == "typical":
            pool = sorted(left, key=lambda shown: abs(shown.score - median))
        else:
            pool = sorted(left, key=lambda shown: (shown.score, shown.gain))
        pool = pool[: max(count, len(questions) // 10)]
        for shown in rng.sample(pool, min(count, len(pool))):
            left.remove(shown)
            picked.append(Shown(kind, shown.after, shown.before, shown.score, shown.gain))
    return picked


def _filled(chosen: list[Shown], every: Sequence[Shown]) -> list[Shown]:
    """Tops up to 12 with further questions where tasks are too small for their share."""
    have = {str(shown.after.get("id")) for shown in chosen}
    for shown in every:
        if len(chosen) >= _LEAST:
            break
        if str(shown.after.get("id")) not in have:
            chosen.append(Shown("typical", shown.after, shown.before, shown.score, shown.gain))
    return chosen


def verdict(shown: Shown) -> str:
    """The honest word for a card: a chosen failure that is fine after all isn't called one."""
    if shown.before is not None and shown.gain < -0.1:
        return "got worse"
    if shown.kind == "failed":
        return "failed" if shown.score < 0.5 else "weakest of its task"
    return shown.kind
