"""The supervised gradient against transformers' own forward with labels, one replicated row a question."""

from __future__ import annotations

import random

import pytest
import torch

from vrlt_fast.config import PromptConfig, VideoConfig
from vrlt_fast.data.prompts import answer_text
from vrlt_fast.data.readers import read_jsonl, resolve_video
from vrlt_fast.model.prompt import encode_narration, encode_prompt
from vrlt_fast.model.vision import normalise
from vrlt_fast.train.passes import How
from vrlt_fast.train.sft import answer_tokens, by_clip, sft_backward
from vrlt_fast.video.cache import ClipLoader


def gradients(lm):
    found = {n: p.grad.clone() for n, p in lm.module.named_parameters() if p.grad is not None}
    lm.module.zero_grad()
    return found


def labelled_backward(lm, prompt, answer, total):
    """transformers' mean cross-entropy over the answer's tokens, weighted to the mean over ``total`` tokens."""
    ids = torch.cat([prompt.ids, torch.tensor(answer)])[None]
    labels = ids.clone()
    labels[0, : len(prompt)] = -100
    after = torch.arange(len(answer)).expand(3, -1) + prompt.next_position
    out = lm.module(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.cat([prompt.positions, after], dim=1)[:, None],
        pixel_values_videos=normalise(lm, prompt.clip.patches),
        video_grid_thw=torch.tensor([prompt.clip.grid]),
        labels=labels,
    )
    part = out.loss * (len(answer) / total)
    part.backward()
    return float(part.detach())


@pytest.mark.parametrize("micro_rows", [64, 2])
def test_gradient_equals_labels_on_replicated_rows(lm, prompts, seed, micro_rows):
    assert len({p.clip.key for p in prompts}) < len(prompts)
    rng = random.Random(seed)
    answers = [[rng.randrange(256) for _ in range(rng.randint(1, 9))] for _ in prompts]
    total = sum(map(len, answers))
    lm.module.zero_grad()
    expected_loss = sum(labelled_backward(lm, p, a, total) for p, a in zip(prompts, answers, strict=True))
    expected = gradients(lm)
    loss = sft_backward(lm, prompts, answers, How(1.0, micro_rows))
    ours = gradients(lm)
    assert loss.answers == pytest.approx(expected_loss, rel=1e-6)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((ours[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-9, name
    replicated = sum(len(p) + len(a) - 1 for p, a in zip(prompts, answers, strict=True))
    assert loss.tokens < replicated


def test_micro_batches_hold_every_prompt_once_by_clip(prompts):
    for micro_rows in (1, 2, 4, 64):
        chunks = by_clip(prompts, micro_rows)
        assert sorted(i for chunk in chunks for group in chunk for i in group) == list(range(len(prompts)))
        for chunk in chunks:
            assert sum(map(len, chunk)) <= micro_rows
            keys = [{prompts[i].clip.key for i in group} for group in chunk]
            assert all(len(k) == 1 for k in keys)
            assert len(set.union(*keys)) == len(chunk)


def test_answers_end_with_the_stop_token(lm, prompts):
    prompt = PromptConfig(think=False)
    for each in prompts:
        tokens = answer_tokens(lm.info, each.sample, prompt)
        assert tokens[-1] in lm.info.stop_tokens
        assert not set(tokens[:-1]) & set(lm.info.stop_tokens)
        assert lm.info.tokenizer.decode(tokens[:-1]) == answer_text(each.sample, prompt)


def test_narration_is_the_captions_behind_their_frame_pairs(lm, demo, seed):
    print("seed", seed)
    prompt = PromptConfig(video_layout="interleaved", think=False)
    loader = ClipLoader(VideoConfig(sampling="fps", fps=2, min_pixels=784, max_pixels=4704), lm.info.geometry)
    videos = {s.video: s for s in read_jsonl(demo / "train.jsonl")}
    samples = list(videos.values())[:3]
    narrations = [encode_narration(lm.info, s, loader.load(resolve_video(s, demo)), prompt) for s in samples]
    for sample, (narration, places) in zip(samples, narrations, strict=True):
        seen = ["-"] * round(sample.duration)
        for moment in sample.timeline:
            seen[round(moment.start) : round(moment.end)] = [f" {moment.text}"] * round(moment.end - moment.start)
        assert lm.info.tokenizer.decode(narration.ids[places]) == "".join(seen)
        behind = narration.visual.view(len(seen), -1)[:, -1] + 2  # <|vision_end|> stands between
        assert set(behind.tolist()) <= set(places.tolist())

    lm.module.zero_grad()
    prompts = [encode_prompt(lm.info, n.sample, n.clip, prompt) for n, _ in narrations]
    answers = [answer_tokens(lm.info, p.sample, prompt) for p in prompts]
    loss = sft_backward(lm, prompts, answers, How(1.0, 2), narrations, 0.5)
    ours = gradients(lm)
    total = sum(map(len, answers))
    assert loss.answers == pytest.approx(
        sum(labelled_backward(lm, p, a, total) for p, a in zip(prompts, answers, strict=True)), rel=1e-6
    )
    rows = []
    for narration, places in narrations:
        out = lm.module(
            input_ids=narration.ids[None],
            attention_mask=torch.ones_like(narration.ids)[None],
            position_ids=narration.positions[:, None],
            pixel_values_videos=normalise(lm, narration.clip.patches),
            video_grid_thw=torch.tensor([narration.clip.grid]),
        )
        rows.append(out.logits[0, places - 1].log_softmax(-1).gather(1, narration.ids[places][:, None])[:, 0])
    expected = -torch.cat(rows).mean()
    (0.5 * expected).backward()
    assert loss.captions == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in lm.module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-7)
