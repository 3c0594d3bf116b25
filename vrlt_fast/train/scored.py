"""Rolled-out groups with what their responses earned, and which of them are in the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from vrlt_fast.config_rl import GrpoConfig
from vrlt_fast.parallel.replicas import Replicas
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.rewards.base import Parts, total
from vrlt_fast.rewards.shapers import MAIN_PARTS, rightness
from vrlt_fast.rollout.group import Group, RolloutRequest
from vrlt_kernels import group_advantages

OF_BATCH = ("batch", "gpg", "reinforce++", "reinforce++_baseline")
"""Estimators of ``grpo.scale`` that look at the rewards of the whole step."""


@dataclass(frozen=True, eq=False)
class ScoredGroup:
    """A rolled-out group with what each response earned: named parts, weighted reward, advantage."""

    group: Group
    parts: tuple[Parts, ...]
    rewards: tuple[float, ...]
    advantages: tuple[float, ...]
    trained: tuple[int, ...]
    """Which responses are in the loss."""
    stale: bool = False
    """Rolled out in an earlier step."""

    @property
    def has_signal(self) -> bool:
        return any(self.advantages[i] != 0.0 for i in self.trained)

    @property
    def has_spread(self) -> bool:
        """Whether some responses are more right than others; where no part says how right, :attr:`has_signal`."""
        if not any(name in part for part in self.parts for name in MAIN_PARTS):
            return self.has_signal
        right = [rightness(part) for part in self.parts]
        return self.has_signal and max(right) > min(right)

    @property
    def tokens(self) -> int:
        """Tokens in the loss."""
        return sum(len(self.group.completions[i].tokens) for i in self.trained)


@dataclass(frozen=True)
class StepSize:
    """What the loss of a step is a mean over: its response ``tokens`` that are trained, or all of its ``rows``, each
    of which could have ``longest`` tokens.
    """

    tokens: int
    rows: int
    longest: int = 1

    @staticmethod
    def of(scored: Sequence[ScoredGroup]) -> StepSize:
        longest = max((s.group.request.sampling.max_new_tokens for s in scored), default=1)
        return StepSize(sum(s.tokens for s in scored), sum(len(s.advantages) for s in scored), longest)

    def normalizer(self, reduction: str) -> int:
        """Of ``grpo.reduction``."""
        return {"token": self.tokens, "sequence": self.rows, "constant": self.rows * self.longest}[reduction]


def from_parts(
    groups: Sequence[Group], parts: Sequence[Sequence[Parts]], weights: Mapping[str, float], grpo: GrpoConfig
) -> list[ScoredGroup]:
    """Scored groups from what their responses earned."""
    rewards = [[total(one, weights) for one in group] for group in parts]
    return with_rewards(groups, parts, rewards, grpo)


def with_rewards(
    groups: Sequence[Group], parts: Sequence[Sequence[Parts]], rewards: Sequence[Sequence[float]], grpo: GrpoConfig
) -> list[ScoredGroup]:
    """Scored groups from given rewards; where advantages are of the whole batch, they are only centred until
    :func:`over_batch`.
    """
    if not all(math.isfinite(r) for group in rewards for r in group):
        raise ValueError("rewards hold a value that is not finite")
    scale = "none" if grpo.scale in OF_BATCH else grpo.scale
    lengths = [[c.response.n_tokens for c in g.completions] for g in groups]
    advantages = _advantages(rewards, lengths, scale, grpo.scale_eps)
    return [
        ScoredGroup(g, tuple(p), tuple(r), a, _trained(g, grpo))
        for g, p, r, a in zip(groups, parts, rewards, advantages, strict=True)
    ]


def over_batch(scored: Sequence[ScoredGroup], grpo: GrpoConfig, replicas: Replicas) -> list[ScoredGroup]:
    """The same groups with advantages that the rewards of the whole step decide, of all replicas, where ``grpo.scale``
    is such a one.
    """
    if grpo.scale not in OF_BATCH:
        return list(scored)
    own = [(s.rewards, [c.response.n_tokens for c in s.group.completions]) for s in scored]
    told = replicas.gather(own)
    rewards = [earned for part in told for earned, _ in part]
    lengths = [tokens for part in told for _, tokens in part]
    first = sum(len(part) for part in told[: replicas.rank])
    advantages = _advantages(rewards, lengths, grpo.scale, grpo.scale_eps)[first:]
    return [replace(s, advantages=a) for s, a in zip(scored, advantages, strict=False)]


def _advantages(
    rewards: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]], scale: str, eps: float
) -> list[tuple[float, ...]]:
    flat = torch.tensor([r for group in rewards for r in group], dtype=torch.float64)
    tokens = torch.tensor([n for group in lengths for n in group])
    sizes = [len(group) for group in rewards]
    offsets, name = torch.tensor([0, *accumulate(sizes)]), "group" if scale == "std" else scale
    needs = name == "opo" or name.startswith("reinforce++")
    found = group_advantages(flat, offsets, scale=name, eps=eps, lengths=tokens if needs else None)
    return [tuple(a.tolist()) for a in found.float().split(sizes)]


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


def with_gradient(scored: Sequence[ScoredGroup], *, flat: bool) -> list[ScoredGroup]:
    """The groups that a pass is worth: responses in the loss, and an advantage that moves them, or a loss that moves
    ``flat`` groups, too.
    """
    return [s for s in scored if s.trained and (flat or s.has_signal)]
