"""TRL 1.16's functions of logits and of the language-model head, with its names and signatures.

What differs from TRL's own: log-probs and entropies are fp32 (fp64 for fp64) whatever the logits' dtype and device, as
TRL's own are on a GPU; rows with -inf logits have a finite entropy; masked rows get an exactly zero gradient, even
where their logits are NaN. `final_logit_softcapping` and a head that DeepSpeed ZeRO-3 has partitioned aren't supported.
"""

from __future__ import annotations

from typing import Optional, Tuple

import torch

from .._checks import bad, describe
from .._launch import has_triton
from ..linear_logprob import linear_logprob
from ..token_logprob import token_logprob
from ._patch import Functions, Handle, replace

VERSIONS = ("1.16.0",)
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
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
    if index.dim() == logits.dim():
        columns = [_logprob_entropy(logits, column, temperature, None)[0] for column in index.unbind(-1)]
        logp = torch.stack(columns, dim=-1) if columns else logits.new_zeros(index.shape)
        return logp if row_mask is None else logp.masked_fill(row_mask == 0, 0.0)
    return _logprob_entropy(logits, index, temperature, row_mask)[0]


def entropy_from_logits(logits: torch.Tensor, chunk_size: int = 128) -> torch.Tensor:
    """`trl.trainer.utils.entropy_from_logits`: entropy [...] in nats, of logits [..., V].

    Nothing of [..., V] is stored but the gradient, so that there is nothing to chunk and ``chunk_size`` has no effect.
    """
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return _logprob_entropy(logits, index, 1.0, None)[1]


def selective_log_softmax_and_entropy(
    logits: torch.Tensor,
    index: torch.Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """`trl.trainer.utils.selective_log_softmax_and_entropy`: both [...] from one pass, 0 where ``row_mask`` is 0."""
    logp, entropy = _logprob_entropy(logits, index, temperature, row_mask)
    return logp, entropy if entropy_requires_grad else entropy.detach()


def fused_selective_log_softmax_and_entropy(
    logits: torch.Tensor,
    index: torch.Tensor,
    temperature: float = 1.0,
    row_mask: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """`trl.kernels.selective_log_softmax_and_entropy`, which has other arguments than the trainers' function."""
    return _logprob_entropy(logits, index, temperature, row_mask)


def _logprob_entropy(
    logits: torch.Tensor, index: torch.Tensor, temperature: float, row_mask: Optional[torch.Tensor]
) -> Tuple[torch.Tensor, torch.Tensor]:
    if index.shape != logits.shape[:-1]:
        raise bad("index", describe(index), f"the shape {list(logits.shape[:-1])} of the rows of the logits")
    if row_mask is not None and row_mask.shape != index.shape:
        raise bad("row_mask", describe(row_mask), f"the shape {list(index.shape)} of index")
    flat = index.reshape(-1)
    if row_mask is not None:  # a masked row may hold an ignored label such as -100
        flat = flat.masked_fill(row_mask.reshape(-1) == 0, 0)
    out = token_logprob(logits.reshape(-1, logits.shape[-1]), flat, temperature)
    logp, entropy = out.logp.view(index.shape), out.entropy.view(index.shape)
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
    if has_triton():  # TRL has the module's function only then
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
