"""full_suite: what ``make test-full`` runs, the slow matrices too, counted by folder of tests."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from bench.harness import ROOT, BenchError, Claim, Record, summarize, write_result

OUTCOMES = ("passed", "skipped", "failed")


def run(argv: Sequence[str]) -> None:
    """Run the tests and write bench/results/full_suite.cpu.json.

    Raises:
        BenchError: a test failed; the result file is written all the same.
    """
    parser = argparse.ArgumentParser(prog="python -m bench full_suite")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest instead of -n 2 --dist loadgroup")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "not gpu", f"--junitxml={xml}"]
        command += options.pytest or ["-n", "2", "--dist", "loadgroup"]
        subprocess.run(command, cwd=ROOT, check=False, env={"VRLT_TEST_SEED": "random", **os.environ})
        if not xml.exists():
            raise BenchError("pytest ended without a report")
        records = records_from(xml)
    write_result("full_suite", "cpu", records, claims, seed=0)
    if not all(claim.holds for claim in claims(records)):
        raise BenchError("tests failed")


def records_from(xml: Path) -> list[Record]:
    """Counts by outcome and seconds for each folder of tests, from a JUnit file of pytest."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: dict[str, float] = defaultdict(float)
    for case in ElementTree.parse(xml).iter("testcase"):
        # A file that can't be collected has an empty class name.
        names = (case.get("classname") or case.get("name") or "").split(".")
        folder = names[1] if len(names) > 2 else "tests"
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[folder][outcome] += 1
        seconds[folder] += float(case.get("time", 0))
    records = [
        summarize(folder, "not gpu", outcome, "tests", [found[outcome]])
        for folder, found in sorted(counts.items())
        for outcome in OUTCOMES
    ]
    return records + [summarize(folder, "not gpu", "time", "s", [spent]) for folder, spent in sorted(seconds.items())]


def claims(records: list[Record]) -> list[Claim]:
    failed = sum(record.median for record in records if record.metric == "failed")
    return [Claim("suite.failed", "tests of make test-full that fail", failed, 0.0, "<=")]
