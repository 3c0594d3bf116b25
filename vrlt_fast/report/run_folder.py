"""Reads a run folder for the report: everything that is there, in one object; what is missing is empty."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrlt_fast.errors import Problem, SetupError
from vrlt_fast.report.metrics import COMPLETIONS, METRICS, Record, read_jsonl_tail, read_jsonl_tolerant
from vrlt_fast.report.numbers import ordered


@dataclass(frozen=True)
class RunFolder:
    """A run as the report sees it.

    ``train`` maps a stage to its ``train`` records by step, ``evals`` a label to its ``eval`` record, ``answers`` a
    label to the lines of its eval file by question id; labels are in the order of the run. ``completions`` holds the
    last responses only.
    """

    name: str
    train: dict[str, list[Record]]
    evals: dict[str, Record]
    answers: dict[str, dict[str, Record]]
    completions: list[Record]
    config_text: str
    config: dict[str, Any]
    versions: dict[str, Any]
    video_root: Path

    @property
    def labels(self) -> list[str]:
        return ordered([*self.evals, *self.answers])


def load_run(run_dir: Path) -> RunFolder:
    """Raises SetupError VRLT-R04 when metrics.jsonl is missing or a file is damaged."""
    try:
        records = read_jsonl_tolerant(run_dir / METRICS)
    except OSError as error:
        raise SetupError(
            Problem(
                "VRLT-R04",
                f"there is no readable {METRICS}",
                str(run_dir),
                error.strerror or str(error),
                "name the folder that a training run wrote: vrlt report runs/NAME",
            )
        ) from error
    train: dict[str, dict[int, Record]] = {}
    evals: dict[str, Record] = {}
    for record in records:
        if record.get("kind") == "train" and isinstance(record.get("step"), int):
            train.setdefault(str(record.get("stage")), {})[record["step"]] = record
        elif record.get("kind") == "eval":
            evals[str(record.get("label"))] = record
    answers = {path.stem: _answers(path) for path in sorted((run_dir / "eval").glob("*.jsonl"))}
    config_text = _text(run_dir / "config.resolved.toml")
    config = _config(config_text)
    return RunFolder(
        name=run_dir.resolve().name,
        train={stage: [steps[step] for step in sorted(steps)] for stage, steps in train.items()},
        evals={label: evals[label] for label in ordered(list(evals))},
        answers={label: answers[label] for label in ordered(list(answers))},
        completions=read_jsonl_tail(run_dir / COMPLETIONS) if (run_dir / COMPLETIONS).exists() else [],
        config_text=config_text,
        config=config,
        versions=_versions(run_dir / "versions.json"),
        video_root=_video_root(config),
    )


def _answers(path: Path) -> dict[str, Record]:
    return {str(line.get("id")): line for line in read_jsonl_tolerant(path)}


def _text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.exists() else ""


def _config(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _versions(path: Path) -> dict[str, Any]:
    try:
        versions = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return versions if isinstance(versions, dict) else {}


def _video_root(config: dict[str, Any]) -> Path:
    data = config.get("data")
    data = data if isinstance(data, dict) else {}
    if data.get("root"):
        return Path(str(data["root"])).resolve()
    return Path(str(data.get("eval") or ".")).resolve().parent
