"""Bench front: result schema, claims recomputed from records, generated tables; all through ``python -m bench``."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness import BenchError, Claim, Record, check_schema, median_of, records_of, summarize

ROOT = Path(__file__).parents[2]

CASE = '''
"""Adds numbers."""

from __future__ import annotations

import argparse

from bench.harness import Claim, Record, median_of, summarize, write_result


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench adding")
    parser.add_argument("--values", type=float, nargs="+", required=True)
    values = parser.parse_args(argv).values
    records = [summarize("ours", "n=4", "time", "ms", values), summarize("theirs", "n=4", "time", "ms", [4.0, 4.0])]
    write_result("adding", "cpu", records, claims, seed=7)


def claims(records: list[Record]) -> list[Claim]:
    ratio = median_of(records, metric="time", arm="theirs") / median_of(records, metric="time", arm="ours")
    return [
        Claim("adding.cpu.speed", "our adding is at least twice as fast", ratio, 2.0),
        Claim("adding.cpu.dream", "our adding is at least 100 times as fast", ratio, 100.0),
    ]


def tables(result: dict) -> dict[str, str]:
    rows = [f"| {r['arm']} | {r['median']:g} {r['unit']} |" for r in result["records"]]
    return {"times": "\\n".join(["| arm | median |", "|---|---|", *rows])}
'''

README = """# A project

Before.

<!-- bench:adding:times -->
<!-- /bench -->

After.
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """A project of its own: our bench package with one case, measured, a README and a page with a table."""
    (tmp_path / "bench" / "cases").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for source in (ROOT / "bench").glob("*.py"):
        shutil.copy(source, tmp_path / "bench")
    (tmp_path / "bench" / "cases" / "adding.py").write_text(CASE)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs" / "speed.md").write_text(README.replace("bench:adding:", "bench:adding.cpu:"))
    assert bench(tmp_path, "adding", "--values", "1", "2", "3").returncode == 0
    return tmp_path


def bench(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    environment = os.environ | {"PYTHONPATH": str(project)}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def result_path(project: Path) -> Path:
    return project / "bench" / "results" / "adding.cpu.json"


def edit(path: Path, change) -> None:
    result = json.loads(path.read_text())
    change(result)
    path.write_text(json.dumps(result))


def test_result_file_has_the_schema(project):
    result = json.loads(result_path(project).read_text())
    assert list(result) == ["case", "device", "commit", "date", "versions", "seed", "records", "claims"]
    assert (result["case"], result["device"], result["seed"]) == ("adding", "cpu", 7)
    assert result["versions"]["python"].startswith("3.")
    ours = {
        "arm": "ours",
        "shape": "n=4",
        "metric": "time",
        "unit": "ms",
        "median": 2.0,
        "p20": 1.4,
        "p80": 2.6,
        "n": 3,
    }
    assert result["records"][0] == pytest.approx(ours)
    speed, dream = result["claims"]
    assert speed == {
        "id": "adding.cpu.speed",
        "statement": "our adding is at least twice as fast",
        "value": 2.0,
        "target": 2.0,
        "op": ">=",
        "holds": True,
    }
    assert dream["holds"] is False
    assert records_of(result)[1] == Record("theirs", "n=4", "time", "ms", 4.0, 4.0, 4.0, 2)


def test_claims_are_listed_with_what_falls_short(project):
    listed = bench(project, "claims")
    assert listed.returncode == 0
    speed, dream = (line for line in listed.stdout.splitlines() if line.startswith("adding."))
    assert "holds" in speed
    assert "FALLS SHORT" in dream
    assert "2 claims, 1 fall short" in listed.stdout
    assert bench(project, "claims", "--check").returncode == 0


EDITS = {
    "value": lambda r: r["claims"][0].update(value=2.1),
    "target": lambda r: r["claims"][1].update(target=1.0),
    "holds": lambda r: r["claims"][1].update(holds=True),
    "statement": lambda r: r["claims"][1].update(statement="easy"),
    "computed from the records": lambda r: r["claims"].pop(1),
    "computed 2.5": lambda r: r["records"][0].update(median=1.6),
    "expected one": lambda r: r["records"].pop(0),
    "twice": lambda r: r["records"].append(r["records"][0]),
    "quantiles": lambda r: r["records"][0].update(p20=2.5),
    "median is": lambda r: r["records"][0].update(median="2"),
    "not finite": lambda r: r["records"][0].update(median=float("nan")),
    "keys are not": lambda r: r["records"][0].update(note="fast"),
    "seed has the wrong type": lambda r: r.update(seed="7"),
    "unlike the file's name": lambda r: r.update(device="h200"),
    "no case": lambda r: r.update(case="missing"),
}


@pytest.mark.parametrize("words", EDITS)
def test_recomputation_catches_an_edit(project, words):
    path = result_path(project)
    edit(path, EDITS[words])
    if words == "no case":
        path.rename(path.with_name("missing.cpu.json"))
    checked = bench(project, "claims", "--check")
    assert checked.returncode == 1
    assert words in checked.stderr


def test_tables_are_written_once_and_edits_found(project):
    stale = bench(project, "tables", "--check")
    assert (stale.returncode, stale.stdout) == (1, "stale: README.md\nstale: docs/speed.md\n")
    assert (project / "README.md").read_text() == README
    assert bench(project, "tables").returncode == 0
    written = (project / "README.md").read_text()
    table = "| arm | median |\n|---|---|\n| ours | 2 ms |\n| theirs | 4 ms |\n"
    assert written == README.replace("<!-- /bench -->", f"{table}<!-- /bench -->")
    again = bench(project, "tables", "--check")
    assert (again.returncode, again.stdout) == (0, "")
    (project / "README.md").write_text(written.replace("| ours | 2 ms |", "| ours | 1 ms |"))
    assert bench(project, "tables", "--check").stdout == "stale: README.md\n"
    assert bench(project, "adding", "--values", "5").returncode == 0
    assert bench(project, "tables").stdout == "updated: README.md\nupdated: docs/speed.md\n"
    assert "| ours | 5 ms |" in (project / "README.md").read_text()


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ("<!-- bench:adding:times -->\nno end", "malformed"),
        ("<!-- bench:adding -->\n<!-- /bench -->", "malformed"),
        ("<!-- bench:adding:prices -->\n<!-- /bench -->", "it has: times"),
        ("<!-- bench:other:times -->\n<!-- /bench -->", "0 result files"),
    ],
)
def test_markers_that_lead_nowhere(project, marker, words):
    (project / "README.md").write_text(marker)
    failed = bench(project, "tables")
    assert failed.returncode == 1
    assert words in failed.stderr
    assert "Traceback" not in failed.stderr


def test_unknown_case_and_help(project):
    unknown = bench(project, "subtracting")
    assert unknown.returncode == 2
    assert "cases: adding" in unknown.stderr
    assert bench(project, "--help").returncode == 0


def test_quantiles_of_any_values(seed):
    rng = random.Random(seed)
    for _ in range(200):
        values = [rng.choice([rng.gauss(0, 1e6), rng.random(), 0.1]) for _ in range(rng.randrange(1, 9))]
        record = summarize("a", "s", "m", "ms", values)
        assert min(values) <= record.p20 <= record.median <= record.p80 <= max(values)
        assert record.n == len(values)
    assert summarize("a", "s", "m", "ms", [0, 10, 20, 30, 40, 50]) == Record("a", "s", "m", "ms", 25, 10, 40, 6)
    with pytest.raises(BenchError):
        summarize("a", "s", "m", "ms", [])


def test_claims_compare_as_their_op_says():
    for op, below, equal, above in [(">=", 0, 1, 1), ("<=", 1, 1, 0), (">", 0, 0, 1), ("<", 1, 0, 0), ("==", 0, 1, 0)]:
        held = [Claim("a.cpu.b", "", value, 2.0, op).holds for value in (1.0, 2.0, 3.0)]
        assert held == [bool(below), bool(equal), bool(above)]
    with pytest.raises(BenchError, match="op"):
        Claim("a.cpu.b", "", 1.0, 2.0, "=>")


def test_records_are_looked_up_unambiguously():
    records = [summarize("ours", shape, "time", "ms", [1.0]) for shape in ("small", "large")]
    assert median_of(records, metric="time", arm="ours", shape="small") == 1.0
    for arguments in ({"arm": "ours"}, {"arm": "theirs"}, {"arm": "ours", "shape": "huge"}):
        with pytest.raises(BenchError):
            median_of(records, metric="time", **arguments)


def test_committed_results_are_valid():
    for path in (ROOT / "bench" / "results").glob("*.json"):
        check_schema(json.loads(path.read_text()), path)
