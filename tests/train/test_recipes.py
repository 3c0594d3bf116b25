"""Every recipe: its constants against a table, and a short run on the demo's samples of its tasks.

A tiny model learns the form of a few answers first, so that rewards vary; then it takes two steps with the recipe's
loss, rewards and grammar. Sizes alone differ from the recipe's.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.rewards.test_scorer import build as build_scorer
from vrlt_fast.config import Config
from vrlt_fast.config_load import load_config
from vrlt_fast.data.grammars.named import grammar
from vrlt_fast.data.readers import read_jsonl, write_jsonl
from vrlt_fast.data.sample import Sample
from vrlt_fast.recipe import recipe_names, recipe_path
from vrlt_fast.report.console import Console
from vrlt_fast.rewards.dual import weights
from vrlt_fast.train.trainer import dry_run, train

ON_POLICY = {"grpo.policy": "clip", "grpo.updates": 1, "grpo.reduction": "sequence", "grpo.scale_eps": 1e-4}
R1V = ON_POLICY | {"grpo.beta": 0.04, "grpo.scale": "std", "rollout.group_size": 8, "grpo.lr": 1e-6}
TEMPORAL = {
    "prompt.grammar": "temporal_r1",
    "reward.semantic": 0.5,
    "reward.temporal": 0.5,
    "reward.format": 0.5,
    "grpo.beta": 0.01,
    "grpo.entropy": 1e-3,
    "grpo.clip_low": 0.2,
    "grpo.clip_high": 0.2,
    "grpo.reduction": "token",
    "grpo.scale_eps": 1e-6,
    "rollout.group_size": 8,
    "rollout.prompts": 16,
    "rollout.max_new_tokens": 2048,
    "grpo.lr": 1e-6,
    "optim.weight_decay": 0.01,
}
CONSTANTS = {
    "temporal_r1": TEMPORAL | {"reward.overlap": "tiou", "data.tasks": ()},
    "temporal_r1_tvg": TEMPORAL | {"reward.overlap": "hull", "data.tasks": ("grounding",)},
    "temporal_r1_qa": TEMPORAL | {"data.tasks": ("videoqa",)},
    "temporal_r1_gqa": TEMPORAL | {"data.tasks": ("grounded_qa",)},
    "video_r1_tgrpo": R1V
    | {"reward.shuffled": 0.3, "reward.shuffled_ratio": 0.8, "reward.length": 0.2, "reward.length_range": (320, 512)}
    | {"reward.earned": 0.1, "reward.semantic": 1.0, "reward.format": 1.0, "rollout.max_new_tokens": 768}
    | {"rollout.top_p": 0.95, "optim.grad_clip": 5.0, "grpo.schedule": "cosine", "video.max_frames": 16},
    "videochat_r1": R1V | {"prompt.grammar": "videochat_r1", "reward.spatial": 1.0, "reward.temporal": 1.0},
    "tw_grpo": {"grpo.token_weight": 1.7, "grpo.clip_low": 0.2, "grpo.clip_high": 0.28, "grpo.beta": 0.0}
    | {"reward.choice": "soft", "data.invert": 0.5, "grpo.reduction": "token", "optim.grad_clip": 20.0}
    | {"grpo.steps": 500, "rollout.group_size": 8, "video.max_pixels": 196 * 28 * 28, "grpo.scale_eps": 1e-4},
    "deepvideo_r1": {"grpo.policy": "reg", "grpo.beta": 0.1, "select.window": 100, "grpo.reg_eps": 0.01}
    | {"grpo.reduction": "sequence", "select.hint": 0.5, "select.noise": 32.0, "video.max_pixels": 252 * 252},
    "longvila_r1": {"reward.semantic": 0.9, "reward.format": 0.1, "grpo.delta": 3.0, "grpo.clip_low": 0.2}
    | {"grpo.clip_high": 0.28, "grpo.beta": 0.01, "grpo.refill": 20, "rollout.top_p": 0.99, "parallel.sp": 8}
    | {"reward.overlong": 0.45, "grpo.reduction": "token", "video.max_frames": 512},
    "seed_bench_r1": R1V
    | {"grpo.beta": 0.1, "reward.format": 0.0, "data.shuffle_options": True, "prompt.images": True},
    "video_thinker": {"sft.lr": 1e-5, "sft.batch": 16, "sft.reasoned": True, "grpo.lr": 5e-6, "grpo.beta": 0.04}
    | {"optim.grad_clip": 5.0, "optim.weight_decay": 0.01, "video.max_frames": 16, "train.stages": ("sft", "grpo")},
    "primo_r1": R1V
    | {"reward.progress": 1.0, "reward.length": 0.2, "rollout.max_new_tokens": 4096}
    | {"video.max_pixels": 401408, "prompt.images": True, "optim.grad_clip": 5.0, "reward.shuffled": 0.0},
    "sole_r1": {"prompt.grammar": "sole_r1", "reward.progress": 1.0, "prompt.images": True},
    "stvg_r1": R1V
    | {"prompt.draw_ids": True, "reward.instance": 1.0, "reward.temporal": 1.0, "reward.format": 1.0}
    | {"reward.overlap": "hull", "rollout.max_new_tokens": 1024},
    "scene_r1_temporal": {"data.tasks": ("grounding",), "reward.temporal": 1.0, "reward.format": 1.0},
    "scene_r1_boxes": {"data.tasks": ("boxes",), "reward.spatial": 1.0, "reward.format": 1.0},
    "videotg_r1": {"data.tasks": ("grounding",), "select.mask_outside": 0.8, "select.mask_steps": 400},
    "videohallu": R1V | {"reward.open": "scorer", "optim.grad_clip": 5.0, "video.max_frames": 16},
    "dapo": {"grpo.clip_low": 0.2, "grpo.clip_high": 0.28, "grpo.beta": 0.0, "grpo.reduction": "token"}
    | {"grpo.refill": 10, "reward.overlong": 1.0, "rollout.group_size": 16, "optim.weight_decay": 0.1},
    "gspo": {"grpo.policy": "gspo", "grpo.clip_low": 3e-4, "grpo.clip_high": 4e-4, "grpo.reduction": "sequence"}
    | {"grpo.beta": 0.0, "grpo.updates": 4},
}
LEARNING = {
    "dapo": {
        "reward.semantic": 2.0,
        "reward.format": 0.0,
        "reward.overlong": 1.0,
        "reward.overlong_buffer": 409,
        "grpo.beta": 0.0,
        "grpo.clip_high": 0.28,
        "grpo.refill": 10,
    },
    "deepvideo_r1": {
        "reward.format": 1.0,
        "grpo.beta": 0.1,
        "grpo.updates": 2,
        "grpo.policy": "reg",
        "grpo.reduction": "sequence",
        "select.hint": 0.5,
        "select.noise": 32.0,
    },
    "gspo": {
        "grpo.beta": 0.0,
        "grpo.clip_low": 0.0003,
        "grpo.clip_high": 0.0004,
        "grpo.updates": 4,
        "grpo.policy": "gspo",
        "grpo.reduction": "sequence",
    },
    "longvila_r1": {
        "reward.semantic": 0.9,
        "reward.format": 0.1,
        "reward.overlong": 0.45,
        "reward.overlong_buffer": 512,
        "grpo.clip_high": 0.28,
        "grpo.delta": 3.0,
        "grpo.scale_eps": 1e-06,
        "grpo.refill": 20,
    },
    "primo_r1": {
        "reward.format": 1.0,
        "reward.length": 0.2,
        "grpo.schedule": "cosine",
        "grpo.beta": 0.04,
        "grpo.reduction": "sequence",
    },
    "scene_r1_boxes": {"reward.format": 1.0, "grpo.beta": 0.04, "grpo.reduction": "sequence"},
    "scene_r1_temporal": {"reward.format": 1.0, "grpo.beta": 0.04, "grpo.reduction": "sequence"},
    "seed_bench_r1": {"reward.format": 0.0, "grpo.steps": 750, "grpo.beta": 0.1, "grpo.reduction": "sequence"},
    "sole_r1": {"reward.format": 1.0},
    "stvg_r1": {
        "reward.format": 1.0,
        "reward.overlap": "hull",
        "grpo.steps": 2000,
        "grpo.beta": 0.04,
        "grpo.reduction": "sequence",
    },
    "temporal_r1": {"reward.semantic": 0.5, "reward.temporal": 0.5, "grpo.entropy": 0.001, "grpo.scale_eps": 1e-06},
    "temporal_r1_gqa": {"reward.semantic": 0.5, "reward.temporal": 0.5, "grpo.entropy": 0.001, "grpo.scale_eps": 1e-06},
    "temporal_r1_qa": {"reward.semantic": 0.5, "reward.temporal": 0.5, "grpo.entropy": 0.001, "grpo.scale_eps": 1e-06},
    "temporal_r1_tvg": {
        "reward.semantic": 0.5,
        "reward.temporal": 0.5,
        "reward.overlap": "hull",
        "grpo.entropy": 0.001,
        "grpo.scale_eps": 1e-06,
    },
    "tw_grpo": {
        "reward.format": 1.0,
        "reward.choice": "soft",
        "grpo.steps": 500,
        "grpo.beta": 0.0,
        "grpo.clip_high": 0.28,
        "grpo.token_weight": 1.7,
    },
    "video_r1_tgrpo": {
        "reward.format": 1.0,
        "reward.shuffled": 0.3,
        "reward.length": 0.2,
        "grpo.schedule": "cosine",
        "grpo.beta": 0.04,
        "grpo.reduction": "sequence",
    },
    "video_thinker": {"reward.format": 1.0, "grpo.lr": 5e-06, "grpo.beta": 0.04, "grpo.reduction": "sequence"},
    "videochat_r1": {
        "reward.overlap": "merged",
        "reward.format": 1.0,
        "grpo.steps": 2000,
        "grpo.beta": 0.04,
        "grpo.reduction": "sequence",
    },
    "videohallu": {
        "reward.format": 1.0,
        "reward.open": "scorer",
        "grpo.schedule": "cosine",
        "grpo.beta": 0.04,
        "grpo.reduction": "sequence",
    },
    "videotg_r1": {
        "reward.format": 1.0,
        "grpo.steps": 600,
        "grpo.beta": 0.04,
        "grpo.reduction": "sequence",
        "select.mask_outside": 0.8,
        "select.mask_steps": 400,
    },
}
"""All keys of the rewards, the loss and the selection that a recipe sets apart from the defaults."""
TASKS = {
    "video_r1_tgrpo": ("number", "regression", "open", "videoqa"),
    "videochat_r1": ("grounding", "grounded_qa", "boxes"),
    "tw_grpo": ("videoqa",),
    "deepvideo_r1": ("videoqa", "grounding"),
    "longvila_r1": ("videoqa",),
    "seed_bench_r1": ("videoqa",),
    "video_thinker": ("videoqa",),
    "primo_r1": ("progress", "videoqa"),
    "sole_r1": ("progress",),
    "stvg_r1": ("instance",),
    "scene_r1_temporal": ("grounding",),
    "scene_r1_boxes": ("boxes",),
    "videotg_r1": ("grounding",),
    "videohallu": ("open",),
    "dapo": ("videoqa",),
    "temporal_r1_tvg": ("grounding",),
    "temporal_r1_qa": ("videoqa",),
    "temporal_r1_gqa": ("grounded_qa",),
}
PICTURED = ("seed_bench_r1", "primo_r1", "sole_r1")
NAMES = [name for name in recipe_names() if not name.startswith(("demo", "on_"))]


def test_the_table_has_every_recipe():
    assert sorted(CONSTANTS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_constants(name: str):
    config = load_config([recipe_path(name)], {})
    found = {key: getattr(getattr(config, key.partition(".")[0]), key.partition(".")[2]) for key in CONSTANTS[name]}
    assert found == CONSTANTS[name]
    assert apart(config) == LEARNING[name]


def apart(config: Config) -> dict[str, object]:
    pairs = [(name, getattr(config, name), getattr(Config(), name)) for name in ("reward", "grpo", "select")]
    return {
        f"{name}.{key}": getattr(ours, key)
        for name, ours, default in pairs
        for key in type(ours).model_fields
        if getattr(ours, key) != getattr(default, key)
    }


def samples_of(name: str, demo: Path) -> list[Sample]:
    """Two samples of each task, with short reasonings; of a recipe that shows images some with one."""
    wanted = TASKS.get(name, ("videoqa", "grounding", "grounded_qa"))
    every = [*read_jsonl(demo / "tasks.jsonl"), *read_jsonl(demo / "train.jsonl")]
    form, out = grammar(load_config([recipe_path(name)], {}).prompt.grammar), []
    for task in wanted:
        fit = [s for s in every if s.task == task and (len(s.letters) < 2 or name == "tw_grpo")]
        fit.sort(key=lambda s: not (s.images and name in PICTURED))
        fit = [s for i, s in enumerate(fit) if s.answer not in {t.answer for t in fit[:i]} or not s.answer]
        images = {"images": ()} if name not in PICTURED else {}
        out += [replace(s, reasoning="so", boxes=s.boxes[:1], timeline=s.timeline[:1], **images) for s in fit[:2]]
        if task == "progress":  # which a grammar has the response repeat
            out = [replace(s, question=f"How far at {i}?") for i, s in enumerate(out)]
    for sample in out:
        form.check(sample)
    return out


def short(name: str, folder: Path, demo: Path, model: Path) -> dict[str, str]:
    """What a run of the demo's size changes, as overrides."""
    letters = TASKS.get(name) == ("videoqa",) and name != "video_thinker"
    longer = name in ("primo_r1", "videochat_r1", "scene_r1_boxes", "video_thinker")
    changes = {
        "model.name": model,
        "model.dtype": "float32",
        "model.device": "cpu",
        "model.freeze_vision": "false",
        "data.train": folder / "samples.jsonl",
        "data.root": demo,
        "train.out": folder / "run",
        "train.threads": 1,
        "video.sampling": "fps",
        "video.fps": 1.0,
        "video.min_frames": 2,
        "video.max_frames": 8,
        "video.min_pixels": 784,
        "video.max_pixels": 1568,
        "video.image_min_pixels": 784,
        "video.image_max_pixels": 1568,
        "video.workers": 0,
        "video.prefetch": 0,
        "prompt.video_layout": "interleaved",
        "rollout.group_size": 6,
        "rollout.prompts": 4,
        "rollout.max_new_tokens": 110 if name in ("primo_r1", "video_thinker") else 64,
        "grpo.steps": 2,
        "grpo.lr": 1e-3,
        "grpo.refill": 1,
        "train.stages": '["sft", "grpo"]',
        "sft.steps": 16 if letters else 60 if longer else 30,
        "sft.batch": 4,
        "sft.lr": 5e-3,
        "rollout.temperature": 1.1,
        "optim.warmup": 2,
        "parallel.sp": 1,
        "checkpoint.every": 0,
        "embed_cache.disk_gb": 0.0,
        "train.recompute": "false",
        "reward.length_range": "[1, 110]",
        "reward.overlong_buffer": 64,
        "eval.start": "false",
        "select.mask_steps": 2,
    }
    if name == "videohallu":
        changes["scorer.model"] = build_scorer(folder / "scorer", 1)
    return {key: str(value) for key, value in changes.items()}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name: str, demo: Path, tiny_folder: Path, tmp_path: Path):
    write_jsonl(samples_of(name, demo), tmp_path / "samples.jsonl")
    config = load_config([recipe_path(name)], short(name, tmp_path, demo, tiny_folder), verb="train")
    assert "per step" in dry_run(config)
    run = train(config, console=Console(file=io.StringIO()))
    lines = [json.loads(line) for line in (run / "completions.jsonl").read_text("utf-8").splitlines()]
    groups: dict[tuple[int, str], list[float]] = {}
    for line in lines:
        groups.setdefault((line["step"], line["id"]), []).append(line["reward"])
    assert any(max(rewards) > min(rewards) for rewards in groups.values())
    weight = weights(config.reward)
    earned = {part for line in lines for part, value in line["parts"].items() if value}
    assert earned >= {part for line in lines for part in line["parts"] if weight[part]}
    asked = {"length", "overlong", "shuffled"} & {part for part, value in weight.items() if value}
    assert earned >= asked
    before, after = (
        load_file(next((run / "checkpoints" / f"{stage}-final").glob("model*.safetensors")))
        for stage in ("sft", "grpo")
    )
    assert any(not tensor.equal(before[key]) for key, tensor in after.items())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    trained = [record for record in steps if record["kind"] == "train" and record["stage"] == "grpo"]
    assert len(trained) == 2
    assert any(record["grad_norm"] for record in trained)
