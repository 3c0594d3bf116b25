"""The shared-prompt passes against transformers' own full forward over replicated rows, with our positions."""

from __future__ import annotations

import random

import pytest
import torch

from vrlt_fast.config import ModelConfig, PromptConfig, VideoConfig
from vrlt_fast.data.readers import read_jsonl, resolve_video
from vrlt_fast.model import language
from vrlt_fast.model.attention import segment_attention
from vrlt_fast.model.language import target_hidden, target_logprobs
from vrlt_fast.model.layout import build_layout, response_row
from vrlt_fast.model.load import load_model
from vrlt_fast.model.prompt import encode_prompt
from vrlt_fast.model.vision import encode_clips, normalise, shared_vision
from vrlt_fast.video.cache import ClipLoader
from vrlt_kernels import linear_logprob

VIDEO = VideoConfig(sampling="fps", fps=2, min_pixels=784, max_pixels=4704)


@pytest.fixture(scope="module")
def lm(tiny_folder):
    return load_model(ModelConfig(name=str(tiny_folder), dtype="float32", device="cpu", freeze_vision=False))


@pytest.fixture(params=["native", "interleaved"])
def prompts(request, lm, demo):
    loader = ClipLoader(VIDEO, lm.info.geometry)
    samples = read_jsonl(demo / "train.jsonl")[:5]
    prompt = PromptConfig(video_layout=request.param, think=False)
    return [encode_prompt(lm.info, s, loader.load(resolve_video(s, demo)), prompt) for s in samples]


def rows_of(prompts, responses):
    return [[response_row(p, r) for r in group] for p, group in zip(prompts, responses, strict=False)]


def replicated_logits(lm, prompt, response):
    """transformers' forward of one row, prompt and response, with pixels; logits that predict the response."""
    ids = torch.cat([prompt.ids, torch.tensor(response)])[None]
    after = torch.arange(len(response)).expand(3, -1) + prompt.next_position
    out = lm.module(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.cat([prompt.positions, after], dim=1)[:, None],
        pixel_values_videos=normalise(lm, prompt.clip.patches),
        video_grid_thw=torch.tensor([prompt.clip.grid]),
    )
    return out.logits[0, len(prompt) - 1 : -1]


def test_logits_and_gradients_equal_the_replicated_forward(lm, prompts, seed):
    rng = random.Random(seed)
    responses = [[[rng.randrange(256) for _ in range(rng.randint(1, 9))] for _ in range(n)] for n in (1, 3, 2, 1, 4)]
    layout = build_layout(prompts, rows_of(prompts, responses))
    weight = torch.randn(len(layout.targets), generator=torch.Generator().manual_seed(seed))

    lm.module.zero_grad()
    logits = lm.module.lm_head(target_hidden(lm, layout, shared_vision(lm, prompts)))
    targets = layout.targets
    (logits.log_softmax(-1).gather(1, targets[:, None])[:, 0] * weight).sum().backward()
    ours = {n: p.grad.clone() for n, p in lm.module.named_parameters()}

    lm.module.zero_grad()
    rows = [replicated_logits(lm, p, r) for p, group in zip(prompts, responses, strict=True) for r in group]
    expected = torch.cat(rows)
    (expected.log_softmax(-1).gather(1, targets[:, None])[:, 0] * weight).sum().backward()

    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for name, parameter in lm.module.named_parameters():
        scale = parameter.grad.abs().max().clamp(min=1e-3)
        assert float((ours[name] - parameter.grad).abs().max() / scale) < 1e-4, name
    assert layout.tokens_logical > layout.tokens_trained
    lm.module.zero_grad()


def test_padding_and_neighbours_do_not_change_a_row(lm, prompts):
    response = [5, 6, 7]
    alone = build_layout(prompts[:1], rows_of(prompts, [[response]]))
    others = rows_of(prompts, [[response], [[1] * 9], [[2]], [], [[3] * 4]])
    among = build_layout(prompts, others)
    with torch.no_grad():
        first = target_hidden(lm, alone, shared_vision(lm, prompts[:1]))
        second = target_hidden(lm, among, shared_vision(lm, prompts))[:3]
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_a_clip_that_stands_twice_is_encoded_once(lm, prompts):
    double = [prompts[0], prompts[1], prompts[0]]
    with torch.no_grad():
        once = shared_vision(lm, double).embeds
        each = encode_clips(lm, [p.clip for p in double]).embeds
    torch.testing.assert_close(once, each, atol=1e-5, rtol=1e-5)


def test_a_frozen_tower_builds_no_graph(tiny_folder, prompts):
    frozen = load_model(ModelConfig(name=str(tiny_folder), dtype="float32", device="cpu", freeze_vision=True))
    assert not shared_vision(frozen, prompts).requires_grad


def test_segment_attention_equals_attention_segment_by_segment(seed):
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = [4, 4, 7, 1, 4, 7]
    q, k, v = (torch.randn(1, 3, sum(lengths), 8, generator=generator, dtype=torch.float64) for _ in range(3))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    out, _ = segment_attention(None, q, k, v, None, cu_seq_lens_q=bounds, scaling=0.3)
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        weights = (q[:, :, part] @ k[:, :, part].transpose(-1, -2) * 0.3).softmax(-1)
        torch.testing.assert_close(out[:, part], (weights @ v[:, :, part]).transpose(1, 2))
        start += n


def test_chunks_of_logits_change_nothing(lm, prompts, monkeypatch):
    layout = build_layout(prompts, rows_of(prompts, [[[5, 6, 7]], [[1] * 9, [2]], [[3]], [], [[4] * 4]]))

    def run():
        lm.module.zero_grad()
        logp, entropy = target_logprobs(lm, layout, shared_vision(lm, prompts), 0.7)
        logp.sum().backward()
        return logp.detach(), entropy, {n: p.grad.clone() for n, p in lm.module.named_parameters()}

    whole = run()
    monkeypatch.setattr(language, "LOGITS", 4 * lm.module.lm_head.weight.shape[0])
    budgets = []
    monkeypatch.setattr(
        language,
        "linear_logprob",
        lambda *args, **kw: budgets.append(kw["budget_bytes"]) or linear_logprob(*args, **kw),
    )
    chunked = run()
    assert budgets == [4 * lm.module.lm_head.weight.nbytes // lm.module.lm_head.weight.shape[1]]
    assert len(layout.targets) > 8
    torch.testing.assert_close(chunked[:2], whole[:2], atol=1e-5, rtol=1e-5)
    for name, grad in whole[2].items():
        torch.testing.assert_close(chunked[2][name], grad, atol=1e-4, rtol=1e-4)
    lm.module.zero_grad()
