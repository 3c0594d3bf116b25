"""Where the prefixes and rows of groups stand in a packed sequence: the index arithmetic of `group_attention`."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Dict, Iterator, Sequence, Tuple

import torch

from ._checks import bad


@dataclass(frozen=True)
class GroupSpans:
    """Groups in a packed sequence, one behind the other; each is its prefix and then its rows.

    ``prefix[g]`` tokens of group g's prefix, ``rows[g]`` the lengths of its rows; any of them may be 0.

    Raises:
        KernelInputError: the tuples differ in length, or a length is negative.
    """

    prefix: Tuple[int, ...]
    rows: Tuple[Tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.prefix) != len(self.rows):
            raise bad("rows", f"{len(self.rows)} groups", f"one entry for each of the {len(self.prefix)} prefixes")
        least = min((*self.prefix, *(n for group in self.rows for n in group)), default=0)
        if least < 0:
            raise bad("spans", least, "lengths of at least 0")

    @staticmethod
    def of(prefix: Sequence[int], rows: Sequence[Sequence[int]]) -> GroupSpans:
        """From any sequences of lengths."""
        return GroupSpans(tuple(int(n) for n in prefix), tuple(tuple(int(n) for n in group) for group in rows))

    @cached_property
    def row_tokens(self) -> Tuple[int, ...]:
        """Tokens of each group's rows together."""
        return tuple(sum(group) for group in self.rows)

    @cached_property
    def starts(self) -> Tuple[int, ...]:
        """Where each group begins, and the number of tokens."""
        return tuple(accumulate((p + r for p, r in zip(self.prefix, self.row_tokens, strict=True)), initial=0))

    @property
    def tokens(self) -> int:
        """Tokens of all groups."""
        return self.starts[-1]

    @cached_property
    def segments(self) -> Tuple[int, ...]:
        """Lengths of all prefixes and rows in packed order: what attends causally within itself."""
        return tuple(n for p, group in zip(self.prefix, self.rows, strict=True) for n in (p, *group))

    @cached_property
    def row_starts(self) -> Tuple[Tuple[int, ...], ...]:
        """Where each row begins, by group."""
        return tuple(
            tuple(accumulate(group[:-1], initial=start + p)) if group else ()
            for start, p, group in zip(self.starts[:-1], self.prefix, self.rows, strict=True)
        )

    @cached_property
    def _kept(self) -> Dict[Tuple[str, torch.device], torch.Tensor]:
        return {}

    def index(self, name: str, values: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """``values`` as a tensor on the device, made once for this name."""
        found = self._kept.get((name, device))
        if found is None:
            found = self._kept[name, device] = torch.tensor(values, dtype=dtype).to(device)
        return found

    @cached_property
    def without_prefix(self) -> GroupSpans:
        """The rows of the only group, as rows of an empty prefix."""
        return GroupSpans((0,), self.rows)

    def floors(self, device: torch.device) -> torch.Tensor:
        """int32 [N]: where the prefix or row that a token belongs to begins."""
        if ("floors", device) not in self._kept:
            lengths = torch.tensor(self.segments, dtype=torch.int64)
            starts = (lengths.cumsum(0) - lengths).to(torch.int32)
            self._kept["floors", device] = starts.repeat_interleave(lengths).to(device)
        return self._kept["floors", device]

    def tiles(self, of: str, block: int, device: torch.device, *, skip: bool = False) -> torch.Tensor:
        """int32 [tiles, 5]: up to ``block`` tokens of one prefix, or of the rows of one group, and what meets them.

        Columns: first token and end of the tile; for queries, where the own keys of the first one begin, then start
        and end of the prefix that rows see; for keys, where the own queries of the last one end, then start and end of
        the rows that see a prefix. The longest work comes first.

        Args:
            skip: prefixes have keys but no queries.
        """
        name = f"{of} by {block}, {skip}"
        if (name, device) not in self._kept:
            groups = range(len(self.prefix))
            make = self._query_tiles if of == "queries" else self._key_tiles
            table = [tile for g in groups for tile in make(g, block, skip)]
            table.sort(key=lambda t: -(abs(t[2] - (t[1] if of == "queries" else t[0])) + t[4] - t[3]))
            return self.index(name, [n for tile in table for n in tile], torch.int32, device).view(-1, 5)
        return self._kept[name, device].view(-1, 5)

    def _query_tiles(self, g: int, block: int, skip: bool) -> Iterator[Tuple[int, ...]]:
        start, middle, end = self.starts[g], self.starts[g] + self.prefix[g], self.starts[g + 1]
        ends = [begin + n for begin, n in zip(self.row_starts[g], self.rows[g], strict=True)]
        for first in range(middle if skip else start, middle, block):
            yield first, min(first + block, middle), start, 0, 0
        for first in range(middle, end, block):
            yield first, min(first + block, end), self.row_starts[g][bisect_right(ends, first)], start, middle

    def _key_tiles(self, g: int, block: int, skip: bool) -> Iterator[Tuple[int, ...]]:
        start, middle, end = self.starts[g], self.starts[g] + self.prefix[g], self.starts[g + 1]
        ends = [begin + n for begin, n in zip(self.row_starts[g], self.rows[g], strict=True)]
        for first in range(start, middle, block):
            yield first, min(first + block, middle), first if skip else middle, middle, end
        for first in range(middle, end, block):
            last = min(first + block, end)
            yield first, last, ends[bisect_right(ends, last - 1)], 0, 0

    def padded_rows(self, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor, int]:
        """Rows that aren't empty as a rectangle: places int64 [rows * R] in the sequence, padding taking the row's
        first place; the places int64 [n] of real tokens in the rectangle; and R.
        """
        places = [s for starts in self.row_starts for s in starts]
        lengths = [n for group in self.rows for n in group]
        flat = [(s, n) for s, n in zip(places, lengths, strict=True) if n]
        widest = max((n for _, n in flat), default=0)
        if ("places", device) not in self._kept:
            begin = torch.tensor([s for s, _ in flat], dtype=torch.int64)[:, None]
            length = torch.tensor([n for _, n in flat], dtype=torch.int64)[:, None]
            column = torch.arange(widest)
            inside = column < length
            self._kept["places", device] = (begin + column * inside).flatten().to(device)
            self._kept["real", device] = inside.flatten().nonzero()[:, 0].to(device)
        return self._kept["places", device], self._kept["real", device], widest


__all__ = ["GroupSpans"]
