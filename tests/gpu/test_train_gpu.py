"""Short runs on a GPU, from videos to checkpoints: what is trained there opens and answers on a CPU too."""

from __future__ import annotations

import io
import json

import pytest
import torch

from vrlt_fast.config import Config, ModelConfig
from vrlt_fast.model.load import load_model
from vrlt_fast.report.console import Console
from vrlt_fast.train.trainer import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.timeout(140),
]
HOW = {
    "trained tower": {"model": {"freeze_vision": False}},
    "frozen tower": {"model": {"freeze_vision": True}, "train": {"recompute": True}, "grpo": {"updates": 2}},
    "lora": {"model": {"freeze_vision": True}, "lora": {"rank": 4}},
    "fp32": {"model": {"freeze_vision": False, "dtype": "float32"}, "rollout": {"cuda_graphs": False}},
}


@pytest.mark.parametrize("name", HOW)
def test_a_short_run(demo, tiny_folder, tmp_path, name):
    if "lora" in HOW[name]:
        pytest.importorskip("peft")
    tree = {
        "model": {"name": str(tiny_folder), "dtype": "bfloat16", "device": "cuda"},
        "data": {"train": str(demo / "train.jsonl"), "eval": str(demo / "heldout.jsonl")},
        "video": {"sampling": "fps", "fps": 2.0, "min_pixels": 784, "max_pixels": 3136},
        "prompt": {"video_layout": "interleaved", "think": False},
        "sft": {"steps": 4, "batch": 4, "lr": 1e-3, "narration": 0.5},
        "rollout": {"group_size": 4, "prompts": 4, "max_new_tokens": 12},
        "grpo": {"steps": 3, "lr": 1e-3, "beta": 0.05},
        "reward": {"shuffle": True},
        "optim": {"warmup": 1, "weight_decay": 1.0},
        "train": {"out": str(tmp_path / "run")},
        "eval": {"samples": 6, "start": False},
    }
    for section, values in HOW[name].items():
        tree[section] = {**tree.get(section, {}), **values}
    run = train(Config.model_validate(tree), console=Console(file=io.StringIO()))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    sft, grpo = ([r for r in records if r["kind"] == "train" and r["stage"] == s] for s in ("sft", "grpo"))
    assert (len(sft), len(grpo)) == (4, 3)
    assert sft[-1]["loss"] < sft[0]["loss"]
    for record in grpo:
        print(name, {k: record[k] for k in ("kl", "mismatch", "phases", "tokens_trained", "tokens_logical", "peak_gb")})
        assert not record.get("skipped")
        assert record["tokens_trained"] < record["tokens_logical"]
        if record["mismatch"]:
            assert record["mismatch"]["max"] < (1e-3 if name == "fp32" else 0.5)
    end = run / "checkpoints" / "grpo-final"
    opened = load_model(ModelConfig(name=str(end), dtype="float32", device="cpu"))
    assert all(bool(p.isfinite().all()) for p in opened.module.parameters())
