"""The attention functions that this package registers in transformers' attention interface: one for the vision tower
over independent segments, one for the language model over what a pass says.

Qwen-VL towers attend inside one frame pair (or window) only. transformers' sdpa path calls attention once a segment
from Python; here segments of equal length go through one batched call. Same mathematics, no extra wheel.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# transformers hands segment boundaries only to implementations whose name contains "flash"
SEGMENTS = "vrlt_flash_segments"
PASS = "vrlt_pass"


def segment_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Full attention inside each segment.

    Args:
        query, key, value: [1, heads, N, d].
        cu_seq_lens_q: [segments + 1] boundaries, from 0 to N.

    Returns:
        [1, N, heads, d], and None for the weights.
    """
    lengths = cu_seq_lens_q.diff()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    sizes = torch.unique(lengths).tolist()
    if len(sizes) == 1:
        return _batched(q, k, v, sizes[0], scaling, dropout).unsqueeze(0), None
    starts = cu_seq_lens_q[:-1]
    order, pieces = [], []
    for size in sizes:
        rows = (starts[lengths == size][:, None] + torch.arange(size, device=starts.device)).flatten()
        order.append(rows)
        pieces.append(_batched(q[rows], k[rows], v[rows], size, scaling, dropout))
    inverse = torch.argsort(torch.cat(order))
    out = torch.cat(pieces)[inverse]
    return out.unsqueeze(0), None


def _batched(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int, scaling: float | None, dropout: float
) -> torch.Tensor:
    """Attention of rows [n * size, heads, d] in n segments of ``size``."""
    q, k, v = (x.unflatten(0, (-1, size)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)


AttentionInterface.register(SEGMENTS, segment_attention)


class Pass(Protocol):
    """What the tokens of one call of the language model attend to."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention [N, Hq, d] of query [N, Hq, d] with the new keys and values [N, Hk, d] of this layer."""
        ...


def pass_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    group_pass: Pass | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """The language model's attention: what the pass says, over one packed sequence [1, heads, N, d].

    Without a pass, as in transformers' own forward or ``generate``, transformers' sdpa.
    """
    if group_pass is None:
        plain: tuple[torch.Tensor, None]
        plain = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
        return plain
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return group_pass.attend(module.layer_idx, q, k, v, scaling).unsqueeze(0), None


AttentionInterface.register(PASS, pass_attention)
AttentionMaskInterface.register(PASS, sdpa_mask)
