"""linear_token_weight: `token_weight` from hidden states, without the logits of all tokens at once.

Shapes: hidden [N, H], weight [V, H], bias [V].    logits = hidden weight^T + bias, in the dtype of hidden.
The weights of a position need all responses of its group at that position. So the rows are taken in the order (group,
position, response), and cut into chunks between positions, as many rows as the budget has room for. 2 N H V FLOPs.
"""

from __future__ import annotations

from typing import Iterator, Optional, Tuple, Union

import torch
from torch.utils.checkpoint import checkpoint

from ._checks import FLOATS, bad, compute_dtype, tensor
from ._rows import inverse_of, split_temperature
from .group_advantage import Groups
from .token_weight import Layout, check_numbers, group_divergence, layout_of, token_weight_ref, weights_from


def _chunks(layout: Layout, most: int) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Rows of a chunk, ascending, and its cu_seqlens [B + 1], on the CPU. A chunk has at least one group's position."""
    cu, _, sequence_of, group_of = (part.cpu() for part in layout)
    position = torch.arange(len(sequence_of)) - cu[sequence_of]
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
    budget_bytes: float = 2.5e9,
) -> torch.Tensor:
    """Weights [N] of `token_weight`, from hidden [N, H] and weight [V, H] (and bias [V]) of one dtype.

    Args:
        budget_bytes: logits held at a time, in bytes; a chunk has at least the G rows of one position.
        released: as in `token_weight`; the gradient recomputes the logits of each chunk.

    ``cu_seqlens`` and ``groups`` are read on the host (on CUDA this waits for the device). The rest is as in
    `token_weight`.

    Raises:
        KernelInputError: an argument of the wrong shape, dtype, device or value.
    """
    tensor("hidden", hidden, shape=[None, None], dtypes=FLOATS)
    tensor("weight", weight, shape=[None, hidden.shape[1]], dtypes=[hidden.dtype], like=hidden)
    if bias is not None:
        tensor("bias", bias, shape=[weight.shape[0]], dtypes=[hidden.dtype], like=hidden)
    if not budget_bytes > 0:
        raise bad("budget_bytes", budget_bytes, "a number above 0")
    check_numbers(alpha, clamp)
    layout = layout_of(hidden, cu_seqlens, groups)
    inverse = inverse_of(*split_temperature(temperature, hidden), hidden)
    if not released:
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    if len(hidden) == 0:
        return hidden.sum(1).to(compute_dtype(hidden))
    sources = [part for part in (hidden, weight, bias) if part is not None and part.requires_grad]
    recompute = bool(sources) and torch.is_grad_enabled()

    def divergence(rows: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(hidden[rows], weight, bias)
        sequence_of = layout.sequence_of[rows]
        every = inverse if inverse.numel() == 1 else inverse[rows]
        out: torch.Tensor = group_divergence(
            logits, None, every, cu, layout.offsets, sequence_of, layout.group_of, clamp=clamp
        )[0]
        return out

    pieces, order = [], []
    for rows, cu in _chunks(layout, int(budget_bytes // (weight.shape[0] * hidden.element_size()))):
        rows, cu = rows.to(hidden.device), cu.to(hidden.device)
        pieces.append(checkpoint(divergence, rows, cu, use_reentrant=False) if recompute else divergence(rows, cu))
        order.append(rows)
    divergences = torch.cat(pieces)[torch.cat(order).argsort()]
    return weights_from(divergences, layout, alpha, released)


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
    budget_bytes: float = 2.5e9,
) -> torch.Tensor:
    """The same from all logits at once, in fp32 or fp64; ``budget_bytes`` is not looked at."""
    wide = compute_dtype(hidden)
    logits = torch.nn.functional.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return token_weight_ref(
        logits, cu_seqlens, groups, alpha=alpha, temperature=temperature, clamp=clamp, released=released
    )


__all__ = ["linear_token_weight", "linear_token_weight_ref"]
