"""Summary of make test-full: every outcome of pytest is counted in its folder, and a failure shows in the claim."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.cases.full_suite import claims, records_from
from bench.harness import median_of

TESTS = """
import pytest

def test_passes(): pass
def test_fails(): assert False
@pytest.fixture
def broken(): raise ValueError
def test_has_no_fixture(broken): pass
@pytest.mark.skip
def test_skipped(): pass
@pytest.mark.xfail
def test_expected(): assert False
"""


def test_every_outcome_counts_once(tmp_path: Path) -> None:
    sources = {
        "one/test_ok": "def test_it(): pass",
        "some/test_all": TESTS,
        "some/test_broken": "import nothing_such",
    }
    for name, text in sources.items():
        path = tmp_path / "tests" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    xml = tmp_path / "junit.xml"
    # The numbers of a run inside a run: its own settings, no plugin of ours.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--junitxml={xml}", "--import-mode=importlib"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    subprocess.run(
        [*command, "--continue-on-collection-errors", f"--rootdir={tmp_path}", "tests"],
        cwd=tmp_path,
        env=environment,
        check=False,
        capture_output=True,
    )
    records = records_from(xml)
    found = {
        (arm, metric): median_of(records, metric=metric, arm=arm)
        for arm in ("one", "some")
        for metric in ("passed", "skipped", "failed")
    }
    assert found[("one", "passed")] == 1
    assert found[("one", "failed")] == 0
    assert [found[("some", kind)] for kind in ("passed", "skipped", "failed")] == [1, 2, 3]
    (claim,) = claims(records)
    assert claim.value == 3
    assert not claim.holds
