"""TRL 1.16's functions of logits and of the language-model head, with its names and signatures.

As TRL's own, log-probs and entropies of fp16 and bf16 logits are fp32 where its kernel runs (on a GPU, one token a
row), and of the logits' dtype elsewhere. What differs: rows with -inf logits have a finite entropy; masked rows get an
exactly zero gradient, even where their logits are NaN. `final_logit_softcapping` and a head that DeepSpeed ZeRO-3 has
partitioned aren't supported.
"""

from __future__ import annotations

from typing import Optional, Tuple

import torch

from .._checks import INTEGERS, bad, describe
from .._launch import has_triton
from ..linear_logprob import linear_logprob
from ._patch import Functions, Handle, replace
from ._rows import in_half, logprob_of

VERSIONS = ("1.16.0",)
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_TRITON = has_triton()  # once: torch.compile warns of a call that is cached
_HALF = (torch.float16, torch.bfloat16)
_TOP1_BYTES = 2**28  # of the logits tile that `is_top1` looks at


def selective_log_softmax(
    logits: torch.Tensor,
    index: torch.Tensor,
    temperature: float = 1.0,
    row_mask: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """`trl.trainer.utils.selective_log_softmax`: log-probs of ``index``, of its shape.

    Args:
        logits: [..., V].
        index: [...], or [..., K] for K tokens of each row (one pass over the logits for each of the K).
        temperature: the logits are divided by it.
        row_mask: of ``index``'s shape; log-probs are 0 where it is 0.
    """
    if index.dim() != logits.dim():
        return _logprob_entropy(logits, index, temperature, row_mask, wide=_in_a_kernel(logits, index, row_mask))[0]
    if row_mask is not None:
        index = _unmasked(index, row_mask)
    columns = [_logprob_entropy(logits, column, temperature, None, wide=True)[0] for column in index.unbind(-1)]
    logp = torch.stack(columns, dim=-1) if columns else logits.new_zeros(index.shape)
    if logits.dtype in _HALF:
        logp, _ = in_half(logits, logp, labels=index, temperature=temperature)
    return logp if row_mask is None else logp.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits: torch.Tensor, chunk_size: int = 128) -> torch.Tensor:
    """`trl.trainer.utils.entropy_from_logits`: entropy [...] in nats, of logits [..., V].

    Nothing of [..., V] is stored but the gradient, so that there is nothing to chunk and ``chunk_size`` has no effect.
    """
    entropy = logprob_of(logits).entropy
    return in_half(logits, entropy=entropy)[1] if logits.dtype in _HALF and not _in_a_kernel(logits) else entropy


def selective_log_softmax_and_entropy(
    logits: torch.Tensor,
    index: torch.Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """`trl.trainer.utils.selective_log_softmax_and_entropy`: both [...] from one pass, 0 where ``row_mask`` is 0."""
    wide = _in_a_kernel(logits, index, row_mask)
    logp, entropy = _logprob_entropy(logits, index, temperature, row_mask, wide=wide)
    return logp, entropy if entropy_requires_grad else entropy.detach()


def fused_selective_log_softmax_and_entropy(
    logits: torch.Tensor,
    index: torch.Tensor,
    temperature: float = 1.0,
    row_mask: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """`trl.kernels.selective_log_softmax_and_entropy`, which has other arguments than the trainers' function."""
    return _logprob_entropy(logits, index, temperature, row_mask, wide=True)


def _in_a_kernel(
    logits: torch.Tensor, index: Optional[torch.Tensor] = None, row_mask: Optional[torch.Tensor] = None
) -> bool:
    """Whether TRL would run its Triton kernel, which returns fp32; its PyTorch functions keep the logits' dtype."""
    return (
        _TRITON
        and logits.device.type in ("cuda", "xpu")
        and 1 <= logits.dim() <= 3
        and logits.stride(-1) == 1
        and (index is None or (index.shape == logits.shape[:-1] and index.dtype in INTEGERS))
        and (row_mask is None or row_mask.dtype in (torch.bool, *INTEGERS))
    )


def _unmasked(index: torch.Tensor, row_mask: torch.Tensor) -> torch.Tensor:
    """A masked row may hold an ignored label such as -100."""
    if row_mask.shape != index.shape:
        raise bad("row_mask", describe(row_mask), f"the shape {list(index.shape)} of index")
    return index.masked_fill(row_mask == 0, 0)


def _logprob_entropy(
    logits: torch.Tensor, index: torch.Tensor, temperature: float, row_mask: Optional[torch.Tensor], *, wide: bool
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Both [...], of half-precision logits in fp32 where ``wide``, else in the logits' dtype."""
    if index.shape != logits.shape[:-1]:
        raise bad("index", describe(index), f"the shape {list(logits.shape[:-1])} of the rows of the logits")
    if row_mask is not None:
        index = _unmasked(index, row_mask)
    logp, entropy, _ = logprob_of(logits, index, temperature, name="index")
    if logits.dtype in _HALF and not wide:
        logp, entropy = in_half(logits, logp, entropy, labels=index, temperature=temperature)
    if row_mask is not None:
        masked = row_mask == 0
        logp, entropy = logp.masked_fill(masked, 0.0), entropy.masked_fill(masked, 0.0)
    return logp, entropy


def chunked_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    targets: torch.Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: Optional[float] = None,
    logit_scale: float = 1.0,
    outputs: Tuple[str, ...] = OPTIONAL_OUTPUTS,
) -> Tuple[
    torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor]
]:
    """`trl.kernels.ChunkedLogProbFunction.apply`: statistics of the distributions of ``hidden @ weight.T + bias``.

    Args:
        hidden, weight, bias: [N, H], [V, H], [V]; under autocast they are projected in its dtype.
        targets: [N].
        temperature: the logits are divided by it.
        chunk_size: no effect; `linear_logprob` chunks by rows under its own budget.
        final_logit_softcapping: only None.
        logit_scale: the logits are multiplied by it, before the temperature; above 0.
        outputs: which of "entropy", "log_sum_sq_probs", "mean_logits" and "is_top1" to compute besides "log_probs".

    Returns:
        Log-probs, entropy (both differentiable), log(sum_v p_v^2), the mean over the vocabulary of the scaled logits,
        and whether the target is the first of the most likely tokens (at the price of another projection); each [N],
        None where not asked for.

    Raises:
        NotImplementedError: soft-capped logits, a logit scale that isn't above 0, or a partitioned weight (DeepSpeed).
        KernelInputError: an unknown output, or what `linear_logprob` refuses.
    """
    unknown = set(outputs) - {"log_probs", *OPTIONAL_OUTPUTS}
    if unknown:
        raise bad("outputs", sorted(unknown), "names among " + ", ".join(("log_probs", *OPTIONAL_OUTPUTS)))
    if final_logit_softcapping is not None:
        raise NotImplementedError("final_logit_softcapping isn't supported: keep TRL's own function for this model")
    if not logit_scale > 0:
        raise NotImplementedError(
            f"logit_scale {logit_scale} isn't supported, only one above 0: keep TRL's own function"
        )
    if hasattr(weight, "ds_id"):  # the backward pass would find it partitioned again
        raise NotImplementedError("a head partitioned by DeepSpeed ZeRO-3 isn't supported: keep TRL's own function")
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    want_p2 = "log_sum_sq_probs" in outputs
    out = linear_logprob(hidden, weight, targets, temperature / logit_scale, bias=bias, want_sum_p2=want_p2)
    log_p2 = None if out.sum_p2 is None else out.sum_p2.detach().log()
    with torch.no_grad():
        mean = _mean_logits(hidden, weight, bias) * (logit_scale / temperature) if "mean_logits" in outputs else None
        top1 = _is_top1(hidden, weight, bias, targets) if "is_top1" in outputs else None
    return out.logp, out.entropy if "entropy" in outputs else None, log_p2, mean, top1


def _mean_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """Mean over the vocabulary: a projection on the mean row of the head."""
    dtype = torch.promote_types(torch.float32, hidden.dtype)
    mean = hidden.to(dtype) @ weight.mean(dim=0, dtype=dtype)
    return mean if bias is None else mean + bias.mean(dtype=dtype)


def _is_top1(
    hidden: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], targets: torch.Tensor
) -> torch.Tensor:
    rows = max(1, _TOP1_BYTES // (weight.shape[0] * hidden.element_size()))
    best = [torch.nn.functional.linear(part, weight, bias).argmax(dim=-1) for part in hidden.split(rows)]
    return torch.cat(best) == targets


def apply(target: object) -> Handle:
    """Put these functions into TRL, for all trainers of the process; before or after a trainer is made.

    Args:
        target: the imported `trl`, one of its modules, or a trainer of it.

    Raises:
        KernelInputError: another TRL than 1.16.0, or it's replaced already.
    """
    ours: Functions = {
        "trl.trainer.utils": {
            "selective_log_softmax": selective_log_softmax,
            "entropy_from_logits": entropy_from_logits,
            "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
        },
        "trl.kernels.chunked_logprob": {"ChunkedLogProbFunction": chunked_logprob},
    }
    if _TRITON:  # TRL has the module's function only then
        ours["trl.kernels.logprob_entropy"] = {
            "selective_log_softmax_and_entropy": fused_selective_log_softmax_and_entropy
        }
    return replace(target, "trl", VERSIONS, ours)


__all__ = [
    "apply",
    "chunked_logprob",
    "entropy_from_logits",
    "fused_selective_log_softmax_and_entropy",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
]
