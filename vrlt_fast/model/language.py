"""Passes of the language model over a group layout: one packed sequence, every prompt once, its responses behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vrlt_fast.model.attention import Pass
from vrlt_fast.model.layout import GroupLayout
from vrlt_fast.model.load import VideoLM
from vrlt_kernels import GroupSpans, TokenLogprob, group_attention, linear_logprob

LOGITS = 2**27
"""Most logits that exist at a time (512 MB in fp32)."""


@dataclass(frozen=True)
class GroupPass:
    """Prefixes and rows of a layout, with gradients."""

    spans: GroupSpans

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return group_attention(query, key, value, self.spans, scale)


def run_text(lm: VideoLM, embeds: torch.Tensor, positions: torch.Tensor, group_pass: Pass) -> torch.Tensor:
    """Hidden states [N, hidden] after the final norm, from embeddings [N, hidden] and positions int64 [3, N]."""
    out = lm.module.model.language_model(
        inputs_embeds=embeds[None],
        position_ids=positions[:, None],
        attention_mask={"full_attention": None},
        use_cache=False,
        group_pass=group_pass,
    )
    hidden: torch.Tensor = out.last_hidden_state[0]
    return hidden


def embed_tokens(lm: VideoLM, ids: torch.Tensor, visual: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
    """Input embeddings [N, hidden] with the clips' embeddings put in by place, never by token id."""
    embeds: torch.Tensor = lm.module.get_input_embeddings()(ids)
    return embeds.index_copy(0, visual, vision.to(embeds.dtype))


def hidden_states(lm: VideoLM, layout: GroupLayout, vision: torch.Tensor) -> torch.Tensor:
    """Hidden states [N, hidden] of all tokens of the layout, with gradients."""
    embeds = embed_tokens(lm, layout.ids, layout.visual, vision)
    return run_text(lm, embeds, layout.positions, GroupPass(layout.spans))


def target_hidden(lm: VideoLM, layout: GroupLayout, vision: torch.Tensor) -> torch.Tensor:
    """Hidden states [M, hidden] that predict every target token, with gradients; M as in ``layout.targets``."""
    return hidden_states(lm, layout, vision).index_select(0, layout.source)


def target_logprobs(
    lm: VideoLM,
    layout: GroupLayout,
    vision: torch.Tensor,
    temperature: float = 1.0,
    *,
    also: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs fp32 [M] of the target tokens, with gradients, and entropies [M] in nats, without.

    Logits exist for ``LOGITS`` values at a time; where they are more, some are computed again in the backward pass.

    Args:
        also: int64 [n] places of further tokens to score, which are inputs themselves; none first in its prefix. Theirs
            stand behind those of the targets.
    """
    source, targets = layout.source, layout.targets
    if also is not None:
        also = also.to(source.device)
        source, targets = torch.cat([source, also - 1]), torch.cat([targets, layout.ids[also]])
    hidden = hidden_states(lm, layout, vision).index_select(0, source)
    out = _score(lm, hidden, targets, temperature)
    return out.logp, out.entropy.detach()


def _score(lm: VideoLM, hidden: torch.Tensor, targets: torch.Tensor, temperature: float) -> TokenLogprob:
    """Log-probs and entropies [n] of targets under the language model's head, from hidden states [n, hidden]."""
    head = lm.module.lm_head
    budget = LOGITS * hidden.element_size()
    return linear_logprob(hidden, head.weight, targets, temperature, bias=head.bias, budget_bytes=budget)
