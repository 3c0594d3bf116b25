"""Logits [..., V] as rows, where they lie: a slice such as logits[:, :-1] isn't copied."""

from __future__ import annotations

import math
from typing import List, Optional, Tuple, Union

import torch

from .._checks import INTEGERS, bad, describe, tensor, values_in_range
from ..token_logprob import TokenLogprob, token_logprob

_EXACT = 2**24  # elements of the log-softmax that `in_half` makes at a time


def blocks(logits: torch.Tensor) -> List[torch.Tensor]:
    """All rows of logits [..., V] in order, as one [n, V] where a single row stride describes them, else one for each
    sequence. None of them is a copy, but under torch.compile, where the number of sequences would become a constant.
    """
    if not isinstance(logits, torch.Tensor) or logits.dim() == 0:
        raise bad("logits", describe(logits), "shape [..., V]")
    rows, vocab = math.prod(logits.shape[:-1]), logits.shape[-1]
    if logits.dim() <= 2 or torch.compiler.is_compiling():
        return [logits.reshape(rows, vocab)]
    try:
        return [logits.view(rows, vocab)]
    except RuntimeError:  # no single stride; there is no cheaper way to ask
        return [block for part in logits.unbind(0) for block in blocks(part)]


def logprob_of(
    logits: torch.Tensor,
    labels: Optional[torch.Tensor] = None,
    temperature: Union[float, torch.Tensor] = 1.0,
    *,
    name: str = "labels",
    want_sum_p2: bool = False,
    inplace: bool = False,
) -> TokenLogprob:
    """`token_logprob` of logits [..., V] and as many labels of any shape; the results are [...].

    Without labels only entropy and sum_p2 mean something. ``name`` is what the caller calls the labels. ``inplace`` has
    no effect on a slice without a single row stride: its sequences are views of one tensor, which autograd protects.
    """
    parts, shape = blocks(logits), logits.shape[:-1]
    inplace = inplace and len(parts) == 1
    if labels is None:
        labels = torch.zeros(shape, dtype=torch.int64, device=logits.device)
    tensor(name, labels, dtypes=INTEGERS, like=logits)
    if labels.numel() != math.prod(shape):
        raise bad(name, describe(labels), f"one for each row of the logits, {list(shape)}")
    values_in_range(name, labels, 0, logits.shape[-1])
    sizes = [len(part) for part in parts]
    heats = [temperature] * len(parts)
    if isinstance(temperature, torch.Tensor) and temperature.numel() > 1:
        heats = list(temperature.split(sizes))
    found = [
        token_logprob(part, goal, heat, want_sum_p2=want_sum_p2, inplace=inplace)
        for part, goal, heat in zip(parts, labels.reshape(-1).split(sizes), heats, strict=True)
    ]
    logp, entropy, sum_p2 = (
        None if column[0] is None else (column[0] if len(column) == 1 else torch.cat(column)).view(shape)
        for column in zip(*found, strict=True)
    )
    return TokenLogprob(logp, entropy, sum_p2)  # type: ignore[arg-type]


def in_half(
    logits: torch.Tensor,
    logp: Optional[torch.Tensor] = None,
    entropy: Optional[torch.Tensor] = None,
    *,
    labels: Optional[torch.Tensor] = None,
    temperature: object = 1.0,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [...] or [..., K] of ``labels`` and entropies [...] in the dtype of half-precision logits, with the
    gradients of those given (None: empty ones).

    On the CPU and at the temperature 1 they have the bits of PyTorch's log_softmax(...).gather(...) and of
    -(p * log_softmax(...)).sum(-1), as code that compares may expect: the logits are read once more for it.
    """
    nothing = logits.new_empty(0)
    given = (logp, entropy)
    if logits.device.type == "cpu" and not isinstance(temperature, torch.Tensor) and temperature == 1.0:
        given = tuple(map(_moved, given, _exactly(logits, labels, entropy is not None)))  # type: ignore[assignment]
    wide_logp, wide_entropy = (nothing if x is None else x.to(logits.dtype) for x in given)
    return wide_logp, wide_entropy


def _moved(wide: Optional[torch.Tensor], exact: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """``exact``'s values with the gradient of ``wide``; where they aren't finite, both of ``wide``."""
    if wide is None or exact is None:
        return wide
    target = exact.view(wide.shape).to(wide.dtype)
    return wide + torch.where(target.isfinite() & wide.isfinite(), target - wide.detach(), 0.0)


@torch.no_grad()
def _exactly(
    logits: torch.Tensor, labels: Optional[torch.Tensor], with_entropy: bool
) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    rows, vocab = math.prod(logits.shape[:-1]), logits.shape[-1]
    pieces = [piece for block in blocks(logits) for piece in block.split(max(1, _EXACT // vocab))]
    goals = None if labels is None else labels.reshape(rows, -1).long().split([len(piece) for piece in pieces])
    logp, entropy = [], []
    for i, piece in enumerate(pieces):
        logs = torch.log_softmax(piece, -1)
        if goals is not None:
            logp.append(logs.gather(-1, goals[i]))
        if with_entropy:
            entropy.append(-(logs.exp() * logs).sum(-1))
    return torch.cat(logp) if logp else None, torch.cat(entropy) if entropy else None


__all__ = ["blocks", "in_half", "logprob_of"]
