"""bench reward: what it scores is mixed, and scoring is not more than five times slower than claimed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from bench.cases.reward import ALL, GRAMMARS, GROUP, TARGET, TASKS, claims, measure, responses, run, score, tables
from bench.harness import median_of


@pytest.mark.parametrize("name", GRAMMARS)
def test_scoring_is_fast_and_responses_are_mixed(name: str, seed: int) -> None:
    scorable = responses(name, 1200, seed)
    assert len(scorable) == 1200
    assert {sample.task for _, sample in scorable} == set(TASKS)
    assert len({id(sample) for _, sample in scorable}) == 1200 // GROUP
    assert len({response.text for response, _ in scorable}) > 1190
    assert {response.finish_reason for response, _ in scorable} == {"stop", "length"}
    begin = time.process_time()
    _, means = score(name, scorable)
    assert time.process_time() - begin < 5 * len(scorable) / TARGET
    assert means.keys() == {"semantic", "temporal", "format"}
    assert 0.6 < means["format"] < 0.9
    assert 0.3 < means["semantic"] < 0.7
    assert 0.2 < means["temporal"] < 0.7


def test_the_same_seed_gives_the_same_responses(seed: int) -> None:
    assert responses("plain", 50, seed) == responses("plain", 50, seed)
    assert responses("plain", 50, seed) != responses("plain", 50, seed + 1)


def test_result_file(tmp_path: Path) -> None:
    path = tmp_path / "reward.cpu.json"
    run(["--responses", "400", "--turns", "2", "--out", str(path)])
    result = json.loads(path.read_text())
    assert [claim["id"] for claim in result["claims"]] == ["reward.cpu.rate"]
    assert tables(result)["rates"].count("\n") == 1 + len(GRAMMARS)


def test_the_claim_is_about_all_responses(seed: int) -> None:
    records = measure(160, 1, seed)
    (claim,) = claims(records)
    rates = [median_of(records, metric="rate", arm="dual reward", shape=name) for name in GRAMMARS]
    assert claim.value == median_of(records, metric="rate", arm="dual reward", shape=ALL)
    assert min(rates) <= claim.value <= max(rates)
