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
    out = torch.zeros_like(x.query)
    slots, lengths = x.slots.tolist(), x.suffix_length.tolist()
    for first, last, start, length in _groups(x):
        query = x.query[first:last].unflatten(1, (-1, x.ratio))
        runs = [_suffix(x, query, first, run, slots, lengths, scale) for run in _runs(lengths, first, last)]
        own = (torch.cat([r[0] for r in runs]), torch.cat([r[1] for r in runs])) if len(runs) > 1 else runs[0]
        if length:
            own = _merged(_prefix(x, query, slice(start, start + length), scale), own)
        out[first:last] = own[0].flatten(1, 2)
    return out


def _groups(x: Arguments) -> Iterator[Tuple[int, int, int, int]]:
    """First and last row, start and length of the prefix, of every group that has rows."""
    ends = x.row_offsets.tolist()
    for i, (start, length) in enumerate(zip(x.prefix_start.tolist(), x.prefix_length.tolist(), strict=True)):
        if ends[i] < ends[i + 1]:
            yield ends[i], ends[i + 1], start, length


def _runs(lengths: List[int], first: int, last: int) -> Iterator[Tuple[int, int]]:
    """Rows first..last cut where the length changes."""
    begin = first
    for row in range(first + 1, last + 1):
        if row == last or lengths[row] != lengths[begin]:
            yield begin, row
            begin = row


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
    x: Arguments, query: torch.Tensor, base: int, run: Tuple[int, int], slots: List[int], lengths: List[int],
    scale: float,
) -> Part:  # fmt: skip
    """Rows of a run as a batch; ``base`` is the row that ``query`` [rows, Hk, ratio, d] begins with."""
    first, last = run
    mine, length = query[first - base : last - base], lengths[first]
    if length == 0:
        lse = mine.new_full(mine.shape[:-1], -torch.inf, dtype=compute_dtype(mine))
        return torch.zeros_like(mine), lse
    wanted = slots[first:last]
    step = wanted[1] - wanted[0] if len(wanted) > 1 else 1
    key, value = x.suffix_key[:, :length], x.suffix_value[:, :length]
    if step > 0 and wanted == list(range(wanted[0], wanted[-1] + 1, step)):
        key, value = (cache[wanted[0] : wanted[-1] + 1 : step] for cache in (key, value))
    else:
        key, value = (cache.index_select(0, x.slots[first:last]) for cache in (key, value))
    return _flash(mine, key.transpose(1, 2), value.transpose(1, 2), scale)


def _merged(a: Part, b: Part) -> Part:
    """Two parts as one; an empty part has log-sum-exp -inf, and not both are empty."""
    lse = torch.logaddexp(a[1], b[1])
    wide = a[0].to(lse.dtype) * (a[1] - lse).exp()[..., None] + b[0].to(lse.dtype) * (b[1] - lse).exp()[..., None]
    return wide.to(a[0].dtype), lse


__all__ = ["Arguments", "decode_cpu", "decode_formula"]
