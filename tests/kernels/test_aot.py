"""Every Triton kernel compiles for sm_80 and sm_90 without spilling, and for a new length nothing is compiled again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.aot import SPILL_LIMIT, in_subprocess
from bench.cases import aot
from bench.harness import RESULTS, read_result

OLDEST = "3.6.0"
LENGTHS = """
import json, torch
import vrlt_kernels as vk
from bench.aot import recording

# Nothing runs, and what is allocated is NaN: no row is left out because its gradient happens to be 0.
torch.use_deterministic_algorithms(True)

def linear(n):
    rows = 4 * n
    cu = torch.tensor([0, n // 2, 2 * n, rows - 1, rows])
    hidden, weight = (torch.zeros(size, 8, dtype=torch.bfloat16, requires_grad=True) for size in (rows, 1000))
    target, live = torch.zeros(rows, dtype=torch.int64), torch.arange(rows) < n + 1
    spec = vk.LossSpec(clip_low=0.01 * n, clip_high=0.02 * n, entropy_coef=0.1 * n)
    given = {"advantages": torch.ones(rows), "old_logp": torch.zeros(rows), "mask": torch.arange(rows) != 1}
    for budget in (2.5e9, (n + 1) * 2000):
        for temperature in (torch.full((rows,), 0.1 * n), 0.1 * n):
            head = (hidden, weight, target, temperature)
            for options in ({"live": live}, {"want_sum_p2": True}):
                out = vk.linear_logprob(*head, budget_bytes=budget, **options)
                (out.logp + out.entropy).sum().backward()
            vk.linear_logprob(*head, budget_bytes=budget).logp.sum().backward()
            options = {"temperature": temperature, "budget_bytes": budget}
            vk.linear_grpo_loss(hidden, weight, target, cu, spec, **options, **given).loss.backward()
            vk.linear_token_weight(hidden, weight, cu, (2, 4)[n % 2], **options)

def decode(n):
    prefix, suffix = torch.zeros(20 * n, 2, 64), torch.zeros(2 * n, n, 2, 64)
    ints = torch.zeros(2 * n, dtype=torch.int64)
    layout = {"prefix_start": ints[1:n], "prefix_length": ints[2:n + 1], "row_offsets": ints[:n]}
    layout |= {"slots": ints[n % 2:][:n], "suffix_length": ints[:n]}
    vk.group_decode(torch.zeros(n, 6, 64), prefix, prefix, suffix, suffix, **layout, max_group=4, max_prefix=300 * n)

def attention(n):
    spans = vk.GroupSpans.of([n, 3], [[n, 2 * n], [1] * n])
    key = torch.zeros(spans.tokens, 2, 32, requires_grad=True)
    vk.group_attention(torch.zeros(spans.tokens, 4, 32), key, key, spans).sum().backward()
    one = vk.GroupSpans.of([n], [[n]])
    vk.group_attention(torch.zeros(n, 4, 32), key[:2 * n], key[:2 * n], one, rows_only=True).sum().backward()

def everything(n):
    cu = torch.tensor([0, n // 2, 2 * n, 4 * n - 1, 4 * n])
    logits = torch.zeros(4 * n, 1000, dtype=torch.bfloat16, requires_grad=True)
    target, rewards = torch.zeros(4 * n, dtype=torch.int64), torch.zeros(4)
    weight = vk.token_weight(logits, cu, (2, 4)[n % 2], alpha=1 + 0.1 * n, clamp=1.0 * n, temperature=0.1 * n)
    vk.group_advantages(rewards, (2, 4)[n % 2], eps=0.1 * n, ddof=n % 2)
    spec = vk.LossSpec(clip_low=0.01 * n, clip_high=0.02 * n, kl="k3", beta=0.01 * n, entropy_coef=0.1 * n)
    out = vk.token_logprob(logits, target, 0.1 * n)
    given = {"old_logp": out.logp.detach(), "ref_logp": out.logp.detach(), "token_weight": weight}
    given |= {"rewards": rewards, "groups": (2, 4)[n % 2], "adv_eps": 0.1 * n}
    vk.policy_loss(out.logp, cu, spec, entropy=out.entropy, **given).loss.backward()
    vk.grpo_loss(logits, target, cu, spec, temperature=0.1 * n, **given).loss.backward()
    decode(n)
    attention(n)
    if n < 15:
        linear(n)

with recording() as recorder:
    everything(2)
    first = len(recorder.rows)
    for n in range(3, 23):
        everything(n)
rows = [row["kernel"] for row in recorder.rows]
print(json.dumps([rows[:first], rows[first:]]))
"""


def check(found: dict[str, Any], archs: set[int]) -> None:
    assert found["unreached"] == [], "add a case to bench/aot_cases.py"
    assert {row["arch"] for row in found["rows"]} == archs
    spilling = [row for row in found["rows"] if row["spill"] > SPILL_LIMIT]
    assert not spilling, "\n".join(map(str, spilling))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_with_the_installed_triton(arch: int) -> None:
    found = in_subprocess(["-m", "bench.aot", str(arch)])
    check(found, {arch})
    version = ".".join(found["triton"].split(".")[:2])
    stored = RESULTS / f"aot.triton{version}.json"
    if stored.is_file():
        told = {record["arm"] for record in read_result(stored)["records"]}
        assert told == {row["kernel"] for row in found["rows"]}, "stale: python -m bench aot"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_the_oldest_triton(tmp_path: Path) -> None:
    """Unpacked beside the installed one: torch wants its own, so it can't be installed."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", "--target", str(tmp_path)]
    done = subprocess.run([*pip, f"triton=={OLDEST}"], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"no wheel of triton {OLDEST}: {done.stderr.strip().splitlines()[-1]}")
    found = in_subprocess(["-m", "bench.aot"], tmp_path)
    assert found["triton"] == OLDEST
    check(found, {80, 90})


def test_a_new_length_or_number_compiles_nothing() -> None:
    first, later = in_subprocess(["-c", LENGTHS])
    assert {name.partition(".")[0] for name in first} == {
        "_rows_triton", "group_advantage_triton", "group_attention_triton", "group_decode_triton", "policy_triton",
        "token_weight_triton",
    }  # fmt: skip
    assert later == []


def test_a_forgotten_kernel_is_found() -> None:
    program = """
import json
from bench.aot import kernels, unreached
found = kernels()
print(json.dumps([sorted(found), unreached(found, {"token_weight_triton.group_divergence_kernel"})]))
"""
    found, missed = in_subprocess(["-c", program])
    assert set(found) - set(missed) == {name for name in found if name.startswith("token_weight_triton.")}
    assert "_rows_triton.row_stats_kernel" in missed


def test_table() -> None:
    row = {
        "kernel": "m.k",
        "case": "a, b",
        "arch": 90,
        "warps": 4,
        "registers": 40,
        "stack": 0,
        "spill": 0,
        "shared": 8,
    }
    rows = [row, row | {"registers": 50}, row | {"arch": 80, "spill": 20}]
    records = aot.records(rows)
    assert len({(record.shape, record.metric) for record in records}) == len(records)
    (claim,) = aot.claims(records)
    assert (claim.value, claim.holds) == (20, False)
    table = aot.tables({"records": [vars(record) for record in records]})["kernels"]
    assert table.splitlines()[2:] == ["| `m.k` | sm_80 | 40 | 20 | 8 |", "| `m.k` | sm_90 | 50 | 0 | 8 |"]
