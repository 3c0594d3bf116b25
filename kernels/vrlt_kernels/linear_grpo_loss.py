"""linear_grpo_loss: from hidden states and the head's weight to the policy loss, without the logits of all rows.

Shapes: hidden H [N, K], weight W [V, K], bias b [V], target [N], sequences bounded by cu_seqlens [B + 1].
Rows are sorted on the host: masked ones cost nothing; those that can't earn a gradient (advantage 0 where nothing but
the advantage moves them) get their log-probs and are left out of both products of the gradient; the rest goes one of
two ways.
    They fit in the budget, or a row's coefficient depends on its whole sequence:
        logp, entropy = linear_logprob(...), loss = policy_loss(...): D = onehot - p waits for the backward pass.
    They don't, and a row's coefficient depends on the row alone (clip, cispo, sapo, reinforce):
        the gradient is taken chunk by chunk in the forward pass, dW added up in fp32; the backward pass scales it.
Either way 6 N V K FLOPs, or 8 for sequence-level losses of rows beyond the budget.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, List, Optional, Tuple, Union

import torch

from ._checks import INTEGERS, compute_dtype, offsets, tensor, values_in_range
from ._head import (
    Head,
    HeadGradients,
    as_given,
    autocast,
    check_head,
    chunks,
    live_rows,
    power_of_two,
    project_,
    rows_within,
)
from ._launch import no_double_backward, no_forward_mode
from ._ops import add_op_namespace_prefix as op
from ._row_order import Order, sort_rows
from ._rows import inverse_of, row_fused_, row_grad_, row_stats
from .grpo_loss import GrpoLoss, assemble, check_spec, grpo_loss_ref, loss_of_rows, valid_targets, valid_temperature
from .linear_logprob import BUDGET, Three, logprob_of_rows
from .loss_spec import LossSpec
from .policy_coef import policy_coef, policy_loss
from .token_logprob import temperature_of

TOKEN_POLICIES = ("clip", "cispo", "sapo", "reinforce")
"""Policies under which a token's coefficient depends on nothing but the token."""
FIELDS = ("advantages", "token_weight", "old_logp", "ref_logp", "rollout_logp", "mask")
"""What a row brings along, each [N]."""
Six = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op(op("linear_grpo_fwd"), mutates_args=())
def linear_grpo_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    target: torch.Tensor,
    temperatures: Optional[torch.Tensor],
    given: List[torch.Tensor],
    numbers: torch.Tensor,
    *,
    temperature: float,
    names: str,
    budget_rows: int,
    needs: List[bool],
) -> Six:
    """The loss [], logp and entropy [N], and in fp32 what ``needs`` asks for of dH, dW, db (empty where not).

    ``given``: as FIELDS, empty where there is none; ``names``, ``numbers``: the spec's; its reduction is in the token
    weights.
    """
    rows = hidden.shape[0]
    spec = replace(LossSpec.unpack(names, numbers), reduction="sum")
    inverse = inverse_of(temperature, temperatures, hidden).expand(rows)
    logp, entropy = (hidden.new_empty(rows, dtype=inverse.dtype) for _ in range(2))
    values_in_range("target", target, 0, weight.shape[0])
    loss = logp.new_zeros(())
    pieces = chunks(0, rows, budget_rows)
    grads = HeadGradients(hidden, weight, needs=(needs[0], needs[1], needs[2]), single=len(pieces) <= 1, keep_wide=True)
    buffer = hidden.new_empty(min(rows, budget_rows), weight.shape[0])
    with as_given(hidden):
        for use in pieces:
            logits = buffer[: use.stop - use.start]
            project_(logits, hidden[use], weight, bias)
            part: Dict[str, Any] = {name: x[use] if len(x) else None for name, x in zip(FIELDS, given, strict=True)}
            piece = _chunk(logits, use, target[use], inverse[use].contiguous(), spec, part=part, grads=grads)
            logp[use], entropy[use] = piece[:2]
            loss += piece[2]
    return loss, logp, entropy, *grads.results()


def _chunk(
    logits: torch.Tensor,
    use: slice,
    target: torch.Tensor,
    inverse: torch.Tensor,
    spec: LossSpec,
    *,
    part: Dict[str, Any],
    grads: HeadGradients,
) -> Three:
    """logp, entropy and loss of a chunk, whose gradient goes to ``grads``; writes over the logits."""
    deferred = spec.entropy_coef == 0
    if deferred:
        logp, entropy, lse = row_fused_(logits, target, inverse)
    else:
        logp, entropy, lse, _ = row_stats(logits, target, inverse, False)
    whole = torch.arange(0, len(logits) + 1, len(logits), device=logits.device)
    out = policy_coef(logp, whole, spec, entropy=entropy, **part)
    live = live_rows(out.a, None if deferred else out.e)
    rows = use if live is None else live + use.start
    pick = slice(None) if live is None else live
    if deferred:
        grads.add(rows, logits, (out.a * inverse)[pick], pick=live)
        return logp, entropy, out.loss.sum()
    a, e, unscale = out.a, out.e, None
    if logits.dtype == torch.float16:
        scale = power_of_two(a * inverse, e * inverse)
        a, e, unscale = a * scale, e * scale, scale.reciprocal()
    row_grad_(logits, logits, target, inverse, lse, entropy, a=a, e=e)
    grads.add(rows, logits, None, pick=live, unscale=unscale)
    return logp, entropy, out.loss.sum()


@linear_grpo_fwd.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, *_: Any, needs: List[bool], **__: Any) -> Six:
    def wide(*shape: int) -> torch.Tensor:
        return hidden.new_empty(shape, dtype=compute_dtype(hidden))

    rows, vocab, width = hidden.shape[0], weight.shape[0], weight.shape[1]
    dh = wide(rows, width) if needs[0] else wide(0)
    dw = wide(vocab, width) if needs[1] else wide(0)
    return wide(), wide(rows), wide(rows), dh, dw, wide(vocab if needs[2] else 0)


@torch.library.custom_op(op("scaled_gradient"), mutates_args=())
def scaled_gradient(gradient: torch.Tensor, factor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """gradient * factor [] in the dtype of ``like``; no second fp32 copy of a head's gradient is made for it."""
    out = torch.empty_like(gradient, dtype=like.dtype)
    rows = len(gradient) if gradient.is_cuda or out.dtype == gradient.dtype else 4096
    for use in chunks(0, len(gradient), max(1, rows)):
        torch.mul(gradient[use], factor, out=out[use])
    return out


@scaled_gradient.register_fake
def _(gradient: torch.Tensor, factor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gradient, dtype=like.dtype)


def _setup(ctx: Any, inputs: Tuple[Any, ...], keyword_only_inputs: Dict[str, Any], output: Six) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, factor: Optional[torch.Tensor], *_: Any) -> Tuple[Any, ...]:
    operands, gradients = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    wanted = [needed and factor is not None for needed in ctx.needs_input_grad[:3]]
    found = [scaled_gradient(g, factor, x) if w else None for g, x, w in zip(gradients, operands, wanted, strict=True)]
    return *found, None, None, [None] * len(FIELDS), None


linear_grpo_fwd.register_autograd(_backward, setup_context=_setup)
no_double_backward(scaled_gradient, "linear_grpo_loss")


def linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: LossSpec,
    *,
    bias: Optional[torch.Tensor] = None,
    temperature: Union[float, torch.Tensor] = 1.0,
    budget_bytes: float = BUDGET,
    **inputs: Any,
) -> GrpoLoss:
    """The loss of N response tokens from their hidden states; differentiable in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: [N, K] fp32, fp64, bf16 or fp16; under autocast it and the weights are cast as a linear layer would.
        weight: [V, K] of the same dtype. What doesn't require a gradient gets none computed.
        target: int32 or int64 [N] in [0, V); anything where masked.
        cu_seqlens: int32 or int64 [B + 1].
        spec: which loss, and its hyper-parameters.
        bias: [V].
        temperature: a number, a 0-d tensor or one value a row [N].
        budget_bytes: most bytes of logits at a time.
        inputs: what `policy_coef` takes beside log-probs: advantages or rewards with groups, old_logp, ref_logp,
            rollout_logp, token_weight, mask, normalizer, adv_scale, adv_eps, adv_ddof.

    With ``hidden`` on a GPU, ``mask``, ``cu_seqlens``, ``advantages``, ``rewards`` and ``groups`` may stay on the CPU,
    and should: rows to leave out are known from them without waiting for the GPU, which is never done. On the CPU rows
    whose coefficient turns out 0 (clipped ones) are left out as well. Under torch.compile rows aren't sorted.

    Raises:
        KernelInputError: names the argument, what it got and what it needs.
    """
    check_head(hidden, weight, bias, target)
    check_spec(spec)
    check_host_offsets(hidden, cu_seqlens, inputs.get("groups"))
    no_forward_mode("linear_grpo_loss", hidden, weight, bias)
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    order, inputs = sort_rows(len(hidden), cu_seqlens, spec, inputs, trains=trains)
    inputs = {name: _move(value, hidden.device) for name, value in inputs.items()}
    order, cu_seqlens = _move(order, hidden.device), _move(cu_seqlens, hidden.device)
    mask = inputs.get("mask")
    target, temperature = valid_targets(target, mask), valid_temperature(temperature, mask)
    if mask is not None and order is None:
        hidden = torch.where(mask[:, None], hidden, 0.0)  # a NaN times a coefficient of 0 would reach dW
    head = (hidden, weight, bias)
    rows = len(hidden) if order is None else len(order[0])
    if trains and rows > rows_within(budget_bytes, weight, autocast(*head)[0].element_size()) and _by_token(spec):
        return _chunked(*(head, target, temperature, order, cu_seqlens, spec), inputs=inputs, budget_bytes=budget_bytes)
    out = logprob_of_rows(
        *(hidden, weight, target, temperature, order), bias=bias, want_sum_p2=False, budget_bytes=budget_bytes
    )
    return loss_of_rows(out.logp, out.entropy, cu_seqlens, spec, inputs)


def check_host_offsets(hidden: torch.Tensor, cu_seqlens: torch.Tensor, groups: object) -> None:
    """Offsets on the CPU that will be moved to a GPU, where nobody can look at their values without waiting."""
    tensor("cu_seqlens", cu_seqlens, shape=[None], dtypes=INTEGERS)
    if hidden.device == cu_seqlens.device:
        return
    offsets("cu_seqlens", cu_seqlens, len(hidden), cu_seqlens)
    if isinstance(groups, torch.Tensor) and groups.device.type == "cpu":
        offsets("groups", groups, len(cu_seqlens) - 1, groups)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_move(v, device) for v in value)
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def _chunked(
    head: Head,
    target: torch.Tensor,
    temperature: Union[float, torch.Tensor],
    order: Order,
    cu_seqlens: torch.Tensor,
    spec: LossSpec,
    *,
    inputs: Dict[str, Any],
    budget_bytes: float,
) -> GrpoLoss:
    """The way of losses whose gradient is known in the forward pass."""
    hidden, weight, bias = autocast(*head)
    number, every = temperature_of(temperature, hidden)
    known = _known(hidden, cu_seqlens, spec, inputs)
    others = (inputs.get(name) for name in FIELDS[2:])
    given = [hidden.new_empty(0) if x is None else x.detach() for x in (*known, *others)]
    states, goal, own = hidden, target, every
    if order is not None:
        on = order[0]
        states, goal = hidden.index_select(0, on), target.index_select(0, on)
        own = every if every is None or every.numel() == 1 else every.to(on.device).index_select(0, on)
        given = [x.index_select(0, on) if len(x) else x for x in given]
    loss, logp, entropy, *_ = linear_grpo_fwd(
        *(states, weight, bias, goal, own, given, spec.numbers),
        temperature=number,
        names=spec.names,
        budget_rows=rows_within(budget_bytes, weight, hidden.element_size()),
        needs=[x is not None and x.requires_grad for x in (states, weight, bias)],
    )
    if order is not None:
        with torch.no_grad():
            rest = logprob_of_rows(
                *(hidden, weight, target, temperature, (order[1], on[:0])),
                bias=bias,
                want_sum_p2=False,
                budget_bytes=budget_bytes,
            )
        logp, entropy = (x.index_copy(0, on, y) for x, y in ((rest.logp, logp), (rest.entropy, entropy)))
    out = policy_loss(logp, cu_seqlens, spec, entropy=entropy, **inputs)
    # The value of the whole's sum, so that it doesn't depend on the chunks; the gradient of the chunks'.
    return assemble(out._replace(loss=loss + (out.loss - loss).detach()), logp, entropy, inputs)


def _known(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, spec: LossSpec, inputs: Dict[str, Any]
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Advantage and whole weight [N] of every token, read off the coefficients of the loss -A logp: a = -weight A."""
    zeros = hidden.new_zeros(len(hidden), dtype=compute_dtype(hidden))
    plain = LossSpec(policy="reinforce", reduction="sum")
    names = ("advantages", "rewards", "groups", "adv_scale", "adv_eps", "adv_ddof", "mask")
    given = {k: v for k, v in inputs.items() if k in names}
    advantages = -policy_coef(zeros, cu_seqlens, plain, **given).a
    counted = {k: v for k, v in inputs.items() if k in ("mask", "token_weight", "normalizer")}
    reduced = replace(plain, reduction=spec.reduction)
    return advantages, policy_coef(zeros, cu_seqlens, reduced, advantages=zeros - 1, **counted).a


def _by_token(spec: LossSpec) -> bool:
    """Whether a row's coefficient depends on nothing but the row."""
    return (
        spec.policy in TOKEN_POLICIES
        and spec.kl_weight != "sequence"
        and (spec.correction == "none" or spec.correction_level == "token")
        and spec.gate_delta is None
    )


def linear_grpo_loss_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: LossSpec,
    *,
    bias: Optional[torch.Tensor] = None,
    temperature: Union[float, torch.Tensor] = 1.0,
    budget_bytes: float = BUDGET,
    **inputs: Any,
) -> GrpoLoss:
    """The mathematics of `linear_grpo_loss` in plain PyTorch, with all logits; the budget changes nothing."""
    mask = inputs.get("mask")
    if mask is not None:
        hidden = torch.where(mask[:, None], hidden, 0.0)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return grpo_loss_ref(logits, target, cu_seqlens, spec, temperature=temperature, **inputs)


__all__ = ["linear_grpo_loss", "linear_grpo_loss_ref"]
