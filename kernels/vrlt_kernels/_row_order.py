"""Which rows a loss needs at all, and which of them can earn a gradient, from what the host knows."""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

import torch

from ._checks import offsets, tensor
from .group_advantage import check_options, group_advantages
from .loss_spec import SEQUENCE_POLICIES, LossSpec
from .policy_inputs import check_ddof

Order = Optional[Tuple[torch.Tensor, torch.Tensor]]
"""Rows int64 with gradient, and rows without; rows in neither aren't needed. None: all rows, with gradient."""


def sort_rows(
    rows: int, cu_seqlens: torch.Tensor, spec: LossSpec, inputs: Dict[str, Any], *, trains: bool
) -> Tuple[Order, Dict[str, Any]]:
    """The order, and the inputs with rewards replaced by the advantages that were worked out for it.

    Only tensors on the CPU are looked at, and none under torch.compile, where shapes must not depend on values.
    """
    if torch.compiler.is_compiling():
        return None, inputs
    used = torch.ones(rows, dtype=torch.bool, device="cpu")
    mask = inputs.get("mask")
    if mask is not None:
        tensor("mask", mask, shape=[rows], dtypes=[torch.bool])
        used = mask if mask.device.type == "cpu" else used
    live = used
    if trains and _only_advantages_move(spec):
        inputs = _with_advantages(cu_seqlens, inputs)
        advantages = _of_rows(rows, cu_seqlens, spec, inputs.get("advantages"))
        live = used if advantages is None else used & (advantages != 0)
    if bool(live.all()):
        return None, inputs
    return (live.nonzero()[:, 0], (used & ~live).nonzero()[:, 0]), inputs


def _only_advantages_move(spec: LossSpec) -> bool:
    """Whether a token of a response with advantage 0 has no gradient: nothing but the policy term, a multiple of it."""
    return spec.policy != "reg" and spec.beta == 0 and spec.entropy_coef == 0


def _with_advantages(cu_seqlens: torch.Tensor, inputs: Dict[str, Any]) -> Dict[str, Any]:
    """Advantages in place of rewards that are on the CPU. "opo" needs lengths, and is left to the loss."""
    rewards, groups, scale = inputs.get("rewards"), inputs.get("groups"), inputs.get("adv_scale", "group")
    if not isinstance(rewards, torch.Tensor) or inputs.get("advantages") is not None or groups is None:
        return inputs
    on_host = all(x.device.type == "cpu" for x in (rewards, groups) if isinstance(x, torch.Tensor))
    if not on_host or scale == "opo" or rewards.shape != (len(cu_seqlens) - 1,):
        return inputs
    options = {"scale": scale, "eps": inputs.get("adv_eps", 1e-4), "ddof": inputs.get("adv_ddof", 1)}
    check_ddof(options["ddof"])
    check_options(**options, prefix="adv_")
    rest = {k: v for k, v in inputs.items() if k not in ("rewards", "adv_scale", "adv_eps", "adv_ddof")}
    return {**rest, "advantages": group_advantages(rewards, groups, **options)}


def _of_rows(
    rows: int, cu_seqlens: torch.Tensor, spec: LossSpec, advantages: Optional[torch.Tensor]
) -> Optional[torch.Tensor]:
    """Advantages [N] of the rows, where the host can tell them; None otherwise."""
    if not isinstance(advantages, torch.Tensor) or advantages.device.type != "cpu" or advantages.dim() != 1:
        return None
    if len(advantages) == len(cu_seqlens) - 1:
        if cu_seqlens.device.type != "cpu":
            return None
        offsets("cu_seqlens", cu_seqlens, rows, cu_seqlens)
        return advantages.repeat_interleave(cu_seqlens.diff().long())
    # The tokens of a sequence share their gradient: advantage 0 of one of them says nothing.
    return None if len(advantages) != rows or spec.policy in SEQUENCE_POLICIES else advantages


__all__ = ["Order", "sort_rows"]
