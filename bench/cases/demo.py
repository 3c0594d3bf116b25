"""demo: does GRPO with the dual reward teach the tiny model, and what of it is not mere sharpening?

For each seed (model initialisation, data order, sampling): the demo recipe, then from the end of its SFT stage two
controls that get the CPU time of the GRPO stage: more SFT, and GRPO with shuffled rewards. The SFT policy is also
sampled at lower temperatures. All on every held-out question, 4 sampled answers each at temperature 1.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import Claim, Record, median_of, summarize, write_result

METRICS = {
    "sampled_tiou": ("sampled", "all", "tiou"),
    "greedy_tiou": ("greedy", "all", "tiou"),
    "sampled_well_formed": ("sampled", "all", "well_formed"),
    "greedy_well_formed": ("greedy", "all", "well_formed"),
    "sampled_accuracy": ("sampled", "videoqa", "accuracy"),
    "greedy_accuracy": ("greedy", "videoqa", "accuracy"),
}
SHARPER = (0.5, 0.25)
SAMPLED = "mean tIoU of answers sampled at temperature 1"


def run(argv: Sequence[str]) -> None:
    """Run all arms and write bench/results/demo.cpu.json (or --out)."""
    parser = argparse.ArgumentParser(prog="python -m bench demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/bench-demo"),
        help="folder for data and runs; what is finished there is not run again",
    )
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    options = parser.parse_args(argv)
    finished = [_seed(options, seed) for seed in options.seeds]
    records = [
        r for seed, values in zip(options.seeds, finished, strict=True) for r in _records(f"seed={seed}", values)
    ]
    write_result("demo", "cpu", records, claims, seed=list(options.seeds), path=options.out)


def _seed(options: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    done = options.work / f"seed{seed}.json"
    if not done.exists():
        values = DemoSeed(options, seed).run()
        done.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    loaded: dict[str, dict[str, float]] = json.loads(done.read_text(encoding="utf-8"))
    return loaded


@dataclass
class DemoSeed:
    """All arms of one seed."""

    options: argparse.Namespace
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.options.work) / f"seed{self.seed}"

    def run(self) -> dict[str, dict[str, float]]:
        """Values by arm and metric."""
        from vrlt_fast.data.demo import build_demo
        from vrlt_fast.model.tiny import build_tiny

        data = Path(self.options.work) / "data"
        if not data.exists():
            build_demo(data, seed=0)
        build_tiny(self.folder / "tiny-model", train_jsonl=data / "train.jsonl", seed=self.seed)
        main = self.train("grpo", "grpo", model=self.folder / "tiny-model")
        sft = main / "checkpoints" / "sft-final"
        spent = _cpu_seconds(main, "grpo")
        each = statistics.median(_per_step(main, "sft"))
        steps = round(spent / each)
        more = self.train("more_sft", "sft", model=sft, stages=["sft"], sft_steps=steps)
        shuffled = self.train("shuffled", "grpo", model=sft, stages=["grpo"], shuffle=True)
        values = {arm: metrics_of(main, arm) for arm in ("sft", "grpo")}
        values["more_sft"] = metrics_of(more, "sft") | {"cpu_seconds": _cpu_seconds(more, "sft")}
        values["shuffled"] = metrics_of(shuffled, "grpo") | {"cpu_seconds": _cpu_seconds(shuffled, "grpo")}
        values["grpo"] |= {"cpu_seconds": spent}
        values |= self.extra(main)
        return values

    def train(self, name: str, last: str, **how: Any) -> Path:
        """The run folder of an arm whose last stage is ``last``: the finished run that is there, or a new one."""
        from vrlt_fast.train.trainer import train

        if (self.folder / name / "eval" / f"{last}.jsonl").exists():
            return self.folder / name
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return train(self.config(name, **how))

    def config(
        self, name: str, *, model: Path, stages: Sequence[str] = (), sft_steps: int = 0, shuffle: bool = False
    ) -> Any:
        from vrlt_fast.config_load import load_config
        from vrlt_fast.recipe import recipe_path

        data = Path(self.options.work) / "data"
        overrides: dict[str, Any] = {
            "model.name": str(model),
            "data.train": str(data / "train.jsonl"),
            "data.eval": str(data / "heldout.jsonl"),
            "train.out": str(self.folder / name),
            "train.seed": self.seed,
            "eval.samples": 0,
            "eval.start": False,
            "checkpoint.every": 0,
        }
        overrides |= {"train.stages": list(stages)} if stages else {}
        overrides |= {"sft.steps": sft_steps} if sft_steps else {}
        overrides |= {"reward.shuffle": True} if shuffle else {}
        overrides |= dict(pair.split("=", 1) for pair in self.options.set)
        return load_config([recipe_path(self.options.recipe)], list(overrides.items()))

    def extra(self, main: Path) -> dict[str, dict[str, float]]:
        """What the run itself doesn't evaluate: the SFT policy at lower temperatures, GRPO's on grey pictures,
        bounds.
        """
        from vrlt_fast.data.readers import read_jsonl
        from vrlt_fast.evals.metrics import best_constant_span
        from vrlt_fast.evals.run import evaluate
        from vrlt_fast.model.load import load_model
        from vrlt_fast.video.alter import grey
        from vrlt_fast.video.cache import ClipLoader

        values: dict[str, dict[str, float]] = {}
        data = Path(self.options.work) / "data"
        samples = read_jsonl(data / "heldout.jsonl")
        for stage in ("sft", "grpo"):
            config = self.config("unused", model=main / "checkpoints" / f"{stage}-final")
            lm = load_model(config.model)
            loader = ClipLoader(config.video, lm.info.geometry)
            if stage == "sft":
                result = evaluate(lm, samples, loader, config, root=data, temperatures=SHARPER)
                for t, kind in zip(SHARPER, ("sampled", f"sampled@{SHARPER[1]}"), strict=True):
                    values[f"sft_t{t}"] = _metrics(result.metrics, only="sampled", kind=kind)
            else:
                result = evaluate(lm, samples, loader, config, root=data, alter=grey)
                values["grpo_grey"] = _metrics(result.metrics)
        values["constant"] = {"greedy_tiou": best_constant_span(samples)[1]}
        before, after = (_grounded_tiou(main / "eval" / f"{label}.jsonl") for label in ("sft", "grpo"))
        low, high = bootstrap([b - a for a, b in zip(before, after, strict=True)], seed=self.seed)
        values["paired"] = {"gain_low": low, "gain_high": high}
        for stage, name in (("sft", "entropy_first"), ("grpo", "entropy_last")):
            entropies = [r["entropy"] for r in _train_records(main, "grpo")]
            part = entropies[:5] if stage == "sft" else entropies[-5:]
            values["paired"][name] = statistics.fmean(part)
        return values


def _train_records(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "train" and r["stage"] == stage]


def _per_step(run_dir: Path, stage: str) -> list[float]:
    return [r["cpu_seconds"] for r in _train_records(run_dir, stage)]


def _cpu_seconds(run_dir: Path, stage: str) -> float:
    return sum(_per_step(run_dir, stage))


def metrics_of(run_dir: Path, label: str) -> dict[str, float]:
    """The values of METRICS in the last evaluation of that label in a run folder."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [r for r in map(json.loads, lines) if r["kind"] == "eval" and r["label"] == label]
    return _metrics(found[-1]["metrics"])


def _metrics(metrics: dict[str, Any], only: str = "", kind: str = "") -> dict[str, float]:
    """The values of METRICS; ``only`` those of greedy or of sampled answers, ``kind`` another name under which they
    stand.
    """
    wanted = {name: where for name, where in METRICS.items() if only in ("", where[0])}
    return {name: metrics[kind or group][task][metric] for name, (group, task, metric) in wanted.items()}


def _grounded_tiou(path: Path) -> list[float]:
    """Mean tIoU of the sampled answers, a question with spans each."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [statistics.fmean(a["tiou"] for a in row["sampled"]) for row in rows if row["spans"]]


def bootstrap(differences: Sequence[float], *, seed: int, rounds: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, by resampling questions."""
    rng = random.Random(seed)
    means = sorted(statistics.fmean(rng.choices(differences, k=len(differences))) for _ in range(rounds))
    return means[int(0.025 * rounds)], means[int(0.975 * rounds) - 1]


def _records(shape: str, values: dict[str, dict[str, float]]) -> list[Record]:
    units = {"cpu_seconds": "s", "entropy_first": "nat", "entropy_last": "nat"}
    return [
        summarize(arm, shape, metric, units.get(metric, "share"), [value])
        for arm, metrics in values.items()
        for metric, value in metrics.items()
    ]


def claims(records: list[Record]) -> list[Claim]:
    """Aggregates are the worst seed's."""
    shapes = sorted({r.shape for r in records})

    def value(metric: str, arm: str) -> list[float]:
        return [median_of(records, metric=metric, arm=arm, shape=shape) for shape in shapes]

    def gain(metric: str, over: str, arm: str = "grpo") -> list[float]:
        return [a - b for a, b in zip(value(metric, arm), value(metric, over), strict=True)]

    sharper = [max(pair) for pair in zip(*(value("sampled_tiou", f"sft_t{t}") for t in SHARPER), strict=True)]
    over_sharper = [a - b for a, b in zip(value("sampled_tiou", "grpo"), sharper, strict=True)]
    at_least = [
        ("miou_gain", f"{SAMPLED}, GRPO over SFT", gain("sampled_tiou", "sft"), 0.08),
        ("gain_interval", "lower end of its paired 95 % interval", value("gain_low", "paired"), 0.0),
        ("greedy_change", "greedy mean tIoU, GRPO over SFT", gain("greedy_tiou", "sft"), -0.01),
        ("well_formed", "well-formed sampled answers after GRPO", value("sampled_well_formed", "grpo"), 0.95),
        ("accuracy_change", "sampled VideoQA accuracy, GRPO over SFT", gain("sampled_accuracy", "sft"), -0.03),
        ("greedy_accuracy_change", "greedy VideoQA accuracy, GRPO over SFT", gain("greedy_accuracy", "sft"), -0.03),
        ("over_more_sft", f"{SAMPLED}, GRPO over more SFT of the same CPU time", gain("sampled_tiou", "more_sft"), 0.0),
        ("over_sharpening", f"{SAMPLED}, GRPO over SFT at its best of temperatures 0.5 and 0.25", over_sharper, 0.0),
        ("over_constant", "greedy mean tIoU, GRPO over the best constant span", gain("greedy_tiou", "constant"), 0.0),
        ("blind_drop", "greedy mean tIoU after GRPO lost on grey frames", gain("greedy_tiou", "grpo_grey"), 0.15),
    ]
    at_most = [
        (
            "shuffled_gain",
            f"control: {SAMPLED}, GRPO with shuffled rewards over SFT",
            gain("sampled_tiou", "sft", "shuffled"),
            0.02,
        ),
        (
            "blind_accuracy",
            "greedy VideoQA accuracy after GRPO on grey frames (chance 0.26)",
            value("greedy_accuracy", "grpo_grey"),
            0.40,
        ),
    ]
    least = [
        Claim(f"demo.{name}", f"{text}, least of all seeds", min(of), target) for name, text, of, target in at_least
    ]
    most = [
        Claim(f"demo.{name}", f"{text}, most of all seeds", max(of), target, "<=") for name, text, of, target in at_most
    ]
    return least + most


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``arms``: the metrics of each arm, a column a seed."""
    records = [Record(**r) for r in result["records"]]
    shapes = sorted({r.shape for r in records})
    rows = [
        ("after SFT", "sft"),
        ("after GRPO", "grpo"),
        ("control: more SFT instead", "more_sft"),
        ("control: GRPO, rewards shuffled", "shuffled"),
        ("SFT policy at temperature 0.5", "sft_t0.5"),
        ("SFT policy at temperature 0.25", "sft_t0.25"),
        ("after GRPO, frames grey", "grpo_grey"),
        ("best constant span", "constant"),
    ]
    head = "| | sampled mean tIoU | greedy mean tIoU | VideoQA accuracy, greedy | well-formed, sampled |"
    lines = [head, "|---|---|---|---|---|"]
    for label, arm in rows:
        cells = [
            _cell(records, shapes, arm, m)
            for m in ("sampled_tiou", "greedy_tiou", "greedy_accuracy", "sampled_well_formed")
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return {"arms": "\n".join(lines)}


def _cell(records: Sequence[Record], shapes: Sequence[str], arm: str, metric: str) -> str:
    values = [r.median for s in shapes for r in records if (r.arm, r.metric, r.shape) == (arm, metric, s)]
    return " / ".join(f"{v:.3f}" for v in values) or "-"
