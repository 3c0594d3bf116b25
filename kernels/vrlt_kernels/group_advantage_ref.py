"""The reference of group_advantage: plain PyTorch in fp64, one group at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import List, Optional, Tuple

import torch


def _in_group(
    rewards: torch.Tensor, lengths: Optional[torch.Tensor], *, scale: str, eps: float, ddof: int, singleton: str
) -> torch.Tensor:
    """What a group's finite rewards [g] become before anything that looks at the whole batch."""
    count = len(rewards)
    if scale == "reinforce++" or count == 0:
        return rewards
    if count == 1:
        if singleton == "zero":
            return torch.zeros_like(rewards)
        return rewards / (1.0 + eps) if scale == "group" else rewards
    if bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean()
    if scale == "group":
        std = rewards.std(correction=ddof) if count > ddof else torch.zeros_like(centred[0])
        return centred / (std + eps)
    if scale == "rloo":
        return centred * (count / (count - 1))
    if scale == "opo" and lengths is not None and bool(lengths.sum() > 0):
        return rewards - (lengths * rewards).sum() / lengths.sum()
    if scale == "pass@k":
        first, second = rewards.topk(2).values
        out = torch.zeros_like(rewards)
        out[rewards.argmax()] = first - second
        return out
    return centred


def _whiten(values: torch.Tensor, weight: torch.Tensor, eps: float, ddof: int) -> torch.Tensor:
    """(values - mean) / (std + eps), both weighted."""
    if len(values) == 0 or bool((values == values[0]).all()):
        return torch.zeros_like(values)
    mean = (weight * values).sum() / weight.sum().clamp(min=1)
    std = ((weight * (values - mean) ** 2).sum() / (weight.sum() - ddof).clamp(min=1)).sqrt()
    return (values - mean) / (std + eps)


def group_bounds(size: int, offsets: Optional[torch.Tensor], total: int) -> List[Tuple[int, int]]:
    """First and last + 1 of every group, from a size or from offsets."""
    ends = list(range(0, total + 1, size)) if offsets is None else offsets.tolist()
    return list(pairwise(ends))


def advantages_ref(
    rewards: torch.Tensor,
    size: int,
    offsets: Optional[torch.Tensor],
    lengths: Optional[torch.Tensor],
    *,
    scale: str,
    eps: float,
    ddof: int,
    singleton: str,
) -> torch.Tensor:
    """Advantages fp64 [R] of rewards [R] in groups of ``size`` or between offsets; see `group_advantages`."""
    rewards = rewards.double()
    lengths = None if lengths is None else lengths.double()
    finite = rewards.isfinite()
    out = torch.zeros_like(rewards)
    for begin, end in group_bounds(size, offsets, len(rewards)):
        at = torch.arange(begin, end, device=rewards.device)[finite[begin:end]]
        sizes = None if lengths is None else lengths[at]
        out[at] = _in_group(rewards[at], sizes, scale=scale, eps=eps, ddof=ddof, singleton=singleton)
    live, values = out[finite], rewards[finite]
    if scale == "batch":
        equal = len(values) == 0 or bool((values == values[0]).all())
        out[finite] = torch.zeros_like(live) if equal else live / (values.std(correction=ddof) + eps)
    elif scale.startswith("reinforce++"):
        weight = torch.ones_like(live) if lengths is None else lengths[finite]
        out[finite] = _whiten(live, weight, eps, ddof)
    elif scale == "gpg":
        out[finite] = live * (len(live) / max(int((values != 0).sum()), 1))
    return out


__all__ = ["advantages_ref", "group_bounds"]
