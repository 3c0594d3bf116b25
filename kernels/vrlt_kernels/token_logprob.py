"""token_logprob: log-probability of the target token, and entropy, from logits.

Shapes: logits [N, V], target [N].
    z = logits / T      log p(y) = z_y - lse(z)      H = lse(z) - sum_v p_v z_v
"""

from __future__ import annotations

from typing import Tuple

import torch


def token_logprob_ref(
    logits: torch.Tensor, target: torch.Tensor, temperature: float = 1.0
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [N], differentiable, and entropies [N] in nats, detached; fp32 (fp64 for fp64 logits)."""
    scaled = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    logprobs = torch.log_softmax(scaled, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(dim=-1)
    return logprobs.gather(1, target[:, None])[:, 0], entropy


__all__ = ["token_logprob_ref"]
