"""Liger-Kernel 0.8.5's GRPO losses, with its names and signatures: `triton_grpo_loss` on logits,
`LigerFusedLinearGRPOLoss` and `liger_fused_linear_grpo` on hidden states.

Liger's conventions: advantages are per sequence [B]; CISPO's only bound is `eps_high` itself (not 1 + eps_high); an
empty sequence counts in B; "dapo", "cispo" and "vespo" are divided by the tokens of all processes over their number.
What differs, because Liger is wrong there: "luspo" is the sum of the unmasked tokens' losses, mean over the sequences;
Liger's changes with padding, and its gradient on logits by token is another one. With ``delta`` below 1 + eps_high the
gradient is that of the loss. Masked positions may hold anything, NaN and -100 included. Log-probs and sums are fp32; a
bias is added in the dtype of the hidden states. A mask of other numbers than 0 and 1, and a ratio below 0, raise; on a
GPU, where they would have to be waited for, they make the loss NaN.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Dict, Optional, Tuple

import torch

from .._checks import bad, describe, tensor
from ..grpo_loss import grpo_loss
from ..linear_grpo_loss import linear_grpo_loss
from ..linear_logprob import linear_logprob
from ..policy_coef import policy_loss
from ..token_logprob import token_logprob
from ._liger import Layout, Number, PerToken, Vespo, normalizer, spec_of


def triton_grpo_loss(
    logits: torch.Tensor,
    old_logp: Optional[torch.Tensor],
    ref_logp: Optional[torch.Tensor],
    completion_ids: torch.Tensor,
    advantages: torch.Tensor,
    completion_mask: Optional[torch.Tensor] = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: Optional[int] = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Optional[torch.Tensor] = None,
    delta: Optional[float] = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Optional[Number] = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> Any:
    """`liger_kernel.transformers.grpo_loss.triton_grpo_loss`.

    Args:
        logits: [B, L + 1, V]; the last position of each sequence is ignored and gets a zero gradient.
        old_logp, ref_logp: [B, L]; without ``old_logp`` the current policy is the old one; ``ref_logp`` is needed with
            ``beta``.
        completion_ids, completion_mask: [B, L]; mask 0 or 1, None: all 1.
        advantages: [B].
        inplace: the gradient may take the place of the logits.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo" or "vespo".
        max_completion_length: "dr_grpo" divides by B times this; L by default.
        importance_sampling_level: "token", or "sequence" (GSPO; not for "cispo", "sapo", "vespo").
        reduce: whether to return the reduced loss.
        vllm_is_ratio: [B], [B, 1] or [B, L], constant, at least 0; it weighs the policy term, not the KL.
        delta: upper bound of the unclipped ratio (not for "cispo", "sapo", "vespo").
        use_bias_correction_kl: weigh the KL by the ratio.
        num_items_in_batch: tokens of the whole step in all processes, for "dapo", "cispo", "vespo".

    Returns:
        With ``reduce``: (loss, [mean KL, clip ratio]), without the KL where beta is 0. Else (loss per token, KL or
        None, clipped as 0 or 1), each [B, L], 0 where masked; the loss is differentiable in both cases.

    Raises:
        KernelInputError: arguments that Liger refuses, or that don't fit each other.
    """
    tensor("logits", logits, shape=[None, None, None])
    batch, length = logits.shape[0], logits.shape[1] - 1
    if length < 0:
        raise bad("logits", describe(logits), "[B, L + 1, V]")
    if beta != 0.0 and ref_logp is None:
        raise bad("ref_logp", None, "log-probs of the reference where beta isn't 0")
    with_kl = beta != 0.0
    spec = spec_of(
        loss_type, importance_sampling_level, beta=beta if with_kl else None, clip=(eps_low, eps_high), delta=delta,
        taus=(sapo_temperature_pos, sapo_temperature_neg), weigh_kl=use_bias_correction_kl,
    )  # fmt: skip
    layout = Layout(completion_mask, "completion_mask", (batch, length), logits, spare=1)
    arguments: Dict[str, Any] = {
        "mask": layout.rows("completion_mask", layout.mask),
        "old_logp": layout.rows("old_logp", old_logp),
        "ref_logp": layout.rows("ref_logp", ref_logp) if with_kl else None,
        "advantages": layout.advantages(advantages, None if loss_type == "vespo" else vllm_is_ratio),
        "normalizer": normalizer(
            loss_type,
            layout.mask,
            max(length, 1) if max_completion_length is None else max_completion_length,
            num_items_in_batch,
        ),
    }
    rows, target = logits.reshape(-1, logits.shape[-1]), layout.targets("completion_ids", completion_ids)
    old = arguments["old_logp"]
    out: Any
    if reduce and loss_type != "vespo":
        out = grpo_loss(rows, target, layout.cu_seqlens, spec, temperature=temperature, inplace=inplace, **arguments)
        return out.loss, layout.metrics(layout.numbers(spec, out.logp, old, out.kl, advantages), with_kl)
    logp = token_logprob(rows, target, temperature, inplace=inplace).logp
    if loss_type == "vespo":
        constants = Vespo(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg)
        arguments["advantages"] = layout.vespo(logp, old, advantages, vllm_is_ratio, constants)
    if reduce:
        out = policy_loss(logp, layout.cu_seqlens, spec, **arguments)
        return out.loss, layout.metrics(layout.numbers(spec, logp, old, out.kl, advantages), with_kl)
    del arguments["normalizer"]
    unweighted = dataclasses.replace(spec, reduction="sum")
    loss, rows_kl = PerToken.apply(logp, layout.cu_seqlens, unweighted, arguments)  # type: ignore[no-untyped-call]
    kl, clipped = layout.numbers(spec, logp, old, rows_kl, advantages)
    return layout.padded(loss), kl if with_kl else None, clipped


def liger_fused_linear_grpo(
    _input: torch.Tensor,
    weight: torch.Tensor,
    selected_token_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    advantages: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    ref_per_token_logps: Optional[torch.Tensor] = None,
    old_per_token_logps: Optional[torch.Tensor] = None,
    ref_input: Optional[torch.Tensor] = None,
    ref_weight: Optional[torch.Tensor] = None,
    ref_bias: Optional[torch.Tensor] = None,
    beta: float = 0.04,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "dapo",
    max_completion_length: Optional[int] = None,
    importance_sampling_level: str = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    temperature: float = 1.0,
    compiled: bool = True,
    use_ref_model: bool = True,
    chunk_size: int = 1,
    vllm_is_ratio: Optional[torch.Tensor] = None,
    delta: Optional[float] = None,
    use_bias_correction_kl: bool = False,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    num_items_in_batch: Optional[Number] = None,
) -> Tuple[torch.Tensor, Tuple[torch.Tensor, ...]]:
    """`liger_kernel.chunked_loss.liger_fused_linear_grpo`: loss and metrics from hidden states.

    Args:
        _input, weight, bias: [B, T, H], [V, H], [V].
        selected_token_ids, attention_mask: [B, T]; mask 0 or 1.
        advantages: [B].
        ref_per_token_logps: [B, T]; else the reference's log-probs come from ``ref_input`` [B, T, H], ``ref_weight``
            and ``ref_bias``, all without gradient.
        use_ref_model: False: the reference is the current policy (KL 0), whatever else is given.
        compiled, chunk_size: no effect: nothing is compiled at run time, and chunks follow a memory budget.
        others: as of `triton_grpo_loss`; ``max_completion_length`` is needed with "dr_grpo".

    Returns:
        (loss, (mean KL, clip ratio)), without the KL where beta is 0.

    Raises:
        KernelInputError: arguments that Liger refuses, or that don't fit each other.
    """
    tensor("_input", _input, shape=[None, None, None])
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise bad("max_completion_length", None, "a length above 0 with loss_type 'dr_grpo'")
    if use_ref_model and ref_per_token_logps is None and ref_input is None:
        raise bad("ref_per_token_logps", None, "log-probs, or ref_input and ref_weight, with use_ref_model")
    with_kl = beta != 0.0 and use_ref_model
    spec = spec_of(
        loss_type, importance_sampling_level, beta=beta if with_kl else None, clip=(epsilon_low, epsilon_high),
        delta=delta, taus=(sapo_temperature_pos, sapo_temperature_neg), weigh_kl=use_bias_correction_kl,
        clip_names=("epsilon_low", "epsilon_high"),
    )  # fmt: skip
    layout = Layout(attention_mask, "attention_mask", tuple(_input.shape[:2]), _input, spare=0)
    weight, bias = weight.to(_input.dtype), None if bias is None else bias.to(_input.dtype)
    rows, target = _input.reshape(-1, _input.shape[-1]), layout.targets("selected_token_ids", selected_token_ids)
    arguments: Dict[str, Any] = {
        "mask": layout.rows("attention_mask", layout.mask),
        "old_logp": layout.rows("old_per_token_logps", old_per_token_logps),
        "ref_logp": layout.rows("ref_per_token_logps", ref_per_token_logps) if with_kl else None,
        "advantages": layout.advantages(advantages, None if loss_type == "vespo" else vllm_is_ratio),
        "normalizer": normalizer(loss_type, layout.mask, max_completion_length, num_items_in_batch),
    }
    if with_kl and ref_per_token_logps is None:
        arguments["ref_logp"] = _reference(ref_input, ref_weight, ref_bias, target, temperature)
    old = arguments["old_logp"]
    out: Any
    if loss_type == "vespo":
        logp = linear_logprob(rows, weight, target, temperature, bias=bias).logp
        constants = Vespo(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg)
        arguments["advantages"] = layout.vespo(logp, old, advantages, vllm_is_ratio, constants)
        out = policy_loss(logp, layout.cu_seqlens, spec, **arguments)
    else:
        out = linear_grpo_loss(
            rows, weight, target, layout.cu_seqlens, spec, bias=bias, temperature=temperature, **arguments
        )
        logp = out.logp
    return out.loss, tuple(layout.metrics(layout.numbers(spec, logp, old, out.kl, advantages), beta != 0.0))


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`: `liger_fused_linear_grpo` with its options kept."""

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: Optional[int] = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: Optional[float] = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        options = dict(locals())
        super().__init__()
        for name in _OPTIONS:
            setattr(self, name, options[name])
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "delta"):
            if options[name] is not None and not options[name] > 0:
                raise bad(name, options[name], "a number above 0")

    def forward(
        self,
        _input: torch.Tensor,
        lin_weight: torch.Tensor,
        selected_token_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        advantages: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        ref_per_token_logps: Optional[torch.Tensor] = None,
        old_per_token_logps: Optional[torch.Tensor] = None,
        ref_input: Optional[torch.Tensor] = None,
        ref_weight: Optional[torch.Tensor] = None,
        ref_bias: Optional[torch.Tensor] = None,
        vllm_is_ratio: Optional[torch.Tensor] = None,
        num_items_in_batch: Optional[Number] = None,
    ) -> Tuple[torch.Tensor, Tuple[torch.Tensor, ...]]:
        """As `liger_fused_linear_grpo`."""
        return liger_fused_linear_grpo(
            _input,
            lin_weight,
            selected_token_ids,
            attention_mask,
            advantages,
            bias=bias,
            ref_per_token_logps=ref_per_token_logps,
            old_per_token_logps=old_per_token_logps,
            ref_input=ref_input,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            vllm_is_ratio=vllm_is_ratio,
            num_items_in_batch=num_items_in_batch,
            **{name: getattr(self, name) for name in _OPTIONS},
        )


_OPTIONS = tuple(inspect.signature(LigerFusedLinearGRPOLoss).parameters)


def _reference(
    hidden: Optional[torch.Tensor],
    weight: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    target: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    if hidden is None or weight is None:
        raise bad("ref_weight", None, "the reference's head with ref_input")
    tensor("ref_input", hidden, shape=[None, None, None])
    rows = hidden.reshape(-1, hidden.shape[-1])
    bias = None if bias is None else bias.to(hidden.dtype)
    with torch.no_grad():
        return linear_logprob(rows, weight.to(hidden.dtype), target, temperature, bias=bias).logp


__all__ = ["LigerFusedLinearGRPOLoss", "liger_fused_linear_grpo", "triton_grpo_loss"]
