"""The evaluation of a suite: metrics over the questions and over its groups, what they were made with, as files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrlt_fast.config import Config
from vrlt_fast.data.sample import Sample
from vrlt_fast.errors import Problem
from vrlt_fast.evals.metrics import Scored, score, summarise
from vrlt_fast.evals.run import Evaluation, answer_all, held_out
from vrlt_fast.evals.tasks import Suite, check_tasks, group_of
from vrlt_fast.files import storage_errors, write_lines, write_text
from vrlt_fast.rewards.base import Response

RESULTS, PREDICTIONS = "results.json", "predictions.jsonl"
Values = dict[str, float]


@dataclass(frozen=True)
class SuiteResult:
    """``metrics`` by kind of answers (greedy, sampled), over all counted questions and by group: ``n`` answers and the
    suite's metrics, shares in 0..1. ``failed`` of ``n`` questions weren't answered, as their videos can't be read;
    they are in the metrics, as wrong, where ``failed_counted``.
    """

    suite: Suite
    n: int
    failed: int
    failed_counted: bool
    metrics: dict[str, Values]
    groups: dict[str, dict[str, Values]]
    evaluation: Evaluation

    @property
    def problems(self) -> list[Problem]:
        """Why questions failed."""
        return [problem for error in self.evaluation.failed for problem in error.problems]

    def to_json(self) -> dict[str, Any]:
        """Numbers of results.json."""
        return {
            "suite": self.suite.name,
            "title": self.suite.title,
            "source": self.suite.source,
            "columns": list(self.suite.columns),
            "n": self.n,
            "n_failed": self.failed,
            "failed_counted": self.failed_counted,
            "metrics": self.metrics,
            "groups": self.groups,
            "failed": [{"code": p.code, "where": p.where, "what": p.what} for p in self.problems],
        }

    def rows(self) -> list[tuple[str, Values]]:
        """Rows of the table: a kind of answers, then its groups."""
        out = []
        for kind, values in self.metrics.items():
            out.append((kind, values))
            out += [(f"  {name}", by_kind[kind]) for name, by_kind in self.groups.items() if kind in by_kind]
        return out


def run_suite(
    chosen: Suite,
    config: Config,
    *,
    count_failed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SuiteResult:
    """Answer the questions of ``config.data.eval`` with the model folder ``config.model.name``.

    Raises:
        VrltError: as the readers and the loader; C04 where a question isn't of the suite's task. Videos that can't be
            read are in the result.
    """
    samples = held_out(config)
    check_tasks(chosen, samples)
    return assess(chosen, samples, answer_all(config, samples, progress), config, count_failed=count_failed)


def assess(
    chosen: Suite, samples: Sequence[Sample], evaluation: Evaluation, config: Config, *, count_failed: bool
) -> SuiteResult:
    """Metrics of an evaluation as the suite defines them."""
    answered = {row["id"] for row in evaluation.rows}
    lost = [sample for sample in samples if sample.id not in answered]
    scored = {kind: list(answers) for kind, answers in evaluation.scored.items()}
    if count_failed:
        for kind in scored or ("greedy",):
            each = 1 if kind == "greedy" else config.eval.responses
            scored.setdefault(kind, []).extend(nothing_said(sample) for sample in lost for _ in range(each))
    present = {group_of(one.source) for answers in scored.values() for one in answers} - {""}
    names = [name for name in chosen.groups if name in present] + sorted(present - set(chosen.groups))
    groups = {
        name: {
            kind: _values(chosen, of_group)
            for kind, answers in scored.items()
            if (of_group := [one for one in answers if group_of(one.source) == name])
        }
        for name in names
    }
    metrics = {kind: _values(chosen, answers) for kind, answers in scored.items()}
    return SuiteResult(chosen, len(samples), len(lost), count_failed, metrics, groups, evaluation)


def nothing_said(sample: Sample) -> Scored:
    """The score of an answer that there isn't."""
    return score(Response("", 0, "stop"), sample, think=False)


def _values(chosen: Suite, scored: Sequence[Scored]) -> Values:
    return summarise(scored, chosen.convention)[chosen.task]


def make_folder(out: Path) -> None:
    """Make the folder of results where it is missing. Raises SetupError R02 or R03."""
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)


def write_results(result: SuiteResult, out: Path, config: Config, *, versions: Mapping[str, str]) -> None:
    """Write results.json and predictions.jsonl into the folder ``out``. Raises SetupError R02 or R03."""
    data = Path(config.data.eval)
    said = {
        **result.to_json(),
        "model": config.model.name,
        "data": {"file": str(data), "sha256": hashlib.sha256(data.read_bytes()).hexdigest()},
        "versions": dict(versions),
        "config": config.model_dump(mode="json"),
    }
    write_lines(out / PREDICTIONS, result.evaluation.rows)
    write_text(out / RESULTS, json.dumps(said, indent=1, ensure_ascii=False) + "\n")
