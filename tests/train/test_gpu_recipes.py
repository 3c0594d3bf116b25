"""The recipes of models on GPUs: what they say they need is what ``vrlt check`` estimates for the released shapes."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest

from vrlt_fast.config_load import load_config
from vrlt_fast.model.load import ModelInfo, inspect_model
from vrlt_fast.recipe import recipe_names, recipe_path, summary
from vrlt_fast.train.memory import estimate

NAMES = [name for name in recipe_names() if name.startswith("on_")]
SHAPES = {
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}
"""config.json of Qwen2.5-VL-3B-Instruct and -7B-Instruct."""
TOWER = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16}
TEXT = 200
"""Tokens of a prompt beside its video."""


def released(info: ModelInfo, size: str) -> ModelInfo:
    config = copy.deepcopy(info.config)
    text, vision = config.text_config, config.vision_config
    for key, value in SHAPES[size].items():
        setattr(text, key, value)
    config.tie_word_embeddings = SHAPES[size]["tie_word_embeddings"]
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    for key, value in TOWER.items():
        setattr(vision, key, value)
    vision.out_hidden_size, vision.fullatt_block_indexes = text.hidden_size, [7, 15, 23, 31]
    text.max_position_embeddings = 128_000
    return replace(info, config=config, context=128_000)


@pytest.mark.parametrize("name", NAMES)
def test_memory(name: str, tiny_folder: Path):
    head = summary(name)
    size, gpus, room, said = re.fullmatch(
        r"Qwen2\.5-VL-(\dB).* on (one|eight) GPUs? of (\d+) GB \(.*\): (\d+) GB(?: each)? with temporal_r1.*", head
    ).groups()
    config = load_config([recipe_path("temporal_r1"), recipe_path(name)], {"data.train": "train.jsonl"})
    assert config.model.name == f"Qwen/Qwen2.5-VL-{size}-Instruct"
    assert config.parallel.replicas * config.parallel.sp == {"one": 1, "eight": 8}[gpus]
    patches = config.video.max_frames // 2 * config.video.max_pixels // 14**2
    found = estimate(
        released(inspect_model(str(tiny_folder)), size),
        config,
        tokens=patches // 4 + TEXT,
        patches=patches,
        device="cuda",
        capacity=int(room) * 10**9,
        videos=1000,
    )
    assert round(found.total / 1e9) == int(said)
    assert found.total < int(room) * 1e9
