"""``group_decode`` in PyTorch: the formula, and the same with aten's CPU flash attention, a group at a time."""

from __future__ import annotations

from typing import Iterator, List, NamedTuple, Tuple

import torch

from ._checks import compute_dtype

Part = Tuple[torch.Tensor, torch.Tensor]  # out [..., d] in the query's dtype, log-sum-exp [...] in fp32 (fp64: fp64)


class Arguments(NamedTuple):
    """Tensors of a call as in group_decode.py, after its checks."""

    query: torch.Tensor
    prefix_key: torch.Tensor
    prefix_value: torch.Tensor
    suffix_key: torch.Tensor
    suffix_value: torch.Tensor
    prefix_start: torch.Tensor
    prefix_length: torch.Tensor
    row_offsets: torch.Tensor
    slots: torch.Tensor
    suffix_length: torch.Tensor

    @property
    def ratio(self) -> int:
        """Query heads that share a KV head."""
        return self.query.shape[1] // self.prefix_key.shape[1]


def decode_formula(x: Arguments, scale: float) -> torch.Tensor:
    """softmax(scale q K^T) V of every row in fp32 (fp64 for fp64), K and V being prefix and suffix end to end."""
    dtype = compute_dtype(x.query)
    out = torch.zeros_like(x.query, dtype=dtype)
    slots, lengths = x.slots.tolist(), x.suffix_length.tolist()
    for first, last, start, length in _groups(x):
        for row in range(first, last):
            mine = (slots[row], slice(lengths[row]))
            key = torch.cat([x.prefix_key[start : start + length], x.suffix_key[mine]]).to(dtype)
            value = torch.cat([x.prefix_value[start : start + length], x.suffix_value[mine]]).to(dtype)
            if len(key):
                heads = x.query[row].to(dtype).unflatten(0, (-1, x.ratio))
                p = (torch.einsum("hrd,lhd->hrl", heads, key) * scale).softmax(-1)
                out[row] = torch.einsum("hrl,lhd->hrd", p, value).flatten(0, 1)
    return out.to(x.query.dtype)


def decode_cpu(x: Arguments, scale: float) -> torch.Tensor:
    """The same with a flash call a group for the prefix and one for each run of rows with equally long suffixes.

    K and V are read where they lie, except suffixes whose slots aren't evenly spaced.
    """
    query = x.query.unflatten(1, (-1, x.ratio))
    lse = torch.full(query.shape[:-1], -torch.inf, dtype=compute_dtype(query))
    shared, own = (torch.zeros_like(query), lse), (torch.zeros_like(query), lse.clone())
    slots, lengths = x.slots.tolist(), x.suffix_length.tolist()
    for first, last, start, length in _groups(x):
        if length:
            _put(shared, first, last, _prefix(x, query[first:last], slice(start, start + length), scale))
    for first, last in _runs(lengths, int(x.row_offsets[-1])):
        if lengths[first]:
            mine = slots[first:last], x.slots[first:last]
            _put(own, first, last, _suffix(x, query[first:last], mine, lengths[first], scale))
    return _merged(shared, own).flatten(1, 2)


def _groups(x: Arguments) -> Iterator[Tuple[int, int, int, int]]:
    """First and last row, start and length of the prefix, of every group that has rows."""
    ends = x.row_offsets.tolist()
    for i, (start, length) in enumerate(zip(x.prefix_start.tolist(), x.prefix_length.tolist(), strict=True)):
        if ends[i] < ends[i + 1]:
            yield ends[i], ends[i + 1], start, length


def _runs(lengths: List[int], rows: int) -> Iterator[Tuple[int, int]]:
    """The first rows cut where the length changes."""
    begin = 0
    for row in range(1, rows + 1):
        if row == rows or lengths[row] != lengths[begin]:
            yield begin, row
            begin = row


def _put(to: Part, first: int, last: int, part: Part) -> None:
    for whole, piece in zip(to, part, strict=True):
        whole[first:last] = piece


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Part:
    """[B, H, M, d] on [B, H, L, d] of any strides but the last."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    return out, lse


def _prefix(x: Arguments, query: torch.Tensor, tokens: slice, scale: float) -> Part:
    """All rows of a group and all query heads of a KV head as queries of one head: the prefix is read once."""
    rows, heads, ratio, _ = query.shape
    folded = query.transpose(0, 1).reshape(1, heads, rows * ratio, -1)
    key, value = (cache[tokens].transpose(0, 1)[None] for cache in (x.prefix_key, x.prefix_value))
    out, lse = (part[0].unflatten(1, (rows, ratio)).transpose(0, 1) for part in _flash(folded, key, value, scale))
    return out, lse


def _suffix(
    x: Arguments, query: torch.Tensor, slots: Tuple[List[int], torch.Tensor], length: int, scale: float
) -> Part:
    """Rows with equally long suffixes as a batch; their slots as numbers and as a tensor."""
    wanted, at = slots
    step = wanted[1] - wanted[0] if len(wanted) > 1 else 1
    key, value = x.suffix_key[:, :length], x.suffix_value[:, :length]
    if step > 0 and wanted == list(range(wanted[0], wanted[-1] + 1, step)):
        key, value = (cache[wanted[0] : wanted[-1] + 1 : step] for cache in (key, value))
    else:
        key, value = (cache.index_select(0, at) for cache in (key, value))
    return _flash(query, key.transpose(1, 2), value.transpose(1, 2), scale)


def _merged(a: Part, b: Part) -> torch.Tensor:
    """Two parts as one; an empty part is zeros with log-sum-exp -inf."""
    top = torch.maximum(a[1], b[1]).clamp_(min=torch.finfo(a[1].dtype).min)
    left, right = ((lse - top).exp_() for lse in (a[1], b[1]))
    total = (left + right).clamp_(min=torch.finfo(top.dtype).tiny)
    out = a[0] * (left / total)[..., None] + b[0] * (right / total)[..., None]
    return out.to(a[0].dtype)


__all__ = ["Arguments", "decode_cpu", "decode_formula"]
