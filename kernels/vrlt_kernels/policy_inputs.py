"""policy_inputs: the checked arguments of policy_coef and policy_loss."""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

import torch

from . import _checks as check
from ._launch import scalar
from .group_advantage import Groups, check_options, group_advantages, split_groups
from .loss_spec import LossSpec

IN_LAUNCH = ("group", "none", "rloo", "pass@k")
"""Advantages that a sequence's program works out from its group's rewards."""


class Inputs(NamedTuple):
    """logp [N], cu_seqlens [B + 1] and what a spec needs beside them; None where it isn't given.

    Either ``advantages`` [B] or [N], or ``rewards`` [B] with ``adv_scale`` and its options; groups are ``offsets``
    [groups + 1] or of ``group_size``.
    ``normalizer`` 0-d is on the device of logp, ``adv_eps`` 0-d on the CPU.
    """

    logp: torch.Tensor
    cu_seqlens: torch.Tensor
    advantages: Optional[torch.Tensor]
    rewards: Optional[torch.Tensor]
    offsets: Optional[torch.Tensor]
    group_size: int
    adv_scale: str
    adv_eps: torch.Tensor
    adv_ddof: int
    old_logp: Optional[torch.Tensor]
    ref_logp: Optional[torch.Tensor]
    rollout_logp: Optional[torch.Tensor]
    entropy: Optional[torch.Tensor]
    token_weight: Optional[torch.Tensor]
    mask: Optional[torch.Tensor]
    normalizer: Optional[torch.Tensor]


def prepare(
    logp: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: LossSpec,
    *,
    advantages: Optional[torch.Tensor] = None,
    rewards: Optional[torch.Tensor] = None,
    groups: Optional[Groups] = None,
    adv_scale: str = "group",
    adv_eps: float = 1e-4,
    adv_ddof: int = 1,
    old_logp: Optional[torch.Tensor] = None,
    ref_logp: Optional[torch.Tensor] = None,
    rollout_logp: Optional[torch.Tensor] = None,
    entropy: Optional[torch.Tensor] = None,
    token_weight: Optional[torch.Tensor] = None,
    mask: Optional[torch.Tensor] = None,
    normalizer: Union[float, torch.Tensor, None] = None,
) -> Inputs:
    """Everything checked and without gradient; advantages worked out where a sequence's program can't do it.

    Raises:
        KernelInputError: names the argument, what it got and what it needs.
    """
    if not isinstance(spec, LossSpec):
        raise check.bad("spec", type(spec).__name__, "a LossSpec")
    check.tensor("logp", logp, shape=[None], dtypes=check.FLOATS)
    n = logp.shape[0]
    check.offsets("cu_seqlens", cu_seqlens, n, logp)
    sequences = cu_seqlens.shape[0] - 1
    per_token = {
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "rollout_logp": rollout_logp,
        "entropy": entropy,
        "token_weight": token_weight,
    }
    for name, value in per_token.items():
        if value is not None:
            check.tensor(name, value, shape=[n], dtypes=check.FLOATS, like=logp)
    if mask is not None:
        check.tensor("mask", mask, shape=[n], dtypes=(torch.bool,), like=logp)
    if groups is None and (rewards is not None or spec.policy == "reg"):
        raise check.bad("groups", "None with rewards or policy 'reg'", "a group size or offsets [groups + 1]")
    _needs(spec, ref_logp, rollout_logp, entropy)
    size, offsets = (0, None) if groups is None else split_groups(groups, sequences, logp)
    if (advantages is None) == (rewards is None):
        raise check.bad("advantages", "both or neither of advantages and rewards", "one of the two")
    if advantages is not None:
        _check_advantages(advantages, logp, sequences, spec)
    elif rewards is not None:
        check.tensor("rewards", rewards, shape=[sequences], dtypes=check.FLOATS, like=logp)
        check_ddof(adv_ddof)
        check_options(scale=adv_scale, eps=adv_eps, ddof=adv_ddof, prefix="adv_")
        if adv_scale not in IN_LAUNCH or spec.policy == "reg":
            advantages = _advantages(rewards, cu_seqlens, groups, mask, adv_scale, adv_eps, adv_ddof)
            if spec.policy == "reg":  # a response without a reward takes no part in the regression
                advantages = advantages.masked_fill(~rewards.isfinite(), float("nan"))
            rewards = None
    return Inputs(
        logp=logp.detach(),
        cu_seqlens=cu_seqlens,
        advantages=_constant(advantages),
        rewards=_constant(rewards),
        offsets=offsets,
        group_size=size,
        adv_scale=adv_scale,
        adv_eps=scalar(adv_eps, torch.float64),
        adv_ddof=int(adv_ddof),
        old_logp=_constant(old_logp),
        ref_logp=_constant(ref_logp),
        rollout_logp=_constant(rollout_logp),
        entropy=_constant(entropy),
        token_weight=_constant(token_weight),
        mask=mask,
        normalizer=_normalizer(normalizer, spec, logp, mask),
    )


def check_ddof(ddof: object) -> None:
    """0 or 1, as an integer: it is a constant of the kernels."""
    if not isinstance(ddof, int):
        raise check.bad("adv_ddof", repr(ddof), "0 or 1")


def _constant(value: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    return None if value is None else value.detach()


def _needs(
    spec: LossSpec,
    ref_logp: Optional[torch.Tensor],
    rollout_logp: Optional[torch.Tensor],
    entropy: Optional[torch.Tensor],
) -> None:
    if spec.kl != "none" and ref_logp is None:
        raise check.bad("ref_logp", f"None with kl {spec.kl!r}", "log-probs [N] of the reference")
    if spec.correction != "none" and rollout_logp is None:
        raise check.bad("rollout_logp", f"None with correction {spec.correction!r}", "log-probs [N] of the rollout")
    if spec.entropy_coef != 0 and entropy is None:
        raise check.bad("entropy", f"None with entropy_coef {spec.entropy_coef}", "entropies [N]")


def _check_advantages(advantages: torch.Tensor, logp: torch.Tensor, sequences: int, spec: LossSpec) -> None:
    check.tensor("advantages", advantages, shape=[None], dtypes=check.FLOATS, like=logp)
    per_sequence = advantages.shape[0] == sequences
    if not per_sequence and advantages.shape[0] != logp.shape[0]:
        wanted = f"shape [{sequences}], one a sequence, or [{logp.shape[0]}], one a token"
        raise check.bad("advantages", check.describe(advantages), wanted)
    if spec.policy == "reg" and not per_sequence:
        raise check.bad("advantages", check.describe(advantages), f"shape [{sequences}] with policy 'reg'")


def _advantages(
    rewards: torch.Tensor,
    cu_seqlens: torch.Tensor,
    groups: Optional[Groups],
    mask: Optional[torch.Tensor],
    scale: str,
    eps: float,
    ddof: int,
) -> torch.Tensor:
    lengths = None
    if scale == "opo":
        lengths = cu_seqlens.diff() if mask is None else _sums(mask.long(), cu_seqlens)
    return group_advantages(
        rewards, len(rewards) if groups is None else groups, scale=scale, eps=eps, ddof=ddof, lengths=lengths
    )


def _sums(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sums [B] of integer values [N] over the sequences."""
    running = torch.cat([values.new_zeros(1), values.cumsum(0)])
    # Offsets on a GPU, or under torch.compile, are unchecked: one outside would stop the device with an assertion.
    return running[cu_seqlens.long().clamp(0, len(values))].diff()


def _normalizer(
    value: Union[float, torch.Tensor, None], spec: LossSpec, logp: torch.Tensor, mask: Optional[torch.Tensor]
) -> Optional[torch.Tensor]:
    if value is None:
        if spec.reduction in ("dapo", "dr_grpo", "seq_sum_norm"):
            raise check.bad("normalizer", f"None with reduction {spec.reduction!r}", "a number or a 0-d tensor")
        return None
    if spec.reduction == "sum":
        raise check.bad("normalizer", value, "None with reduction 'sum'")
    if isinstance(value, torch.Tensor):
        check.tensor("normalizer", value, shape=[], like=logp)
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return value.detach()
        value = float(value)
    if not isinstance(value, (int, float)):
        raise check.bad("normalizer", repr(value), "a number above 0 or a 0-d tensor")
    dtype = check.compute_dtype(logp)
    if value == 0 and (mask is not None or len(logp) == 0):
        return _of_nothing(mask, logp.new_ones((), dtype=dtype))
    if not value > 0:
        raise check.bad("normalizer", value, "a number above 0, or 0 where no token counts")
    return scalar(value, dtype, logp.device)


def _of_nothing(mask: Optional[torch.Tensor], one: torch.Tensor) -> torch.Tensor:
    """The normalizer in place of 0: of a sum without terms any will do. On a GPU a mask is not waited for."""
    if mask is None:
        return one
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(mask.any(), torch.nan, one)
    if bool(mask.any()):
        raise check.bad("normalizer", 0, "a number above 0, or 0 where no token counts")
    return one


__all__ = ["IN_LAUNCH", "Inputs", "check_ddof", "prepare"]
