"""grpo_loss: from logits to the policy loss, forward and backward.

Shapes: logits [N, V], target [N], sequences bounded by cu_seqlens [B + 1].
    logp, entropy = token_logprob(logits, target, temperature)      one read of the logits
    loss, a, e    = policy_loss(logp, entropy, ...)                 [N] only
    dlogits       = (1/T) g (a (onehot - p) - e p (log p + H))      one read, one write; g: upstream gradient
"""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Optional, Union

import torch

from ._checks import bad, tensor
from .loss_spec import LossSpec
from .policy_coef import PolicyLoss, policy_loss, policy_loss_ref
from .token_logprob import check_logits, token_logprob, token_logprob_ref


class GrpoLoss(NamedTuple):
    """``loss`` 0-d with gradient; the rest without: ``per_token`` (weighted: its sum is the loss), ``logp``,
    ``entropy`` and ``kl`` [N], ``clipped`` bool [N], all 0 where masked, and the 0-d ``metrics`` of `policy_loss`.
    """

    loss: torch.Tensor
    per_token: torch.Tensor
    logp: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor
    clipped: torch.Tensor
    metrics: Dict[str, torch.Tensor]


def grpo_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: LossSpec,
    *,
    temperature: Union[float, torch.Tensor] = 1.0,
    inplace: bool = False,
    **inputs: Any,
) -> GrpoLoss:
    """The loss of N response tokens from their logits.

    Args:
        logits: [N, V] fp32, fp64, bf16 or fp16, any row stride.
        target: int32 or int64 [N] in [0, V); anything where masked.
        cu_seqlens: int32 or int64 [B + 1].
        spec: which loss, and its hyper-parameters.
        temperature: a number, a 0-d tensor or one value a row [N].
        inplace: let the backward pass write the gradient over the logits; a second one then raises.
        inputs: what `policy_coef` takes beside log-probs: advantages or rewards with groups, old_logp, ref_logp,
            rollout_logp, token_weight, mask, normalizer, adv_scale, adv_eps, adv_ddof.

    Masked rows may hold anything, NaN too: they count nowhere and get zeros. See `token_logprob` for rows of -inf.

    Raises:
        KernelInputError: names the argument, what it got and what it needs.
    """
    check_logits(logits, target)
    check_spec(spec)
    mask = inputs.get("mask")
    goal, heat = valid_targets(target, mask), valid_temperature(temperature, mask)
    row = token_logprob(logits, goal, heat, inplace=inplace)
    return loss_of_rows(row.logp, row.entropy, cu_seqlens, spec, inputs)


def check_spec(spec: LossSpec) -> None:
    """It must be one."""
    if not isinstance(spec, LossSpec):
        raise bad("spec", type(spec).__name__, "a LossSpec")


def valid_targets(target: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
    """Targets with 0 in place of what stands at masked rows."""
    if mask is None:
        return target
    tensor("mask", mask, shape=[len(target)], dtypes=[torch.bool], like=target)
    return torch.where(mask, target, 0)


def valid_temperature(
    temperature: Union[float, torch.Tensor], mask: Optional[torch.Tensor]
) -> Union[float, torch.Tensor]:
    """Temperatures with 1 in place of what stands at masked rows; what has another form than the mask is left alone."""
    if mask is None or not isinstance(temperature, torch.Tensor):
        return temperature
    if temperature.shape != mask.shape or temperature.device != mask.device:
        return temperature
    return torch.where(mask, temperature, 1)


def loss_of_rows(
    logp: torch.Tensor, entropy: torch.Tensor, cu_seqlens: torch.Tensor, spec: LossSpec, inputs: Dict[str, Any]
) -> GrpoLoss:
    """The loss from differentiable log-probs and entropies [N]."""
    spread = entropy if spec.entropy_coef != 0 else entropy.detach()
    return assemble(policy_loss(logp, cu_seqlens, spec, entropy=spread, **inputs), logp, entropy, inputs)


def assemble(out: PolicyLoss, logp: torch.Tensor, entropy: torch.Tensor, inputs: Dict[str, Any]) -> GrpoLoss:
    """The result's fields, with 0 at masked rows."""
    logp, entropy, mask = logp.detach(), entropy.detach(), inputs.get("mask")
    if mask is not None:
        logp, entropy = torch.where(mask, logp, 0.0), torch.where(mask, entropy, 0.0)
    return GrpoLoss(out.loss, out.per_token, logp, entropy, out.kl, out.clipped, out.metrics)


def grpo_loss_ref(
    logits: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: LossSpec,
    *,
    temperature: Union[float, torch.Tensor] = 1.0,
    inplace: bool = False,
    **inputs: Any,
) -> GrpoLoss:
    """The mathematics of `grpo_loss` in plain PyTorch, differentiable everywhere; ``inplace`` changes nothing."""
    mask = inputs.get("mask")
    if mask is not None:
        logits = torch.where(mask[:, None], logits, 0.0)
    row = token_logprob_ref(logits, valid_targets(target, mask), valid_temperature(temperature, mask))
    return assemble(
        policy_loss_ref(row.logp, cu_seqlens, spec, entropy=row.entropy, **inputs), row.logp, row.entropy, inputs
    )


__all__ = ["GrpoLoss", "grpo_loss", "grpo_loss_ref"]
