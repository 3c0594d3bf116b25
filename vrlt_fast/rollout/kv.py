"""Keys and values during decoding: the prompts' repeated for their rows, and room for the longest response."""

from __future__ import annotations

import torch

from vrlt_fast.model.language import KeyValues


class DecodeCache:
    """Buffers [rows, kv_heads, L + max_new, d] a layer. ``length`` is the number of filled columns."""

    def __init__(self, prefix: KeyValues, group: torch.Tensor, max_new: int):
        self.length = prefix.keys[0].shape[2]
        self._keys = [self._buffer(k, group, max_new) for k in prefix.keys]
        self._values = [self._buffer(v, group, max_new) for v in prefix.values]

    @staticmethod
    def _buffer(prefix: torch.Tensor, group: torch.Tensor, max_new: int) -> torch.Tensor:
        _, heads, length, dim = prefix.shape
        out = prefix.new_empty(len(group), heads, length + max_new, dim)
        out[:, :, :length] = prefix.index_select(0, group)
        return out

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + key.shape[2]
        self._keys[layer][:, :, self.length : end] = key
        self._values[layer][:, :, self.length : end] = value
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def advance(self) -> None:
        """Count the column that all layers have just written."""
        self.length += 1

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these."""
        self._keys = [k[rows] for k in self._keys]
        self._values = [v[rows] for v in self._values]
