"""A group that is too large for one pass, in stages: its prompt once, then its responses in any number of pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vrlt_fast.model.attention import Pass
from vrlt_fast.model.language import GroupPass, Inputs, head_untouched, make_inputs, run_nothing, run_text, score_hidden
from vrlt_fast.model.layout import GroupLayout, Row, build_layout
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.vision import VisionEmbeds
from vrlt_kernels import GroupSpans, group_attention

KeyValues = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [P, Hk, d] of a prompt, by layer."""


class PromptPass:
    """The prompt alone, as ``inner`` attends; keeps keys and values of its layers, until :meth:`take`.

    Activation checkpoints hold on to the pass, and what it keeps to them: a cycle that no garbage collector sees.
    """

    def __init__(self, inner: Pass):
        self._inner = inner
        self._kept: KeyValues | None = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        if self._kept is not None:  # else the layer is computed again
            self._kept[layer] = (key, value)
        return self._inner.attend(layer, query, key, value, scale)

    def take(self) -> list[torch.Tensor]:
        """Keys and values of the first layer, of the second, and so on."""
        kept, self._kept = self._kept or {}, None
        return [tensor for layer in sorted(kept) for tensor in kept[layer]]


class _RowsPass:
    """Rows behind the prompt that was computed before."""

    def __init__(self, spans: GroupSpans, prompt: KeyValues):
        self._spans, self._prompt = spans, prompt

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        keys, values = (torch.cat(pair) for pair in zip(self._prompt[layer], (key, value), strict=True))
        return group_attention(query, keys, values, self._spans, scale, rows_only=True)


class StagedPrompt:
    """A prompt's forward pass, cut off from those of its responses: its keys, values and last hidden state are leaves,
    in which the gradients of all pieces add up, in the type of the activations; :meth:`backward` takes them through the
    prompt in one pass. Exact, and holds the prompt's activations and those of one piece, with whose keys and values
    stands a copy of the prompt's.

    ``tokens``: of the prompt, computed by this process.

    Args:
        vision: the visual tokens of the prompt's media in order.
    """

    def __init__(self, lm: VideoLM, prompt: Prompt, vision: VisionEmbeds):
        self._lm, self._prompt = lm, prompt
        layout = build_layout([prompt], [[]], device=lm.device)
        self._cut_off(lm.run(self._forward, layout, vision), layout.tokens_trained)

    def _forward(self, layout: GroupLayout, vision: VisionEmbeds) -> tuple[torch.Tensor, ...]:
        """The prompt's last hidden state [1, hidden], and keys and values, layer by layer."""
        inputs = make_inputs(self._lm, layout.ids, layout.positions, layout.visual, vision)
        prompt_pass = PromptPass(GroupPass(layout.spans))
        hidden = run_text(self._lm, inputs, prompt_pass)
        last = hidden[-1:] + head_untouched(self._lm, hidden[-1:]) if self._lm.in_shards else hidden[-1:]
        return (last, *prompt_pass.take())

    def _cut_off(self, made: Sequence[torch.Tensor], tokens: int) -> None:
        self.tokens = tokens
        self._made = list(made)
        self._leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self._made]
        pairs = zip(self._leaves[1::2], self._leaves[2::2], strict=True)
        self._keys_values: KeyValues = dict(enumerate(pairs))

    def logprobs(
        self, rows: Sequence[Row], temperature: float, *, entropy_grad: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :func:`~vrlt_fast.model.language.target_logprobs` of the prompt and these rows."""
        layout = build_layout([self._prompt], [rows], device=self._lm.device)
        return self._lm.run(self._logprobs, layout, temperature, entropy_grad)

    def _logprobs(
        self, layout: GroupLayout, temperature: float, entropy_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lm, prefix = self._lm, len(self._prompt)
        hidden = [self._leaves[0]]
        embeds = lm.module.get_input_embeddings()(layout.ids[prefix:])
        inputs = Inputs(embeds, layout.positions[:, prefix:])
        if len(embeds):
            hidden.append(run_text(lm, inputs, _RowsPass(layout.spans, self._keys_values)))
        elif lm.in_shards:
            hidden.append(run_nothing(lm, inputs, GroupPass(GroupSpans.of([0], [[]]))))
        sources = torch.cat(hidden).index_select(0, layout.source - (prefix - 1))
        out = score_hidden(lm, sources, layout.targets, temperature)
        return out.logp, out.entropy if entropy_grad else out.entropy.detach()

    def backward(self) -> None:
        """Accumulate the gradients of parameters, and of the visual tokens, from what the leaves have collected."""
        pairs = [
            (made, leaf.grad) for made, leaf in zip(self._made, self._leaves, strict=True) if leaf.grad is not None
        ]
        self._made, self._leaves, self._keys_values = [], [], {}
        if pairs:
            torch.autograd.backward([made for made, _ in pairs], [grad for _, grad in pairs])
