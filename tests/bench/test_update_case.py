"""The case ``update``: claims from records; its arms agree on a small step, or an error says which doesn't."""

from __future__ import annotations

import pytest
import torch

from bench import update_run
from bench.cases.update import CPU, claims, tables
from bench.harness import BenchError, summarize
from bench.update_arms import PACKED, REPLICATED, STAGED, STRONG, Shape, arm, make_step

SMALL = Shape("demo", 140, 3, 1, 2)


def test_claims_are_ratios_over_the_packed_arm() -> None:
    seconds = {PACKED: 1.0, STRONG: 2.6, REPLICATED: 3.9}
    records = [summarize(name, CPU, "step", "s", [spent]) for name, spent in seconds.items()]
    records += [summarize(name, CPU, "peak memory", "B", [2e9 if name == STRONG else 1e9]) for name in seconds]
    found = {claim.id: (claim.value, claim.holds) for claim in claims(records)}
    assert found == {
        "update.cpu.vs_replicated": (pytest.approx(3.9), False),
        "update.cpu.vs_strong": (pytest.approx(2.6), True),
        "update.cpu.memory": (pytest.approx(0.5), True),
    }
    assert claims([]) == []
    assert f"| {CPU} | strong | 2.6 | 2.60 | 2.00 GB |" in tables({"records": [vars(r) for r in records]})["cells"]


def test_arms_agree_and_compute_what_they_say(seed) -> None:
    lm, scored = make_step(SMALL, torch.device("cpu"), seed, recompute=True)
    arms = {name: arm(name, lm, scored, 2) for name in (PACKED, STAGED, STRONG, REPLICATED)}
    assert len(update_run._agree(lm, arms, "small")) == 4
    computed = {name: run().tokens_trained for name, run in arms.items()}
    prompt = len(scored[0].group.request.prompt)
    assert computed[PACKED] == computed[STAGED] == computed[STRONG] - prompt
    lm.module.zero_grad()
    wrong = {REPLICATED: arms[REPLICATED], PACKED: lambda: arm(PACKED, lm, scored[:0] + scored)() and arms[STRONG]()}
    with pytest.raises(BenchError, match="packed differs"):
        update_run._agree(lm, wrong, "small")
