"""What the vLLM engine does without vLLM: what it hands over, and what it says where it can't run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vrlt_fast.config import ModelConfig, PromptConfig, VideoConfig, VllmConfig
from vrlt_fast.data.readers import read_jsonl, resolve_video
from vrlt_fast.errors import SetupError
from vrlt_fast.model.load import load_model
from vrlt_fast.model.prompt import encode_prompt
from vrlt_fast.rollout.vllm import VllmEngine, check_vllm, vllm_prompt
from vrlt_fast.video.cache import ClipLoader


@pytest.fixture(scope="module")
def lm(tiny_folder):
    return load_model(ModelConfig(name=str(tiny_folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def clip(lm, demo):
    loader = ClipLoader(VideoConfig(sampling="fps", fps=2, min_pixels=784, max_pixels=4704), lm.info.geometry)
    sample = read_jsonl(demo / "train.jsonl")[0]
    return sample, loader.load(resolve_video(sample, demo))


def vllm_positions(given, info):
    """Temporal, height and width positions of all tokens as vLLM 0.32 makes them for Qwen2.5-VL."""
    ids, video = given["prompt_token_ids"], given["multi_modal_data"]["video"]
    items = iter(zip(video["video_grid_thw"].tolist(), video["second_per_grid_ts"].tolist(), strict=True))
    pieces = []
    start = 0
    for token in ids:
        if token != info.video_token:
            piece = np.zeros((3, 1), dtype=np.int64)
        else:
            (t, h, w), seconds = next(items)
            grid = np.indices((t, h // 2, w // 2))
            grid[0] = (grid[0] * (seconds * info.config.vision_config.tokens_per_second)).astype(np.int64)
            piece = grid.reshape(3, -1)
        pieces.append(piece + start)
        start = int(pieces[-1].max()) + 1
    return torch.from_numpy(np.concatenate(pieces, axis=1))


@pytest.mark.parametrize("layout", ["native", "interleaved"])
def test_vllm_lays_the_prompt_out_as_we_do(lm, clip, layout, seed):
    sample, found = clip
    generator = torch.Generator().manual_seed(seed)
    intervals = [
        1.0,
        2 / 3,
        0.1,
        0.7,
        0.9999999,
        1 / 24,
        *torch.rand(20, generator=generator).mul(3).add(0.01).tolist(),
    ]
    for seconds in intervals:
        prompt = encode_prompt(
            lm.info, sample, replace(found, seconds_per_grid=seconds), PromptConfig(video_layout=layout)
        )
        given = vllm_prompt(lm.info, prompt, torch.zeros(len(prompt.visual), 4))
        video = given["multi_modal_data"]["video"]
        videos = 1 if layout == "native" else found.grid[0]
        assert given["prompt_token_ids"].count(lm.info.video_token) == videos == len(video["video_grid_thw"])
        assert int(video["video_grid_thw"].prod(-1).sum()) == 4 * len(prompt.visual)
        assert torch.equal(vllm_positions(given, lm.info), prompt.positions), seconds


def test_what_is_missing_is_said_with_its_fix(lm, monkeypatch):
    monkeypatch.setattr("vrlt_fast.rollout.vllm.find_spec", lambda name: None)
    with pytest.raises(SetupError) as missing:
        VllmEngine(lm, VllmConfig())
    assert (missing.value.code, missing.value.exit_code) == ("VRLT-E01", 4)
    assert "pip install" in str(missing.value)
    monkeypatch.setattr("vrlt_fast.rollout.vllm.find_spec", lambda name: object())
    check_vllm("qwen2_5_vl")
    with pytest.raises(SetupError) as unknown:
        check_vllm("qwen9_vl")
    assert unknown.value.code == "VRLT-M02"
