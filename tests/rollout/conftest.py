from __future__ import annotations

import pytest
import torch

from vrlt_fast.config import ModelConfig, PromptConfig, VideoConfig
from vrlt_fast.data.readers import read_jsonl, resolve_video
from vrlt_fast.model.load import load_model
from vrlt_fast.model.prompt import encode_prompt
from vrlt_fast.video.cache import ClipLoader


@pytest.fixture(autouse=True, scope="module")
def one_thread(one_torch_thread):
    """All of them are about small models."""


@pytest.fixture(scope="module")
def lm(tiny_folder):
    lm = load_model(ModelConfig(name=str(tiny_folder), dtype="float32", device="cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in lm.module.parameters():
            p.mul_(1.5)  # sharper distributions than a fresh initialisation has
    return lm


@pytest.fixture(scope="module")
def prompts(lm, demo):
    """Four prompts; the first two are about one clip."""
    loader = ClipLoader(VideoConfig(sampling="fps", fps=2, min_pixels=784, max_pixels=4704), lm.info.geometry)
    samples = read_jsonl(demo / "train.jsonl")[:4]
    prompt = PromptConfig(video_layout="interleaved", think=False)
    return [encode_prompt(lm.info, s, loader.load(resolve_video(s, demo)), prompt) for s in samples]
