"""verl 0.9's functions of logits and of the language-model head, with its names and signatures.

Log-probs are fp32 (fp64 for fp64) on every device, as verl's are with flash-attn; so are `linear_cross_entropy`'s
entropies and those "with chunking". The other entropies have the dtype of the logits or hidden states, as verl's have.
What differs: rows with -inf logits have a finite entropy; sum p^2 has no gradient; a vocabulary that is no multiple of
a tile is read to its end and no further. Tensor parallelism (`dist_process_group`) isn't supported.
"""

from __future__ import annotations

from typing import Optional, Tuple, cast

import torch

from .._checks import bad, describe, one_of
from ..linear_logprob import linear_logprob
from ._patch import Functions, Handle, replace
from ._rows import logprob_of

VERSIONS = ("0.9.1",)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: Optional[float] = 1.0,
    reduction: Optional[str] = "none",
    dist_process_group: Optional[torch.distributed.ProcessGroup] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """`verl.utils.kernel.linear_cross_entropy.linear_cross_entropy`: log-probs (not their negative) and entropy.

    Args:
        hidden, weight, labels: [..., H], [V, H], [...]; the leading dimensions are flattened to N rows.
        temperature: the logits are divided by it.
        reduction: of the log-probs: "none" [N], "sum" or "mean" over all rows. Entropies are [N] always.
        dist_process_group: only None.

    Raises:
        NotImplementedError: a process group.
        KernelInputError: shapes that don't fit, an unknown reduction, and what `linear_logprob` refuses.
    """
    if dist_process_group is not None:
        raise NotImplementedError(
            "dist_process_group isn't supported: keep verl's own function with tensor parallelism"
        )
    kind = reduction.lower() if isinstance(reduction, str) else reduction
    one_of("reduction", kind, ("none", "sum", "mean"))
    if temperature is None:
        raise bad("temperature", None, "a number above 0")
    rows = hidden.reshape(-1, hidden.shape[-1])
    # verl's kernel keeps the products in fp32, where a linear layer rounds them to the dtype of the hidden states
    wide = torch.float32 if hidden.dtype in (torch.float16, torch.bfloat16) else None
    out = linear_logprob(rows, weight, labels.reshape(-1), temperature, logits_dtype=wide)
    logp = out.logp if kind == "none" else out.logp.sum() if kind == "sum" else out.logp.mean()
    return logp, out.entropy


def fused_linear_for_ppo(
    hidden_states: torch.Tensor,
    vocab_weights: torch.Tensor,
    input_ids: torch.Tensor,
    temperature: float = 1.0,
    chunk_size: int = 512,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """`verl.utils.experimental.torch_functional.FusedLinearForPPOFunction.apply`: log-probs and entropy, as the labels.

    The log-probs are fp32, the entropy has the dtype of ``hidden_states`` [..., H]; ``chunk_size`` has no effect:
    `linear_logprob` chunks under its own budget.
    """
    shape = hidden_states.shape[:-1]
    if input_ids.shape != shape:
        raise bad("input_ids", describe(input_ids), f"the shape {list(shape)} of the hidden states without their last")
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    out = linear_logprob(rows, vocab_weights, input_ids.reshape(-1), temperature)
    return out.logp.view(shape), out.entropy.view(shape).to(hidden_states.dtype)


def logprobs_from_logits(logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True) -> torch.Tensor:
    """`verl.utils.torch_functional.logprobs_from_logits`: log-probs [...] of logits [..., V].

    ``labels`` may have any shape with as many elements, in the same order. With ``inplace_backward`` the backward pass
    writes the gradient over the logits, if they aren't a slice of others as logits[:, :-1]; on every device, where
    verl's own does so with flash-attn only.
    """
    return logprob_of(logits, labels, inplace=inplace_backward).logp


def entropy_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """`verl.utils.torch_functional.entropy_from_logits`: entropy [...] in nats, of logits [..., V], in their dtype."""
    return logprob_of(logits).entropy.to(logits.dtype)


def entropy_from_logits_with_chunking(logits: torch.Tensor, chunk_size: int = 2048) -> torch.Tensor:
    """`verl.utils.torch_functional.entropy_from_logits_with_chunking`: fp32 entropy (fp64 for fp64).

    ``chunk_size`` has no effect: nothing of the logits' size is made.
    """
    return logprob_of(logits).entropy


def calculate_sum_pi_squared_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """`verl.utils.torch_functional.calculate_sum_pi_squared_from_logits`: sum_v p_v^2 [...], detached."""
    return cast(torch.Tensor, logprob_of(logits, want_sum_p2=True).sum_p2).to(logits.dtype)


def apply(target: object) -> Handle:
    """Put these functions into verl, before its workers are made (some keep a compiled copy of what they find).

    A model whose fused kernels use the "liger" backend keeps Liger's.

    Args:
        target: the imported `verl`, or one of its modules.

    Raises:
        KernelInputError: another verl than 0.9.1, or it's replaced already.
    """
    ours: Functions = {
        "verl.utils.torch_functional": {
            "logprobs_from_logits": logprobs_from_logits,
            "entropy_from_logits": entropy_from_logits,
            "entropy_from_logits_with_chunking": entropy_from_logits_with_chunking,
            "calculate_sum_pi_squared_from_logits": calculate_sum_pi_squared_from_logits,
        },
        "verl.utils.experimental.torch_functional": {"FusedLinearForPPOFunction": fused_linear_for_ppo},
        "verl.utils.kernel.linear_cross_entropy": {
            "linear_cross_entropy": linear_cross_entropy,
            "LinearCrossEntropy": linear_cross_entropy,
        },
    }
    return replace(target, "verl", VERSIONS, ours)


__all__ = [
    "apply",
    "calculate_sum_pi_squared_from_logits",
    "entropy_from_logits",
    "entropy_from_logits_with_chunking",
    "fused_linear_for_ppo",
    "linear_cross_entropy",
    "logprobs_from_logits",
]
