"""The case ``rollout``: claims from records, and its arms on a small prompt."""

from __future__ import annotations

import pytest
import torch

from bench.cases.rollout import claims, tables
from bench.harness import BenchError, summarize
from bench.rollout_arms import PerRow, make_model, make_prompt, our_arm
from bench.rollout_run import cpu_cell, gpu_cells

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def rate(arm: str, shape: str, value: float):
    return summarize(arm, shape, "rate", "tokens/s", [value])


def test_claims_are_ratios_over_the_better_of_the_others() -> None:
    records = [summarize("device", "cpu", "memory", "B", [1.0])]
    for label, ours in (("1k", 60.0), ("4k", 45.0)):
        shape = f"toy, prompt {label}, 32 tokens"
        records += [rate("group engine", shape, ours), rate("HF generate, dynamic cache", shape, 9.0)]
        records += [rate("HF generate, static cache", shape, 10.0)]
    found = {claim.id: claim for claim in claims(records)}
    assert found["rollout.cpu.1k"].value == pytest.approx(6.0)
    assert found["rollout.cpu.1k"].holds
    assert found["rollout.cpu.4k"].value == pytest.approx(4.5)
    assert not found["rollout.cpu.4k"].holds
    longer = "demo, prompt 1k, 128 tokens"
    records += [rate("group engine", longer, 18.0), rate("HF generate, static cache", longer, 10.0)]
    assert {c.id: c.value for c in claims(records)}["rollout.cpu.1k"] == pytest.approx(1.8)
    assert claims(records[:1]) == []
    assert "HF generate, static cache" in tables({"records": [vars(r) for r in records]})["cells"]


@pytest.mark.timeout(400)
def test_arms_agree_and_a_prefix_is_read_once_instead_of_once_a_row() -> None:
    records = {(r.arm, r.metric): r.median for r in cpu_cell("demo", 150, 4, 3, 1, 5)}
    assert len([key for key in records if key[1] == "rate"]) == 3
    ours, theirs = (records[arm, "prefix read"] for arm in ("group engine", "HF generate, static cache"))
    assert theirs == 3 * ours


def test_reading_prefixes_per_row_changes_no_token() -> None:
    lm = make_model("demo", torch.device("cpu"), 600)
    prompts = [make_prompt(lm, 150 + 80 * i, i) for i in range(2)]
    plain, per_row = (our_arm(k, lm, prompts, 3, 6, **how) for k, how in (("a", {}), ("b", {"decoder": PerRow})))
    assert plain.run(1.0) == per_row.run(1.0)
    assert per_row.stats.prefix_tokens_read == 3 * plain.stats.prefix_tokens_read


def test_wrong_log_probs_are_not_timed(monkeypatch) -> None:
    monkeypatch.setattr("bench.rollout_run.full_forward_logprobs", lambda *_: torch.zeros(4))
    with pytest.raises(BenchError, match="differ from a full forward pass"):
        cpu_cell("demo", 150, 4, 2, 1, 5)


@pytest.mark.timeout(400)
def test_the_cells_of_a_gpu_run_small() -> None:
    found = [r for records in gpu_cells(torch.device("cpu"), 2, 5, small=True) for r in records]
    assert {r.metric for r in found} >= {"attention", "step", "rate", "floor"}
    assert all(r.median > 0 for r in found)
