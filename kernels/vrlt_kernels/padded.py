"""padded: the losses over padded batches [B, T] with a mask.

Where the mask is on the CPU, what is [N] is packed first, so that losses, gradients and metrics have the same bits as
those of the packed call. Logits are never copied for it: their padded rows are read, and get zeros. Where the mask is
on a GPU, or under torch.compile, packing would have to wait for its values: it goes along instead, with the same
results to rounding.
"""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Optional, Union

import torch

from ._checks import FLOATS, bad, describe, tensor
from .grpo_loss import GrpoLoss, check_spec, loss_of_rows, valid_targets, valid_temperature
from .linear_grpo_loss import linear_grpo_loss
from .linear_logprob import BUDGET
from .loss_spec import LossSpec
from .token_logprob import check_logits, token_logprob

PER_TOKEN = ("advantages", "old_logp", "ref_logp", "rollout_logp", "token_weight")


class _Packed(NamedTuple):
    """Which of the B * T rows count (None: a mask goes along), offsets [B + 1], and the inputs [N] of the loss."""

    rows: Optional[torch.Tensor]
    cu_seqlens: torch.Tensor
    inputs: Dict[str, Any]


def padded_grpo_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    spec: LossSpec,
    *,
    temperature: Union[float, torch.Tensor] = 1.0,
    inplace: bool = False,
    **inputs: Any,
) -> GrpoLoss:
    """`grpo_loss` of B padded sequences.

    Args:
        logits: [B, T, V]; copied only if [B, T] can't be seen as one dimension.
        target: int32 or int64 [B, T]; anything where masked.
        mask: bool [B, T], True for tokens that count, anywhere in a row. May stay on the CPU, and should.
        temperature: a number, or a tensor [], [B] or [B, T].
        inputs: as `grpo_loss`, with [B, T] in place of [N]; advantages [B] or [B, T].

    Returns:
        As `grpo_loss`, with [B, T] in place of [N], 0 where masked. Whatever stands in masked places counts nowhere.

    Raises:
        KernelInputError: names the argument, what it got and what it needs.
    """
    tensor("logits", logits, shape=[None, None, None], dtypes=FLOATS)
    check_spec(spec)
    packed = _pack(logits, target, mask, inputs)
    flat, goals = logits.flatten(0, 1), target.flatten()
    check_logits(flat, goals)
    counted = mask.to(logits.device, non_blocking=True).flatten()
    heat = valid_temperature(_flat_temperature(temperature, target), counted)
    row = token_logprob(flat, valid_targets(goals, counted), heat, inplace=inplace)
    logp, entropy = row.logp, row.entropy
    if packed.rows is not None:
        logp, entropy = logp.index_select(0, packed.rows), entropy.index_select(0, packed.rows)
    return _unpack(loss_of_rows(logp, entropy, packed.cu_seqlens, spec, packed.inputs), packed.rows, target)


def padded_linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    spec: LossSpec,
    *,
    bias: Optional[torch.Tensor] = None,
    temperature: Union[float, torch.Tensor] = 1.0,
    budget_bytes: float = BUDGET,
    **inputs: Any,
) -> GrpoLoss:
    """`linear_grpo_loss` of B padded sequences: hidden [B, T, K], the rest as `padded_grpo_loss`.

    Masked rows cost nothing where the mask is on the CPU.

    Raises:
        KernelInputError: names the argument, what it got and what it needs.
    """
    tensor("hidden", hidden, shape=[None, None, None], dtypes=FLOATS)
    packed = _pack(hidden, target, mask, inputs)
    states, goals = hidden.flatten(0, 1), target.flatten()
    heat = _flat_temperature(temperature, target)
    if packed.rows is not None:
        states, goals = states.index_select(0, packed.rows), goals.index_select(0, packed.rows)
        if isinstance(heat, torch.Tensor) and heat.dim():
            heat = heat.index_select(0, packed.rows)
    out = linear_grpo_loss(
        *(states, weight, goals, packed.cu_seqlens, spec),
        bias=bias,
        temperature=heat,
        budget_bytes=budget_bytes,
        **packed.inputs,
    )
    return _unpack(out, packed.rows, target)


def _pack(x: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, inputs: Dict[str, Any]) -> _Packed:
    batch, width = x.shape[:2]
    tensor("target", target, shape=[batch, width], like=x)
    tensor("mask", mask, shape=[batch, width], dtypes=[torch.bool])
    if "mask" in inputs:
        raise bad("inputs", "a second mask", "one")
    flat = {}
    for name in PER_TOKEN:
        value = inputs.get(name)
        if value is None or (name == "advantages" and isinstance(value, torch.Tensor) and value.dim() == 1):
            continue
        tensor(name, value, shape=[batch, width])
        flat[name] = value.flatten()
    host = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    # As many tokens as sequences: advantages of the tokens would be taken for those of the sequences.
    if not host or ("advantages" in flat and int(mask.sum()) == batch):
        ends = torch.arange(batch + 1, device=x.device) * width
        return _Packed(None, ends, {**inputs, **flat, "mask": mask.to(x.device).flatten()})
    rows = mask.flatten().nonzero()[:, 0]
    lengths = torch.cat([torch.zeros(1, dtype=torch.int64, device=mask.device), mask.sum(1)])
    picked = {k: v.index_select(0, rows.to(v.device, non_blocking=True)) for k, v in flat.items()}
    device = x.device
    ends = lengths.cumsum(0)
    return _Packed(rows.to(device, non_blocking=True), ends.to(device, non_blocking=True), {**inputs, **picked})


def _flat_temperature(temperature: Union[float, torch.Tensor], target: torch.Tensor) -> Union[float, torch.Tensor]:
    if not isinstance(temperature, torch.Tensor) or temperature.dim() == 0:
        return temperature
    if temperature.shape != target.shape[: temperature.dim()] or temperature.dim() > 2:
        raise bad("temperature", describe(temperature), f"shape [], [{target.shape[0]}] or {list(target.shape)}")
    spread = temperature if temperature.dim() == 2 else temperature[:, None].expand(target.shape)
    return spread.flatten()


def _unpack(out: GrpoLoss, rows: Optional[torch.Tensor], target: torch.Tensor) -> GrpoLoss:
    def wide(x: torch.Tensor) -> torch.Tensor:
        full = x if rows is None else x.new_zeros(target.numel()).index_copy(0, rows, x)
        return full.view(target.shape)

    return out._replace(
        per_token=wide(out.per_token),
        logp=wide(out.logp),
        entropy=wide(out.entropy),
        kl=wide(out.kl),
        clipped=wide(out.clipped),
    )


__all__ = ["padded_grpo_loss", "padded_linear_grpo_loss"]
