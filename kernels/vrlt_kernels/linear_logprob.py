"""linear_logprob: log-probability of the target token, and entropy, from hidden states and the head's weight.

Shapes: hidden H [N, K], weight W [V, K], bias b [V], target [N], temperature T a number or [N].
    x = H W^T + b       logp, entropy, sum_p2 of z = x / T as in token_logprob;  D = onehot(target) - p
    dH = diag(a / T) (D W)      dW = D^T (diag(a / T) H)      a: upstream gradient of logp
The forward pass leaves D, without any factor, where the logits were, and the backward pass scales H and what is as
small: 6 N V K FLOPs, and nothing underflows. As much of D is kept as a budget allows; beyond it the logits are computed
again (2 N V K more for those rows). With a gradient of the entropy, dlogits = (1/T) (a D - e p (log p + H)) is formed
from a chunk of D at a time: p is in D. sum_p2 has no gradient.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple, Union, cast

import torch

from ._checks import bad, compute_dtype, describe, tensor, values_in_range
from ._head import (
    HALF,
    Head,
    HeadGradients,
    Rows,
    as_given,
    autocast,
    check_head,
    chunks,
    live_rows,
    partition,
    power_of_two,
    project_,
    rows_within,
)
from ._launch import no_double_backward, no_forward_mode
from ._ops import add_op_namespace_prefix as op
from ._row_order import Order
from ._rows import inverse_of, row_fused_, row_grad_, row_mix_, row_stats
from .token_logprob import TokenLogprob, temperature_of, token_logprob_ref

BUDGET = 2.5e9
"""Bytes of logits that may exist at a time."""
Five = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Three = Tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op(op("linear_logprob_fwd"), mutates_args=())
def linear_logprob_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    target: torch.Tensor,
    temperatures: Optional[torch.Tensor],
    *,
    temperature: float,
    want_sum_p2: bool,
    budget_rows: int,
    trained: int,
    wide: bool = False,
) -> Five:
    """logp, entropy, lse, sum_p2 (empty unless wanted), D of the rows that are kept of the first ``trained`` ones.

    ``wide``: the logits of half-precision operands in fp32; then none is kept.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    kept, step = (0, budget_rows) if wide else partition(trained, budget_rows)
    if not wide and kept == trained:
        step = max(1, budget_rows - kept, budget_rows // 4)
    # On a CPU one product over all rows is faster than two; their logits then stay together until the backward pass.
    joint = rows if hidden.device.type == "cpu" and 0 < kept == trained < rows <= budget_rows else kept
    logits = hidden.new_empty(joint, vocab)
    rest = logits[:kept]
    inverse = inverse_of(temperature, temperatures, hidden)
    logp, entropy, lse = (hidden.new_empty(rows, dtype=inverse.dtype) for _ in range(3))
    sum_p2 = logp.new_empty(rows if want_sum_p2 else 0)
    values_in_range("target", target, 0, vocab)
    with as_given(hidden):
        if kept:
            first = slice(0, kept)
            project_(logits, hidden[:joint], weight, bias)
            scale = _part(inverse, first)
            if want_sum_p2:
                logp[first], entropy[first], lse[first], sum_p2[first] = row_stats(rest, target[first], scale, True)
                whole = scale.reciprocal().expand(kept).contiguous()
                row_grad_(rest, rest, target[first], scale, lse[first], entropy[first], a=whole, e=None)
            else:
                logp[first], entropy[first], lse[first] = row_fused_(rest, target[first], scale)
        dtype = inverse.dtype if wide else hidden.dtype
        buffer = logits[kept:] if joint > kept else hidden.new_empty(min(step, rows - kept), vocab, dtype=dtype)
        for part in chunks(kept, rows, len(buffer) or 1):
            piece = buffer[: part.stop - part.start]
            if joint == kept:
                project_(piece, hidden[part], weight, bias)
            stats = row_stats(piece, target[part], _part(inverse, part), want_sum_p2)
            logp[part], entropy[part], lse[part] = stats[:3]
            if want_sum_p2:
                sum_p2[part] = stats[3]
    return logp, entropy, lse, sum_p2, rest


@linear_logprob_fwd.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *_: Any,
    want_sum_p2: bool,
    budget_rows: int,
    trained: int,
    wide: bool = False,
    **__: Any,
) -> Five:
    rows = hidden.shape[0]
    logp, entropy, lse = (hidden.new_empty(rows, dtype=compute_dtype(hidden)) for _ in range(3))
    kept = 0 if wide else partition(trained, budget_rows)[0]
    return logp, entropy, lse, logp.new_empty(rows if want_sum_p2 else 0), hidden.new_empty(kept, weight.shape[0])


@torch.library.custom_op(op("linear_logprob_bwd"), mutates_args=())
def linear_logprob_bwd(
    rest: torch.Tensor,
    head: List[Optional[torch.Tensor]],
    target: torch.Tensor,
    temperatures: Optional[torch.Tensor],
    stats: List[torch.Tensor],
    a: torch.Tensor,
    e: Optional[torch.Tensor],
    *,
    temperature: float,
    budget_rows: int,
    trained: int,
    needs: List[bool],
    wide: bool = False,
) -> Three:
    """dH, dW, db, empty where not needed, from D, [hidden, weight, bias] and [logp, entropy, lse].

    Rows with a = e = 0 cost nothing on the CPU.
    """
    hidden, weight, bias = cast(Head, tuple(head))
    logp, entropy, lse = stats
    rows = trained
    kept, step = (0, budget_rows) if wide else partition(rows, budget_rows)
    inverse = inverse_of(temperature, temperatures, hidden).expand(hidden.shape[0])[:rows]
    a, e = a[:rows], None if e is None else e[:rows]
    live = live_rows(a, e)
    deferred = kept if e is None else 0
    pieces = _pieces(live, deferred, kept, step) + _pieces(live, kept, rows, step)
    grads = HeadGradients(
        hidden, weight, needs=(needs[0], needs[1], needs[2]), single=(deferred > 0) + len(pieces) <= 1
    )
    with as_given(hidden):
        if deferred:
            pick = None if live is None else live[live < kept]
            use = slice(0, kept) if pick is None else pick
            grads.add(use, rest, (a * inverse)[use], pick=pick)
        most = min(step, rows - deferred) if pieces else 0
        buffer = hidden.new_empty(most, weight.shape[0])
        logits = hidden.new_empty(most, weight.shape[0], dtype=inverse.dtype) if wide else buffer
        scale = power_of_two(a * inverse, None if e is None else e * inverse) if hidden.dtype == torch.float16 else None
        for use in pieces:
            a_use, e_use = a[use].contiguous(), None if e is None else e[use].contiguous()
            if scale is not None:
                a_use, e_use = a_use * scale, None if e_use is None else e_use * scale
            goal, factor, spread = target[use], inverse[use].contiguous(), entropy[use]
            grad = buffer[: len(goal)]
            if int(use[0] if isinstance(use, torch.Tensor) else use.start) < kept and e_use is not None:
                row_mix_(grad, rest[use], goal, factor, logp[use], spread, a=a_use, e=e_use)
            else:
                z = logits[: len(goal)]
                project_(z, hidden[use], weight, bias)
                row_grad_(z, z, goal, factor, lse[use], spread, a=a_use, e=e_use)
                if wide:
                    grad.copy_(z)
            grads.add(use, grad, None, unscale=None if scale is None else scale.reciprocal())
    return grads.results()


def _pieces(live: Optional[torch.Tensor], start: int, stop: int, step: int) -> List[Rows]:
    """The live rows in [start, stop), at most ``step`` at a time."""
    if live is None:
        return list(chunks(start, stop, step))
    inside = live[(live >= start) & (live < stop)]
    return list(inside.split(step)) if len(inside) else []


@linear_logprob_bwd.register_fake
def _(rest: torch.Tensor, head: List[Optional[torch.Tensor]], *_: Any, needs: List[bool], **__: Any) -> Three:
    hidden, weight, _bias = cast(Head, tuple(head))
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        hidden.new_empty(weight.shape if needs[1] else (0,)),
        hidden.new_empty(weight.shape[0] if needs[2] else 0),
    )


def _setup(ctx: Any, inputs: Tuple[Any, ...], keyword_only_inputs: Dict[str, Any], output: Five) -> None:
    hidden, weight, bias, target, temperatures = inputs
    ctx.options = {name: keyword_only_inputs[name] for name in ("temperature", "budget_rows", "trained", "wide")}
    logp, entropy, lse, sum_p2, rest = output
    ctx.mark_non_differentiable(lse, sum_p2, rest)
    ctx.save_for_backward(rest, hidden, weight, bias, target, temperatures, logp, entropy, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, a: Optional[torch.Tensor], e: Optional[torch.Tensor], *_: Any) -> Tuple[Any, ...]:
    if a is None and e is None:
        return (None,) * 5
    rest, hidden, weight, bias, target, temperatures, logp, entropy, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    slope = torch.zeros_like(lse) if a is None else a.contiguous()
    given = (rest, [hidden, weight, bias], target, temperatures, [logp, entropy, lse])
    gradients = linear_logprob_bwd(*given, slope, None if e is None else e.contiguous(), needs=needs, **ctx.options)
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None, None


linear_logprob_fwd.register_autograd(_backward, setup_context=_setup)
no_double_backward(linear_logprob_bwd, "linear_logprob")


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    temperature: Union[float, torch.Tensor] = 1.0,
    *,
    bias: Optional[torch.Tensor] = None,
    want_sum_p2: bool = False,
    budget_bytes: float = BUDGET,
    live: Optional[torch.Tensor] = None,
    logits_dtype: Optional[torch.dtype] = None,
) -> TokenLogprob:
    """Log-probs of the targets and entropies, differentiable in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: [N, K] fp32, fp64, bf16 or fp16; under autocast it and the weights are cast as a linear layer would.
        weight: [V, K] of the same dtype. Frozen (or the hidden states are): its gradient isn't computed.
        target: int32 or int64 [N] in [0, V). On CUDA a value outside isn't looked for; its log-prob is NaN.
        temperature: a number, a 0-d tensor or one value a row [N]; above 0; a constant.
        bias: [V].
        want_sum_p2: also return sum_v p_v^2, detached.
        budget_bytes: most bytes of logits at a time. Rows beyond it have theirs computed again in the backward pass; a
            gradient of the entropy needs up to a quarter more.
        live: bool [N] on the CPU: rows that get a gradient. The others have values only, and are left out of
            both products of the backward pass. It is host data so that no GPU is waited for; without it, rows whose
            upstream gradients turn out 0 are left out on the CPU; on a GPU they are multiplied by 0, and must hold
            finite hidden states. Not used under torch.compile.
        logits_dtype: None: that of ``hidden``, as a linear layer has them. float32: bf16 and fp16 products are kept
            unrounded. No logits are then kept for the backward pass, which computes them again: 8 N V K FLOPs.

    Rows agree with `token_logprob` on hidden @ weight.T to the rounding of the product. Two calls give the same bits.

    Raises:
        KernelInputError: a wrong type, shape, dtype, device, target, temperature or budget.
        RuntimeError: with create_graph: there is no second derivative; under forward-mode AD.
    """
    check_head(hidden, weight, bias, target)
    order: Order = None
    if live is not None:
        tensor("live", live, shape=[hidden.shape[0]], dtypes=[torch.bool])
        if live.device.type != "cpu":
            raise bad("live", describe(live), "a tensor on the CPU")
        if not torch.compiler.is_compiling() and not bool(live.all()):
            on, off = (x.nonzero()[:, 0].to(hidden.device, non_blocking=True) for x in (live, ~live))
            order = (on, off)
    return logprob_of_rows(
        *(hidden, weight, target, temperature, order),
        bias=bias,
        want_sum_p2=want_sum_p2,
        budget_bytes=budget_bytes,
        logits_dtype=logits_dtype,
    )


def logprob_of_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    temperature: Union[float, torch.Tensor],
    order: Order,
    *,
    bias: Optional[torch.Tensor],
    want_sum_p2: bool,
    budget_bytes: float,
    logits_dtype: Optional[torch.dtype] = None,
) -> TokenLogprob:
    """`linear_logprob` of the rows that ``order`` lists, with and without gradient, and 0 elsewhere."""
    hidden, weight, bias = autocast(hidden, weight, bias)
    no_forward_mode("linear_logprob", hidden, weight, bias)
    number, every = temperature_of(temperature, hidden)
    wide = _wide(logits_dtype, hidden)
    # Beside fp32 logits their gradient in half precision: 6 bytes a logit.
    budget_rows = rows_within(budget_bytes, weight, 4 + hidden.element_size() if wide else hidden.element_size())

    goal, own, trained = target, every, len(hidden)
    if order is not None:
        trained, rows = len(order[0]), torch.cat(order)
        hidden, goal = hidden.index_select(0, rows), target.index_select(0, rows)
        own = every if every is None or every.numel() == 1 else every.to(rows.device).index_select(0, rows)
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        trained = 0
    logp, entropy, _, sum_p2, _ = linear_logprob_fwd(
        *(hidden, weight, bias, goal, own),
        temperature=number,
        want_sum_p2=want_sum_p2,
        budget_rows=budget_rows,
        trained=trained,
        wide=wide,
    )
    if order is not None:
        logp, entropy = (_spread(x, len(target), order) for x in (logp, entropy))
        sum_p2 = _spread(sum_p2, len(target), order) if want_sum_p2 else sum_p2
    return TokenLogprob(logp, entropy, sum_p2 if want_sum_p2 else None)


def _wide(dtype: Optional[torch.dtype], hidden: torch.Tensor) -> bool:
    """Whether the logits have more digits than the hidden states."""
    if dtype is None or dtype == hidden.dtype:
        return False
    if dtype != torch.float32 or hidden.dtype not in HALF:
        raise bad("logits_dtype", dtype, f"None, {hidden.dtype} or, for bf16 and fp16, float32")
    return True


def _spread(x: torch.Tensor, rows: int, order: Tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Values in their rows [N], with gradient for the first list of rows alone."""
    on, off = order
    full = x.new_zeros(rows).index_copy(0, off, x[len(on) :].detach())
    return full.index_copy(0, on, x[: len(on)])


def linear_logprob_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    temperature: Union[float, torch.Tensor] = 1.0,
    *,
    bias: Optional[torch.Tensor] = None,
    want_sum_p2: bool = False,
    budget_bytes: float = BUDGET,
    live: Optional[torch.Tensor] = None,
    logits_dtype: Optional[torch.dtype] = None,
) -> TokenLogprob:
    """The mathematics of `linear_logprob` in plain PyTorch, with all logits; the budget changes nothing."""
    if _wide(logits_dtype, hidden):
        hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
    logits = torch.nn.functional.linear(hidden, weight, bias)
    out = token_logprob_ref(logits, target, temperature, want_sum_p2=want_sum_p2)
    if live is None:
        return out
    alive = live.to(hidden.device)
    logp, entropy = (torch.where(alive, x, x.detach()) for x in out[:2])
    return TokenLogprob(logp, entropy, out.sum_p2)


def _part(inverse: torch.Tensor, rows: slice) -> torch.Tensor:
    return inverse if inverse.numel() == 1 else inverse[rows]


__all__ = ["linear_logprob", "linear_logprob_ref"]
