"""policy_coef: the loss of every token and its derivative by the token's log-prob and entropy.

Shapes: N response tokens in flat order, sequences bounded by cu_seqlens [B + 1], groups of consecutive sequences.
    loss = sum_t W_t (nu_t L_t + beta k_t KL_t - entropy_coef H_t)          (loss_spec.py has every L, KL and weight)
    a_t = d loss / d logp_t        e_t = d loss / d H_t
One launch, a program a sequence: it reads the rewards of its group and forms the advantage, goes over its tokens once
for sums of the sequence (twice, where its tokens share a gradient), and once more for loss, a, e, KL and metrics.
Before it: a fill for the normalizer, where it isn't a tensor; a reduction for "bnpo" with a mask and for "seq_sum",
where none is given; one launch for the advantages of "opo", two for those of the whole batch; two for policy "reg"
(advantages, and sums of every sequence, which the programs of a group share).
The exponent of a ratio and of k3 saturates at 40 (fp64: 350), where it would overflow. Without ``old_logp`` the current
policy is the old one: the ratio is 1, with its gradient.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch

from . import policy_ref
from ._checks import compute_dtype
from ._launch import choose, no_double_backward, no_forward_mode
from ._ops import add_op_namespace_prefix
from .group_advantage import Groups
from .loss_spec import LossSpec
from .policy_inputs import Inputs, prepare
from .policy_ref import Outputs
from .policy_torch import coef_torch


class PolicyCoef(NamedTuple):
    """All [N], without gradient: ``loss`` (weighted: its sum is the loss), ``a``, ``e``, ``kl``, ``clipped`` bool.

    fp32, or fp64 for fp64 log-probs; 0 where masked. ``kl`` is the KL_t itself, 0 without one. ``clipped``: a bound
    acts (of the sequence's ratio under "gspo" and its like). ``metrics``: see `policy_loss`.
    """

    loss: torch.Tensor
    a: torch.Tensor
    e: torch.Tensor
    kl: torch.Tensor
    clipped: torch.Tensor
    metrics: Dict[str, torch.Tensor]


class PolicyLoss(NamedTuple):
    """``loss`` 0-d with gradient; ``per_token`` (weighted), ``kl`` and ``clipped`` [N] and ``metrics`` without."""

    loss: torch.Tensor
    per_token: torch.Tensor
    kl: torch.Tensor
    clipped: torch.Tensor
    metrics: Dict[str, torch.Tensor]


@torch.library.custom_op(add_op_namespace_prefix("policy_coef"), mutates_args=())
def _coef(
    logp: torch.Tensor,
    cu_seqlens: torch.Tensor,
    given: List[Optional[torch.Tensor]],
    names: str,
    numbers: torch.Tensor,
    adv_eps: torch.Tensor,
    *,
    adv_scale: str,
    adv_ddof: int,
    group_size: int,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, a, e, kl, clipped [N] and partial sums [B, 9]; ``given`` are the tensors of `_GIVEN`.

    Numbers that may change from call to call are tensors, on the CPU: torch.compile would compile for every float.
    """
    inputs = Inputs(
        logp=logp,
        cu_seqlens=cu_seqlens,
        group_size=group_size,
        adv_scale=adv_scale,
        adv_eps=adv_eps,
        adv_ddof=adv_ddof,
        **dict(zip(_GIVEN, given, strict=True)),
    )
    spec = LossSpec.unpack(names, numbers)
    if choose("policy_coef", logp, has=("triton", "reference")) == "triton":
        from .policy_triton import coef_triton

        return coef_triton(inputs, spec)
    if logp.device.type == "cpu":
        return coef_torch(inputs, spec)
    mended, right = mended_offsets(cu_seqlens, logp.shape[0])
    loss, a, e, kl, clipped, partial = coef_torch(inputs._replace(cu_seqlens=mended), spec)
    loss, a, e, kl = (torch.where(right, x, torch.nan) for x in (loss, a, e, kl))
    return loss, a, e, kl, clipped, partial


def mended_offsets(cu_seqlens: torch.Tensor, rows: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Offsets that PyTorch's operators can't go wrong with, and whether the given ones were such, bool [].

    On a GPU their values were never looked at, and a wrong one would stop it with an assertion.
    """
    mended = cu_seqlens.clamp(0, rows).cummax(0).values
    mended[0] = 0
    if len(mended) > 1:
        mended[-1] = rows
    return mended, (mended == cu_seqlens).all()


@_coef.register_fake
def _(logp: torch.Tensor, cu_seqlens: torch.Tensor, *rest: Any, **scalars: Any) -> Outputs:
    like = logp.new_empty(logp.shape, dtype=compute_dtype(logp))
    a, e, kl = (torch.empty_like(like) for _ in range(3))
    clipped = torch.empty_like(like, dtype=torch.bool)
    return like, a, e, kl, clipped, like.new_empty(cu_seqlens.shape[0] - 1, len(policy_ref.METRICS))


_GIVEN = (
    "advantages",
    "rewards",
    "offsets",
    "old_logp",
    "ref_logp",
    "rollout_logp",
    "entropy",
    "token_weight",
    "mask",
    "normalizer",
)


@torch.library.custom_op(add_op_namespace_prefix("policy_sum"), mutates_args=())
def _sum(
    logp: torch.Tensor, entropy: Optional[torch.Tensor], loss: torch.Tensor, a: torch.Tensor, e: torch.Tensor
) -> torch.Tensor:
    """The sum of loss [N], whose gradient is a for logp and e for entropy."""
    return loss.sum()


@_sum.register_fake
def _(
    logp: torch.Tensor, entropy: Optional[torch.Tensor], loss: torch.Tensor, a: torch.Tensor, e: torch.Tensor
) -> torch.Tensor:
    return loss.new_empty(())


@torch.library.custom_op(add_op_namespace_prefix("policy_sum_backward"), mutates_args=())
def _sum_backward(grad: torch.Tensor, logp: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    """grad coefficient [N] in the dtype of logp, which is here so that a second derivative finds this operator."""
    return (grad * coefficient).to(logp.dtype)


@_sum_backward.register_fake
def _(grad: torch.Tensor, logp: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(coefficient, dtype=logp.dtype)


no_double_backward(_sum_backward, "policy_loss")


def _save(ctx: Any, inputs: Tuple[Any, ...], output: torch.Tensor) -> None:
    logp, entropy, _, a, e = inputs
    ctx.has_entropy = entropy is not None
    ctx.save_for_backward(logp, logp if entropy is None else entropy, a, e)


def _backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
    logp, entropy, a, e = ctx.saved_tensors
    to_logp = _sum_backward(grad, logp, a) if ctx.needs_input_grad[0] else None
    to_entropy = _sum_backward(grad, entropy, e) if ctx.has_entropy and ctx.needs_input_grad[1] else None
    return to_logp, to_entropy, None, None, None


_sum.register_autograd(_backward, setup_context=_save)


def _run(inputs: Inputs, spec: LossSpec) -> Outputs:
    out: Outputs = _coef(
        inputs.logp,
        inputs.cu_seqlens,
        [getattr(inputs, name) for name in _GIVEN],
        spec.names,
        spec.numbers,
        inputs.adv_eps,
        adv_scale=inputs.adv_scale,
        adv_ddof=inputs.adv_ddof,
        group_size=inputs.group_size,
    )
    return out


def _metrics(partial: torch.Tensor) -> Dict[str, torch.Tensor]:
    """0-d metrics from partial sums [B, 9]; all 0 where there are no tokens."""
    if partial.shape[0] == 0:
        partial = partial.new_zeros(1, partial.shape[1])
    sums, shares = partial[:, :-2].sum(0), ("clip_low_share", "clip_high_share")
    tokens = sums[0]
    means = (sums[1:] / tokens.clamp(min=1)).unbind()
    names = (*shares, "ratio_mean", "kl_mean", "entropy_mean", "correction_mean")
    low, high = partial[:, -2].amin(), partial[:, -1].amax()
    some = tokens > 0
    extrema = {"ratio_min": torch.where(some, low, 0.0), "ratio_max": torch.where(some, high, 0.0)}
    return {"tokens": tokens, **dict(zip(names, means, strict=True)), **extrema}


def policy_coef(
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
) -> PolicyCoef:
    """Loss, coefficients and metrics of tokens with log-probs ``logp`` [N] (any float type), without gradient.

    Values behind the mask may be anything, NaN too, and count nowhere; elsewhere log-probs must be finite.

    Args:
        cu_seqlens: int32/int64 [B + 1], the first token of every sequence, and N. On a GPU its values are not looked
            at here; tokens outside of all sequences get NaN.
        advantages: [B], one a sequence, or [N], one a token (when B = N they are taken as [B]).
        rewards: [B] in place of advantages, which are then formed as `group_advantages` does with ``adv_scale``,
            ``adv_eps`` and ``adv_ddof``; a NaN reward gets advantage 0, and takes no part under policy "reg".
        groups: sequences in a group, or offsets [groups + 1]; needed with rewards and with policy "reg".
        old_logp: [N] under the policy that the ratio divides by; None: the current one.
        ref_logp: [N] under the reference model, for the KL.
        rollout_logp: [N] as the rollout engine saw them, for the correction and the gate.
        entropy: [N] in nats, for the entropy bonus and the metric.
        token_weight: [N], a constant factor of the token's whole loss.
        mask: bool [N], True for tokens that count; default all.
        normalizer: what the reduction divides by, see `LossSpec`; a 0-d tensor on the device of logp, or a number;
            above 0, or 0 where no token counts. On a GPU the value of a tensor is not looked at.

    Raises:
        KernelInputError: names the argument, what it got and what it needs.
    """
    inputs = prepare(
        logp,
        cu_seqlens,
        spec,
        advantages=advantages,
        rewards=rewards,
        groups=groups,
        adv_scale=adv_scale,
        adv_eps=adv_eps,
        adv_ddof=adv_ddof,
        old_logp=old_logp,
        ref_logp=ref_logp,
        rollout_logp=rollout_logp,
        entropy=entropy,
        token_weight=token_weight,
        mask=mask,
        normalizer=normalizer,
    )
    loss, a, e, kl, clipped, partial = _run(inputs, spec)
    return PolicyCoef(loss, a, e, kl, clipped, _metrics(partial))


def policy_loss(
    logp: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: LossSpec,
    *,
    entropy: Optional[torch.Tensor] = None,
    **inputs: Any,
) -> PolicyLoss:
    """The loss, differentiable once in ``logp`` and ``entropy``; arguments and errors as `policy_coef`.

    ``metrics``, 0-d without gradient: tokens, clip_low_share, clip_high_share (of tokens), ratio_mean, ratio_min and
    ratio_max (of the ratio the policy uses), kl_mean, entropy_mean, correction_mean; 0 where there are no tokens.
    """
    out = policy_coef(logp, cu_seqlens, spec, entropy=entropy, **inputs)
    no_forward_mode("policy_loss", logp, entropy)
    loss = _sum(logp, entropy, out.loss, out.a, out.e)
    return PolicyLoss(loss, out.loss, out.kl, out.clipped, out.metrics)


def policy_loss_ref(
    logp: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: LossSpec,
    *,
    entropy: Optional[torch.Tensor] = None,
    **inputs: Any,
) -> PolicyLoss:
    """`policy_loss` as a formula of plain PyTorch: autograd differentiates it."""
    checked = prepare(logp, cu_seqlens, spec, entropy=entropy, **inputs)
    parts = policy_ref.parts_ref(checked, spec, logp, entropy)
    return PolicyLoss(parts.loss.sum(), parts.loss.detach(), parts.kl, parts.clipped, _metrics(parts.partial.detach()))


def policy_coef_ref(
    logp: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: LossSpec,
    *,
    entropy: Optional[torch.Tensor] = None,
    **inputs: Any,
) -> PolicyCoef:
    """`policy_coef` from the autograd of `policy_loss_ref`."""
    checked = prepare(logp, cu_seqlens, spec, entropy=entropy, **inputs)
    dtype = compute_dtype(checked.logp)
    with torch.enable_grad():
        leaf = checked.logp.to(dtype, copy=True).requires_grad_()
        height = torch.zeros_like(leaf) if checked.entropy is None else checked.entropy.to(dtype, copy=True)
        parts = policy_ref.parts_ref(checked, spec, leaf, height.requires_grad_())
        a, e = torch.autograd.grad(parts.loss.sum(), (leaf, height), materialize_grads=True)
    return PolicyCoef(parts.loss.detach(), a, e, parts.kl, parts.clipped, _metrics(parts.partial.detach()))


__all__ = ["PolicyCoef", "PolicyLoss", "policy_coef", "policy_coef_ref", "policy_loss", "policy_loss_ref"]
