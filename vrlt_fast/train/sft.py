"""Supervised warm-up: the training set's own answers behind the prompts that GRPO uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vrlt_fast.config import PromptConfig
from vrlt_fast.data.prompts import answer_text
from vrlt_fast.data.sample import Sample
from vrlt_fast.model.embed_cache import EmbeddingCache
from vrlt_fast.model.language import target_logprobs
from vrlt_fast.model.layout import GroupLayout, answer_row, build_layout
from vrlt_fast.model.load import ModelInfo, VideoLM
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.sequence import SharedLayout, shared_logprobs
from vrlt_fast.model.vision import VisionEmbeds, shared_vision
from vrlt_fast.train.passes import How, idle


def answer_tokens(info: ModelInfo, sample: Sample, prompt: PromptConfig) -> list[int]:
    """Token ids of the right answer, with the stop token."""
    text = answer_text(sample, prompt) + "<|im_end|>"
    return list(info.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class SftLoss:
    """Losses in nats a token, each a mean over the step: of the answers, and of the captions (0 without); and the
    tokens that went through the model.
    """

    answers: float
    captions: float
    tokens: int


@dataclass(frozen=True)
class SftSize:
    """What the losses of a step are means over: tokens of answers and of captions, those of all processes."""

    answers: int
    captions: int

    @staticmethod
    def of(answers: Sequence[Sequence[int]], narrations: Sequence[Narration]) -> SftSize:
        return SftSize(sum(len(a) for a in answers), sum(len(places) for _, places in narrations))


Narration = tuple[Prompt, torch.Tensor]
"""A prompt that ends with the clip's captions, and the places int64 [n] of their tokens."""


def sft_backward(
    lm: VideoLM,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    how: How,
    narrations: Sequence[Narration] = (),
    weight: float = 0.0,
    cache: EmbeddingCache | None = None,
    *,
    size: SftSize | None = None,
) -> SftLoss:
    """Accumulate the gradient of the mean negative log-likelihood of the answers, and ``weight`` times that of the
    captions.

    Questions about the same video share its tokens: system message and video run once, the questions are rows behind
    them. A caption stands right behind its frame pair: the tower learns from it long before attention finds the pair
    from an answer. Both go through the model in one packed sequence, and a clip goes through the tower once, or not at
    all where the tower is frozen and ``cache`` has it.

    Args:
        size: of the step, where this is a share of it.
    """
    size = size or SftSize.of(answers, narrations)
    total, captions = size.answers, size.captions
    left = {narration[0].clip.key: narration for narration in narrations}
    if not left.keys() <= {p.clip.key for p in prompts}:
        raise ValueError("a narration has a clip that no prompt has")
    answer_loss, caption_loss, tokens = 0.0, 0.0, 0
    chunks = by_clip(prompts, how.micro_rows)
    most = max(how.in_step.gather(len(chunks)))
    for chunk in chunks:
        told = [left.pop(key) for key in dict.fromkeys(prompts[g[0]].clip.key for g in chunk) if key in left]
        firsts = [*(prompts[group[0]] for group in chunk), *(prompt for prompt, _ in told)]
        cuts = [*(common_prefix([prompts[i] for i in group]) for group in chunk), *(len(p) for p, _ in told)]
        rows = [
            *(
                [answer_row(prompts[i], cut, answers[i]) for i in group]
                for cut, group in zip(cuts, chunk, strict=False)
            ),
            *([] for _ in told),
        ]
        layout = build_layout(firsts, rows, cuts=cuts, device=lm.device)
        starts = layout.spans.starts[len(chunk) :]
        places = [where + start for (_, where), start in zip(told, starts, strict=False)]
        vision, also = shared_vision(lm, firsts, cache, how.peers), torch.cat(places) if places else None
        logp, scored, passed = _scored(lm, layout, vision, how, also)
        of_answers, of_captions = (-part.sum() for part in logp.tensor_split([scored]))
        part = of_answers / total + (weight * of_captions / captions if captions else 0.0)
        torch.autograd.backward(part)
        answer_loss += float(of_answers.detach()) / total
        caption_loss += float(of_captions.detach()) / max(captions, 1)
        tokens += passed - (sum(len(prompt) for prompt, _ in told) if how.peers.rank == 0 else 0)
    for _ in range(most - len(chunks)):
        torch.autograd.backward(idle(lm))
    return SftLoss(answer_loss, caption_loss, tokens)


def _scored(
    lm: VideoLM, layout: GroupLayout, vision: VisionEmbeds, how: How, also: torch.Tensor | None
) -> tuple[torch.Tensor, int, int]:
    """Log-probs of this process's targets, how many of them are of answers, and the tokens that it computed."""
    if how.peers.size == 1:
        logp, _ = lm.run(target_logprobs, lm, layout, vision, also=also)
        return logp, len(layout.targets), layout.tokens_trained
    shared = SharedLayout(layout, how.peers, also)
    logp, _ = lm.run(shared_logprobs, lm, shared, vision, method=how.method)
    return logp, int((shared.targets < len(layout.targets)).sum()), shared.share.tokens


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
