"""Steps that aren't finite: skipped, written down, and the third in a row ends the run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from vrlt_fast.errors import SetupError, Stopped
from vrlt_fast.report.console import Console
from vrlt_fast.train import guard as guard_module
from vrlt_fast.train import stages
from vrlt_fast.train.guard import Guard, describe_prompts
from vrlt_fast.train.trainer import train

NAN = math.nan


def batch():
    return {"a": torch.arange(3)}, [{"id": "x"}]


def test_three_in_a_row(tmp_path):
    said = []
    guard = Guard(tmp_path / "bad", said.append)
    assert guard.look("grpo", 1, 0.5, 1.0, batch)
    assert not (tmp_path / "bad").exists()
    for step, (loss, norm) in enumerate([(NAN, 1.0), (1.0, math.inf), (0.1, 0.1), (NAN, NAN), (-math.inf, 1.0)], 2):
        assert guard.look("grpo", step, loss, norm, batch) == (step == 4)
    with pytest.raises(Stopped, match="3 steps in a row") as caught:
        guard.look("grpo", 7, NAN, 0.0, batch)
    assert (caught.value.code, caught.value.exit_code) == ("VRLT-S01", 75)
    steps = (2, 3, 5, 6, 7)
    names = sorted(f"grpo-{n:06d}.{kind}" for n in steps for kind in ("json", "safetensors"))
    assert sorted(p.name for p in (tmp_path / "bad").iterdir()) == names
    assert len(said) == len(steps)
    assert "grpo-000002.json" in said[0]
    about = json.loads((tmp_path / "bad" / "grpo-000006.json").read_text())
    assert (about["loss"], about["grad_norm"], about["prompts"]) == ("-inf", "1.0", [{"id": "x"}])
    assert load_file(tmp_path / "bad" / "grpo-000006.safetensors")["a"].tolist() == [0, 1, 2]


def test_peers_count_what_one_of_them_writes(tmp_path):
    guard = Guard(tmp_path / "bad", print, writes=False)
    for step in (1, 2):
        assert not guard.look("grpo", step, NAN, 1.0, batch)
    with pytest.raises(Stopped):
        guard.look("grpo", 3, NAN, 1.0, batch)
    assert not (tmp_path / "bad").exists()


def test_a_batch_that_is_too_large_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(guard_module, "MOST_BYTES", 1000)
    guard = Guard(tmp_path, print)
    guard.look("sft", 1, NAN, 0.0, lambda: ({"a": torch.zeros(100), "b": torch.zeros(200)}, []))
    assert list(load_file(tmp_path / "sft-000001.safetensors")) == ["a"]
    assert json.loads((tmp_path / "sft-000001.json").read_text())["left_out"] == ["b"]


def test_what_is_written_of_prompts(prompts):
    response = {"tokens": (5, 6), "logprobs": torch.tensor([-0.5, -1.0]), "reward": 0.25}
    tensors, about = describe_prompts(prompts[:2], [[response], []])
    assert tensors["0.ids"].tolist() == prompts[0].ids.tolist()
    assert tensors["1.positions"].tolist() == prompts[1].positions.tolist()
    assert tensors["0.0.tokens"].tolist() == [5, 6]
    assert tensors["0.0.logprobs"].tolist() == [-0.5, -1.0]
    assert about[0]["responses"] == [{"reward": 0.25}]
    assert (about[1]["id"], about[1]["responses"]) == (prompts[1].sample.id, [])


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "bad").write_text("")
    with pytest.raises(SetupError):
        Guard(tmp_path / "bad", print).look("sft", 1, NAN, 0.0, batch)


@pytest.mark.usefixtures("one_thread")
def test_a_run_skips_one_bad_step_and_stops_at_three(make_config, monkeypatch):
    """The gradient is spoilt for real, behind the backward pass."""
    whole, bad = stages.grpo_backward, {2}

    def spoilt(lm, *args, **kwargs):
        stats = whole(lm, *args, **kwargs)
        steps.append(len(steps) + 1)
        if steps[-1] in bad:
            next(p for p in lm.module.parameters() if p.grad is not None).grad.view(-1)[0] = NAN
        return stats

    monkeypatch.setattr(stages, "grpo_backward", spoilt)
    config = make_config(train={"stages": ["grpo"]}, grpo={"steps": 3}, eval={"samples": 1, "start": False})
    steps: list[int] = []
    run = train(config, console=Console())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    skipped = [r.get("skipped", False) for r in records if r["kind"] == "train"]
    assert skipped == [False, True, False]
    assert json.loads((run / "bad_steps" / "grpo-000002.json").read_text())["prompts"][0]["responses"][0]["text"]
    steps, bad = [], {1, 2, 3}
    with pytest.raises(Stopped, match="S01"):
        train(make_config(**{**again(config), "train": {"stages": ["grpo"], "out": f"{run}-again"}}), console=Console())
    assert steps == [1, 2, 3]


def again(config):
    return {"grpo": {"steps": config.grpo.steps + 2}, "eval": {"samples": 1, "start": False}}
