"""token_weight: per-token weights from how much the responses of a group disagree at a position (TW-GRPO).

Shapes: logits [N, V] of the response tokens of B sequences (cu_seqlens [B + 1]); groups are consecutive sequences.
    log p_g = log_softmax(logits_g / T) of the G responses at one position; a response that has ended: -log V everywhere
    d_g     = clamp(mean_g log p_g - log p_g, -11, 11)                         per token of the vocabulary
    D       = mean_g sum_v (exp(d_g) - 1 - d_g)                                one number per group and position
    w       = 1 + (alpha - 1) (D - min D) / (max D - min D + 1e-8)             min and max over the group's positions
After the released trainer of "Reinforcing Video Reasoning with Focused Thinking" (TW-GRPO). Two reads of the logits,
the first one for the log-sum-exp; one when ``lse`` is given. Nothing of size [N, V] is written.
"""

from __future__ import annotations

import math
from typing import Any, Iterator, NamedTuple, Optional, Tuple, Union

import torch

from ._checks import FLOATS, bad, compute_dtype, describe, tensor
from ._checks import offsets as check_offsets
from ._launch import choose, hyper, no_double_backward, no_forward_mode, scalar
from ._ops import add_op_namespace_prefix as op
from ._rows import inverse_of, row_stats
from .group_advantage import Groups, split_groups
from .token_logprob import temperature_of

_TILE = 2**22  # logits the reference works on at a time: 16 MB in fp32


class Layout(NamedTuple):
    """Who belongs to whom; all int64, on the logits' device."""

    cu_seqlens: torch.Tensor  # [B + 1]
    offsets: torch.Tensor  # [groups + 1], in sequences
    sequence_of: torch.Tensor  # [N]
    group_of: torch.Tensor  # [B]


def layout_of(rows: torch.Tensor, cu_seqlens: torch.Tensor, groups: Groups) -> Layout:
    """Check sequences and groups over the rows [N, ...]. On CUDA values aren't looked at, but can't lead outside."""
    check_offsets("cu_seqlens", cu_seqlens, len(rows), rows)
    sequences = cu_seqlens.numel() - 1
    size, given = split_groups(groups, sequences, rows)
    if given is None:
        offsets = torch.arange(0, sequences + 1, size, device=rows.device)
    else:
        offsets = given.long().clamp(0, sequences)
    cu = cu_seqlens.long().clamp(0, len(rows))
    count = torch.arange(max(len(rows), sequences), device=rows.device)
    sequence_of = torch.searchsorted(cu[1:], count[: len(rows)], right=True).clamp(max=max(sequences - 1, 0))
    group_of = torch.searchsorted(offsets[1:], count[:sequences], right=True).clamp(max=max(len(offsets) - 2, 0))
    return Layout(cu, offsets, sequence_of, group_of)


def _tiles(logits: torch.Tensor, cu_seqlens: torch.Tensor, offsets: torch.Tensor) -> Iterator[Tuple[torch.Tensor, ...]]:
    """Rows [positions, G] and whether they are live, group by group, a few positions at a time."""
    ends, lengths = offsets.tolist(), cu_seqlens.diff().tolist()
    for i, first in enumerate(ends[:-1]):
        last = ends[i + 1]
        begin, end = cu_seqlens[first:last], cu_seqlens[first + 1 : last + 1]
        longest = max(lengths[first:last], default=0)
        step = max(1, _TILE // max(1, (last - first) * logits.shape[1]))
        for start in range(0, longest, step):
            position = torch.arange(start, min(start + step, longest), device=logits.device)
            rows = begin + position[:, None]
            yield rows.clamp(max=len(logits) - 1), rows < end


def _divergence_parts(
    logits: torch.Tensor, rows: torch.Tensor, live: torch.Tensor, lse: torch.Tensor, inverse: torch.Tensor, clamp: float
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p, d and where d has a slope, each [positions, G, V], of the rows [positions, G]."""
    x = logits[rows].to(lse.dtype)
    finite = x != -torch.inf
    base = torch.where(lse == -torch.inf, 0.0, lse)[rows]
    log_p = torch.where(finite, x, 0.0) * inverse.expand(len(logits))[rows][..., None] - base[..., None]
    alive = live[..., None]
    log_p = torch.where(alive, log_p, -math.log(logits.shape[1]))
    # The mean from the distances to one row: of equal rows it is that row, so their divergence is exactly 0.
    pivot = log_p[:, :1]
    mean = pivot + (log_p - pivot).mean(1, keepdim=True)
    # A logit of -inf as the limit of ever smaller ones: +clamp for the row that has it, -clamp for the others.
    # A token that no live response can produce counts for nothing.
    hole = (alive & ~finite).any(1, keepdim=True)
    counted = (alive & finite).any(1, keepdim=True)
    sloped = counted & ~hole & ((mean - log_p).abs() <= clamp)
    own = torch.where(alive & ~finite, clamp, -clamp)
    d = torch.where(hole, own, (mean - log_p).clamp(-clamp, clamp))
    return log_p, torch.where(counted, d, 0.0), sloped


def _divergence_ref(
    logits: torch.Tensor,
    lse: torch.Tensor,
    inverse: torch.Tensor,
    cu: torch.Tensor,
    offsets: torch.Tensor,
    clamp: float,
) -> torch.Tensor:
    """D [N] in plain PyTorch, the same for all rows of a group at a position."""
    out = torch.full_like(lse, torch.nan)
    for rows, live in _tiles(logits, cu, offsets):
        _, d, _ = _divergence_parts(logits, rows, live, lse, inverse, clamp)
        value = (d.expm1() - d).sum(2).mean(1, keepdim=True).expand(rows.shape)
        out = out.index_put((rows[live],), value[live])
    return out


@torch.library.custom_op(op("group_divergence"), mutates_args=())
def group_divergence(
    logits: torch.Tensor,
    lse: Optional[torch.Tensor],
    inverse: torch.Tensor,
    cu: torch.Tensor,
    offsets: torch.Tensor,
    sequence_of: torch.Tensor,
    group_of: torch.Tensor,
    clamp: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """D [N] and the log-sum-exp of each row [N]. ``clamp`` is 0-d, on the CPU: a graph is tied to a float's value."""
    lse = row_stats(logits, torch.zeros_like(sequence_of), inverse, False)[2] if lse is None else lse.clone()
    if len(logits) == 0 or choose("token_weight", logits, has=("triton", "reference")) == "reference":
        return _divergence_ref(logits, lse, inverse, cu, offsets, float(clamp)), lse
    out = torch.full_like(lse, torch.nan)
    bound = hyper([float(clamp)], lse.dtype, logits.device)
    from . import token_weight_triton

    with torch.cuda.device_of(logits):
        token_weight_triton.group_divergence(logits, lse, inverse, (cu, offsets, sequence_of, group_of), bound, out)
    return out, lse


@group_divergence.register_fake
def _(logits: torch.Tensor, *_: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    out = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits))
    return out, torch.empty_like(out)


@torch.library.custom_op(op("group_divergence_backward"), mutates_args=())
def group_divergence_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    lse: torch.Tensor,
    inverse: torch.Tensor,
    cu: torch.Tensor,
    offsets: torch.Tensor,
    clamp: torch.Tensor,
) -> torch.Tensor:
    """Gradient [N, V] in PyTorch, tile by tile: only the released variant needs it, so it has no kernel."""
    out = torch.zeros_like(logits)
    every = inverse.expand(len(logits))
    for rows, live in _tiles(logits, cu, offsets):
        log_p, d, sloped = _divergence_parts(logits, rows, live, lse, inverse, float(clamp))
        upstream = (grad[rows] * live).sum(1) / rows.shape[1]
        slope = torch.where(sloped, d.expm1(), 0.0)
        by_log_p = (slope.mean(1, keepdim=True) - slope) * upstream[:, None, None]
        p = torch.where(logits[rows] == -torch.inf, 0.0, log_p.exp())
        by_logit = (by_log_p - p * by_log_p.sum(2, keepdim=True)) * every[rows][..., None]
        out[rows[live]] = by_logit[live].to(out.dtype)
    return out


@group_divergence_backward.register_fake
def _(grad: Any, logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(logits)


def _keep(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, _, inverse, cu, offsets, _, _, clamp = inputs
    ctx.save_for_backward(logits, output[1], inverse, cu, offsets, clamp)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> Tuple[Any, ...]:
    return (group_divergence_backward(grad, *ctx.saved_tensors), *[None] * 7)


group_divergence.register_autograd(_backward, setup_context=_keep)
no_double_backward(group_divergence_backward, "token_weight")


def inverse_at(temperature: Union[float, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """1 / T, [1] or [N], in the computing dtype of the rows; under torch.compile NaN where T isn't above 0."""
    number, every = temperature_of(temperature, rows)
    if every is None or not torch.compiler.is_compiling():
        return inverse_of(number, every, rows)
    inverse = every.to(device=rows.device, dtype=compute_dtype(rows)).reciprocal()
    return torch.where(inverse > 0, inverse, torch.nan)


def weights_from(divergence: torch.Tensor, layout: Layout, alpha: float, released: bool) -> torch.Tensor:
    """Min-max normalisation of D [N] over the positions of each group, mapped to [1, alpha]."""
    cu, offsets, sequence_of, group_of = layout
    row_group = group_of[sequence_of]
    groups = len(offsets) - 1
    low = divergence.new_full((groups,), torch.inf).scatter_reduce(0, row_group, divergence, "amin")
    high = divergence.new_full((groups,), -torch.inf).scatter_reduce(0, row_group, divergence, "amax")
    if released:
        # There all groups are padded to the longest response of the batch, and D is 0 where a whole group has ended.
        longest = cu.new_zeros(groups).scatter_reduce(0, group_of, cu.diff(), "amax")
        low = torch.where(longest < longest.max(), torch.zeros_like(low), low)
    unit = (divergence - low[row_group]) / (high - low + 1e-8)[row_group]
    return 1.0 + (alpha - 1.0) * unit


def check_numbers(alpha: float, clamp: float, vocab: int) -> None:
    """Raises KernelInputError for hyper-parameters outside their range."""
    for name, value in (("alpha", alpha), ("clamp", clamp)):
        if not isinstance(value, (int, float)):
            raise bad(name, repr(value), "a number")
    if not 0 <= alpha < math.inf:
        raise bad("alpha", alpha, "a finite number, at least 0")
    most = 88 - math.log(vocab)
    if not 0 < clamp <= most:
        raise bad("clamp", clamp, f"a number in (0, {most:.1f}]: {vocab} times e^clamp must be finite in fp32")


def token_weight(
    logits: torch.Tensor,
    cu_seqlens: torch.Tensor,
    groups: Groups,
    *,
    alpha: float = 1.4,
    temperature: Union[float, torch.Tensor] = 1.0,
    clamp: float = 11.0,
    lse: Optional[torch.Tensor] = None,
    released: bool = False,
) -> torch.Tensor:
    """Weights [N] in [1, alpha], fp32 (fp64 for fp64 logits): large where the responses of a group disagree.

    All responses of a group have the same weight at a position. A group of one, a group with one position and a group
    that disagrees equally everywhere have weight 1. A response that has ended counts as uniform over the vocabulary.

    Args:
        logits: [N, V], rows may be strided. -inf is a token that can't be produced: left out where all live responses
            have it, else the limit of ever smaller logits. NaN makes the weights of its group NaN.
        cu_seqlens: int32 or int64 [B + 1], where each response begins and ends.
        groups: responses per group, or offsets int32/int64 [groups + 1] in sequences.
        alpha: the largest weight; 1.4 is the released default, 1.7 its recipe.
        temperature: above 0; a number, 0-d or [N].
        clamp: bound of the difference of log-probs, up to 88 - log V, so that a sum over V is finite in fp32.
        lse: log-sum-exp of logits / temperature [N], where known; saves a read of the logits.
        released: what the released trainer does: the weights are differentiable in the logits (in plain PyTorch, no
            second derivative), and a group shorter than the longest one of the batch has 0 as its smallest D, because
            padding takes part. False: detached, and a group doesn't depend on the others.

    Raises:
        KernelInputError: an argument of the wrong shape, dtype, device or value.
    """
    tensor("logits", logits, shape=[None, None], dtypes=FLOATS)
    if logits.shape[1] == 0:
        raise bad("logits", describe(logits), "a vocabulary")
    check_numbers(alpha, clamp, logits.shape[1])
    layout = layout_of(logits, cu_seqlens, groups)
    inverse = inverse_at(temperature, logits)
    if released:
        no_forward_mode("token_weight", logits)
    if lse is not None:
        tensor("lse", lse, shape=[len(logits)], dtypes=[compute_dtype(logits)], like=logits)
        lse = lse.detach()
    rows = logits if released else logits.detach()
    if len(rows) == 0:
        return rows.sum(1).to(compute_dtype(rows))
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    divergence, _ = group_divergence(rows, lse, inverse, *layout, scalar(clamp, torch.float64))
    return weights_from(divergence, layout, alpha, released)


def token_weight_ref(
    logits: torch.Tensor,
    cu_seqlens: torch.Tensor,
    groups: Groups,
    *,
    alpha: float = 1.4,
    temperature: Union[float, torch.Tensor] = 1.0,
    clamp: float = 11.0,
    lse: Optional[torch.Tensor] = None,
    released: bool = False,
) -> torch.Tensor:
    """`token_weight` in plain PyTorch, with autograd's own gradient where ``released``."""
    layout = layout_of(logits, cu_seqlens, groups)
    inverse = inverse_at(temperature, logits)
    rows = logits if released else logits.detach()
    if lse is None or released:
        lse = (rows.to(inverse.dtype) * inverse.expand(len(rows))[:, None]).logsumexp(1)
    divergence = _divergence_ref(rows, lse, inverse, layout.cu_seqlens, layout.offsets, clamp)
    return weights_from(divergence, layout, alpha, released)


__all__ = ["token_weight", "token_weight_ref"]
