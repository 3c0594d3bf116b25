"""A whole short run: what the run folder holds, what a step does, and what survives the border of two stages."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vrlt_fast.data.readers import read_jsonl
from vrlt_fast.data.splits import data_root
from vrlt_fast.errors import DataError
from vrlt_fast.model.load import load_model
from vrlt_fast.report.console import Console
from vrlt_fast.train.feed import Feed
from vrlt_fast.train.guard import Guard
from vrlt_fast.train.optim import make_optimizer
from vrlt_fast.train.setup import read_inputs
from vrlt_fast.train.stages import GrpoStage, SftStage
from vrlt_fast.train.trainer import dry_run, train
from vrlt_fast.video.cache import ClipLoader


def records(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("one_thread")
def test_run_folder_of_a_short_run(make_config, capsys):
    # an untrained model earns nothing: the decay takes it away from the reference
    config = make_config(sft={"steps": 2}, grpo={"steps": 2}, optim={"weight_decay": 10.0, "warmup": 1})
    run = train(config, console=Console())
    assert (run / "report.html").stat().st_size > 1000
    assert sorted(p.name for p in (run / "eval").iterdir()) == ["grpo.jsonl", "sft.jsonl", "start.jsonl"]
    assert {"sft-final", "grpo-final"} <= {p.name for p in (run / "checkpoints").iterdir()}
    metrics = records(run)
    assert [(r["kind"], r["stage"], r["step"]) for r in metrics] == [
        ("eval", "sft", 0),
        ("train", "sft", 1),
        ("train", "sft", 2),
        ("eval", "sft", 2),
        ("train", "grpo", 1),
        ("train", "grpo", 2),
        ("eval", "grpo", 2),
    ]
    assert [r["label"] for r in metrics if r["kind"] == "eval"] == ["start", "sft", "grpo"]
    for record in (r for r in metrics if r["kind"] == "train"):
        phases = {"decode", "update"}
        if record["stage"] == "grpo":
            phases |= {"encode", "prefill", "generate", "reward", "reference"}
            assert record["parts"]["format"] >= 0
            assert record["tokens_trained"] < record["tokens_logical"]
            assert 0 <= record["entropy"] <= math.log(768)
        assert set(record["phases"]) == phases
        assert record["peak_gb"] > 0.05
        assert record["failed_videos"] == 0
    assert metrics[4]["kl"] == pytest.approx(0.0, abs=1e-9)  # the reference is the policy after SFT
    assert metrics[5]["kl"] > 0
    lines = records(run, "completions.jsonl")
    assert [line["step"] for line in lines] == [1] * 6 + [2] * 6
    for line in lines:
        assert line["reward"] == pytest.approx(
            line["parts"].get("semantic", 0) + line["parts"].get("temporal", 0) + 0.5 * line["parts"]["format"]
        )
    mean = sum(line["reward"] for line in lines[:6]) / 6
    assert metrics[4]["reward"] == pytest.approx(mean)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("one_thread")
def test_failures_are_counted_across_the_border_of_stages(make_config, demo, tmp_path):
    """A run that is resumed from the end of SFT goes on with SFT's count and its window of outcomes."""
    data = shutil.copytree(demo, tmp_path / "data")
    samples = read_jsonl(data / "train.jsonl")
    for name in list(dict.fromkeys(s.video for s in samples))[:2]:
        (data / name).write_bytes(b"not a video")
    files = {"train": str(data / "train.jsonl"), "eval": "", "max_failed_share": 0.5}
    config = make_config(data=files, sft={"batch": 12, "steps": 1})
    run = train(config, console=Console(file=io.StringIO()))
    last = records(run)[-1]
    assert last["stage"] == "grpo"
    assert last["failed_videos"] >= 2
    for name in ("grpo-final", "grpo-000001"):
        shutil.rmtree(run / "checkpoints" / name, ignore_errors=True)
    train(config, resume=True, console=Console(file=io.StringIO()))
    assert records(run)[-1]["failed_videos"] == last["failed_videos"]
    assert [r["stage"] for r in records(run)] == ["sft", "grpo"]


@pytest.mark.usefixtures("one_thread")
def test_a_stage_that_loses_too_many_videos_stops_and_can_go_on(make_config, demo, tmp_path):
    data = shutil.copytree(demo, tmp_path / "data")
    names = list(dict.fromkeys(s.video for s in read_jsonl(data / "train.jsonl")))
    good = {name: (data / name).read_bytes() for name in names}
    config = make_config(data={"train": str(data / "train.jsonl"), "eval": ""}, sft={"batch": 12, "steps": 2})
    # the index of a file stays readable while its pictures are gone: only decoding finds out
    for name in names[:4]:
        content = bytearray(good[name])
        start = content.index(b"mdat") + 4
        content[start : start + len(content) // 3] = bytes(len(content) // 3)
        (data / name).write_bytes(content)
    warned = io.StringIO()
    with pytest.raises(DataError) as caught:
        train(config, console=Console(file=warned))
    assert (caught.value.code, caught.value.exit_code) == ("VRLT-D12", 3)
    for name in names[:4]:
        (data / name).write_bytes(good[name])
    run = train(config, resume=True, console=Console(file=io.StringIO()))
    assert [(r["stage"], r["step"]) for r in records(run)] == [("sft", 1), ("sft", 2), ("grpo", 1)]


@pytest.mark.usefixtures("one_thread")
def test_dry_run_describes_and_writes_nothing(make_config, tmp_path):
    text = dry_run(make_config())
    assert "[grpo]" in text
    assert "held out  3 questions" in text
    assert "per step  2 prompts x 3 responses" in text
    assert not (tmp_path / "run").exists()


def stage_of(kind, config, reference=True, keep=lambda lines: None):
    inputs = read_inputs(config)
    lm = load_model(config.model, inputs.info)
    loader = ClipLoader(config.video, inputs.info.geometry)
    feed = Feed(inputs.info, inputs.train, loader, config, root=data_root(config, "train"), warn=print)
    guard = Guard(Path(config.train.out).parent / "bad_steps", print)
    if kind == "sft":
        optimizer = make_optimizer(lm, config.optim, config.sft.lr)
        return SftStage(config, lm, feed, feed.videos(config.sft.batch, 1), optimizer, guard=guard)
    twin = load_model(config.model, inputs.info) if reference else None
    optimizer = make_optimizer(lm, config.optim, config.grpo.lr)
    return GrpoStage(config, lm, twin, feed, optimizer, seed=1, guard=guard, keep=keep, say=print, warn=print)


def test_sft_steps_lower_the_loss(make_config):
    stage = stage_of("sft", make_config(sft={"steps": 100, "batch": 12}, optim={"warmup": 0}))
    losses = [stage.step(step)["loss"] for step in (1, 2, 3, 4)]
    assert losses[0] == pytest.approx(math.log(768), abs=0.5)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("updates", [1, 2])
def test_only_a_second_update_leaves_the_rollout_policy(make_config, updates):
    grpo = {"updates": updates, "lr": 0.01, "clip_low": 1e-4, "clip_high": 1e-4, "beta": 0.0, "steps": 10}
    reward = {"shuffle": False}
    stage = stage_of("grpo", make_config(grpo=grpo, reward=reward, rollout={"group_size": 6, "prompts": 4}), False)
    # an untrained model earns nothing: rewards that differ are what is needed here
    stage._rollouts.earnings.each._reward = lambda response, sample: {"format": float(len(response.text) % 2)}
    record = stage.step(1)
    assert record["reward_std"] > 0
    assert record["mismatch"]["max"] < 1e-4
    assert (record["clips_encoded"], record["prefills"]) == (4, 4)
    assert (record["clip_share"] > 0) is (updates == 2)


def test_shuffled_rewards_are_the_same_rewards(make_config):
    found = {}
    for shuffle in (False, True):
        config = make_config(reward={"shuffle": shuffle}, rollout={"group_size": 6, "prompts": 4})
        found[shuffle] = []
        stage = stage_of("grpo", config, keep=found[shuffle].extend)
        stage._rollouts.earnings.each._reward = lambda response, sample: {
            "format": float(sum(map(ord, response.text)) % 7)
        }
        stage.step(1)
    plain, shuffled = found[False], found[True]
    assert [c["response"] for c in plain] == [c["response"] for c in shuffled]
    assert [c["reward"] for c in plain] != [c["reward"] for c in shuffled]
    for start in range(0, 24, 6):
        group = slice(start, start + 6)
        assert sorted(c["reward"] for c in plain[group]) == sorted(c["reward"] for c in shuffled[group])


def test_a_step_without_signal_changes_nothing(make_config):
    """An untrained model earns nothing: without a KL neither pass nor optimizer step is worth it."""
    stage = stage_of("grpo", make_config(grpo={"steps": 2}, optim={"weight_decay": 10.0}), False)
    stage._rollouts.earnings.each._reward = lambda response, sample: {"format": 1.0}
    before = [p.detach().clone() for p in stage.lm.module.parameters()]
    record = stage.step(1)
    assert (record["zero_signal_groups"], record["response_tokens_passed"]) == (2, 0)
    assert (record["grad_norm"], record["entropy"], record["mismatch"], record["tokens_trained"]) == (
        None,
        None,
        None,
        0,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, stage.lm.module.parameters(), strict=True))
    assert not stage.optimizer.state


def test_refill_takes_further_prompts_until_enough_have_signal(make_config):
    """Rewards of every second group are equal: two of them need four prompts, two rollouts of two."""
    kept = []
    stage = stage_of("grpo", make_config(grpo={"steps": 2, "refill": 3, "beta": 0.0}), False, kept.append)
    calls = itertools.count()

    def reward(response, sample):
        call = next(calls)  # groups of three, one after the other
        return {"format": float(call % 3) if call // 3 % 2 else 1.0}

    stage._rollouts.earnings.each._reward = reward
    record = stage.step(1)
    assert (record["responses"], record["zero_signal_groups"]) == (4 * 3, 2)
    assert len(kept) == 4
    assert 0 < record["response_tokens_passed"] < sum(r["n_tokens"] for lines in kept for r in lines)
    seeds = {line["response"] for lines in kept for line in lines}
    assert len(seeds) > 1
    stage._rollouts.earnings.each._reward = lambda response, sample: {"format": 1.0}
    record = stage.step(2)
    assert (record["responses"], record["response_tokens_passed"]) == ((1 + 3) * 2 * 3, 0)


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("cosine", 0.1)])
def test_learning_rate_of_grpo_follows_its_schedule(make_config, schedule, last):
    stage = stage_of(
        "grpo", make_config(grpo={"schedule": schedule, "lr": 1e-6, "steps": 9}, optim={"warmup": 0}), False
    )
    counted = itertools.count()
    stage._rollouts.earnings.each._reward = lambda response, sample: {"format": float(next(counted))}
    assert stage.step(9)["lr"] == pytest.approx(last * 1e-6)
    assert all(group["lr"] == pytest.approx(last * 1e-6) for group in stage.optimizer.param_groups)


def test_an_interrupted_rollout_has_written_what_was_complete(make_config):
    lines = []

    def keep(records):
        if lines:
            raise KeyboardInterrupt
        lines.extend(records)

    stage = stage_of("grpo", make_config(rollout={"group_size": 3, "prompts": 4, "max_rows": 3}), keep=keep)
    with pytest.raises(KeyboardInterrupt):
        stage.step(1)
    assert len(lines) == 3
    assert len({line["id"] for line in lines}) == 1
    assert all(line["reward"] is not None and line["response"] is not None for line in lines)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_moments_in_bf16_resume_as_if_nothing_had_happened(make_config, tmp_path, dtype):
    found = []
    for name in ("whole", "resumed"):
        config = make_config(
            model={"dtype": dtype},
            optim={"states": "bfloat16", "weight_decay": 10.0, "warmup": 1},
            grpo={"steps": 2},
            train={"stages": ["grpo"], "out": str(tmp_path / name)},
            eval={"samples": 1, "start": False},
        )
        run = train(config, console=Console(file=io.StringIO()))
        if name == "resumed":
            shutil.rmtree(run / "checkpoints" / "grpo-final")
            train(config, resume=True, console=Console(file=io.StringIO()))
        files = sorted((run / "checkpoints" / "grpo-final").rglob("*.safetensors"))
        found.append({(f.parent.name, f.name, k): t for f in files for k, t in load_file(f).items()})
    whole, resumed = found
    moments = [t for (_, _, k), t in whole.items() if k.endswith(("/exp_avg", "/exp_avg_sq"))]
    assert {t.dtype for t in moments} == {torch.bfloat16}
    assert whole.keys() == resumed.keys()
    assert [k for k, t in whole.items() if not torch.equal(resumed[k], t)] == []
