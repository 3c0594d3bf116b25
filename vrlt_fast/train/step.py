"""One GRPO step on given prompts: rewards to advantages, the clipped loss with k3 KL, gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from time import perf_counter
from typing import Literal

import torch

from vrlt_fast.config import GrpoConfig
from vrlt_fast.model.language import target_logprobs
from vrlt_fast.model.layout import GroupLayout, Row, build_layout, response_row
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.replicated import replicated_logprobs
from vrlt_fast.model.vision import Embeddings, StepVision, VisionEmbeds, shared_vision
from vrlt_fast.rewards.base import Parts, ResponseGroup, Reward, Shaper, total
from vrlt_fast.rollout.group import Group
from vrlt_fast.train.mismatch import Mismatch
from vrlt_kernels import LossSpec, group_advantages, policy_loss

Prefix = Literal["shared", "replicated"]


@dataclass(frozen=True, eq=False)
class ScoredGroup:
    """A rolled-out group with what each response earned: named parts, weighted reward, advantage."""

    group: Group
    parts: tuple[Parts, ...]
    rewards: tuple[float, ...]
    advantages: tuple[float, ...]
    trained: tuple[int, ...]
    """Which responses are in the loss."""

    @property
    def has_signal(self) -> bool:
        return any(self.advantages[i] != 0.0 for i in self.trained)

    @property
    def tokens(self) -> int:
        """Tokens in the loss."""
        return sum(len(self.group.completions[i].tokens) for i in self.trained)


@dataclass(frozen=True)
class StepSize:
    """What the loss of a step is a mean over: its response ``tokens`` that are trained, or all of its ``rows``."""

    tokens: int
    rows: int

    @staticmethod
    def of(scored: Sequence[ScoredGroup]) -> StepSize:
        return StepSize(sum(s.tokens for s in scored), sum(len(s.advantages) for s in scored))


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


def score_groups(
    groups: Sequence[Group], reward: Reward, shape: Shaper, weights: Mapping[str, float], grpo: GrpoConfig
) -> list[ScoredGroup]:
    """Reward, shape and normalise within each group."""
    views = [ResponseGroup(g.request.prompt.sample, tuple(c.response for c in g.completions)) for g in groups]
    trained = [(g, v) for g, v in zip(groups, views, strict=True) if g.request.train]
    auxiliary = [v for g, v in zip(groups, views, strict=True) if not g.request.train]
    parts = [
        shape([reward(r, v.sample) for r in v.responses], v, [a for a in auxiliary if a.sample is v.sample])
        for _, v in trained
    ]
    rewards = [[total(p, weights) for p in group] for group in parts]
    return with_rewards([g for g, _ in trained], parts, rewards, grpo)


def with_rewards(
    groups: Sequence[Group], parts: Sequence[Sequence[Parts]], rewards: Sequence[Sequence[float]], grpo: GrpoConfig
) -> list[ScoredGroup]:
    """Scored groups from given rewards."""
    flat = torch.tensor([r for group in rewards for r in group], dtype=torch.float64)
    if not bool(torch.isfinite(flat).all()):
        raise ValueError("rewards hold a value that is not finite")
    sizes = [len(group) for group in rewards]
    offsets = torch.tensor([0, *accumulate(sizes)])
    scale = "group" if grpo.scale == "std" else "none"
    advantages = group_advantages(flat, offsets, scale=scale).float().split(sizes)
    return [
        ScoredGroup(g, tuple(p), tuple(r), tuple(a.tolist()), _trained(g, grpo))
        for g, p, r, a in zip(groups, parts, rewards, advantages, strict=True)
    ]


def _trained(group: Group, grpo: GrpoConfig) -> tuple[int, ...]:
    ended = [c.response.finish_reason != "length" or grpo.truncated == "keep" for c in group.completions]
    return tuple(i for i, keep in enumerate(ended) if keep)


def with_gradient(scored: Sequence[ScoredGroup], *, kl: bool) -> list[ScoredGroup]:
    """The groups that a pass is worth: responses in the loss, and an advantage or a KL that moves them."""
    return [s for s in scored if s.trained and (kl or s.has_signal)]


def grpo_backward(
    lm: VideoLM,
    reference: VideoLM | None,
    scored: Sequence[ScoredGroup],
    grpo: GrpoConfig,
    *,
    temperature: float,
    micro_rows: int,
    size: StepSize | None = None,
    prefix: Prefix = "shared",
    old: Sequence[torch.Tensor] | None = None,
    held: Embeddings | None = None,
) -> UpdateStats:
    """Accumulate the gradient of the step's loss. The normaliser is the whole step's, so micro-batches don't change it.

    Args:
        size: of the step, where groups of it were left out.
        prefix: "replicated" computes a prompt once a response, to check that the shared one is the same.
        old: log-probs [N] of each micro-batch under the policy that rolled out; None: the current policy (mu = 1).
        held: embeddings of a frozen tower, or of the step of a trained one, which ends with this call.
    """
    stats, size = UpdateStats(tokens=sum(s.tokens for s in scored)), size or StepSize.of(scored)
    for number, chunk in enumerate(micro_batches(scored, micro_rows)):
        layout = group_layout(lm, chunk)
        advantages = torch.tensor([s.advantages[i] for s in chunk for i in s.trained], device=lm.device)
        prompts = [s.group.request.prompt for s in chunk]
        vision = shared_vision(lm, prompts, held)
        begin = perf_counter()
        ref_logp = None
        if reference is not None and grpo.beta > 0:
            with torch.no_grad():
                same_tower = not vision.requires_grad
                ref_vision = vision if same_tower else shared_vision(reference, prompts)
                ref_logp, _ = _logprobs(reference, chunk, layout, ref_vision, temperature, prefix)
        stats.reference_seconds += perf_counter() - begin
        logp, entropy = _logprobs(lm, chunk, layout, vision, temperature, prefix)
        stats.mismatch.add(torch.cat([s.group.completions[i].logprobs for s in chunk for i in s.trained]), logp)
        out = policy_loss(
            logp,
            layout.target_offsets,
            _spec(grpo, has_reference=ref_logp is not None),
            advantages=advantages,
            old_logp=None if old is None else old[number],
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
    prefix: Prefix = "shared",
    held: Embeddings | None = None,
) -> list[torch.Tensor]:
    """Log-probs [N] of each micro-batch under the current policy, for steps with more than one update."""
    out = []
    for chunk in micro_batches(scored, micro_rows):
        layout = group_layout(lm, chunk)
        vision = shared_vision(lm, [s.group.request.prompt for s in chunk], held)
        out.append(_logprobs(lm, chunk, layout, vision, temperature, prefix)[0])
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


def micro_batches(scored: Sequence[ScoredGroup], micro_rows: int) -> list[list[ScoredGroup]]:
    """Whole groups, in order, packed into micro-batches of at most ``micro_rows`` responses (one group at least)."""
    out: list[list[ScoredGroup]] = []
    used = 0
    for group in scored:
        if not out or used + len(group.trained) > micro_rows:
            out.append([])
            used = 0
        out[-1].append(group)
        used += len(group.trained)
    return out


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
