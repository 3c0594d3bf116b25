"""What a step asks of the engine beside its groups, and what its responses earn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.test_trainer import stage_of
from vrlt_fast.data.readers import read_jsonl, write_jsonl
from vrlt_fast.data.sample import Box, Instance
from vrlt_fast.errors import ConfigError, DataError
from vrlt_fast.train.rollouts import Rollouts
from vrlt_fast.train.setup import read_inputs

OWN = """
import os

def shortness(response, sample):
    return 1.0 / response.n_tokens

def crash(response, sample):
    os._exit(3)

def nothing(response, sample):
    return "a lot"
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """The requests of every rollout, auxiliary ones behind the others."""
    seen: list = []
    auxiliary = Rollouts._auxiliary

    def watched(self, requests):
        found = auxiliary(self, requests)
        seen.append([*requests, *found])
        return found

    monkeypatch.setattr(Rollouts, "_auxiliary", watched)
    return seen


def test_the_shuffled_group_sees_other_frames_and_is_not_trained(make_config, asked):
    kept: list = []
    rollout = {"group_size": 6, "prompts": 2}
    config = make_config(reward={"shuffled": 0.3, "format": 1.0}, rollout=rollout, grpo={"beta": 0.0})
    stage = stage_of("grpo", config, False, kept.append)
    stage._rollouts.earnings.each._reward = lambda response, sample: {"semantic": float(len(response.text) % 2)}
    record = stage.step(1)
    (requests,) = asked
    assert [(r.n, r.train) for r in requests] == [(6, True)] * 2 + [(3, False)] * 2
    for plain, shuffled in zip(requests[:2], requests[2:], strict=True):
        assert plain.prompt.clip.key != shuffled.prompt.clip.key
        assert plain.prompt.ids.equal(shuffled.prompt.ids)
        frames = [clip.frames().flatten(1).tolist() for clip in (plain.prompt.clip, shuffled.prompt.clip)]
        assert sorted(frames[0]) == sorted(frames[1])
        assert plain.seed != shuffled.seed
    assert [len(lines) for lines in kept] == [6, 6]
    assert record["responses"] == 12
    assert record["clips_encoded"] == 4
    for lines in kept:
        for line in lines:
            right = line["parts"]["semantic"] > 0.1
            assert line["parts"]["shuffled"] in ((0.0, 1.0) if right else (0.0,))
            assert line["reward"] == pytest.approx(line["parts"]["semantic"] + 0.3 * line["parts"]["shuffled"])


def test_own_rewards_count_and_fail_alone(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    kept: list = []
    own = {"user": ("mine:shortness", "mine:nothing"), "user_weights": (2.0, 1.0), "format": 0.0}
    stage = stage_of("grpo", make_config(reward=own, grpo={"beta": 0.0}), False, kept.append)
    record = stage.step(1)
    lines = [line for group in kept for line in group]
    assert all(line["parts"]["user:mine:shortness"] == pytest.approx(1 / line["n_tokens"]) for line in lines)
    assert all(line["parts"]["user:mine:nothing"] == 0.0 for line in lines)
    assert record["reward_failures"] == {"user type": len(lines)}
    assert record["parts"].keys() >= {"user:mine:shortness", "format"}
    stage.close()


def test_what_own_rewards_lack_is_known_before_the_run(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_inputs(make_config(reward={"user": ("mine:absent", "nowhere:f")}))
    assert [p.code for p in caught.value.problems] == ["VRLT-W01"] * 2


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"grpo": {"policy": "reg"}, "train": {"micro_tokens": 100}}, "train.micro_tokens"),
        ({"grpo": {"token_weight": 1.7}, "parallel": {"sp": 2}}, "parallel.sp"),
        ({"grpo": {"token_weight": 1.7}, "train": {"prefix": "replicated"}}, "train.prefix"),
        ({"reward": {"shuffled": 0.3}, "parallel": {"sp": 2}}, "parallel.sp"),
        ({"reward": {"shuffled": 0.3}, "rollout": {"group_size": 1}}, "rollout.group_size"),
        ({"grpo": {"correction": "icepop", "correction_level": "sequence"}}, "grpo"),
        ({"data": {"tasks": ("grounding", "grounds")}}, "data.tasks"),
        ({"data": {"tasks": ("progress",)}}, None),
        ({"sft": {"reasoned": True, "steps": 1}, "data": {"tasks": ("grounding",)}}, None),
    ],
)
def test_what_does_not_go_together(make_config, demo: Path, tmp_path: Path, changes: dict, key: str | None):
    plain = [replace(s, reasoning="") for s in read_jsonl(demo / "train.jsonl")]
    write_jsonl(plain, tmp_path / "plain.jsonl")
    data = {"train": str(tmp_path / "plain.jsonl"), "root": str(demo), **changes.pop("data", {})}
    config = make_config(data=data, **changes)
    with pytest.raises(ConfigError) as caught:
        read_inputs(config)
    assert caught.value.code == "VRLT-C04"
    assert key is None or caught.value.problems[0].where == key


def test_a_task_without_a_form_is_found_before_the_run(make_config):
    with pytest.raises(DataError) as caught:
        read_inputs(make_config(prompt={"grammar": "stvg_r1"}))
    assert {p.code for p in caught.value.problems} == {"VRLT-D14"}
    assert caught.value.problems[0].where == "train.jsonl:1"


def test_numbers_are_drawn_where_that_is_asked_for(make_config, demo: Path, tmp_path: Path):
    sample = replace(read_jsonl(demo / "train.jsonl")[0], instances=(Instance(5, (Box(1.0, 0.2, 0.2, 0.8, 0.8),)),))
    write_jsonl([sample], tmp_path / "one.jsonl")
    data = {"train": str(tmp_path / "one.jsonl"), "root": str(demo)}
    prompts = [
        stage_of("grpo", make_config(data=data, prompt={"draw_ids": drawn}, rollout={"prompts": 1}), False).feed.prompt(
            0
        )
        for drawn in (False, True)
    ]
    plain, drawn = (p.clip for p in prompts)
    assert plain.key != drawn.key
    assert not plain.patches.equal(drawn.patches)
    assert prompts[0].ids.equal(prompts[1].ids)
