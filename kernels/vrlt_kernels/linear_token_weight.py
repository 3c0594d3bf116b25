"""linear_token_weight: `token_weight` from hidden states, without the logits of all tokens at once.

Shapes: hidden [N, H], weight [V, H], bias [V].    logits = hidden weight^T + bias, in the dtype of hidden.
The weights of a position need all responses of its group at that position. So the rows are taken in the order (group,
position, response), and cut into chunks between positions, as many rows as the budget has room for. 2 N H V FLOPs.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import torch

from ._checks import compute_dtype
from ._head import HeadGradients, as_given, autocast, check_head, power_of_two, project_, rows_within
from ._launch import no_double_backward, no_forward_mode, scalar
from ._ops import add_op_namespace_prefix as op
from .group_advantage import Groups
from .linear_logprob import BUDGET, Three
from .token_weight import (
    Layout,
    check_numbers,
    group_divergence,
    group_divergence_backward,
    inverse_at,
    layout_of,
    token_weight_ref,
    weights_from,
)

Two = Tuple[torch.Tensor, torch.Tensor]


def _chunks(layout: Layout, most: int) -> Iterator[Two]:
    """Rows of a chunk, ascending, and its cu_seqlens [B + 1], on the CPU. A chunk has at least one group's position."""
    if len(layout.sequence_of) == 0:
        return
    cu, _, sequence_of, group_of = (part.cpu() for part in layout)
    position = torch.arange(len(sequence_of), device="cpu") - cu[sequence_of]
    key = group_of[sequence_of] * (int(position.max()) + 1) + position
    order = key.argsort(stable=True)
    _, sizes = key[order].unique_consecutive(return_counts=True)
    ends = sizes.cumsum(0).tolist()
    start = 0
    for i, end in enumerate(ends):
        if i + 1 < len(ends) and ends[i + 1] - start <= most:
            continue
        rows = order[start:end].sort().values
        lengths = sequence_of[rows].bincount(minlength=len(cu) - 1)
        yield rows, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        start = end


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], layout: Layout, budget_rows: int
) -> Tuple[int, Iterator[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """The number of chunks, and of each its rows, its cu_seqlens and its logits, which the next chunk overwrites."""
    pieces = list(_chunks(layout, budget_rows))
    buffer = hidden.new_empty(max((len(rows) for rows, _ in pieces), default=0), weight.shape[0])

    def every() -> Iterator[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for rows, cu in pieces:
            rows, cu, logits = rows.to(hidden.device), cu.to(hidden.device), buffer[: len(rows)]
            project_(logits, hidden.index_select(0, rows), weight, bias)
            yield rows, cu, logits

    return len(pieces), every()


@torch.library.custom_op(op("linear_group_divergence"), mutates_args=())
def linear_group_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    inverse: torch.Tensor,
    layout: List[torch.Tensor],
    clamp: torch.Tensor,
    *,
    budget_rows: int,
) -> Two:
    """D [N] and the log-sum-exp of each row [N]; an operator, because the chunks depend on the lengths' values."""
    whole = Layout(*layout)
    out, lse = (hidden.new_empty(len(hidden), dtype=inverse.dtype) for _ in range(2))
    with as_given(hidden):
        for rows, cu, logits in _logits(hidden, weight, bias, whole, budget_rows)[1]:
            own = inverse if inverse.numel() == 1 else inverse[rows]
            where = (cu, whole.offsets, whole.sequence_of[rows], whole.group_of)
            out[rows], lse[rows] = group_divergence(logits, None, own, *where, clamp)
    return out, lse


@linear_group_divergence.register_fake
def _(hidden: torch.Tensor, *_: Any, budget_rows: int) -> Two:
    out = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    return out, torch.empty_like(out)


@torch.library.custom_op(op("linear_group_divergence_backward"), mutates_args=())
def linear_group_divergence_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    inverse: torch.Tensor,
    lse: torch.Tensor,
    layout: List[torch.Tensor],
    clamp: torch.Tensor,
    *,
    budget_rows: int,
    needs: List[bool],
) -> Three:
    """dH, dW, db, empty where not needed; the logits of each chunk are computed again."""
    whole = Layout(*layout)
    scale = power_of_two(grad * inverse) if hidden.dtype == torch.float16 else None
    with as_given(hidden):
        count, pieces = _logits(hidden, weight, bias, whole, budget_rows)
        grads = HeadGradients(hidden, weight, needs=(needs[0], needs[1], needs[2]), single=count <= 1)
        for rows, cu, logits in pieces:
            own = inverse if inverse.numel() == 1 else inverse[rows]
            upstream = grad[rows] if scale is None else grad[rows] * scale
            slope = group_divergence_backward(upstream, logits, lse[rows], own, cu, whole.offsets, clamp)
            grads.add(rows, slope, None, unscale=None if scale is None else scale.reciprocal())
    return grads.results()


@linear_group_divergence_backward.register_fake
def _(grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, *_: Any, needs: List[bool], **__: Any) -> Three:
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        hidden.new_empty(weight.shape if needs[1] else (0,)),
        hidden.new_empty(weight.shape[0] if needs[2] else 0),
    )


def _keep(ctx: Any, inputs: Tuple[Any, ...], keyword_only_inputs: Dict[str, Any], output: Two) -> None:
    hidden, weight, bias, inverse, layout, clamp = inputs
    ctx.budget_rows = keyword_only_inputs["budget_rows"]
    ctx.save_for_backward(hidden, weight, bias, inverse, output[1], *layout, clamp)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> Tuple[Any, ...]:
    *given, a, b, c, d, clamp = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    found = linear_group_divergence_backward(
        grad, *given, [a, b, c, d], clamp, budget_rows=ctx.budget_rows, needs=needs
    )
    return *(g if needed else None for g, needed in zip(found, needs, strict=True)), None, [None] * 4, None


linear_group_divergence.register_autograd(_backward, setup_context=_keep)
no_double_backward(linear_group_divergence_backward, "linear_token_weight")


def linear_token_weight(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    cu_seqlens: torch.Tensor,
    groups: Groups,
    *,
    bias: Optional[torch.Tensor] = None,
    alpha: float = 1.4,
    temperature: Union[float, torch.Tensor] = 1.0,
    clamp: float = 11.0,
    released: bool = False,
    budget_bytes: float = BUDGET,
) -> torch.Tensor:
    """Weights [N] of `token_weight`, from hidden [N, H] and weight [V, H] (and bias [V]) of one dtype.

    Under autocast the three are cast as a linear layer would.

    Args:
        budget_bytes: logits held at a time, in bytes; a chunk has at least the G rows of one position.
        released: as in `token_weight`; the gradient recomputes the logits of each chunk (2 N H V FLOPs more).

    ``cu_seqlens`` and ``groups`` are read on the host (on CUDA this waits for the device). The rest is as in
    `token_weight`.

    Raises:
        KernelInputError: an argument of the wrong shape, dtype, device or value.
    """
    check_head(hidden, weight, bias)
    check_numbers(alpha, clamp, weight.shape[0])
    hidden, weight, bias = autocast(hidden, weight, bias)
    budget_rows = rows_within(budget_bytes, weight, hidden.element_size())
    layout = layout_of(hidden, cu_seqlens, groups)
    inverse = inverse_at(temperature, hidden)
    if released:
        no_forward_mode("linear_token_weight", hidden, weight, bias)
    else:
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    if len(hidden) == 0:
        return hidden.sum(1).to(compute_dtype(hidden))
    divergence, _ = linear_group_divergence(
        *(hidden, weight, bias, inverse, list(layout), scalar(clamp, torch.float64)), budget_rows=budget_rows
    )
    return weights_from(divergence, layout, alpha, released)


def linear_token_weight_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    cu_seqlens: torch.Tensor,
    groups: Groups,
    *,
    bias: Optional[torch.Tensor] = None,
    alpha: float = 1.4,
    temperature: Union[float, torch.Tensor] = 1.0,
    clamp: float = 11.0,
    released: bool = False,
    budget_bytes: float = BUDGET,
) -> torch.Tensor:
    """The same from all logits at once, in fp32 or fp64; ``budget_bytes`` is not looked at."""
    wide = compute_dtype(hidden)
    logits = torch.nn.functional.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return token_weight_ref(
        logits, cu_seqlens, groups, alpha=alpha, temperature=temperature, clamp=clamp, released=released
    )


__all__ = ["linear_token_weight", "linear_token_weight_ref"]
