"""Supervised warm-up: the training set's own answers behind the prompts that GRPO uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vrlt_fast.config import PromptConfig
from vrlt_fast.data.prompts import answer_text
from vrlt_fast.data.sample import Sample
from vrlt_fast.model.language import prefix_logprobs, target_logprobs
from vrlt_fast.model.layout import answer_row, build_layout
from vrlt_fast.model.load import ModelInfo, VideoLM
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.vision import shared_vision


def answer_tokens(info: ModelInfo, sample: Sample, prompt: PromptConfig) -> list[int]:
    """Token ids of the right answer, with the stop token."""
    text = answer_text(sample, prompt) + "<|im_end|>"
    return list(info.tokenizer(text, add_special_tokens=False)["input_ids"])


def sft_backward(
    lm: VideoLM, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], micro_rows: int
) -> tuple[float, int]:
    """Accumulate the gradient of the mean negative log-likelihood (nats a token) of the answers.

    Questions about the same video share its tokens: system message and video run once, the questions are rows behind
    them. Returns the loss and the number of tokens that went through the model.
    """
    total = sum(len(a) for a in answers)
    loss, trained = 0.0, 0
    for chunk in by_clip(prompts, micro_rows):
        firsts = [prompts[group[0]] for group in chunk]
        cuts = [common_prefix([prompts[i] for i in group]) for group in chunk]
        rows = [
            [answer_row(prompts[i], cut, answers[i]) for i in group] for cut, group in zip(cuts, chunk, strict=True)
        ]
        layout = build_layout(firsts, rows, pad=lm.info.pad_token, cuts=cuts, device=lm.device)
        logp, _ = target_logprobs(lm, layout, shared_vision(lm, firsts))
        part = -logp.sum() / total
        torch.autograd.backward(part)
        loss += float(part.detach())
        trained += layout.tokens_trained
    return loss, trained


def narration_backward(
    lm: VideoLM, narrations: Sequence[tuple[Prompt, torch.Tensor]], weight: float, micro_rows: int
) -> float:
    """Accumulate ``weight`` times the gradient of the mean negative log-likelihood (nats a token) of the captions.

    A caption stands right behind its frame pair: the tower learns from it long before attention finds the pair from an
    answer. Returns the loss without the weight.
    """
    total, loss = sum(len(places) for _, places in narrations), 0.0
    for start in range(0, len(narrations), micro_rows):
        chunk = narrations[start : start + micro_rows]
        prompts = [prompt for prompt, _ in chunk]
        layout = build_layout(prompts, [[] for _ in chunk], pad=lm.info.pad_token, device=lm.device)
        width = layout.ids.shape[1]
        places = torch.cat([places + row * width for row, (_, places) in enumerate(chunk)]).to(lm.device)
        part = -prefix_logprobs(lm, layout, shared_vision(lm, prompts), places).sum() / total
        torch.autograd.backward(weight * part)
        loss += float(part.detach())
    return loss


def by_clip(prompts: Sequence[Prompt], micro_rows: int) -> list[list[list[int]]]:
    """Micro-batches of at most ``micro_rows`` prompts; in each, the indices of the prompts grouped by what is seen."""
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].media_key)
    out = []
    for start in range(0, len(order), micro_rows):
        groups: dict[tuple[str, ...], list[int]] = {}
        for i in order[start : start + micro_rows]:
            groups.setdefault(prompts[i].media_key, []).append(i)
        out.append(list(groups.values()))
    return out


def common_prefix(prompts: Sequence[Prompt]) -> int:
    """How many tokens the prompts of one clip share up to the end of what is seen."""
    first, length = prompts[0], int(prompts[0].visual[-1]) + 1
    if any(not torch.equal(first.ids[:length], other.ids[:length]) for other in prompts[1:]):
        raise ValueError("prompts of one clip differ before the end of the video")
    return length
