"""One GRPO step on given prompts: rewards to advantages, the clipped loss with k3 KL, gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from time import perf_counter

import torch

from vrlt_fast.config import GrpoConfig
from vrlt_fast.model.language import target_logprobs
from vrlt_fast.model.layout import GroupLayout, build_layout, response_row
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.vision import Embeddings, StepVision, shared_vision
from vrlt_fast.rewards.base import Parts, ResponseGroup, Reward, Shaper, total
from vrlt_fast.rollout.group import Group
from vrlt_fast.train.mismatch import Mismatch
from vrlt_kernels import LossSpec, group_advantages, policy_loss


@dataclass(frozen=True, eq=False)
class ScoredGroup:
    """A rolled-out group with what each response earned: named parts, weighted reward, advantage."""

    group: Group
    parts: tuple[Parts, ...]
    rewards: tuple[float, ...]
    advantages: tuple[float, ...]

    @property
    def has_signal(self) -> bool:
        return any(a != 0.0 for a in self.advantages)


@dataclass
class UpdateStats:
    """Sums over the response tokens of one step, and wall seconds."""

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
        ScoredGroup(g, tuple(p), tuple(r), tuple(a.tolist()))
        for g, p, r, a in zip(groups, parts, rewards, advantages, strict=True)
    ]


def grpo_backward(
    lm: VideoLM,
    reference: VideoLM | None,
    scored: Sequence[ScoredGroup],
    grpo: GrpoConfig,
    *,
    temperature: float,
    micro_rows: int,
    old: Sequence[torch.Tensor] | None = None,
    held: Embeddings | None = None,
) -> UpdateStats:
    """Accumulate the gradient of the step's loss. The normaliser is the whole step's, so micro-batches don't change it.

    Args:
        old: log-probs [N] of each micro-batch under the policy that rolled out; None: the current policy (mu = 1).
        held: embeddings of a frozen tower, or of the step of a trained one, which ends with this call.
    """
    stats = UpdateStats(tokens=sum(len(c.tokens) for s in scored for c in s.group.completions))
    rows = sum(len(s.advantages) for s in scored)
    for number, chunk in enumerate(micro_batches(scored, micro_rows)):
        layout = group_layout(lm, chunk)
        advantages = torch.tensor([a for s in chunk for a in s.advantages], device=lm.device)
        prompts = [s.group.request.prompt for s in chunk]
        vision = shared_vision(lm, prompts, held)
        begin = perf_counter()
        ref_logp = None
        if reference is not None and grpo.beta > 0:
            with torch.no_grad():
                same_tower = not vision.requires_grad
                ref_vision = vision if same_tower else shared_vision(reference, prompts)
                ref_logp, _ = target_logprobs(reference, layout, ref_vision, temperature)
        stats.reference_seconds += perf_counter() - begin
        logp, entropy = target_logprobs(lm, layout, vision, temperature)
        stats.mismatch.add(torch.cat([c.logprobs for s in chunk for c in s.group.completions]), logp)
        out = policy_loss(
            logp,
            layout.target_offsets,
            _spec(grpo, has_reference=ref_logp is not None),
            advantages=advantages,
            old_logp=None if old is None else old[number],
            ref_logp=ref_logp,
            normalizer=stats.tokens if grpo.reduction == "token" else rows,
        )
        torch.autograd.backward(out.loss)
        stats.loss += float(out.loss.detach())
        stats.kl += float(out.kl.sum())
        stats.clipped += float(out.clipped.sum())
        stats.entropy += float(entropy.detach().sum())
        stats.tokens_trained += layout.tokens_trained
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
    held: Embeddings | None = None,
) -> list[torch.Tensor]:
    """Log-probs [N] of each micro-batch under the current policy, for steps with more than one update."""
    out = []
    for chunk in micro_batches(scored, micro_rows):
        layout = group_layout(lm, chunk)
        vision = shared_vision(lm, [s.group.request.prompt for s in chunk], held)
        out.append(target_logprobs(lm, layout, vision, temperature)[0])
    return out


def micro_batches(scored: Sequence[ScoredGroup], micro_rows: int) -> list[list[ScoredGroup]]:
    """Whole groups, in order, packed into micro-batches of at most ``micro_rows`` responses (one group at least)."""
    out: list[list[ScoredGroup]] = []
    used = 0
    for group in scored:
        if not out or used + len(group.advantages) > micro_rows:
            out.append([])
            used = 0
        out[-1].append(group)
        used += len(group.advantages)
    return out


def group_layout(lm: VideoLM, chunk: Sequence[ScoredGroup]) -> GroupLayout:
    """The layout of some groups' prompts and responses."""
    prompts = [s.group.request.prompt for s in chunk]
    rows = [[response_row(p, c.tokens) for c in s.group.completions] for p, s in zip(prompts, chunk, strict=True)]
    return build_layout(prompts, rows, device=lm.device)


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
