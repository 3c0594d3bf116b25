"""Configurations of short runs on the demo data, and an opened tiny model."""

from __future__ import annotations

import io

import pytest
import torch
from safetensors.torch import load_file

from vrlt_fast.config import Config, ModelConfig, PromptConfig, VideoConfig
from vrlt_fast.data.readers import read_jsonl, resolve_video
from vrlt_fast.model.load import load_model
from vrlt_fast.model.prompt import encode_prompt
from vrlt_fast.report.console import Console
from vrlt_fast.train.trainer import train
from vrlt_fast.video.cache import ClipLoader

VIDEO = {"sampling": "fps", "fps": 1.0, "min_frames": 2, "min_pixels": 784, "max_pixels": 1568}


@pytest.fixture
def one_thread():
    """Undo what a run sets: threads and determinism."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def make_config(demo, tiny_folder, tmp_path):
    """``make_config(section={key: value})``: a short run into ``tmp_path/run``, with changes."""

    def make(**changes):
        tree = {
            "model": {"name": str(tiny_folder), "dtype": "float32", "device": "cpu", "freeze_vision": False},
            "data": {"train": str(demo / "train.jsonl"), "eval": str(demo / "heldout.jsonl")},
            "video": VIDEO,
            "prompt": {"video_layout": "interleaved", "think": False},
            "sft": {"steps": 1, "batch": 2, "lr": 1e-3},
            "rollout": {"group_size": 3, "prompts": 2, "max_new_tokens": 6},
            "grpo": {"steps": 1, "lr": 1e-3, "beta": 0.05},
            "train": {"out": str(tmp_path / "run"), "seed": 5, "deterministic": True, "threads": 1},
            "optim": {"warmup": 1},
            "checkpoint": {"every": 1},
            "eval": {"samples": 3, "responses": 1},
        }
        for section, values in changes.items():
            tree[section] = {**tree.get(section, {}), **values}
        return Config.model_validate(tree)

    return make


@pytest.fixture
def two_steps(make_config, tmp_path):
    """``two_steps(name, section={key: value})``: a run of two GRPO steps; what it printed, all tensors of its last
    checkpoint by file and name, and its completions.
    """

    def run(name, **changes):
        tree = {
            "grpo": {"steps": 2, "lr": 1e-3, "beta": 0.05},
            "optim": {"weight_decay": 10.0, "warmup": 1},
            "eval": {"samples": 1, "start": False},
            **changes,
        }
        folder = tmp_path / name
        tree["train"] = {"stages": ["grpo"], "out": str(folder), **changes.get("train", {})}
        out = io.StringIO()
        train(make_config(**tree), console=Console(file=out, errors=out))
        files = sorted((folder / "checkpoints" / "grpo-final").rglob("*.safetensors"))
        tensors = {f"{f.parent.name}/{f.name}/{k}": t for f in files for k, t in load_file(f).items()}
        return out.getvalue(), tensors, (folder / "completions.jsonl").read_bytes()

    return run


@pytest.fixture
def lm(tiny_folder):
    """The tiny model in float64, so that two ways to one gradient agree to many digits."""
    opened = load_model(ModelConfig(name=str(tiny_folder), dtype="float32", device="cpu", freeze_vision=False))
    opened.module.double()
    return opened


@pytest.fixture
def prompts(lm, demo):
    """Prompts of the first six samples: questions about the same video stand among them."""
    loader = ClipLoader(VideoConfig(**VIDEO), lm.info.geometry)
    prompt = PromptConfig(video_layout="interleaved", think=False)
    samples = read_jsonl(demo / "train.jsonl")[:6]
    return [encode_prompt(lm.info, s, loader.load(resolve_video(s, demo)), prompt) for s in samples]
