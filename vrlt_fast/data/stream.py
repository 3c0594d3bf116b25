"""The order in which a run visits its samples."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any, Protocol


class Stream(Protocol):
    """Endless batches of indices, resumable."""

    def next(self) -> list[int]:
        """The next batch."""
        ...

    def ahead(self) -> Iterator[list[int]]:
        """The batches that :meth:`next` is likely to give, endless; asking for them moves nothing."""
        ...

    def state(self) -> dict[str, Any]:
        """What :meth:`load` needs to go on after the last batch, as JSON."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Go to the place that ``state`` tells, of a stream made with the same arguments."""
        ...


class BatchStream:
    """Endless batches of indices ``0 .. n - 1``: seeded epochs in shuffled order, resumable from two numbers.

    Every index comes once an epoch. A batch may span the border of two epochs; it holds no index twice when
    ``n >= batch``.
    """

    def __init__(self, n: int, batch: int, seed: int):
        if n < 1 or batch < 1:
            raise ValueError(f"n and batch must be at least 1, not {n} and {batch}")
        self.n, self.batch, self.seed = n, batch, seed
        self._epoch, self._offset = 0, 0
        self._order = self._shuffle(0)

    def next(self) -> list[int]:
        """The next ``batch`` indices."""
        out: list[int] = []
        while len(out) < self.batch:
            if self._offset == self.n:
                self._epoch, self._offset, self._order = self._epoch + 1, 0, self._after(self._epoch, self._order)
            taken = self._order[self._offset : self._offset + self.batch - len(out)]
            self._offset += len(taken)
            out += taken
        return out

    def ahead(self) -> Iterator[list[int]]:
        """The batches that :meth:`next` will give, endless; asking for them moves nothing."""
        return iter(copy.copy(self).next, None)

    def state(self) -> dict[str, Any]:
        """What :meth:`load` needs to go on after the last batch."""
        return {"epoch": self._epoch, "offset": self._offset}

    def load(self, state: dict[str, Any]) -> None:
        """Goes to the place that ``state`` tells, of a stream with the same ``n``, ``batch`` and ``seed``."""
        epoch, offset = int(state["epoch"]), int(state["offset"])
        if epoch < 0 or not 0 <= offset <= self.n:
            raise ValueError(f"no such place in a stream of {self.n}: {state}")
        order = self._shuffle(0)
        for past in range(epoch):
            order = self._after(past, order)
        self._epoch, self._offset, self._order = epoch, offset, order

    def _shuffle(self, epoch: int) -> list[int]:
        order = list(range(self.n))
        random.Random(f"{self.seed}-{epoch}").shuffle(order)
        return order

    def _after(self, epoch: int, order: list[int]) -> list[int]:
        """Order of the epoch after ``epoch``, whose order is given."""
        following = self._shuffle(epoch + 1)
        begun = (epoch + 1) * self.n % self.batch  # so many of the batch on the border are the end of this epoch
        if begun == 0 or self.n < self.batch:
            return following
        used = set(order[self.n - begun :])
        head = [index for index in following if index not in used][: self.batch - begun]
        taken = set(head)
        return head + [index for index in following if index not in taken]
