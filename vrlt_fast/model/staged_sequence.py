"""A group in stages over several processes: each holds its chunks of the prompt, and its rows of every piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vrlt_fast.model.language import Inputs, head_untouched, score_hidden
from vrlt_fast.model.layout import Row, build_layout
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.sequence import GatherKV, SharedLayout, is_recomputed, run_share
from vrlt_fast.model.staged import KeyValues, PromptPass, StagedPrompt
from vrlt_fast.model.vision import VisionEmbeds
from vrlt_fast.parallel.sequence import Peers


class _RowsBehind:
    """Own rows behind the own chunks of the prompt, which were computed before."""

    def __init__(self, inner: GatherKV, prompt: KeyValues):
        self._inner, self._prompt = inner, prompt

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        keys, values = (torch.cat(pair) for pair in zip(self._prompt[layer], (key, value), strict=True))
        return self._inner.attend(layer, query, keys, values, scale)


class SharedStagedPrompt(StagedPrompt):
    """:class:`StagedPrompt` of which each process has a share; all make the same calls. Prefix keys and values are
    gathered anew for every piece, so that none of them stays.
    """

    def __init__(self, lm: VideoLM, prompt: Prompt, vision: VisionEmbeds, peers: Peers):
        self._lm, self._prompt, self._peers = lm, prompt, peers
        shared = SharedLayout(build_layout([prompt], [[]], device=lm.device), peers)
        self._pieces = 0
        self._cut_off(lm.run(self._forward_share, shared, vision), shared.share.tokens)

    def _forward_share(self, shared: SharedLayout, vision: VisionEmbeds) -> tuple[torch.Tensor, ...]:
        recorded = PromptPass(GatherKV(shared, keep=is_recomputed(self._lm)))
        hidden = run_share(self._lm, shared.inputs(self._lm, vision), recorded)
        last = shared.last_tokens(hidden)
        last = last + head_untouched(self._lm, last) if self._lm.in_shards else last
        return (last, *recorded.take())

    def shared_logprobs(
        self, rows: Sequence[Row], temperature: float, *, entropy_grad: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, SharedLayout]:
        """Log-probs and entropies of the targets of own rows, and which they are."""
        layout = build_layout([self._prompt], [rows], device=self._lm.device)
        shared = SharedLayout(layout, self._peers, first=self._pieces)
        self._pieces += len(rows)
        logp, entropy = self._lm.run(self._scored, shared, temperature, entropy_grad)
        return logp, entropy, shared

    def _scored(
        self, shared: SharedLayout, temperature: float, entropy_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lm = self._lm
        held = sum(shared.share.prefix_counts)
        places = shared.places[held:]
        embeds = lm.module.get_input_embeddings()(shared.layout.ids[places])
        rows_pass = _RowsBehind(GatherKV(shared, keep=is_recomputed(lm), rows_only=True), self._keys_values)
        hidden = run_share(lm, Inputs(embeds, shared.layout.positions[:, places]), rows_pass)
        sources = torch.cat([hidden, self._leaves[0]]).index_select(0, shared.source - held)
        out = score_hidden(lm, sources, shared.target_ids, temperature)
        return out.logp, out.entropy if entropy_grad else out.entropy.detach()
