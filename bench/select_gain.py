"""Does the half that is picked by variance teach more than a random half? Demo data of which half was made useless."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from bench.cases.demo import metrics_of

Row = dict[str, Any]
ARMS = ("picked", "random")
DATA = ("useless", "noise")
"""Half of the samples say their answer or ask for what isn't there; or a quarter of the labels are wrong."""


def spoiled(rows: Sequence[Row], what: str, seed: int) -> tuple[list[Row], set[str]]:
    """The rows, of which some (their ids are the second) were made useless, or got wrong labels."""
    rng = random.Random(f"{what}-{seed}")
    share = 0.5 if what == "useless" else 0.25
    chosen = set(rng.sample(range(len(rows)), round(share * len(rows))))
    change = _useless if what == "useless" else _noise
    found = [change(row, rows, rng) if i in chosen else row for i, row in enumerate(rows)]
    return found, {rows[i]["id"] for i in chosen}


def _useless(row: Row, rows: Sequence[Row], rng: random.Random) -> Row:
    ways = [_told, _absent, *([_single] if row.get("options") and not row.get("spans") else [])]
    return rng.choice(ways)(row, rows, rng)


def _told(row: Row, _: Sequence[Row], __: random.Random) -> Row:
    """The answer stands in the question."""
    said = [row["answer"]] if row.get("answer") else []
    said += [f"{start:.1f} to {end:.1f}" for start, end in row.get("spans", ())]
    return row | {"question": f"{row['question']} ({', '.join(said)})"}


def _single(row: Row, _: Sequence[Row], __: random.Random) -> Row:
    """Always solvable: beside the answer there is one option only, which is never right."""
    return row | {"options": [row["options"]["ABCDEFGH".index(row["answer"])], "nothing at all"], "answer": "A"}


def _absent(row: Row, rows: Sequence[Row], rng: random.Random) -> Row:
    """The event isn't in the video: that is another clip, without any of the events."""
    events = {moment["text"] for moment in row["timeline"]}
    end = max((span[1] for span in row.get("spans", ())), default=0.0)
    others = [
        other
        for other in rng.sample(list(rows), min(len(rows), 200))
        if other["duration"] >= end and events.isdisjoint(moment["text"] for moment in other["timeline"])
    ]
    if not others:
        return _told(row, rows, rng)
    shown = {key: others[0][key] for key in ("video", "duration", "timeline", "reasoning")}
    kept = {k: v for k, v in row.items() if k not in ("images", "boxes", "instances", "object_id", "progress")}
    return kept | shown


def _noise(row: Row, _: Sequence[Row], rng: random.Random) -> Row:
    """Another span of the same length, another letter."""
    changed = dict(row)
    if row.get("spans"):
        start, end = row["spans"][0]
        places = [float(t) for t in range(int(row["duration"] - (end - start)) + 1) if abs(t - start) >= 1]
        begin = rng.choice(places or [start])
        changed["spans"] = [[begin, begin + end - start]]
    if row.get("answer"):
        changed["answer"] = rng.choice([x for x in "ABCDEFGH"[: len(row["options"])] if x != row["answer"]])
    return changed


@dataclass
class Seed:
    """All arms of one seed on one kind of data. What is finished in ``folder`` isn't run again.

    Args:
        until: ``monotonic()`` after which no arm begins.
    """

    work: Path
    seed: int
    what: str
    recipe: str
    settings: dict[str, str]
    until: float
    values: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.work / f"{self.what}-{self.seed}"

    def run(self) -> dict[str, dict[str, float]]:
        """Values by arm and metric, of the arms that there was time for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        data = self._data()
        if not self._step("sft", lambda: self._trained("sft", data, ["sft"], self._tiny())):
            return self.values
        model = self.folder / "sft" / "checkpoints" / "sft-final"
        if not self._step("scoring", lambda: self._scored(data, model)):
            return self.values
        self._step("choice", lambda: self._picked(data))
        for arm in ARMS:
            self._step(arm, lambda arm=arm: self._trained(arm, self.folder / f"{arm}.jsonl", ["grpo"], model))  # type: ignore[misc]
        return self.values

    def _step(self, name: str, do: Callable[[], dict[str, float]]) -> bool:
        """Whether it is done, now or before; its values are kept beside its files."""
        done = self.folder / f"{name}.json"
        if not done.exists():
            if monotonic() > self.until:
                return False
            done.write_text(json.dumps(do(), indent=1) + "\n", encoding="utf-8")
        self.values[name] = json.loads(done.read_text(encoding="utf-8"))
        return True

    def _data(self) -> Path:
        from vrlt_fast.data.demo import build_demo

        if not (self.work / "data").exists():
            build_demo(self.work / "data", seed=0)
        path = self.folder / "train.jsonl"
        if not path.exists():
            lines = (self.work / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
            rows, ids = spoiled([json.loads(line) for line in lines], self.what, self.seed)
            (self.folder / "spoiled.json").write_text(json.dumps(sorted(ids)), encoding="utf-8")
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def _tiny(self) -> Path:
        from vrlt_fast.model.tiny import build_tiny

        out = self.folder / "tiny-model"
        shutil.rmtree(out, ignore_errors=True)
        return build_tiny(out, train_jsonl=self.folder / "train.jsonl", seed=self.seed)

    def _config(self, name: str, data: Path, model: Path, **overrides: Any) -> Any:
        from vrlt_fast.config_load import load_config
        from vrlt_fast.recipe import recipe_path

        given: dict[str, Any] = {
            "model.name": str(model),
            "data.train": str(data),
            "data.eval": str(self.work / "data" / "heldout.jsonl"),
            "data.root": str(self.work / "data"),
            "train.out": str(self.folder / name),
            "train.seed": self.seed,
            "eval.samples": 0,
            "eval.start": False,
            "checkpoint.every": 0,
            "select.repeats": 8,
            "select.first": 4,
        }
        return load_config([recipe_path(self.recipe)], list((given | self.settings | overrides).items()))

    def _trained(self, name: str, data: Path, stages: Sequence[str], model: Path) -> dict[str, float]:
        from vrlt_fast.train.trainer import train

        shutil.rmtree(self.folder / name, ignore_errors=True)
        run = train(self._config(name, data, model, **{"train.stages": tuple(stages)}))
        return metrics_of(run, stages[-1])

    def _scored(self, data: Path, model: Path) -> dict[str, float]:
        """Scores in waves, and all at once, of the same responses: what waves cost and save, in time and decisions."""
        from vrlt_fast.select.policies import classes
        from vrlt_fast.select.score import score_samples
        from vrlt_fast.select.scores import read_tables

        found: dict[str, float] = {}
        decided = {}
        for name, first in (("waves", 4), ("whole", 0)):
            out = self.folder / f"{name}.jsonl"
            out.unlink(missing_ok=True)
            spent = score_samples(self._config("unused", data, model, **{"select.first": first}), out)
            found |= {f"{name}_seconds": spent.seconds, f"{name}_responses": float(spent.drawn)}
            table = read_tables([out])
            decided[name] = dict(zip(table.ids, classes(table.shares, 8).tolist(), strict=True))
        changed = sum(decided["waves"][name] != kind for name, kind in decided["whole"].items())
        found["changed"] = changed / len(decided["whole"])
        found["saved"] = 1 - found["waves_responses"] / found["whole_responses"]
        found["saved_seconds"] = 1 - found["waves_seconds"] / found["whole_seconds"]
        return found

    def _picked(self, data: Path) -> dict[str, float]:
        """Half of the samples, by variance and at random, and how much of them is spoiled."""
        from vrlt_fast.select.pick import pick_file
        from vrlt_fast.select.policies import Choice

        spoiled_ids = set(json.loads((self.folder / "spoiled.json").read_text(encoding="utf-8")))
        found = {}
        for arm, policy in zip(ARMS, ("variance", "random"), strict=True):
            out = self.folder / f"{arm}.jsonl"
            choice = Choice("variance" if policy == "variance" else "random", size=0.5, seed=self.seed)
            pick_file([self.folder / "waves.jsonl"], data, out, choice, report=self.folder / f"{arm}.html")
            ids = [json.loads(line)["id"] for line in out.read_text(encoding="utf-8").splitlines()]
            found[f"{arm}_spoiled"] = sum(name in spoiled_ids for name in ids) / len(ids)
        return found
