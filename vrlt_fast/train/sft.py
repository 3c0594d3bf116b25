"""Supervised warm-up: the training set's own answers behind the prompts that GRPO uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vrlt_kernels import token_logprob_ref

from vrlt_fast.config import PromptConfig
from vrlt_fast.data.prompts import answer_text
from vrlt_fast.data.sample import Sample
from vrlt_fast.model.language import response_logits
from vrlt_fast.model.layout import build_layout
from vrlt_fast.model.load import ModelInfo, VideoLM
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.rollout.engine import shared_vision


def answer_tokens(info: ModelInfo, sample: Sample, prompt: PromptConfig) -> list[int]:
    """Token ids of the right answer, with the stop token."""
    text = answer_text(sample, prompt) + "<|im_end|>"
    return list(info.tokenizer(text, add_special_tokens=False)["input_ids"])


def sft_backward(
    lm: VideoLM, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], micro_rows: int
) -> tuple[float, int]:
    """Accumulate the gradient of the mean negative log-likelihood (nats a token) of the answers.

    Returns the loss and the number of tokens that went through the model.
    """
    total = sum(len(a) for a in answers)
    loss, trained = 0.0, 0
    for start in range(0, len(prompts), micro_rows):
        chunk = prompts[start : start + micro_rows]
        layout = build_layout(
            chunk, [[a] for a in answers[start : start + micro_rows]], pad=lm.info.pad_token, device=lm.device
        )
        logits = response_logits(lm, layout, shared_vision(lm, chunk))
        logp, _ = token_logprob_ref(logits, layout.responses[layout.mask])
        part = -logp.sum() / total
        torch.autograd.backward(part)
        loss += float(part.detach())
        trained += layout.tokens_trained
    return loss, trained
