"""The gradient of one GRPO step on scored groups: the clipped loss with k3 KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from time import perf_counter
from typing import Literal

import torch

from vrlt_fast.config import GrpoConfig
from vrlt_fast.model.language import target_logprobs
from vrlt_fast.model.layout import GroupLayout, Row, build_layout, response_row
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.replicated import replicated_logprobs
from vrlt_fast.model.vision import Embeddings, StepVision, VisionEmbeds, shared_vision
from vrlt_fast.train.mismatch import Mismatch
from vrlt_fast.train.plan import micro_batches
from vrlt_fast.train.scored import ScoredGroup, StepSize
from vrlt_kernels import LossSpec, policy_loss

Prefix = Literal["shared", "replicated"]
OldLogprobs = dict[tuple[int, int], torch.Tensor]
"""Log-probs [tokens] of a response, by the id of its group and its number in it."""


@dataclass
class UpdateStats:
    """Sums over the ``tokens`` response tokens that went through the model in one step, and wall seconds."""

    loss: float = 0.0
    kl: float = 0.0
    clipped: float = 0.0
    entropy: float = 0.0
    tokens: int = 0
    tokens_trained: int = 0
    tokens_logical: int = 0
    reference_seconds: float = 0.0
    mismatch: Mismatch = field(default_factory=Mismatch)

    def add(self, other: UpdateStats) -> None:
        """Take another share's sums in."""
        for f in fields(self):
            if f.name == "mismatch":
                self.mismatch.merge(other.mismatch)
            else:
                setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


def grpo_backward(
    lm: VideoLM,
    reference: VideoLM | None,
    scored: Sequence[ScoredGroup],
    grpo: GrpoConfig,
    *,
    temperature: float,
    micro_rows: int,
    micro_tokens: int = 0,
    size: StepSize | None = None,
    prefix: Prefix = "shared",
    old: OldLogprobs | None = None,
    held: Embeddings | None = None,
) -> UpdateStats:
    """Accumulate the gradient of the step's loss. The normaliser is the whole step's, so micro-batches don't change it.

    Args:
        size: of the step, where groups of it were left out.
        prefix: "replicated" computes a prompt once a response, to check that the shared one is the same.
        old: log-probs under the policy that rolled out; None: the current policy (mu = 1).
        held: embeddings of a frozen tower, or of the step of a trained one, which ends with this call.
    """
    stats, size = UpdateStats(tokens=sum(s.tokens for s in scored)), size or StepSize.of(scored)
    for chunk in micro_batches(scored, micro_rows, micro_tokens):
        layout = group_layout(lm, chunk)
        advantages = torch.tensor([s.advantages[i] for s in chunk for i in s.trained], device=lm.device)
        prompts = [s.group.request.prompt for s in chunk]
        vision = shared_vision(lm, prompts, held)
        begin = perf_counter()
        ref_logp = None
        if reference is not None and grpo.beta > 0:
            with torch.no_grad(), reference.opened() as frozen:
                same_tower = not vision.requires_grad
                ref_vision = vision if same_tower else shared_vision(frozen, prompts)
                ref_logp, _ = _logprobs(frozen, chunk, layout, ref_vision, temperature, prefix)
        stats.reference_seconds += perf_counter() - begin
        logp, entropy = _logprobs(lm, chunk, layout, vision, temperature, prefix)
        stats.mismatch.add(torch.cat([s.group.completions[i].logprobs for s in chunk for i in s.trained]), logp)
        out = policy_loss(
            logp,
            layout.target_offsets,
            _spec(grpo, has_reference=ref_logp is not None),
            advantages=advantages,
            old_logp=None if old is None else torch.cat([old[id(s.group), i] for s in chunk for i in s.trained]),
            ref_logp=ref_logp,
            normalizer=size.tokens if grpo.reduction == "token" else size.rows,
        )
        torch.autograd.backward(out.loss)
        stats.loss += float(out.loss.detach())
        stats.kl += float(out.kl.sum())
        stats.clipped += float(out.clipped.sum())
        stats.entropy += float(entropy.detach().sum())
        stats.tokens_trained += layout.tokens_trained if prefix == "shared" else layout.tokens_logical
        stats.tokens_logical += layout.tokens_logical
    if isinstance(held, StepVision):
        held.backward()
    return stats


@torch.no_grad()
def score_old(
    lm: VideoLM,
    scored: Sequence[ScoredGroup],
    *,
    temperature: float,
    micro_rows: int,
    micro_tokens: int = 0,
    prefix: Prefix = "shared",
    held: Embeddings | None = None,
) -> OldLogprobs:
    """Log-probs of all responses in the loss under the current policy, for steps with more than one update."""
    out: OldLogprobs = {}
    for chunk in micro_batches(scored, micro_rows, micro_tokens):
        layout = group_layout(lm, chunk)
        vision = shared_vision(lm, [s.group.request.prompt for s in chunk], held)
        logp, _ = _logprobs(lm, chunk, layout, vision, temperature, prefix)
        rows = [(id(s.group), i) for s in chunk for i in s.trained]
        out |= dict(zip(rows, logp.split(layout.target_offsets.diff().tolist()), strict=True))
    return out


def _logprobs(
    lm: VideoLM,
    chunk: Sequence[ScoredGroup],
    layout: GroupLayout,
    vision: VisionEmbeds,
    temperature: float,
    prefix: Prefix,
) -> tuple[torch.Tensor, torch.Tensor]:
    if prefix == "shared":
        return target_logprobs(lm, layout, vision, temperature)
    return replicated_logprobs(lm, [s.group.request.prompt for s in chunk], _rows(chunk), vision, temperature)


def group_layout(lm: VideoLM, chunk: Sequence[ScoredGroup]) -> GroupLayout:
    """The layout of some groups' prompts and the responses in the loss."""
    return build_layout([s.group.request.prompt for s in chunk], _rows(chunk), device=lm.device)


def _rows(chunk: Sequence[ScoredGroup]) -> list[list[Row]]:
    return [[response_row(s.group.request.prompt, s.group.completions[i].tokens) for i in s.trained] for s in chunk]


def _spec(grpo: GrpoConfig, *, has_reference: bool) -> LossSpec:
    """The configured loss; the log-ratio of k3 is clamped to +-10, so that one token can't outweigh the step."""
    return LossSpec(
        reduction="dapo" if grpo.reduction == "token" else "grpo",
        clip_low=grpo.clip_low,
        clip_high=grpo.clip_high,
        kl="k3" if has_reference else "none",
        kl_clamp_in=10.0,
        beta=grpo.beta if has_reference else 0.0,
    )
