"""The case ``update``: claims from records; its arms agree on a small step, or an error says which doesn't."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import update_run
from bench.cases.update import CPU, claims, run, tables
from bench.harness import BenchError, load_case, read_result, summarize, write_result
from bench.update_arms import PACKED, REPLICATED, STAGED, STRONG, Shape, arm, make_step
from bench.update_peers import PREFIX_GROUPER, TRL, any_arm, arms_of

pytestmark = pytest.mark.usefixtures("one_torch_thread")
SMALL = Shape("demo", 140, 3, 1, 2)
TEXT = Shape("demo", 60, 5, 2, 3, text=True)


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


@pytest.mark.timeout(400)
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


def test_prefix_grouper_agrees_with_replicated_rows_of_two_groups(seed) -> None:
    pytest.importorskip("prefix_grouper")
    lm, scored = make_step(Shape("demo", 140, 3, 2, 2), torch.device("cpu"), seed, recompute=True)
    arms = {name: any_arm(name, lm, scored) for name in (PREFIX_GROUPER, PACKED, REPLICATED)}
    assert len(update_run._agree(lm, arms, "small")) == 3
    assert arms[PREFIX_GROUPER]().tokens_trained == arms[PACKED]().tokens_trained


@pytest.mark.timeout(400)
def test_trl_agrees_on_text_in_every_micro_batch(seed) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    lm, scored = make_step(TEXT, torch.device("cpu"), seed, recompute=True)
    arms = {f"{TRL} {rows}": any_arm(TRL, lm, scored, rows) for rows in (1, 4, 6)}
    arms |= {name: any_arm(name, lm, scored) for name in (PACKED, REPLICATED)}
    assert len(update_run._agree(lm, arms, "text")) == 5
    checkpointed = {m.gradient_checkpointing for m in lm.module.modules() if hasattr(m, "gradient_checkpointing")}
    assert checkpointed == {True}  # TRL's trainer leaves it as all arms have it


def test_arms_whose_packages_are_missing_are_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.update_peers.find_spec", lambda name: None)
    assert arms_of(SMALL) == (
        [PACKED, STAGED, STRONG, REPLICATED],
        {PREFIX_GROUPER: "prefix_grouper not installed"},
    )
    assert arms_of(TEXT) == ([PACKED, REPLICATED], {TRL: "trl and datasets not installed"})


@pytest.mark.slow
@pytest.mark.timeout(300)  # peaks are measured in processes of their own, on a machine that may be busy
def test_cells_join_a_file_and_what_it_has_is_measured_again_only_when_asked(tmp_path, capsys) -> None:
    there = ("toy, P=1, R=1, 1 x 8", "demo, P=20, R=2, 1 x 8, text only")
    records = [summarize("device", "cpu", "memory", "B", [1.0])]
    records += [summarize(PACKED, shape, "step", "s", [1.0]) for shape in there]
    path = write_result("update", "cpu", records, claims, 0, tmp_path / "update.cpu.json")
    before = path.read_bytes()
    command = ["--device", "cpu", "--out", str(tmp_path), "--rounds", "1", "--cells", "demo:20x2x1:text"]
    run(command)
    assert path.read_bytes() == before
    assert "in " in capsys.readouterr().out
    run([*command, "--minutes", "-1", "--redo"])
    assert path.read_bytes() == before
    run([*command, "--redo"])
    found = {(r["arm"], r["shape"], r["metric"]): r["median"] for r in read_result(path)["records"]}
    assert found[PACKED, there[0], "step"] == 1.0
    assert found[PACKED, there[1], "step"] != 1.0
    assert {shape for arm, shape, _ in found if arm == REPLICATED} == {there[1]}
    for name in arms_of(Shape("demo", 20, 2, 1, 8, text=True))[0]:
        assert found[name, there[1], "step"] > 0
        assert (name, there[1], "peak memory") in found
    with pytest.raises(SystemExit):
        run([*command[:-1], "20x2"])


@pytest.mark.parametrize("case", ["rollout", "step", "update", "video_gpu"])
def test_what_is_tried_only_replaces_no_result(case: str, tmp_path: Path) -> None:
    work = ["--work", str(tmp_path)] if case == "video_gpu" else []
    with pytest.raises(BenchError, match="--small needs --out"):
        load_case(case).run(["--small", "--device", "cpu", *work])
