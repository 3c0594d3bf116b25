"""Passes of the language model over a group layout: the prompt once, the responses on top of its keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from inspect import signature
from typing import Any

import torch

from vrlt_fast.model.layout import GroupLayout
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.vision import VisionEmbeds
from vrlt_kernels import TokenLogprob, linear_logprob

LOGITS = 2**27
"""Most logits that exist at a time (512 MB in fp32)."""


@dataclass
class KeyValues:
    """Keys and values a layer, each [P, kv_heads, L, d]: what transformers' attention asks of a cache, and no more."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.append(key)
        self.values.append(value)
        return key, value


@dataclass
class Extension:
    """The keys and values of the prompts, repeated for their rows, in front of the rows' own. Keeps the graph."""

    prefix: KeyValues
    group: torch.Tensor

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.cat([self.prefix.keys[layer].index_select(0, self.group), key], dim=2)
        values = torch.cat([self.prefix.values[layer].index_select(0, self.group), value], dim=2)
        return keys, values


def run_text(
    lm: VideoLM,
    embeds: torch.Tensor,
    positions: torch.Tensor,
    cache: object,
    mask: torch.Tensor | None,
    **deepstack: object,
) -> torch.Tensor:
    """Hidden states [B, T, hidden] after the final norm. ``mask`` bool [B, 1, T, keys]; None: causal."""
    attention_mask: object = {"full_attention": mask}
    if lm.info.family == "qwen3_vl":  # takes one mask; without one it asks the cache for lengths
        width = embeds.shape[1]
        causal = torch.ones(1, 1, width, width, dtype=torch.bool, device=embeds.device).tril()
        attention_mask = causal if mask is None else mask
    out = lm.module.model.language_model(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=attention_mask,
        use_cache=False,
        **deepstack,
        **{_cache_argument(type(lm.module.model.language_model).forward): cache},
    )
    hidden: torch.Tensor = out.last_hidden_state
    return hidden


@lru_cache(maxsize=8)
def _cache_argument(forward: Callable[..., Any]) -> str:
    """What a model's forward calls its cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in signature(forward).parameters else "past_key_values"


def embed_prompts(lm: VideoLM, layout: GroupLayout, vision: VisionEmbeds) -> torch.Tensor:
    """Input embeddings [P, L, hidden] with the media's embeddings put in by place, never by token id."""
    embeds = lm.module.get_input_embeddings()(layout.ids)
    flat = embeds.flatten(0, 1).index_copy(0, layout.visual, vision.embeds.to(embeds.dtype))
    stacked: torch.Tensor = flat.view_as(embeds)
    return stacked


def run_prompts(lm: VideoLM, layout: GroupLayout, vision: VisionEmbeds, cache: KeyValues) -> torch.Tensor:
    """Hidden states [P, L, hidden] of the prompts, whose keys and values go to ``cache``.

    Padding stands on the right, so the causal mask alone keeps it out.
    """
    extra: dict[str, object] = {}
    if vision.deepstack:
        visual = torch.zeros(layout.ids.numel(), dtype=torch.bool, device=layout.ids.device)
        visual[layout.visual] = True
        extra = {"visual_pos_masks": visual.view_as(layout.ids), "deepstack_visual_embeds": list(vision.deepstack)}
    return run_text(lm, embed_prompts(lm, layout, vision), layout.positions, cache, None, **extra)


def prefill(lm: VideoLM, layout: GroupLayout, vision: VisionEmbeds) -> tuple[torch.Tensor, KeyValues]:
    """One pass over the prompts: the hidden state [P, hidden] of each prompt's last token, and the prefix KV."""
    cache = KeyValues()
    hidden = run_prompts(lm, layout, vision, cache)
    return hidden[torch.arange(len(hidden), device=hidden.device), layout.lengths - 1], cache


def row_mask(layout: GroupLayout, queries: int) -> torch.Tensor:
    """bool [rows, 1, queries, L + queries]: a token of a row sees its prefix and what stands before it in its row."""
    device, width = layout.ids.device, layout.ids.shape[1]
    prefix = torch.arange(width, device=device) < layout.lengths[layout.group][:, None]
    own = torch.ones(queries, queries, dtype=torch.bool, device=device).tril()
    rows = len(layout.group)
    return torch.cat(
        [prefix[:, None, None, :].expand(rows, 1, queries, width), own.expand(rows, 1, queries, queries)], dim=3
    )


def target_hidden(lm: VideoLM, layout: GroupLayout, vision: VisionEmbeds) -> torch.Tensor:
    """Hidden states [N, hidden] that predict every target token, rows in order; N as in ``layout.targets``.

    The prefix runs once a group; its keys and values, and its last hidden state, feed all rows, with gradients.
    """
    last, prefix = prefill(lm, layout, vision)
    hidden = last.index_select(0, layout.group)[:, None]
    queries = layout.row_ids.shape[1] - 1
    if queries > 0:
        embeds = lm.module.get_input_embeddings()(layout.row_ids[:, :-1])
        positions = layout.row_positions[:, :, :-1]
        mask = row_mask(layout, queries)
        rest = run_text(lm, embeds, positions, Extension(prefix, layout.group), mask)
        hidden = torch.cat([hidden, rest], dim=1)
    return hidden[layout.mask]


def target_logprobs(
    lm: VideoLM, layout: GroupLayout, vision: VisionEmbeds, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs fp32 [N] of the target tokens, with gradients, and entropies [N] in nats, without.

    Logits exist for ``LOGITS`` values at a time; where they are more, some are computed again in the backward pass.
    """
    out = _score(lm, target_hidden(lm, layout, vision), layout.targets, temperature)
    return out.logp, out.entropy.detach()


def _score(lm: VideoLM, hidden: torch.Tensor, targets: torch.Tensor, temperature: float) -> TokenLogprob:
    """Log-probs and entropies [n] of targets under the language model's head, from hidden states [n, hidden]."""
    head = lm.module.lm_head
    budget = LOGITS * hidden.element_size()
    return linear_logprob(hidden, head.weight, targets, temperature, bias=head.bias, budget_bytes=budget)


def prefix_logprobs(lm: VideoLM, layout: GroupLayout, vision: VisionEmbeds, places: torch.Tensor) -> torch.Tensor:
    """Log-probs fp32 [n], with gradients, of the prefix tokens at ``places`` (int64 [n] in [P * L], none first in its
    row).
    """
    hidden = run_prompts(lm, layout, vision, KeyValues()).flatten(0, 1)
    return _score(lm, hidden[places - 1], layout.ids.flatten()[places], 1.0).logp
