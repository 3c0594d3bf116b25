"""What processes that share one sequence say to each other: parts of tensors gathered, summed and exchanged, with
gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vrlt_fast.parallel.replicas import Replicas, waiting

T = TypeVar("T")
# torch 2.13 names them anew and warns of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Peers:
    """The processes that share a sequence; alone where there is no other.

    Every call is one that all of them make, in the same order. ``received`` counts, by purpose, the bytes that this
    process got from others.

    Args:
        group: of ``size`` processes, in which this one is ``rank``.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None):
        self.rank, self.size, self._group = rank, size, group
        self._members = Replicas(rank, size, group)
        self.received: Counter[str] = Counter()

    def gather(self, x: torch.Tensor, counts: Sequence[int], why: str) -> torch.Tensor:
        """[sum(counts), ...]: the parts [counts[rank], ...] of all processes by rank, differentiable.

        In the backward pass each gets the sum of what all have for its part.
        """
        if self.size == 1:
            return x
        out: torch.Tensor = _Gather.apply(  # type: ignore[no-untyped-call]
            x, self, tuple(counts), why
        )
        return out

    def sum(self, x: torch.Tensor, why: str) -> torch.Tensor:
        """The sum of all processes' x, differentiable: the gradient is the sum of all processes' gradients."""
        if self.size == 1:
            return x
        out: torch.Tensor = _Sum.apply(  # type: ignore[no-untyped-call]
            x, self, why
        )
        return out

    def exchange(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int], why: str) -> torch.Tensor:
        """[sum(receive), ...]: ``receive[r]`` entries from each process r, which sent them to this one; ``send[r]``
        entries of x [sum(send), ...], in order, go to process r. Differentiable.
        """
        if self.size == 1:
            return x
        out: torch.Tensor = _Exchange.apply(  # type: ignore[no-untyped-call]
            x, self, tuple(send), tuple(receive), why
        )
        return out

    def all_gather(self, x: torch.Tensor, counts: Sequence[int], why: str) -> torch.Tensor:
        """:meth:`gather` without gradients."""
        most, entry = max(counts), x.shape[1:].numel() * x.element_size()
        self.received[why] += (self.size - 1) * most * entry
        if not most:
            return x
        padded = x.contiguous() if len(x) == most else torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
        out = x.new_empty(self.size * most, *x.shape[1:])
        with waiting(why):
            _all_gather(out, padded, group=self._group)
        if min(counts) == most:
            return out
        return torch.cat([part[:n] for part, n in zip(out.split(most), counts, strict=True)])

    def scatter_sum(self, x: torch.Tensor, counts: Sequence[int], why: str) -> torch.Tensor:
        """[counts[rank], ...]: the sum over all processes of their x [sum(counts), ...], this process's part of it."""
        most, entry = max(counts), x.shape[1:].numel() * x.element_size()
        self.received[why] += (self.size - 1) * most * entry
        if not most:
            return x
        if min(counts) < most:
            parts = (torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in x.split(list(counts)))
            x = torch.cat(list(parts))
        out = x.new_empty(most, *x.shape[1:])
        with waiting(why):
            _reduce_scatter(out, x.contiguous(), group=self._group)
        return out[: counts[self.rank]]

    def all_reduce(self, x: torch.Tensor, why: str) -> torch.Tensor:
        """:meth:`sum` without gradients, in a tensor of its own."""
        self.received[why] += 2 * (self.size - 1) * x.nbytes // self.size
        out = x.contiguous().clone()
        with waiting(why):
            dist.all_reduce(out, group=self._group)
        return out

    def all_to_all(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int], why: str) -> torch.Tensor:
        """:meth:`exchange` without gradients."""
        entry = x.shape[1:].numel() * x.element_size()
        self.received[why] += (sum(receive) - receive[self.rank]) * entry
        out = x.new_empty(sum(receive), *x.shape[1:])
        with waiting(why):
            dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=self._group)
        return out

    def of_first(self, x: torch.Tensor) -> torch.Tensor:
        """The first process's x; all have one of this shape and dtype."""
        out = x.contiguous().clone()
        if self.size > 1:
            with waiting("the first process's draws"):
                dist.broadcast(out, group=self._group, group_src=0)
        return out

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``size``-th of the items, from ``rank`` on."""
        return self._members.share(items)

    def objects(self, value: T) -> list[T]:
        """What each process has, by rank."""
        return self._members.gather(value)

    def agree(self, value: bool) -> bool:
        """Whether it holds in all of them."""
        return not self._members.any(not value)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, peers: Peers, counts: tuple[int, ...], why: str) -> torch.Tensor:
        ctx.about = (peers, counts, why)
        return peers.all_gather(x, counts, why)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        peers, counts, why = ctx.about
        return peers.scatter_sum(grad, counts, f"{why}, backward"), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, peers: Peers, why: str) -> torch.Tensor:
        ctx.about = (peers, why)
        return peers.all_reduce(x, why)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        peers, why = ctx.about
        return peers.all_reduce(grad, f"{why}, backward"), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, peers: Peers, send: tuple[int, ...], receive: tuple[int, ...], why: str
    ) -> torch.Tensor:
        ctx.about = (peers, send, receive, why)
        return peers.all_to_all(x, send, receive, why)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        peers, send, receive, why = ctx.about
        return peers.all_to_all(grad, receive, send, f"{why}, backward"), None, None, None, None
