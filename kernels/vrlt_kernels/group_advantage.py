"""group_advantage: rewards of the responses of a group, centred and scaled within the group.

Shapes: rewards [N] in groups of consecutive responses, sizes [groups] with sum N.
    A_i = (r_i - mean_g) / (std_g + eps)      GRPO (DeepSeekMath, eq. 3 of outcome supervision)
    A_i =  r_i - mean_g                       Dr.GRPO
std_g is the unbiased one (ddof 1), as in TRL and verl. A group of one, and a group whose rewards are all equal, get 0.
"""

from __future__ import annotations

from typing import Sequence

import torch


def group_advantages_ref(
    rewards: torch.Tensor, sizes: Sequence[int], *, scale: str = "std", eps: float = 1e-4
) -> torch.Tensor:
    """Advantages fp32 [N] of rewards [N] (any float type); ``scale`` is "std" or "none".

    Raises:
        ValueError: sizes don't add up to N, a size below 1, an unknown scale, or a reward that is not finite.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale is {scale!r}, needs 'std' or 'none'")
    if sum(sizes) != rewards.numel() or any(size < 1 for size in sizes):
        raise ValueError(f"sizes {tuple(sizes)} do not add up to {rewards.numel()} rewards")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards hold a value that is not finite")
    out = []
    for group in rewards.double().split(list(sizes)):
        centred = group - group.mean()
        if bool((group == group[0]).all()):
            centred = torch.zeros_like(group)
        elif scale == "std":
            centred = centred / (group.std(correction=1) + eps)
        out.append(centred)
    return torch.cat(out).float() if out else rewards.float()


__all__ = ["group_advantages_ref"]
