"""Rolled-out groups with what their responses earned, and which of them are in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from vrlt_fast.config_rl import GrpoConfig
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.rewards.base import Parts, ResponseGroup, Reward, Shaper, total
from vrlt_fast.rollout.group import Group, RolloutRequest
from vrlt_kernels import group_advantages


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


def exchanged(own: Mapping[int, ScoredGroup], requests: Sequence[RolloutRequest], peers: Peers) -> list[ScoredGroup]:
    """All processes' groups in the order of the requests; ``own``: those that this process has scored, by place. Each
    is some process's.
    """
    if peers.size == 1:
        return [own[place] for place in range(len(requests))]
    told = peers.objects(
        {place: (s.group.completions, s.parts, s.rewards, s.advantages, s.trained) for place, s in own.items()}
    )
    found = {place: scored for part in told for place, scored in part.items()}
    out = []
    for place, request in enumerate(requests):
        completions, parts, rewards, advantages, trained = found[place]
        out.append(ScoredGroup(Group(request, completions), parts, rewards, advantages, trained))
    return out


def _trained(group: Group, grpo: GrpoConfig) -> tuple[int, ...]:
    ended = [c.response.finish_reason != "length" or grpo.truncated == "keep" for c in group.completions]
    return tuple(i for i, keep in enumerate(ended) if keep)


def with_gradient(scored: Sequence[ScoredGroup], *, kl: bool) -> list[ScoredGroup]:
    """The groups that a pass is worth: responses in the loss, and an advantage or a KL that moves them."""
    return [s for s in scored if s.trained and (kl or s.has_signal)]
