"""A recipe on the demo data whose rewards vary: an untrained model earns nothing by the rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from vrlt_fast.config import Config
from vrlt_fast.config_load import dump_toml

WORTH = '''
import zlib

def worth(response, sample):
    """By the text, in a way of the sample's own: some are always worth nothing, some always 1."""
    bias = zlib.crc32(sample.id.encode()) % 1000 / 1000
    value = zlib.crc32(response.text.encode()) % 1000 / 1000
    if sample.task == "grounding":
        return (bias + value) / 2
    return float(value < 1.6 * bias - 0.3)
'''


@pytest.fixture(scope="module")
def workplace(demo, tiny_folder, tmp_path_factory) -> Path:
    """A folder with recipe.toml and the module that has the reward."""
    folder = tmp_path_factory.mktemp("select")
    (folder / "worth.py").write_text(WORTH, encoding="utf-8")
    config = Config.model_validate(
        {
            "model": {"name": str(tiny_folder), "dtype": "float32", "device": "cpu"},
            "data": {"train": str(demo / "train.jsonl")},
            "video": {
                "sampling": "fps", "fps": 1.0, "min_frames": 2, "min_pixels": 784, "max_pixels": 1568, "workers": 0,
            },
            "prompt": {"video_layout": "interleaved", "think": False},
            "rollout": {"max_new_tokens": 6},
            "reward": {"semantic": 0.0, "temporal": 0.0, "format": 0.0, "user": ("worth:worth",)},
            "select": {"repeats": 4, "first": 2, "error": 0.2},
            "train": {"seed": 7, "threads": 1},
        }
    )  # fmt: skip
    (folder / "recipe.toml").write_text(dump_toml(config), encoding="utf-8")
    return folder
