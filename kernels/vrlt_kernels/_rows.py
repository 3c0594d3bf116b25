"""Row operations over logits [n, V]: what the operators of this package run, on the backend of the tensor.

z = x / T, lse = logsumexp(z), p = exp(z - lse), H = lse - sum p z. D = onehot(target) - p. Rows may be strided, their
elements not. Everything is computed in fp32, for fp64 logits in fp64; no [n, V] tensor of that type is ever made.
A row of -inf alone has log p = -inf, H = 0 and gradient 0; where a = e = 0 the gradient is 0, whatever the logits are.
"""

from __future__ import annotations

from typing import Iterator, Optional, Tuple

import torch

from ._checks import bad, compute_dtype, describe, tensor
from ._launch import choose, hyper

Stats = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_BLOCK = 2**21  # elements the reference backend works on at a time: 8 MB in fp32


def split_temperature(temperature: object, logits: torch.Tensor) -> Tuple[float, Optional[torch.Tensor]]:
    """A temperature as operators take it: a number, and a tensor [N] or [1] in its place where one was given."""
    if not isinstance(temperature, torch.Tensor):
        if not isinstance(temperature, (int, float)) or not temperature > 0 or temperature == float("inf"):
            raise bad("temperature", repr(temperature), "a finite number above 0, or a tensor of them")
        return float(temperature), None
    if temperature.requires_grad:
        raise bad("temperature", "a tensor that requires a gradient", "one that doesn't: it is taken as a constant")
    if temperature.numel() != 1 or temperature.dim() > 1:
        tensor("temperature", temperature, shape=[logits.shape[0]], like=logits)
    if not temperature.is_floating_point():
        raise bad("temperature", describe(temperature), "a floating-point tensor")
    return 1.0, temperature.reshape(-1)


def inverse_of(temperature: float, temperatures: Optional[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """1 / T, [1] or [n], in the computing dtype. On the CPU a temperature that isn't above 0 raises; on CUDA, where it
    would have to be waited for, it gives NaN.
    """
    dtype = compute_dtype(logits)
    if temperatures is None:
        return hyper([1.0 / temperature], dtype, logits.device)
    if temperatures.device.type == "cpu":
        wrong = temperatures[~((temperatures > 0) & temperatures.isfinite())]
        if len(wrong):
            raise bad("temperature", f"{float(wrong[0])} in a tensor", "finite values above 0")
    inverse = temperatures.to(device=logits.device, dtype=dtype).reciprocal()
    return torch.where(inverse > 0, inverse, torch.nan).contiguous()


def _outputs(logits: torch.Tensor, count: int) -> Tuple[torch.Tensor, ...]:
    dtype = compute_dtype(logits)
    return tuple(torch.empty(logits.shape[0], dtype=dtype, device=logits.device) for _ in range(count))


def row_stats(logits: torch.Tensor, target: torch.Tensor, inverse: torch.Tensor, want_p2: bool) -> Stats:
    """log p(target), entropy, logsumexp and sum p^2 (empty where not asked for), each [n]."""
    backend, target = choose("row_stats", logits), target.contiguous()
    if len(logits) == 0 or backend == "reference":
        return _stats_reference(logits, target, inverse, want_p2)
    if backend == "native":
        out: Stats = torch.ops.vrlt_native.row_stats(logits, target, inverse, want_p2)
        return out[0], out[1], out[2], out[3] if want_p2 else out[0].new_empty(0)
    logp, entropy, lse = _outputs(logits, 3)
    sum_p2 = torch.empty_like(logp) if want_p2 else logp.new_empty(0)
    from . import _rows_triton

    with torch.cuda.device_of(logits):
        _rows_triton.row_stats(logits, target, inverse, (logp, entropy, lse, sum_p2), want_p2)
    return logp, entropy, lse, sum_p2


def row_fused_(logits: torch.Tensor, target: torch.Tensor, inverse: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """log p(target), entropy and logsumexp, each [n]; leaves D, unscaled, in the logits."""
    backend, target = choose("row_fused", logits), target.contiguous()
    if len(logits) == 0 or backend == "reference":
        logp, entropy, lse, _ = _stats_reference(logits, target, inverse, False)
        _grad_reference_(logits, logits, target, inverse, lse, entropy, a=torch.ones_like(lse), e=None, scaled=False)
        return logp, entropy, lse
    if backend == "native":
        fused: Tuple[torch.Tensor, ...] = torch.ops.vrlt_native.row_fused_(logits, target, inverse)
        return fused
    from . import _rows_triton

    outputs = _outputs(logits, 3)
    with torch.cuda.device_of(logits):
        _rows_triton.row_fused_(logits, target, inverse, outputs)
    return outputs


def row_grad_(
    out: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    inverse: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    *,
    a: torch.Tensor,
    e: Optional[torch.Tensor],
) -> None:
    """out = (1/T) (a D - e p (log p + H)); ``out`` may be the logits themselves. ``e`` None: zeros."""
    backend, target = choose("row_grad", logits), target.contiguous()
    if len(logits) == 0:
        return
    if backend == "reference":
        _grad_reference_(out, logits, target, inverse, lse, entropy, a=a, e=e, scaled=True)
    elif backend == "native":
        slopes = torch.zeros_like(a) if e is None else e
        torch.ops.vrlt_native.row_grad_(out, logits, target, inverse, lse, entropy, a, slopes)
    else:
        from . import _rows_triton

        with torch.cuda.device_of(logits):
            _rows_triton.row_grad_(out, logits, target, inverse, lse, entropy, a=a, e=e)


def row_mix_(
    out: torch.Tensor,
    rest: torch.Tensor,
    target: torch.Tensor,
    inverse: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    *,
    a: torch.Tensor,
    e: torch.Tensor,
) -> None:
    """The gradient of `row_grad_` from ``rest`` = D: p is -D off the target, where rounding hasn't touched it, and
    exp(logp) on it.
    """
    target = target.contiguous()
    if choose("row_mix", rest, has=("triton", "reference")) == "triton" and len(rest):
        from . import _rows_triton

        with torch.cuda.device_of(rest):
            _rows_triton.row_mix_(out, rest, target, inverse, logp, entropy, a=a, e=e)
        return
    every = inverse.expand(len(rest))
    for rows in _row_blocks(rest):
        left = rest[rows].to(a.dtype)
        hit = _goal(target[rows], rest)[:, None]
        p = left.neg().scatter_(1, hit, logp[rows].exp()[:, None])
        log_p = p.log().scatter_(1, hit, logp[rows][:, None])
        slope = torch.where(p == 0, 0.0, p * (log_p + entropy[rows][:, None]))
        grad = (left * a[rows][:, None] - slope * e[rows][:, None]) * every[rows][:, None]
        dead = (a[rows] == 0) & (e[rows] == 0)
        out[rows] = grad.masked_fill_(dead[:, None], 0.0).to(out.dtype)


def _row_blocks(logits: torch.Tensor) -> Iterator[slice]:
    rows, vocab = logits.shape
    step = max(1, _BLOCK // vocab)
    return (slice(start, start + step) for start in range(0, rows, step))


def _goal(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    # An index outside would stop a GPU with an assertion. The log-prob of such a row is NaN.
    return target.long().clamp(0, logits.shape[1] - 1)


def _stats_reference(logits: torch.Tensor, target: torch.Tensor, inverse: torch.Tensor, want_p2: bool) -> Stats:
    logp, entropy, lse = _outputs(logits, 3)
    sum_p2 = torch.empty_like(logp) if want_p2 else logp.new_empty(0)
    every = inverse.expand(len(logits))
    for rows in _row_blocks(logits):
        z = logits[rows].to(lse.dtype) * every[rows][:, None]
        if len(z) == 1:
            # PyTorch sums a single long row in parallel pieces: as one of two it is summed as every other row is.
            z = z.repeat(2, 1)
        goal = _goal(target[rows], logits)
        taken = z.gather(1, goal[:, None].expand(len(z), 1))[:, 0].where(goal == target[rows], torch.nan)
        top = z.amax(1)
        base = torch.where(top == -torch.inf, 0.0, top)
        gap = z.sub_(base[:, None])
        power = gap.exp()
        total = power.sum(1)
        empty = total == 0
        size = torch.where(empty, 1.0, total).log()
        moment = torch.where(power > 0, gap.mul_(power), 0.0).sum(1)
        stop = min(rows.stop, len(logits)) - rows.start
        logp[rows] = torch.where(empty, -torch.inf, taken - base - size)[:stop]
        entropy[rows] = torch.where(empty, 0.0, size - moment / total)[:stop]
        lse[rows] = torch.where(empty, -torch.inf, base + size)[:stop]
        if want_p2:
            sum_p2[rows] = torch.where(empty, 0.0, power.square_().sum(1) / total.square())[:stop]
    return logp, entropy, lse, sum_p2


def _grad_reference_(
    out: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    inverse: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    *,
    a: torch.Tensor,
    e: Optional[torch.Tensor],
    scaled: bool,
) -> None:
    every = inverse.expand(len(logits))
    for rows in _row_blocks(logits):
        log_p = (logits[rows].to(lse.dtype) * every[rows][:, None]).sub_(lse[rows][:, None])
        p = log_p.exp()
        if e is not None:
            slope = torch.where(p == 0, 0.0, log_p.add_(entropy[rows][:, None]).mul_(p)).mul_(e[rows][:, None])
        grad = p.neg_().scatter_add_(1, _goal(target[rows], logits)[:, None], torch.ones_like(lse[rows])[:, None])
        grad = grad.mul_(a[rows][:, None])
        dead = (a[rows] == 0) | (lse[rows] == -torch.inf)
        if e is not None:
            grad -= slope
            dead &= (e[rows] == 0) | (lse[rows] == -torch.inf)
        if scaled:
            grad *= every[rows][:, None]
        out[rows] = grad.masked_fill_(dead[:, None], 0.0).to(out.dtype)


__all__ = [
    "inverse_of",
    "row_fused_",
    "row_grad_",
    "row_mix_",
    "row_stats",
    "split_temperature",
]
