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
COARSE_LSE = 64.0
"""A log-sum-exp of this size has lost, by rounding, digits that every probability would miss. As in csrc/row_core.h."""
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


def lse_rounding(dtype: torch.dtype) -> float:
    """How far, relatively, a row's log-sum-exp may be from one that was stored in ``dtype`` and still be the same."""
    return 2.0**-50 if dtype == torch.float64 else 2.0**-22


def _row_blocks(logits: torch.Tensor) -> Iterator[slice]:
    rows, vocab = logits.shape
    step = max(1, _BLOCK // vocab)
    return (slice(start, start + step) for start in range(0, rows, step))


def _goal(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    # An index outside would stop a GPU with an assertion. The log-prob of such a row is NaN.
    return target.long().clamp(0, logits.shape[1] - 1)


def _fold(x: torch.Tensor, every: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """max m of the rows of x (0 where that is -inf), and (x - m) / T: inv x and inv m would each be rounded."""
    top = x.amax(1)
    base = torch.where(top == -torch.inf, 0.0, top)
    return base, (x - base[:, None]).mul_(every[:, None])


def _total(power: torch.Tensor) -> torch.Tensor:
    # PyTorch sums a single long row in parallel pieces: as one of two it is summed as every other row is.
    return power.sum(1) if len(power) != 1 else power.expand(2, -1).contiguous().sum(1)[:1]


def _stats_reference(logits: torch.Tensor, target: torch.Tensor, inverse: torch.Tensor, want_p2: bool) -> Stats:
    logp, entropy, lse = _outputs(logits, 3)
    sum_p2 = torch.empty_like(logp) if want_p2 else logp.new_empty(0)
    every = inverse.expand(len(logits))
    for rows in _row_blocks(logits):
        x, scale = logits[rows].to(lse.dtype), every[rows]
        goal = _goal(target[rows], logits)
        taken = x.gather(1, goal[:, None])[:, 0].where(goal == target[rows], torch.nan)
        base, gap = _fold(x, scale)
        power = gap.exp()
        total = _total(power)
        empty = total == 0
        size = torch.where(empty, 1.0, total).log()
        moment = _total(torch.where(power > 0, gap.mul_(power), 0.0))
        logp[rows] = torch.where(empty, -torch.inf, (taken - base) * scale - size)
        entropy[rows] = torch.where(empty, 0.0, size - moment / total)
        lse[rows] = torch.where(empty, -torch.inf, base * scale + size)
        if want_p2:
            sum_p2[rows] = torch.where(empty, 0.0, _total(power.square_()) / total.square())
    return logp, entropy, lse, sum_p2


def _restore(x: torch.Tensor, every: torch.Tensor, lse: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """base and size [n] with log p = (x - base) / T - size: 0 and lse, or where that is coarse what the row gives,
    unless lse is of more than this row.
    """
    coarse = lse.abs() >= COARSE_LSE
    if lse.device.type == "cpu" and not bool(coarse.any()):
        return torch.zeros_like(lse), lse
    base, gap = _fold(x, every)
    size = _total(gap.exp_()).log()
    near = (base * every + size - lse).abs() <= lse.abs() * lse_rounding(lse.dtype)
    restored = coarse & (near | (lse == torch.inf))
    return torch.where(restored, base, 0.0), torch.where(restored, size, lse)


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
        x, scale = logits[rows].to(lse.dtype), every[rows]
        base, size = _restore(x, scale, lse[rows])
        log_p = (x - base[:, None]).mul_(scale[:, None]).sub_(size[:, None])
        p = log_p.exp()
        if e is not None:
            slope = torch.where(p == 0, 0.0, log_p.add_(entropy[rows][:, None]).mul_(p)).mul_(e[rows][:, None])
        grad = p.neg_().scatter_add_(1, _goal(target[rows], logits)[:, None], torch.ones_like(size)[:, None])
        grad = grad.mul_(a[rows][:, None])
        dead = (a[rows] == 0) | (lse[rows] == -torch.inf)
        if e is not None:
            grad -= slope
            dead &= (e[rows] == 0) | (lse[rows] == -torch.inf)
        if scaled:
            grad *= scale[:, None]
        out[rows] = grad.masked_fill_(dead[:, None], 0.0).to(out.dtype)


__all__ = [
    "inverse_of",
    "row_fused_",
    "row_grad_",
    "row_mix_",
    "row_stats",
    "split_temperature",
]
