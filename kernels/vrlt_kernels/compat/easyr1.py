"""EasyR1's functions of logits and of the policy loss (0.3.3.dev0), with its names and signatures.

EasyR1's package is called `verl`. Its conventions: log-ratios are clamped to +-20; "gspo" shares the gradient among the
tokens of a sequence, "gspo_token" doesn't; CISPO clips to [1 - low, 1 + high]; advantages are per token. What differs
from EasyR1's own: log-probs of logits are fp32.
"""

from __future__ import annotations

from typing import Dict, Literal, Tuple

import torch

from .._checks import bad, describe, one_of
from ..loss_spec import LossSpec
from ..policy_coef import policy_loss
from ._patch import Functions, Handle, replace
from ._rows import logprob_of

VERSIONS = ("0.3.3.dev0",)
_POLICIES = {"default": "clip", "gspo": "gspo", "gspo_token": "gspo_token", "cispo": "cispo", "sapo": "sapo"}
_REDUCTIONS = {"token": "bnpo", "seq": "grpo"}
_CLAMP = 20.0
_IGNORED = -100


def log_probs_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`verl.utils.torch_functional.log_probs_from_logits`: log-probs [...] of as many labels, of logits [..., V].

    A label of -100 has log-prob 0 and no gradient, as in both of EasyR1's own ways. The backward pass writes the
    gradient over the logits, as EasyR1's does with flash-attn, if they aren't a slice of others as logits[:, :-1].
    """
    ignored = labels == _IGNORED
    logp = logprob_of(logits, labels.masked_fill(ignored, 0), inplace=True).logp
    return logp.masked_fill(ignored.view(logp.shape), 0.0)


def compute_policy_loss(
    old_log_probs: torch.Tensor,
    log_probs: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_dual: float,
    tau_positive: float,
    tau_negative: float,
    loss_type: Literal["default", "gspo", "gspo_token", "cispo", "sapo"],
    loss_avg_mode: Literal["token", "seq"],
    **kwargs: object,
) -> Tuple[torch.Tensor, Dict[str, float]]:
    """`verl.trainer.core_algos.compute_policy_loss`: the loss, and the metrics as numbers.

    Args:
        old_log_probs, log_probs, advantages, response_mask: [B, T]; the mask is 0 or 1.
        clip_ratio_low, clip_ratio_high: the ratio is clipped to [1 - low, 1 + high].
        clip_ratio_dual: with a negative advantage the loss is at most -dual * advantage; at least 1 + high.
        tau_positive, tau_negative: SAPO's temperatures.
        loss_type: as named; "default" is the clipped loss.
        loss_avg_mode: "token", the mean over all tokens; "seq", the mean over sequences of the mean over their tokens.

    Raises:
        KernelInputError: an unknown name or keyword, a dual clip below 1 + high, shapes that differ.
    """
    if kwargs:
        raise bad("kwargs", sorted(kwargs), "none: this function knows no further arguments")
    one_of("loss_type", loss_type, _POLICIES)
    one_of("loss_avg_mode", loss_avg_mode, _REDUCTIONS)
    for name, value in (("old_log_probs", old_log_probs), ("advantages", advantages), ("response_mask", response_mask)):
        if value.shape != log_probs.shape or log_probs.dim() != 2:
            raise bad(name, describe(value), f"the shape [B, T] of log_probs, {list(log_probs.shape)}")
    clips = loss_type not in ("cispo", "sapo")
    if clips and clip_ratio_dual < 1.0 + clip_ratio_high:
        raise bad("clip_ratio_dual", clip_ratio_dual, f"at least 1 + clip_ratio_high, {1.0 + clip_ratio_high}")
    spec = LossSpec(
        policy=_POLICIES[loss_type],
        reduction=_REDUCTIONS[loss_avg_mode],
        clip_low=clip_ratio_low,
        clip_high=clip_ratio_high,
        delta=clip_ratio_dual if clips else None,
        # CISPO's ratio is a constant that its own bounds hold
        log_ratio_clamp=None if loss_type == "cispo" else _CLAMP,
        tau_pos=tau_positive,
        tau_neg=tau_negative,
    )
    batch, length = log_probs.shape
    out = policy_loss(
        log_probs.reshape(-1),
        torch.arange(batch + 1, device=log_probs.device) * length,
        spec,
        advantages=advantages.reshape(-1),
        old_logp=old_log_probs.reshape(-1),
        mask=response_mask.reshape(-1) != 0,
    )
    with torch.no_grad():
        metrics = _metrics(log_probs, old_log_probs, response_mask != 0, loss_avg_mode)
        if clips:
            higher, lower = _clipped(log_probs - old_log_probs, advantages, response_mask != 0, spec)
            metrics["pg_clipfrac_higher"] = _token_mean(higher, response_mask != 0)
            metrics["pg_clipfrac_lower"] = _token_mean(lower, response_mask != 0)
    numbers = torch.stack(list(metrics.values())).tolist()  # one wait for the device
    return out.loss, dict(zip(metrics, numbers, strict=True))


def _token_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, values, 0.0).sum() / (mask.sum() + 1e-8)


def _metrics(logp: torch.Tensor, old: torch.Tensor, mask: torch.Tensor, mode: str) -> Dict[str, torch.Tensor]:
    """Mean of old - new, and the mean of -log-prob, which EasyR1 calls the entropy loss and averages as the loss."""
    if mode == "token":
        entropy = _token_mean(-logp, mask)
    else:
        entropy = (torch.where(mask, -logp, 0.0).sum(dim=-1) / (mask.sum(dim=-1) + 1e-8)).mean()
    return {"ppo_kl": _token_mean(old - logp, mask), "entropy_loss": entropy}


def _clipped(
    log_ratio: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, spec: LossSpec
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Which tokens the clip and the dual clip bind, as 0 or 1."""
    if spec.policy != "clip":
        mean = torch.where(mask, log_ratio, 0.0).sum(dim=-1, keepdim=True) / (mask.sum(dim=-1, keepdim=True) + 1e-8)
        log_ratio = mean.expand_as(log_ratio)
    ratio = log_ratio.clamp(-_CLAMP, _CLAMP).exp()
    clipped = ratio.clamp(1.0 - spec.clip_low, 1.0 + spec.clip_high)
    higher = -advantages * ratio < -advantages * clipped
    # the bound is at least 1 + high, so that only the ratio itself can be above it
    lower = (advantages < 0) & (ratio > (spec.delta or 0.0))
    return higher.float(), lower.float()


def apply(target: object) -> Handle:
    """Put these functions into EasyR1, before its workers are made (they keep a compiled copy of what they find).

    Args:
        target: the imported `verl` of EasyR1, or one of its modules.

    Raises:
        KernelInputError: another EasyR1 than 0.3.3.dev0, verl itself, or it's replaced already.
    """
    ours: Functions = {
        "verl.utils.torch_functional": {"log_probs_from_logits": log_probs_from_logits},
        "verl.trainer.core_algos": {"compute_policy_loss": compute_policy_loss},
    }
    return replace(target, "verl", VERSIONS, ours)


__all__ = ["apply", "compute_policy_loss", "log_probs_from_logits"]
