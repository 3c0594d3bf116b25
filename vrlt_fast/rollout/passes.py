"""What the tokens of a prefill and of a decode step attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vrlt_fast.rollout.kv import KvStore
from vrlt_kernels import GroupSpans, chunk_attention, group_attention, group_decode


@dataclass
class PrefillPass:
    """Whole prompts, packed, or one piece of a long prompt behind ``past`` tokens; fills the arena from ``places``.

    ``places`` int64 [N]: where each token's keys and values go.
    """

    store: KvStore
    places: torch.Tensor
    spans: GroupSpans
    past: int = 0
    start: int = 0

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        keys, values = self.store.prefix_keys[layer], self.store.prefix_values[layer]
        keys[self.places], values[self.places] = key, value
        if not self.past:
            return group_attention(query, key, value, self.spans, scale)
        before = slice(self.start, self.start + self.past)
        return chunk_attention(query, key, value, keys[before], values[before], scale)


@dataclass
class DecodePass:
    """One new token a row, rows sorted by prompt: the shared prefix, read once a prompt, and the row's own tokens.

    All int64: ``slots`` and ``columns`` [rows], where the row's new keys and values go; ``own_length`` [rows], the new
    token counted; ``prefix_start`` and ``prefix_length`` [prompts]; ``row_offsets`` [prompts + 1]. No prompt has more
    than ``max_group`` rows.
    """

    store: KvStore
    slots: torch.Tensor
    columns: torch.Tensor
    own_length: torch.Tensor
    prefix_start: torch.Tensor
    prefix_length: torch.Tensor
    row_offsets: torch.Tensor
    max_group: int

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        own_keys, own_values = self.store.own_keys[layer], self.store.own_values[layer]
        own_keys[self.slots, self.columns], own_values[self.slots, self.columns] = key, value
        return group_decode(
            query,
            self.store.prefix_keys[layer],
            self.store.prefix_values[layer],
            own_keys,
            own_values,
            prefix_start=self.prefix_start,
            prefix_length=self.prefix_length,
            row_offsets=self.row_offsets,
            slots=self.slots,
            suffix_length=self.own_length,
            scale=scale,
            max_prefix=self.store.plan.longest,
            max_group=self.max_group,
            validate=layer == 0,
        )
