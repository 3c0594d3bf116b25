"""What a run learns of its samples while it trains: their order, how they are shown, groups that stand in, resuming."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train.test_trainer import stage_of
from vrlt_fast.data.readers import read_jsonl, write_jsonl
from vrlt_fast.errors import ConfigError
from vrlt_fast.report.console import Console
from vrlt_fast.rewards.earned import Earned
from vrlt_fast.train.checkpoint import load_checkpoint
from vrlt_fast.train.setup import read_inputs
from vrlt_fast.train.trainer import train
from vrlt_fast.video.preprocess import Clip

SHOWN = {"weighted": True, "hint": 0.8, "noise": 20.0, "mask_outside": 0.6, "mask_steps": 3, "window": 4}
SHOWN |= {"frames_first": 2, "frames_steps": 3, "frames_by": 2}


def by_text(self, responses, sample, **_):
    """Rewards that an untrained model earns, and that differ within most groups."""
    return [{"format": float(sum(map(ord, r.text)) % 5) / 4} for r in responses]


@pytest.fixture
def earns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Earned, "__call__", by_text)


@pytest.mark.usefixtures("one_thread", "earns")
@pytest.mark.parametrize("select", [SHOWN, {"replay": 3}, {"solved": 0.5, "weighted": True}])
def test_a_resumed_run_is_the_uninterrupted_one(make_config, tmp_path: Path, select: dict):
    def config(name: str, steps: int):
        grpo = {"steps": steps, "beta": 0.0, "lr": 1e-3}
        parts = {"train": {"out": str(tmp_path / name), "stages": ("grpo",)}, "checkpoint": {"keep": 10}}
        return make_config(select=select, grpo=grpo, eval={"samples": 0, "start": False}, data={"eval": ""}, **parts)

    whole = train(config("whole", 4), console=Console(file=io.StringIO()))
    stopped = config("stopped", 4)
    with pytest.MonkeyPatch.context() as patch:
        from vrlt_fast.train import trainer

        after = trainer.Trainer._after_step

        def stop(self, stage, name, step):
            if step == 2:
                self._stop_signal = "TEST"
            after(self, stage, name, step)

        patch.setattr(trainer.Trainer, "_after_step", stop)
        with pytest.raises(trainer.Stopped):
            train(stopped, console=Console(file=io.StringIO()))
    again = train(stopped, resume=True, console=Console(file=io.StringIO()))
    lines = [(run / "completions.jsonl").read_text("utf-8").splitlines() for run in (whole, again)]
    assert lines[0] == lines[1]
    ends = [load_checkpoint(run / "checkpoints" / "grpo-final") for run in (whole, again)]
    assert ends[0].state["stage_state"] == ends[1].state["stage_state"]
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    assert all(torch.equal(t, ends[1].tensors[n]) for n, t in ends[0].tensors.items())


@pytest.mark.usefixtures("earns")
def test_groups_with_signal_stand_in_for_those_without(make_config, monkeypatch: pytest.MonkeyPatch):
    config = make_config(select={"replay": 5}, grpo={"steps": 4, "beta": 0.0}, rollout={"prompts": 3, "group_size": 4})
    stage = stage_of("grpo", config, False)
    first = stage.step(1)
    assert "replayed_groups" not in first
    assert first["zero_signal_groups"] == 0
    monkeypatch.setattr(Earned, "__call__", lambda self, responses, sample, **_: [{"format": 1.0} for _ in responses])
    record = stage.step(2)
    assert (record["zero_signal_groups"], record["replayed_groups"]) == (3, 3)
    assert record["grad_norm"] > 0
    assert record["tokens_trained"] > 0
    assert record["mismatch"] is None  # that is about fresh responses


@pytest.mark.usefixtures("earns")
def test_hard_samples_get_a_hint_and_easy_ones_noise(make_config, demo: Path, tmp_path: Path):
    """One sample earns nothing, one all there is: at their second visit they are shown in other ways."""
    two = [s for s in read_jsonl(demo / "train.jsonl") if s.task == "grounding"][:2]
    thought = "first this and then that was seen in there"
    write_jsonl([replace(s, reasoning=thought) for s in two], tmp_path / "two.jsonl")
    data = {"train": str(tmp_path / "two.jsonl"), "root": str(demo), "eval": ""}
    select = {"hint": 1.0, "noise": 40.0, "window": 2}
    config = make_config(
        data=data, select=select, grpo={"steps": 2, "beta": 0.0}, reward={"temporal": 1.0, "format": 0.0}
    )
    stage = stage_of("grpo", config, False)
    hard = two[0].id
    stage._rollouts.earnings.each._reward = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Earned, "__call__", lambda self, rs, s, **_: [{"temporal": 0.0 if s.id == hard else 1.0} for _ in rs]
        )
        before = {p.sample.id: p for p in stage.feed.next(stage.feed.questions(2, 0), stage._teaching.change(1))}
        stage.step(1)
        after = {p.sample.id: p for p in stage.feed.next(stage.feed.questions(2, 0), stage._teaching.change(2))}
    easy = two[1].id
    assert after[hard].sample.question == f"{before[hard].sample.question}\nHint: {thought}"
    assert after[hard].clip.key == before[hard].clip.key
    assert after[easy].sample.question == before[easy].sample.question
    gap = (after[easy].clip.patches.float() - before[easy].clip.patches.float()).std()
    assert 20 < float(gap) < 45


def test_a_hint_that_does_not_fit_is_left_out(make_config):
    stage = stage_of("grpo", make_config(), False)
    feed, long = stage.feed, "word " * 40_000
    prompts = feed.next(feed.questions(2, 0), lambda _, sample, clip: (replace(sample, question=long), clip))
    assert [p.sample.question for p in prompts] == [p.sample.question for p in feed.next(feed.questions(2, 0))]
    assert feed.failed == 0


def test_videos_are_hidden_outside_of_the_span_at_first(make_config, demo: Path, tmp_path: Path):
    samples = [s for s in read_jsonl(demo / "train.jsonl") if s.task == "grounding"][:3]
    levels = [replace(s, difficulty=d) for s, d in zip(samples, (0.0, 0.5, None), strict=True)]
    write_jsonl(levels, tmp_path / "three.jsonl")
    data = {"train": str(tmp_path / "three.jsonl"), "root": str(demo), "eval": ""}
    stage = stage_of("grpo", make_config(data=data, select={"mask_outside": 1.0, "mask_steps": 10}), False)

    def hidden(step: int) -> list[float]:
        found = {p.sample.id: p.clip for p in stage.feed.next(stage.feed.questions(3, 0), stage._teaching.change(step))}
        grey = [(found[s.id].patches.view(found[s.id].grid[0], -1) == 128).all(1) for s in levels]
        return [float(g.float().sum()) for g in grey]

    first, later, last = hidden(1), hidden(6), hidden(11)
    assert first[0] == 0 < first[1] < first[2]
    assert later[2] < first[2]
    assert last == [0.0] * 3


def test_videos_get_more_frames_with_the_steps(make_config, demo: Path):
    """2 at first, then two more at a time, all in the end; also where what is outside of the spans is hidden."""
    select = {"frames_first": 2, "frames_steps": 10, "frames_by": 2, "mask_outside": 1.0, "mask_steps": 100}
    config = make_config(select=select, video={"max_frames": 6}, data={"tasks": ("grounding",)})
    stage = stage_of("grpo", config, False)

    def shown(step: int) -> list[Clip]:
        prompts = stage.feed.next(stage.feed.questions(3, 0), stage._teaching.change(step))
        assert all(int(p.clip.grid[0] * p.clip.grid[1] * p.clip.grid[2] / 4) == len(p.visual) for p in prompts)
        return [p.clip for p in prompts]

    whole = [p.clip for p in stage.feed.next(stage.feed.questions(3, 0))]
    assert {clip.grid[0] for clip in whole} == {3}
    for step, pairs in ((1, 1), (5, 1), (6, 2), (10, 2), (11, 3), (500, 3)):
        clips = shown(step)
        assert [clip.grid for clip in clips] == [(pairs, *clip.grid[1:]) for clip in whole]
        assert all(set(clip.times) <= set(before.times) for clip, before in zip(clips, whole, strict=True))
    assert [clip.key for clip in shown(500)] == [clip.key for clip in whole]


@pytest.mark.parametrize(
    "changes",
    [
        {"select": {"replay": 2, "hint": 0.5}},
        {"select": {"replay": 2}, "parallel": {"replicas": 2}},
        {"select": {"noise": 2.0}, "parallel": {"sp": 2}},
        {"select": {"frames_first": 2, "frames_steps": 4}, "parallel": {"sp": 2}},
        {"select": {"frames_first": 2, "frames_steps": 4, "replay": 2}},
        {"select": {"frames_first": 2}},
        {"select": {"frames_first": 1, "frames_steps": 4}},
        {"select": {"frames_first": 65, "frames_steps": 4}},
    ],
)
def test_what_does_not_go_together(make_config, changes: dict):
    with pytest.raises(ConfigError) as caught:
        read_inputs(make_config(**changes))
    assert caught.value.code == "VRLT-C04"


def test_the_order_follows_the_deviation(make_config):
    """Samples whose rewards differ come more often than flat ones, and processes that are told the same agree."""
    stages = [stage_of("grpo", make_config(select={"weighted": True}, rollout={"prompts": 2}), False) for _ in range(2)]
    count = len(stages[0].feed.samples)
    for stage in stages:
        for index in range(count):
            for _ in range(4):
                stage._teaching.stats.update(index, [1.0, 1.0, 1.0] if index < count // 2 else [0.0, 1.0, 1.0])
    orders = [[i for _ in range(count) for i in stage.stream.next()] for stage in stages]
    assert orders[0] == orders[1]
    assert sum(i >= count // 2 for i in orders[0]) > 0.6 * len(orders[0])
    assert json.loads(json.dumps(stages[0].state())) == stages[0].state() | {"traces": []}
