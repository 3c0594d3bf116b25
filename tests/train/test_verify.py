"""train.verify_shared_prefix: it says what it found, changes nothing, and refuses passes that differ."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vrlt_fast.config_load import check, dump_toml
from vrlt_fast.errors import SetupError
from vrlt_fast.model import language
from vrlt_fast.model.tiny import build_tiny
from vrlt_fast.train.verify import TOLERANCE

SAID = "shared prefix verified against replicated rows"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"freeze_vision": True}, "train": {"micro_tokens": 1}},
        {"lora": {"rank": 2}, "model": {"freeze_vision": True}, "train": {"recompute": True}},
        {"model": {"dtype": "bfloat16"}},
    ],
    ids=["trained tower", "frozen tower, staged", "lora, recompute", "bf16"],
)
def test_a_run_with_the_check_is_the_run_without(two_steps, changes):
    if "lora" in changes:
        pytest.importorskip("peft")
    on = {**changes, "train": {**changes.get("train", {}), "verify_shared_prefix": "first_step"}}
    silent, right, responses = two_steps("off", **changes)
    said, ours, found = two_steps("on", **on)
    assert silent.count(SAID) == 0
    assert said.count(SAID) == 1
    assert found == responses
    assert ours.keys() == right.keys()
    assert [k for k, t in right.items() if not torch.equal(ours[k], t)] == []


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_other_families_pass(two_steps, tmp_path, demo, family):
    folder = build_tiny(tmp_path / family, train_jsonl=demo / "train.jsonl", seed=1, family=family)
    model = {"name": str(folder)}
    said, *_ = two_steps("run", model=model, train={"verify_shared_prefix": "first_step"})
    assert said.count(SAID) == 1


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_that_sees_too_little_is_refused(two_steps, tmp_path, monkeypatch, dtype):
    """The last layer's responses don't see their prompt."""
    attend = language.GroupPass.attend

    def blind(self, layer, query, key, value, scale):
        out = attend(self, layer, query, key, value, scale)
        if layer < 3:
            return out
        prefix = self.spans.prefix[0]
        return torch.cat([out[:prefix], torch.zeros_like(out[prefix:])])

    monkeypatch.setattr(language.GroupPass, "attend", blind)
    on = {"verify_shared_prefix": "first_step"}
    with pytest.raises(SetupError, match=r"VRLT-E06 .*layers\.") as caught:
        two_steps("run", model={"dtype": dtype}, train=on)
    assert f"allows {TOLERANCE[getattr(torch, dtype)][0]:g} nat" in str(caught.value)
    records = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"train"' not in records


@pytest.mark.usefixtures("one_thread")
def test_memory_that_runs_out_in_the_check_is_said(two_steps, monkeypatch):
    attend = language.GroupPass.attend

    def short(self, layer, query, *rest):
        if layer == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return attend(self, layer, query, *rest)

    monkeypatch.setattr(language.GroupPass, "attend", short)
    with pytest.raises(SetupError, match=r"VRLT-E05 train\.verify_shared_prefix"):
        two_steps("run", train={"verify_shared_prefix": "first_step"})


def test_it_needs_shared_passes(make_config):
    config = make_config(train={"verify_shared_prefix": "first_step", "prefix": "replicated"})
    assert [p.code for p in check(config)] == ["VRLT-C04"]


SCRIPT = """
import os, sys, torch
from vrlt_fast.cli import main
from vrlt_fast.model import language

attend = language.GroupPass.attend


def blind(self, layer, query, key, value, scale):
    return attend(self, layer, query, key, value * (2.0 if layer == 3 else 1.0), scale)


if os.environ["RANK"] == sys.argv[2]:
    language.GroupPass.attend = blind
sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("wrong", [pytest.param("none", marks=pytest.mark.slow), "1"])
def test_all_processes_stop_where_one_refuses(make_config, tmp_path, wrong):
    on = {"stages": ["grpo"], "out": str(tmp_path / "run"), "verify_shared_prefix": "first_step"}
    file = tmp_path / "run.toml"
    config = make_config(train=on, parallel={"replicas": 2}, eval={"samples": 1, "start": False})
    file.write_text(dump_toml(config), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    root = Path(__file__).parents[2]
    env |= {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    command = [sys.executable, "-c", SCRIPT, str(file), wrong]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env={**env, "RANK": str(rank)}, **pipes) for rank in range(2)]
    told = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == ([0, 0] if wrong == "none" else [4, 4]), told
    assert [out.count(SAID) for out, _ in told] == ([1, 0] if wrong == "none" else [0, 0])
    assert [text.count("VRLT-E06") for _, text in told] == ([0, 0] if wrong == "none" else [1, 1])
