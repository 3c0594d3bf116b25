"""train.probe: the largest update before the first step. It trains nothing, and what it finds out is kept."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch

from vrlt_fast.errors import SetupError
from vrlt_fast.model import language, staged
from vrlt_fast.train.probe import wanted

ON = {"train": {"probe": "on"}}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "changes",
    [
        {"optim": {"states": "bfloat16", "weight_decay": 10.0, "warmup": 1}, "sft": {"steps": 1, "batch": 2}},
        {"model": {"freeze_vision": True}, "train": {"micro_tokens": 1}},
        {"lora": {"rank": 2}, "train": {"recompute": True}},
        {"train": {"prefix": "replicated", "stages": ["sft", "grpo"]}},
    ],
    ids=["trained tower", "frozen tower, staged", "lora, recompute", "replicated, after sft"],
)
def test_a_run_with_a_probe_is_the_run_without(two_steps, changes):
    if "lora" in changes:
        pytest.importorskip("peft")
    torch.manual_seed(1)
    random.seed(1)
    silent, right, responses = two_steps("off", **changes)
    torch.manual_seed(1)
    random.seed(1)
    said, ours, found = two_steps("on", **{**changes, "train": {**changes.get("train", {}), "probe": "on"}})
    assert "probe: " not in silent
    match = re.search(
        r"probe: 3 responses of 6 tokens behind a prompt of (\d+): [\d.]+ s, peak memory [\d.]+ GB\n", said
    )
    assert match
    assert int(match[1]) > 60
    assert found == responses
    assert ours.keys() == right.keys()
    assert [k for k, t in right.items() if not torch.equal(ours[k], t)] == []  # random states among them


@pytest.fixture
def small(monkeypatch):
    """``small(n)``: passes of more than n tokens run out of memory in their last layer, as they would in any; returns
    what passes have had.
    """

    def limit(most):
        seen = []
        for kind in (language.GroupPass, staged.PromptPass, staged._RowsPass):

            def attend(self, layer, query, *rest, whole=kind.attend):
                if layer == 3 and torch.is_grad_enabled():
                    seen.append(len(query))
                    if len(query) > most:
                        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
                return whole(self, layer, query, *rest)

            monkeypatch.setattr(kind, "attend", attend)
        return seen

    return limit


@pytest.mark.usefixtures("one_thread")
def test_what_does_not_fit_is_cut_before_the_first_step(two_steps, small, tmp_path):
    """Two groups in one pass are too much; the run goes on with one a pass, and never runs out of memory."""
    rollout = {"group_size": 3, "prompts": 2, "max_new_tokens": 30}
    seen = small(260)
    said, *_ = two_steps("run", **ON, rollout=rollout)
    tokens = int(re.search(r"memory ran out 1 times, so train.micro_tokens is (\d+) from here on", said)[1])
    assert sum(n > 260 for n in seen) == 1
    assert max(seen[1:]) <= tokens
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("out_of_memory" not in r for r in records)


@pytest.mark.usefixtures("one_thread")
def test_what_cannot_fit_ends_the_run_before_the_first_rollout(two_steps, small, tmp_path):
    small(50)
    with pytest.raises(SetupError, match=r"VRLT-E05 .*out of memory in the update"):
        two_steps("run", **ON)
    lines = tmp_path / "run" / "completions.jsonl"
    assert not lines.exists() or not lines.read_bytes()


def test_auto_is_for_gpus(make_config):
    kinds = {"auto": (False, True), "on": (True, True), "off": (False, False)}
    for probe, expected in kinds.items():
        config = make_config(train={"probe": probe})
        assert tuple(wanted(config, torch.device(name)) for name in ("cpu", "cuda")) == expected
