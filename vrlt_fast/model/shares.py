"""Which tokens of a packed sequence each of several processes computes: the index arithmetic of sequence parallelism.

A prefix of P tokens is cut into 2 * size even chunks, of which rank r has chunk r and chunk 2 * size - 1 - r: a causal
token costs what stands before it, and so each rank has the same cost. A row goes to one rank whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from vrlt_kernels import GroupSpans

Chunk = tuple[int, int]
"""First token and end, in a prefix."""


@dataclass(frozen=True)
class Share:
    """What ``rank`` of ``size`` processes has of a packed sequence: of each group two chunks of the prefix, the first
    one first, and the numbers of its ``rows``, ascending.
    """

    spans: GroupSpans
    rank: int
    size: int
    chunks: tuple[tuple[Chunk, Chunk], ...]
    rows: tuple[tuple[int, ...], ...]

    @cached_property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Lengths of the rows it has, by group."""
        return tuple(tuple(self.spans.rows[g][i] for i in mine) for g, mine in enumerate(self.rows))

    @cached_property
    def prefix_counts(self) -> tuple[int, ...]:
        """Tokens of prefixes that it has, by group."""
        return tuple(sum(end - start for start, end in pair) for pair in self.chunks)

    @cached_property
    def tokens(self) -> int:
        """Tokens that it computes."""
        return sum(self.prefix_counts) + sum(map(sum, self.lengths))

    @cached_property
    def places(self) -> torch.Tensor:
        """int64 [tokens]: where its tokens stand in the packed sequence, ascending."""
        found: list[int] = []
        for g, (pair, mine) in enumerate(zip(self.chunks, self.rows, strict=True)):
            start = self.spans.starts[g]
            for low, high in pair:
                found.extend(range(start + low, start + high))
            for i in mine:
                begin = self.spans.row_starts[g][i]
                found.extend(range(begin, begin + self.spans.rows[g][i]))
        return torch.tensor(found, dtype=torch.int64)


def shares(spans: GroupSpans, size: int, first: int = 0) -> list[Share]:
    """The shares of all ranks: every token of the sequence is in exactly one.

    Rows go longest first to the rank with the fewest tokens of rows so far; of several, to the first from rank
    ``first`` modulo ``size`` on, so that pieces of a group with fewer rows than processes take turns.
    """
    load = [0] * size
    rows: list[list[list[int]]] = [[[] for _ in spans.rows] for _ in range(size)]
    order = [(-n, g, i) for g, group in enumerate(spans.rows) for i, n in enumerate(group)]
    for negative, g, i in sorted(order):
        rank = min(range(size), key=lambda r: (load[r], (r - first) % size))
        load[rank] += 1 - negative  # a row of one token isn't an input, but its target has a cost too
        rows[rank][g].append(i)
    return [
        Share(
            spans,
            rank,
            size,
            tuple(_chunks(n, rank, size) for n in spans.prefix),
            tuple(tuple(sorted(mine)) for mine in rows[rank]),
        )
        for rank in range(size)
    ]


def _chunks(tokens: int, rank: int, size: int) -> tuple[Chunk, Chunk]:
    """The zigzag pair of a prefix; with one rank both halves."""
    bounds = [tokens * j // (2 * size) for j in range(2 * size + 1)]
    low, high = rank, 2 * size - 1 - rank
    return (bounds[low], bounds[low + 1]), (bounds[high], bounds[high + 1])


def prefix_order(every: list[Share], own: Share) -> torch.Tensor:
    """int64: [prefixes of all ranks by rank | own rows] to group 0's prefix, own rows of group 0, group 1's prefix, ...

    The first part is what a gather of each rank's prefix tokens, in the order of its share, gives.
    """
    size = sum(own.spans.prefix)
    at: list[list[int]] = [[0] * n for n in own.spans.prefix]
    place = 0
    for share in every:
        for g, pair in enumerate(share.chunks):
            for low, high in pair:
                at[g][low:high] = range(place, place + high - low)
                place += high - low
    order: list[int] = []
    for g, mine in enumerate(own.lengths):
        order.extend(at[g])
        order.extend(range(size, size + sum(mine)))
        size += sum(mine)
    return torch.tensor(order, dtype=torch.int64)
