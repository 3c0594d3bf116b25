"""The case ``kernels``: its cells and problems, claims and tables from records, refusals, and small runs of it all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from bench.cases.kernels import claims, tables
from bench.cells import CPU, LOSSES, MODELS, Cell, plan
from bench.harness import BenchError, Record, check_schema, summarize
from bench.plots import bars
from bench.problem import FAR, SPECS, make_problem, relative_error, sequence_lengths, truth
from vrlt_kernels import LossSpec, grpo_loss_ref, linear_grpo_loss_ref

ROOT = Path(__file__).parents[2]
GPU = [f"{stage} 7B N=4096 {loss}" for stage in ("row", "linear") for loss in ("grpo", "gspo")]


def bench(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    # The tests of the kernels set TRITON_INTERPRET; threads only get into each other's way at this size.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH", "")])
    return subprocess.run(list(words), env=env | changes, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_cells_are_parsed_back() -> None:
    for kind in ("cpu", "cuda", "small"):
        cells = [cell for cell, _ in plan(kind)]
        assert [Cell.parse(str(cell)) for cell in cells] == cells
        assert len(set(map(str, cells))) == len(cells)
    for wrong in ("row", "row 9B N=8 grpo", "row 7B N=4096 ppo", "row 7B N=4 grpo", "row 7B N=64 grpo speed=2"):
        with pytest.raises(BenchError):
            Cell.parse(wrong)


def test_floors() -> None:
    assert Cell.parse("linear 7B N=4096 grpo").flops == 6 * 4096 * 3584 * 152064
    assert Cell.parse("linear 7B N=4096 grpo frozen").flops == 4 * 4096 * 3584 * 152064
    assert Cell.parse("linear 3B N=1000 grpo skip=0.4").flops == (2 * 1000 + 4 * 600) * 2048 * 151936
    assert Cell.parse("row 7B N=4096 grpo").passes(2) == 2 * 4096 * 152064 * 2


@pytest.mark.parametrize("tokens", [8, 40, 512, 4096, 4099])
@pytest.mark.parametrize(("skip", "valid"), [(0.0, 1.0), (0.4, 1.0), (0.0, 0.6), (0.4, 0.7)])
def test_sequence_lengths(tokens: int, skip: float, valid: float) -> None:
    cell = Cell("row", "7B", tokens, skip=skip, valid=valid)
    lengths, dead = sequence_lengths(cell)
    assert sum(lengths) == tokens
    assert sum(n for n, off in zip(lengths, dead, strict=True) if off) == tokens - cell.live
    assert min(lengths) >= 1 or tokens < 40
    if tokens >= 512 and not skip:
        assert sum(lengths) / (len(lengths) * max(lengths)) == pytest.approx(valid, rel=0.02)


@pytest.mark.parametrize("stage", ["row", "linear"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_truth_is_the_reference_of_the_kernels(loss: str, stage: str, seed: int) -> None:
    """Two derivations of the same loss: the one peers are compared with, and ours."""
    p = make_problem(Cell(stage, "tiny", 32, loss), torch.device("cpu"), torch.float64, seed=seed, gaps=FAR)
    terms = p.terms
    given = {"advantages": p.advantages.double(), "old_logp": terms.old_logp, "ref_logp": terms.ref_logp}
    given |= {"normalizer": 32.0} if SPECS[loss]["reduction"] == "dapo" else {}
    leaves = [x.clone().requires_grad_() for x in ([p.logits] if stage == "row" else [p.hidden, p.weight])]
    function = grpo_loss_ref if stage == "row" else linear_grpo_loss_ref
    out = function(*leaves, p.target, p.cu_seqlens, LossSpec(**SPECS[loss]), **given)
    found = [out.loss.detach(), *torch.autograd.grad(out.loss, leaves)]
    assert relative_error(found, truth(p), scale=1.0) < 1e-6
    found[-1] = found[-1] * 1.01
    assert relative_error(found, truth(p), scale=1.0) == pytest.approx(0.01, rel=1e-3)
    found[-1] = found[-1] * float("nan")
    assert not relative_error(found, truth(p), scale=1.0) < 1.0


def record(arm: str, shape: str, metric: str, value: float) -> Record:
    return summarize(arm, shape, metric, "ms", [value])


def cpu_records() -> list[Record]:
    times = {"ours": 1.0, "eager log_softmax": 4.0, "eager logsumexp": 3.5}
    row, linear, skip = CPU
    found = [record("device", "cpu float32", "memory", 1e9)]
    found += [record(arm, row, "time", time) for arm, time in times.items()]
    found += [record(arm, linear, "time", 10 + time / 4) for arm, time in times.items()]
    found += [record(arm, skip, "time", 10.0 if arm == "ours" else 15 + time) for arm, time in times.items()]
    memory = {"ours": 4e8, "eager log_softmax": 12e8, "eager logsumexp": 9e8}
    return found + [record(arm, linear, "memory beyond dW", value) for arm, value in memory.items()]


def test_claims_on_the_cpu() -> None:
    found = {claim.id: claim for claim in claims(cpu_records())}
    values = {name: claim.value for name, claim in found.items()}
    assert values == pytest.approx(
        {
            "loss.cpu.row_vs_eager": 3.5,
            "loss.cpu.linear_vs_eager": 10.875 / 10.25,
            "loss.cpu.linear_skip": 1.85,
            "loss.cpu.linear_memory": 4 / 9,
        }
    )
    assert [claim.id for claim in found.values() if not claim.holds] == ["loss.cpu.linear_memory"]
    fewer = [r for r in cpu_records() if (r.arm, r.shape) != ("eager logsumexp", CPU[0])]
    assert "loss.cpu.row_vs_eager" not in {claim.id for claim in claims(fewer)}, "compared with one of both only"


def test_claims_on_a_gpu() -> None:
    row, row_gspo, linear, linear_gspo = GPU
    found = [record("device", "h200 bfloat16", "memory", 1e11), record("ours", linear, "floor", 0.93)]
    times = {"ours": 18.0, "TRL": 27.0, "verl": 45.0, "Liger chunked": 200.0, "Liger chunked whole": 90.0}
    found += [record(arm, linear, "time", time) for arm, time in times.items()]
    found += [record("ours", linear_gspo, "time", 18.9), record("ours deferred", row_gspo, "time", 0.7)]
    found += [record("ours deferred", row, "time", 0.6), record("Liger Triton", row, "time", 0.9)]
    found += [record("ours deferred", row, "floor", 0.8)]
    values = {claim.id: (round(claim.value, 6), claim.holds) for claim in claims(found)}
    assert values == {
        "loss.h200.linear_floor": (0.93, True),
        "loss.h200.vs_trl": (1.5, True),
        "loss.h200.vs_verl": (2.5, True),
        "loss.h200.vs_liger_chunked": (5.0, False),
        "loss.h200.row_floor": (0.8, False),
        "loss.h200.vs_liger_triton": (1.5, True),
        "loss.h200.gspo_vs_grpo": (round(0.7 / 0.6, 6), False),
    }
    assert [claim.id for claim in claims(found[:2])] == ["loss.h200.linear_floor"]


def test_tables_and_plot() -> None:
    records = [*cpu_records(), record("device", CPU[0], "time", 0.1), record("verl", "linear: no | GPU", "not run", 0)]
    records += [record("ours", CPU[0], "floor", 0.1), record("ours", "row", "recompilations", 0)]
    found = tables({"records": [vars(r) for r in records]})
    assert set(found) == {"row-0.6B-N-512-grpo", "linear-0.6B-N-512-grpo", "linear-0.6B-N-512-grpo-skip-0.4", "not-run"}
    rows = found["row-0.6B-N-512-grpo"].splitlines()
    assert rows[2] == "| ours | 1 | 1 to 1 | - | - | 10 % | - | - | 0 |"
    assert [row.split(" | ")[0] for row in rows[3:]] == ["| eager logsumexp", "| eager log_softmax"]
    assert found["not-run"].endswith("| verl | linear: no / GPU |")
    picture = ElementTree.fromstring(bars(records, "cpu"))
    texts = [e.text for e in picture.iter() if e.tag.endswith("text")]
    assert texts.count("eager logsumexp") == 3
    assert "1 · 10 % of the floor" in texts
    assert "device" not in texts


WRONG = """
import sys
from dataclasses import replace
from bench import kernel_run
from bench.providers import Arm, Provider, all_providers

right = next(p for p in all_providers() if (p.name, p.stage) == ("eager logsumexp", "row"))

def scaled(problem):
    arm = right.prepare(problem)
    def step():
        loss, gradient = arm.step()
        return loss, gradient * 1.01
    return Arm(step)

def broken(problem):
    raise OSError("no such kernel")

providers = [right, replace(right, name="wrong", prepare=scaled), replace(right, name="broken", prepare=broken)]
kernel_run.all_providers = lambda: providers
from bench.cases.kernels import run
run(["--device", "cpu", "--cell", "row tiny N=40 grpo", "--no-memory", "--no-lengths", "--out", sys.argv[1]])
"""


def test_what_is_wrong_or_fails_is_refused_with_its_reason(tmp_path: Path) -> None:
    out = tmp_path / "kernels.cpu.json"
    done = bench(sys.executable, "-c", WRONG, str(out))
    assert done.returncode == 0, done.stderr
    records = json.loads(out.read_text())["records"]
    assert {r["arm"] for r in records if r["metric"] == "time"} == {"eager logsumexp", "device"}
    reasons = {r["arm"]: r["shape"] for r in records if r["metric"] == "not run"}
    assert reasons["broken"] == "row tiny N=40 grpo: OSError: no such kernel"
    assert "its error is 1.0e-02" in reasons["wrong"]


@pytest.mark.timeout(300)
def test_other_cells_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "kernels.cpu.json"
    for cell in ("row tiny N=40 grpo", "row tiny N=48 gspo", "row tiny N=40 grpo"):
        options = ["--small", "--device", "cpu", "--no-memory", "--no-lengths", "--keep", "--arm", "eager*"]
        done = bench(*(sys.executable, "-m", "bench", "kernels", *options, "--cell", cell, "--out", str(out)))
        assert done.returncode == 0, done.stderr
    times = [r["shape"] for r in json.loads(out.read_text())["records"] if r["metric"] == "time"]
    assert sorted(times) == ["row tiny N=40 grpo"] * 3 + ["row tiny N=48 gspo"] * 3


@pytest.mark.timeout(300)
def test_small_run(tmp_path: Path) -> None:
    out = tmp_path / "kernels.cpu.json"
    options = ["--cell", "linear tiny N=40 gspo valid=0.6", "--arm", "ours", "--arm", "eager*", "--arm", "verl"]
    done = bench(*(sys.executable, "-m", "bench", "kernels", "--small", "--device", "cpu", "--out", str(out), *options))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    check_schema(result, out)
    found = {(r["arm"], r["metric"]): r for r in result["records"]}
    for arm in ("ours", "eager log_softmax", "eager logsumexp"):
        assert 0 < found[arm, "error"]["median"] < 1e-5
        assert found[arm, "time"]["median"] > 0
        assert found[arm, "recompilations"]["median"] == 0
        assert min(found[arm, name]["median"] for name in ("memory", "memory beyond dW")) >= 0
        work = found[arm, "rate"]["median"] * found[arm, "time"]["median"]
        assert work == pytest.approx(1e-9 * 6 * 40 * MODELS["tiny"][0] * MODELS["tiny"][1])
    assert found["verl", "not run"]["shape"] in ("linear: not installed", "linear: needs a CUDA device")
    assert out.with_suffix(".svg").is_file()


def test_interpreted_kernels_are_not_timed(tmp_path: Path) -> None:
    done = bench(sys.executable, "-m", "bench", "kernels", "--small", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET" in done.stderr


def test_gpu_check_lists_its_parts() -> None:
    for path in ["bench/gpu_check.sh", *(f"bench/gpu/{p.name}" for p in (ROOT / "bench" / "gpu").glob("*.sh"))]:
        assert bench("bash", "-n", path).returncode == 0
    for words in ([], ["no_such_part"], ["kernels", "more"]):
        done = bench("bash", "bench/gpu_check.sh", *words)
        assert done.returncode == 2
        assert "kernels" in done.stdout


@pytest.mark.timeout(300)
def test_gpu_check_runs_small(tmp_path: Path) -> None:
    changes = {"GPU_CHECK_SMALL": "1", "OUT": str(tmp_path), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = bench("bash", "bench/gpu_check.sh", "kernels", **changes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    result = json.loads((tmp_path / "kernels.cpu.json").read_text())
    assert {r["shape"] for r in result["records"] if r["metric"] == "time"} == {str(cell) for cell, _ in plan("small")}
