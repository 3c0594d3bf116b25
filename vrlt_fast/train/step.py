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
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.replicated import replicated_logprobs
from vrlt_fast.model.staged import StagedPrompt
from vrlt_fast.model.vision import Embeddings, StepVision, VisionEmbeds, shared_vision
from vrlt_fast.train.mismatch import Mismatch
from vrlt_fast.train.plan import MicroBatch, Unit, update_units
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
    for unit in _units(scored, micro_rows, micro_tokens, prefix):
        vision = shared_vision(lm, _prompts(unit), held)
        begin = perf_counter()
        ref_logps = _reference_logprobs(reference if grpo.beta > 0 else None, unit, vision, temperature, prefix)
        stats.reference_seconds += perf_counter() - begin
        policy = _UnitPass(lm, unit, vision, temperature, prefix)
        for chunk, ref_logp in zip(unit, ref_logps, strict=True):
            layout = group_layout(lm, chunk)
            logp, entropy = policy.logprobs(chunk, layout)
            stats.mismatch.add(torch.cat([s.group.completions[i].logprobs for s in chunk for i in s.trained]), logp)
            out = policy_loss(
                logp,
                layout.target_offsets,
                _spec(grpo, has_reference=ref_logp is not None),
                advantages=torch.tensor([s.advantages[i] for s in chunk for i in s.trained], device=lm.device),
                old_logp=None if old is None else torch.cat([old[id(s.group), i] for s in chunk for i in s.trained]),
                ref_logp=ref_logp,
                normalizer=size.tokens if grpo.reduction == "token" else size.rows,
            )
            torch.autograd.backward(out.loss)
            stats.loss += float(out.loss.detach())
            stats.kl += float(out.kl.sum())
            stats.clipped += float(out.clipped.sum())
            stats.entropy += float(entropy.detach().sum())
            stats.tokens_logical += layout.tokens_logical
        policy.backward()
        stats.tokens_trained += policy.tokens
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
    for unit in _units(scored, micro_rows, micro_tokens, prefix):
        policy = _UnitPass(lm, unit, shared_vision(lm, _prompts(unit), held), temperature, prefix)
        for chunk in unit:
            layout = group_layout(lm, chunk)
            logp, _ = policy.logprobs(chunk, layout)
            rows = [(id(s.group), i) for s in chunk for i in s.trained]
            out |= dict(zip(rows, logp.split(layout.target_offsets.diff().tolist()), strict=True))
    return out


def _units(scored: Sequence[ScoredGroup], micro_rows: int, micro_tokens: int, prefix: Prefix) -> list[Unit]:
    units = update_units(scored, micro_rows, micro_tokens)
    return units if prefix == "shared" else [[batch] for unit in units for batch in unit]


class _UnitPass:
    """The passes of one model over the micro-batches of a unit, one after the other; ``tokens`` that they computed."""

    def __init__(self, lm: VideoLM, unit: Unit, vision: VisionEmbeds, temperature: float, prefix: Prefix):
        self._lm, self._vision, self._temperature, self._prefix = lm, vision, temperature, prefix
        self._staged = StagedPrompt(lm, _prompts(unit)[0], vision) if len(unit) > 1 else None
        self.tokens = len(_prompts(unit)[0]) if self._staged else 0

    def logprobs(self, chunk: MicroBatch, layout: GroupLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of the micro-batch's targets."""
        prompts, rows = [s.group.request.prompt for s in chunk], _rows(chunk)
        if self._staged is not None:
            self.tokens += layout.tokens_trained - len(prompts[0])
            return self._staged.logprobs(rows[0], self._temperature)
        if self._prefix == "shared":
            self.tokens += layout.tokens_trained
            return target_logprobs(self._lm, layout, self._vision, self._temperature)
        self.tokens += layout.tokens_logical
        return replicated_logprobs(self._lm, prompts, rows, self._vision, self._temperature)

    def backward(self) -> None:
        """What the backward passes of the micro-batches have left to do."""
        if self._staged is not None:
            self._staged.backward()


def _reference_logprobs(
    reference: VideoLM | None, unit: Unit, vision: VisionEmbeds, temperature: float, prefix: Prefix
) -> list[torch.Tensor | None]:
    if reference is None:
        return [None] * len(unit)
    with torch.no_grad(), reference.opened() as frozen:
        seen = shared_vision(frozen, _prompts(unit)) if vision.requires_grad else vision  # else it is the same tower
        passes = _UnitPass(frozen, unit, seen, temperature, prefix)
        return [passes.logprobs(chunk, group_layout(frozen, chunk))[0] for chunk in unit]


def _prompts(unit: Unit) -> list[Prompt]:
    """The prompts that a unit computes: those of its groups; pieces of a group have the same one."""
    return [s.group.request.prompt for s in unit[0]]


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
