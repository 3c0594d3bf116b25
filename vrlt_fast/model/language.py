"""Passes of the language model over a group layout: one packed sequence, every prompt once, its responses behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from vrlt_fast.model.attention import Pass
from vrlt_fast.model.layout import GroupLayout
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.vision import VisionEmbeds
from vrlt_kernels import GroupSpans, TokenLogprob, group_attention, linear_logprob, linear_token_weight

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


@dataclass(frozen=True, eq=False)
class Inputs:
    """N tokens as the language model takes them: ``embeds`` [N, hidden], ``positions`` int64 [3, N]; of a tower with
    deepstack layers, ``visual`` int64 [n] the ascending places of visual tokens and ``deepstack``, each [n, hidden].
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor | None = None
    deepstack: tuple[torch.Tensor, ...] = ()

    def piece(self, start: int, end: int) -> Inputs:
        """Tokens ``start`` to ``end``."""
        embeds, positions = self.embeds[start:end], self.positions[:, start:end]
        if self.visual is None:
            return Inputs(embeds, positions)
        low, high = torch.searchsorted(self.visual, torch.tensor([start, end], device=self.visual.device)).tolist()
        return Inputs(embeds, positions, self.visual[low:high] - start, tuple(d[low:high] for d in self.deepstack))


def join(pieces: Sequence[Inputs]) -> Inputs:
    """Several sequences, one behind the other; at least one."""
    starts = [0, *accumulate(len(p.embeds) for p in pieces)]
    places = [p.visual + start for p, start in zip(pieces, starts, strict=False) if p.visual is not None]
    return Inputs(
        torch.cat([p.embeds for p in pieces]),
        torch.cat([p.positions for p in pieces], dim=1),
        torch.cat(places) if places else None,
        tuple(torch.cat(level) for level in zip(*(p.deepstack for p in pieces if p.deepstack), strict=True)),
    )


def make_inputs(
    lm: VideoLM, ids: torch.Tensor, positions: torch.Tensor, visual: torch.Tensor, vision: VisionEmbeds
) -> Inputs:
    """Token embeddings of ids int64 [N], with the media's embeddings put in by place, never by token id."""
    embeds: torch.Tensor = lm.module.get_input_embeddings()(ids)
    embeds = embeds.index_copy(0, visual, vision.embeds.to(embeds.dtype))
    return Inputs(embeds, positions, visual if vision.deepstack else None, vision.deepstack)


def run_text(lm: VideoLM, inputs: Inputs, group_pass: Pass | None) -> torch.Tensor:
    """Hidden states [N, hidden] after the final norm. Without a pass: one sequence, by transformers' own attention."""
    more: dict[str, object] = {"attention_mask": {"full_attention": None}}
    if lm.info.family == "qwen3_vl":  # takes one mask, and makes none for an attention function that is not its own
        more = {"attention_mask": None}
    if inputs.visual is not None and len(inputs.visual):
        seen = torch.zeros(1, len(inputs.embeds), dtype=torch.bool, device=inputs.embeds.device)
        seen[0, inputs.visual] = True
        more |= {"visual_pos_masks": seen, "deepstack_visual_embeds": list(inputs.deepstack)}
    out = lm.module.model.language_model(
        inputs_embeds=inputs.embeds[None],
        position_ids=inputs.positions[:, None],
        use_cache=False,
        group_pass=group_pass,
        **more,
    )
    hidden: torch.Tensor = out.last_hidden_state[0]
    return hidden


class _NoTokens:
    """A pass for the process that has no token: transformers' models want one at least, which nobody sees."""

    def __init__(self, inner: Pass):
        self._inner = inner

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        nothing = self._inner.attend(layer, query[:0], key[:0], value[:0], scale)
        return torch.cat([nothing, torch.zeros_like(query)])


def head_untouched(lm: VideoLM, hidden: torch.Tensor) -> torch.Tensor:
    """Zero, whose gradient is zero for the head and for hidden states [n, hidden], at least one: for a pass without
    targets where processes share the weights, so that it has gradients for the same parameters as others' passes.
    """
    target = torch.zeros(1, dtype=torch.int64, device=hidden.device)
    return score_hidden(lm, hidden[:1], target, 1.0).logp.sum() * 0.0


def run_nothing(lm: VideoLM, inputs: Inputs, group_pass: Pass) -> torch.Tensor:
    """Hidden states [0, hidden] of no tokens, for a process that takes part in the passes of others: what it would
    exchange with them, in attention and for weights, it does, forward and backward.
    """
    one = torch.cat([inputs.embeds, inputs.embeds.new_zeros(1, inputs.embeds.shape[1])])
    return run_text(lm, Inputs(one, inputs.positions.new_zeros(3, 1)), _NoTokens(group_pass))[:0]


def hidden_states(lm: VideoLM, layout: GroupLayout, vision: VisionEmbeds) -> torch.Tensor:
    """Hidden states [N, hidden] of all tokens of the layout, with gradients."""
    inputs = make_inputs(lm, layout.ids, layout.positions, layout.visual, vision)
    return run_text(lm, inputs, GroupPass(layout.spans))


def target_hidden(lm: VideoLM, layout: GroupLayout, vision: VisionEmbeds) -> torch.Tensor:
    """Hidden states [M, hidden] that predict every target token, with gradients; M as in ``layout.targets``."""
    return hidden_states(lm, layout, vision).index_select(0, layout.source)


def target_logprobs(
    lm: VideoLM,
    layout: GroupLayout,
    vision: VisionEmbeds,
    temperature: float = 1.0,
    *,
    also: torch.Tensor | None = None,
    entropy_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs fp32 [M] of the target tokens, with gradients, and entropies [M] in nats, without.

    Logits exist for ``LOGITS`` values at a time; where they are more, some are computed again in the backward pass.

    Args:
        also: int64 [n] places of further tokens to score, which are inputs themselves; none first in its prefix. Theirs
            stand behind those of the targets.
        entropy_grad: entropies with gradients too.
    """
    source, targets = layout.source, layout.targets
    if also is not None:
        also = also.to(source.device)
        source, targets = torch.cat([source, also - 1]), torch.cat([targets, layout.ids[also]])
    hidden = hidden_states(lm, layout, vision).index_select(0, source)
    out = score_hidden(lm, hidden, targets, temperature)
    return out.logp, out.entropy if entropy_grad else out.entropy.detach()


def target_weights(
    lm: VideoLM, layout: GroupLayout, vision: VisionEmbeds, temperature: float, alpha: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`target_logprobs`, entropies with gradients, and TW-GRPO's weights [M] of the targets in 1..alpha,
    without; a group is the rows of a prefix.
    """
    hidden, head = target_hidden(lm, layout, vision), lm.module.lm_head
    out = score_hidden(lm, hidden, layout.targets, temperature)
    ends = torch.tensor([0, *(len(rows) for rows in layout.spans.rows)], device=hidden.device).cumsum(0)
    with torch.no_grad():
        weight = linear_token_weight(
            hidden.detach(),
            head.weight,
            layout.target_offsets,
            ends,
            bias=head.bias,
            alpha=alpha,
            temperature=temperature,
            budget_bytes=LOGITS * hidden.element_size(),
        )
    return out.logp, out.entropy, weight


def score_hidden(lm: VideoLM, hidden: torch.Tensor, targets: torch.Tensor, temperature: float) -> TokenLogprob:
    """Log-probs and entropies [n] of targets under the language model's head, from hidden states [n, hidden]."""
    head = lm.module.lm_head
    budget = LOGITS * hidden.element_size()
    return linear_logprob(hidden, head.weight, targets, temperature, bias=head.bias, budget_bytes=budget)
