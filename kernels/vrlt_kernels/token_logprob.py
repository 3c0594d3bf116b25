"""token_logprob: log-probability of the target token, and entropy, from logits.

Shapes: logits [N, V], target [N], temperature T a number or [N].
    z = logits / T      log p(y) = z_y - lse(z)      H = lse(z) - sum_v p_v z_v      P2 = sum_v p_v^2
    dlogits = (1/T) (g_logp (onehot(y) - p) - g_H p (log p + H))
The forward pass reads the logits once and keeps, beside them, three numbers a row; the backward pass reads them again
and writes the gradient, into the logits themselves where ``inplace`` allows it.
"""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Optional, Tuple, Union

import torch

from ._checks import FLOATS, INTEGERS, bad, compute_dtype, describe, tensor, values_in_range
from ._launch import no_double_backward, no_forward_mode, scalar
from ._ops import add_op_namespace_prefix as op
from ._rows import inverse_of, row_grad_, row_stats, split_temperature


class TokenLogprob(NamedTuple):
    """Each [N], fp32 (fp64 for fp64 inputs): ``logp`` and ``entropy`` (nats) with gradients, ``sum_p2`` without."""

    logp: torch.Tensor
    entropy: torch.Tensor
    sum_p2: Optional[torch.Tensor]


@torch.library.custom_op(op("token_logprob_fwd"), mutates_args=())
def token_logprob_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    temperatures: Optional[torch.Tensor],
    *,
    temperature: float,
    want_sum_p2: bool,
    inplace: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logp, entropy, lse, sum_p2 (empty unless wanted). ``inplace`` is what the backward pass may do."""
    values_in_range("target", target, 0, logits.shape[1])
    return row_stats(_rows_of(logits), target, inverse_of(temperature, temperatures, logits), want_sum_p2)


@token_logprob_fwd.register_fake
def _(
    logits: torch.Tensor, *_: Any, want_sum_p2: bool, **__: Any
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    logp, entropy, lse = (logits.new_empty(logits.shape[0], dtype=compute_dtype(logits)) for _ in range(3))
    return logp, entropy, lse, logp.new_empty(logits.shape[0] if want_sum_p2 else 0)


@torch.library.custom_op(op("token_logprob_bwd"), mutates_args=())
def token_logprob_bwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    temperatures: Optional[torch.Tensor],
    lse: torch.Tensor,
    entropy: torch.Tensor,
    a: torch.Tensor,
    e: Optional[torch.Tensor],
    *,
    temperature: float,
) -> torch.Tensor:
    """The gradient [N, V] in the logits' dtype; ``a``, ``e``: upstream gradients of log-prob and entropy [N]."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    inverse = inverse_of(temperature, temperatures, logits)
    slopes = None if e is None else e.contiguous()
    row_grad_(out, _rows_of(logits), target, inverse, lse, entropy, a=a.contiguous(), e=slopes)
    return out


@token_logprob_bwd.register_fake
def _(logits: torch.Tensor, *_: Any, temperature: float) -> torch.Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op(op("token_logprob_bwd_"), mutates_args=("logits",))
def token_logprob_bwd_(
    logits: torch.Tensor,
    target: torch.Tensor,
    temperatures: Optional[torch.Tensor],
    lse: torch.Tensor,
    entropy: torch.Tensor,
    a: torch.Tensor,
    e: Optional[torch.Tensor],
    *,
    temperature: float,
) -> None:
    """The same gradient over the logits, whose rows must not overlap and whose elements must be contiguous in a row."""
    inverse = inverse_of(temperature, temperatures, logits)
    slopes = None if e is None else e.contiguous()
    row_grad_(logits, logits, target, inverse, lse, entropy, a=a.contiguous(), e=slopes)


def _rows_of(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _setup(
    ctx: Any, inputs: Tuple[Any, ...], keyword_only_inputs: Dict[str, Any], output: Tuple[torch.Tensor, ...]
) -> None:
    logits, target, temperatures = inputs
    ctx.temperature, ctx.inplace = keyword_only_inputs["temperature"], keyword_only_inputs["inplace"]
    _, entropy, lse, sum_p2 = output
    ctx.save_for_backward(logits, target, temperatures, lse, entropy)
    ctx.mark_non_differentiable(lse, sum_p2)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, a: Optional[torch.Tensor], e: Optional[torch.Tensor], *_: Any) -> Tuple[Any, ...]:
    nothing = (None, None)
    if a is None and e is None:
        return None, *nothing
    if getattr(ctx, "spent", False):
        raise RuntimeError(
            "inplace: the first backward pass wrote the gradient over the logits, so there is no second one; "
            "call with inplace=False to go through the graph twice"
        )
    logits, target, temperatures, lse, entropy = ctx.saved_tensors
    slope = torch.zeros_like(lse) if a is None else a
    rest = (target, temperatures, lse, entropy, slope, e)
    if not ctx.inplace or logits.stride(1) != 1 or logits.stride(0) < logits.shape[1]:
        return token_logprob_bwd(logits, *rest, temperature=ctx.temperature), *nothing
    if torch.is_grad_enabled():
        raise RuntimeError("inplace: create_graph=True differentiates the gradient; call with inplace=False")
    ctx.spent = True
    gradient = logits.detach()
    token_logprob_bwd_(gradient, *rest, temperature=ctx.temperature)
    return gradient, *nothing


token_logprob_fwd.register_autograd(_backward, setup_context=_setup)
no_double_backward(token_logprob_bwd, "token_logprob")


def temperature_of(temperature: object, logits: torch.Tensor) -> Tuple[float, Optional[torch.Tensor]]:
    """`split_temperature`, with every value such that 1 / T is a number of the computing dtype too.

    Under torch.compile a number becomes a tensor [1] on the CPU: a float would be a constant of the graph.
    """
    number, every = split_temperature(temperature, logits)
    if torch.compiler.is_compiling():
        return (number, every) if every is not None else (1.0, scalar(number, torch.float64).reshape(1))
    low = torch.finfo(compute_dtype(logits)).tiny
    if every is None:
        wrong = [] if low <= number <= 1 / low else [number]
    elif every.device.type == "cpu":  # what isn't a finite number above 0 is the operator's to refuse
        least, most = (float(x) for x in every.aminmax()) if every.numel() else (1.0, 1.0)
        inside = low <= least and most <= 1 / low
        wrong = [] if inside else [x for x in every.tolist() if 0 < x < low or 1 / low < x < float("inf")]
    else:
        wrong = []
    if wrong:
        raise bad("temperature", wrong[0], f"values from {low:.2g} to {1 / low:.2g}")
    return number, every


def check_logits(logits: torch.Tensor, target: torch.Tensor) -> None:
    """logits [N, V >= 1] of a float type and target int [N] on its device."""
    tensor("logits", logits, shape=[None, None], dtypes=FLOATS)
    if logits.shape[1] == 0:
        raise bad("logits", describe(logits), "at least one column")
    tensor("target", target, shape=[logits.shape[0]], dtypes=INTEGERS, like=logits)


def token_logprob(
    logits: torch.Tensor,
    target: torch.Tensor,
    temperature: Union[float, torch.Tensor] = 1.0,
    *,
    want_sum_p2: bool = False,
    inplace: bool = False,
) -> TokenLogprob:
    """Log-probs of the targets and entropies of the rows, both differentiable in the logits.

    Args:
        logits: [N, V] fp32, fp64, bf16 or fp16, any row stride. -inf is a token that can't be drawn. A row of -inf
            alone has log-prob -inf, entropy 0 and no gradient.
        target: int32 or int64 [N] in [0, V). On CUDA a value outside isn't looked for; its log-prob is NaN.
        temperature: a number, a 0-d tensor or one value a row [N]; above 0; a constant.
        want_sum_p2: also return sum_v p_v^2, detached.
        inplace: let the backward pass write the gradient over the logits, which saves a tensor of their size. They hold
            the gradient afterwards, and a second backward pass raises. Under torch.compile it has no effect.

    Rows whose upstream gradients are 0 get zeros, even where their logits are NaN. A row's results don't depend on
    other rows, and two calls give the same bits.

    Raises:
        KernelInputError: a wrong type, shape, dtype, device, target or temperature.
        RuntimeError: in a second backward pass after ``inplace``, or with create_graph: there is no second derivative;
            under forward-mode AD.
    """
    check_logits(logits, target)
    number, rows = temperature_of(temperature, logits)
    no_forward_mode("token_logprob", logits)
    inplace = inplace and not torch.compiler.is_compiling()
    logp, entropy, _, sum_p2 = token_logprob_fwd(
        logits, target, rows, temperature=number, want_sum_p2=want_sum_p2, inplace=inplace
    )
    return TokenLogprob(logp, entropy, sum_p2 if want_sum_p2 else None)


def token_logprob_ref(
    logits: torch.Tensor,
    target: torch.Tensor,
    temperature: Union[float, torch.Tensor] = 1.0,
    *,
    want_sum_p2: bool = False,
    inplace: bool = False,
) -> TokenLogprob:
    """The mathematics of `token_logprob` in plain PyTorch, differentiable everywhere; ``inplace`` changes nothing."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.reshape(-1, 1)
    logprobs = torch.log_softmax(logits.to(compute_dtype(logits)) / temperature, dim=-1)
    p = logprobs.exp()
    entropy = -torch.where(p > 0, p * logprobs.clamp(min=torch.finfo(p.dtype).min), 0.0).sum(-1)
    sum_p2 = p.detach().square().sum(-1) if want_sum_p2 else None
    return TokenLogprob(logprobs.gather(1, target.long()[:, None])[:, 0], entropy, sum_p2)


__all__ = ["TokenLogprob", "token_logprob", "token_logprob_ref"]
