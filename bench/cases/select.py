"""select: what early stopping saves, what picking costs, and whether the picked half of the data teaches more.

``--parts`` says which are measured; a result that exists keeps the records of the others. ``gain`` trains (hours on two
cores): it takes up what is finished in ``--work``, and begins nothing after ``--minutes``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from bench.harness import RESULTS, BenchError, Claim, Record, median_of, summarize, write_result
from bench.select_files import write_large
from bench.select_gain import DATA, Seed
from bench.select_stop import MIXTURE, simulate

SAMPLES = 490_000
REAL = "mixed tasks"
PARTS = ("stop", "pick", "gain")


def run(argv: Sequence[str]) -> None:
    """Write bench/results/select.cpu.json (or --out)."""
    parser = argparse.ArgumentParser(prog="python -m bench select")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["stop", "pick"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=240.0, help="of gain: no arm begins later")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-select"), help="of gain: data and runs")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of pick")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(argv)
    path = options.out or RESULTS / "select.cpu.json"
    records = [r for r in _before(path) if _part_of(r) not in options.parts]
    if "stop" in options.parts:
        records += stop_records(options.seeds)
    if "pick" in options.parts:
        records += pick_records(options.samples, options.seeds)
    if "gain" in options.parts:
        records += gain_records(options)
    write_result("select", "cpu", records, claims, seed=list(options.seeds), path=path)


def _before(path: Path) -> list[Record]:
    if not path.exists():
        return []
    return [Record(**record) for record in json.loads(path.read_text(encoding="utf-8"))["records"]]


def _part_of(record: Record) -> str:
    return record.arm.partition(": ")[0]


def stop_records(seeds: Sequence[int]) -> list[Record]:
    """The rule with 4 + 4 responses on simulated samples: the mixture, and right-or-wrong questions of which a growing
    share is never answered (where the rule is at its worst).
    """
    shapes = {REAL: MIXTURE}
    shapes |= {f"right or wrong, {never:.0%} never": {"videoqa": (1.0, never, 0.0, (1.0, 1.0))} for never in _NEVER}
    records = []
    for shape, mixture in shapes.items():
        found = [simulate(mixture, samples=20_000, repeats=8, first=4, error=0.02, seed=seed) for seed in seeds]
        for metric in ("saved", "changed", "same_half"):
            values = [getattr(each, metric) for each in found]
            records.append(summarize("stop: 4 + 4", shape, metric, "share", values))
    return records


_NEVER = (0.0, 0.3, 0.6, 0.9)


def pick_records(samples: int, seeds: Sequence[int]) -> list[Record]:
    """``vrlt select pick`` with a report, in a process of its own."""
    seconds, memory = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scores, data = write_large(folder, samples, seed=0)
        for seed in seeds:
            words = ["select", "pick", str(scores), "--data", str(data), "--out", str(folder / "picked.jsonl")]
            words += ["--report", str(folder / "page.html"), "--policy", "buckets", "--quota", "equal"]
            words += ["--count", str(samples // 15), "--seed", str(seed)]
            begin = perf_counter()
            ended = subprocess.run([sys.executable, "-c", _PEAK, *words], check=False, capture_output=True, text=True)
            seconds.append(perf_counter() - begin)
            if ended.returncode:
                raise BenchError(f"vrlt {' '.join(words)} ended with {ended.returncode}: {ended.stderr}")
            memory.append(float(ended.stderr.split()[-1]) * 1024)
    shape = f"{samples} samples"
    return [
        summarize("pick: command", shape, "seconds", "s", seconds),
        summarize("pick: command", shape, "memory", "B", memory),
    ]


_PEAK = (
    "import resource, sys\nfrom vrlt_fast.cli import main\ncode = main(sys.argv[1:])\n"
    "sys.stderr.write(f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\\n')\nraise SystemExit(code)"
)


def gain_records(options: argparse.Namespace) -> list[Record]:
    """What is finished of the training arms, in ``--minutes`` and before."""
    until = monotonic() + 60 * options.minutes
    settings = dict(pair.split("=", 1) for pair in options.set)
    records = []
    for what in DATA:
        for seed in options.seeds:
            values = Seed(options.work, seed, what, options.recipe, settings, until).run()
            records += [
                summarize(f"gain: {arm}", f"{what}, seed={seed}", metric, _unit(metric), [value])
                for arm, metrics in values.items()
                for metric, value in metrics.items()
            ]
    return records


def _unit(metric: str) -> str:
    return "s" if metric.endswith("seconds") and "saved" not in metric else "1" if "responses" in metric else "share"


def gains(records: Sequence[Record], metric: str, what: str = DATA[0]) -> list[float]:
    """Picked less random, a seed whose two arms are finished each."""
    found: dict[str, dict[str, float]] = {}
    for r in records:
        if r.metric == metric and r.shape.startswith(f"{what}, ") and r.arm in ("gain: picked", "gain: random"):
            found.setdefault(r.shape, {})[r.arm] = r.median
    return [arms["gain: picked"] - arms["gain: random"] for arms in found.values() if len(arms) == 2]


def claims(records: list[Record]) -> list[Claim]:
    """Of what was measured; that the picked half teaches more is claimed of three seeds or more."""
    made = []
    kinds = {_part_of(r) for r in records}
    if "stop" in kinds:
        saved, changed = (median_of(records, metric=m, arm="stop: 4 + 4", shape=REAL) for m in ("saved", "changed"))
        made.append(Claim("select.cpu.stop", "simulated mixed tasks, 4 + 4: responses saved by stopping", saved, 0.3))
        worst = max(r.p80 for r in records if r.arm == "stop: 4 + 4" and r.metric == "changed")
        made.append(Claim("select.cpu.stop_changed", "the same: decisions that it changes", changed, 0.02, "<="))
        made.append(Claim("select.cpu.stop_worst", "decisions changed, most of all simulations", worst, 0.02, "<="))
    for r in records:
        if r.arm == "pick: command" and r.shape == f"{SAMPLES} samples":
            seconds = r.metric == "seconds"
            text = f"vrlt select pick of {SAMPLES} samples, with a report: {'seconds' if seconds else 'GB'}"
            value, target = (r.p80, 30.0) if seconds else (r.p80 / 1e9, 2.0)
            made.append(Claim(f"select.cpu.pick_{r.metric}", text, value, target, "<="))
    if len(found := gains(records, "sampled_tiou")) >= 3:
        text = "half of the demo data useless: held-out mean tIoU of sampled answers, picked half over a random one"
        made.append(Claim("select.cpu.gain", f"{text}, least of {len(found)} seeds", min(found), 0.0, ">"))
        demo = [r.median for r in records if r.arm == "gain: scoring" and r.metric == "saved" and DATA[0] in r.shape]
        made.append(Claim("select.cpu.demo_stop", "responses saved on that data, least of all seeds", min(demo), 0.3))
        demo = [r.median for r in records if r.arm == "gain: scoring" and r.metric == "changed" and DATA[0] in r.shape]
        made.append(Claim("select.cpu.demo_changed", "decisions changed there, most", max(demo), 0.02, "<="))
    return made


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``stop``: what stopping saves and changes, a row a simulation."""
    records = [Record(**r) for r in result["records"]]
    shapes = list(dict.fromkeys(r.shape for r in records if _part_of(r) == "stop"))
    if not shapes:
        return {}
    lines = ["| simulated samples | responses saved | decisions changed |", "|---|---|---|"]
    for shape in shapes:
        saved, changed = (
            median_of(records, metric=metric, arm="stop: 4 + 4", shape=shape) for metric in ("saved", "changed")
        )
        lines.append(f"| {shape} | {saved:.1%} | {changed:.2%} |")
    return {"stop": "\n".join(lines)}
