"""Data parallelism: processes with the same weights, each with its share of every step's prompts.

Sums over the step (tokens, rewards, gradients) are what one process would have, so that how many there are changes
nothing but rounding. Rank 0 alone writes, logs and prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vrlt_fast.errors import Problem, Stopped

T = TypeVar("T")
BUCKET = 2**26
"""Values of gradients that travel together."""


class Replicas:
    """Some processes of a run, of which this one is ``rank``; alone where there is no other.

    Args:
        group: of torch.distributed; None: all processes.
    """

    def __init__(self, rank: int = 0, world: int = 1, group: Any = None):
        self.rank, self.world, self._group = rank, world, group

    @property
    def first(self) -> bool:
        """Whether this process writes and logs."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``world``-th of the items, from ``rank`` on."""
        return list(items[self.rank :: self.world])

    def place(self, index: int) -> int:
        """Where item ``index`` of this process's share stands among all."""
        return index * self.world + self.rank

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes, in fp64."""
        if self.world == 1:
            return list(values)
        together = torch.tensor(list(values), dtype=torch.float64)
        with waiting("the sums of a step"):
            dist.all_reduce(together, group=self._group)
        return together.tolist()

    def any(self, value: bool) -> bool:
        """Whether it holds in any process."""
        return self.sum([float(value)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """What each process has, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with waiting("what each process has"):
            dist.all_gather_object(found, value, group=self._group)
        return found

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)

    @torch.no_grad()
    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes. A parameter keeps none where no process has one."""
        if self.world == 1:
            return
        wanted = list(parameters)
        has = self.sum([float(p.grad is not None) for p in wanted])
        summed = [p for p, count in zip(wanted, has, strict=True) if count]
        for p in summed:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for bucket in _buckets(summed):
            flat = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
            with waiting("the gradients of a step"):
                dist.all_reduce(flat, group=self._group)
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = part.view_as(p)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """For a call that other processes make too, which ``what`` names.

    Raises:
        Stopped: S04 one has ended, or doesn't come within ``parallel.wait``.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise lost(error, what) from error


def lost(error: BaseException, what: str) -> Stopped:
    """What a process says that waited for others in vain."""
    why = (str(error).splitlines() or [type(error).__name__])[0][:200]
    fix = "mend what ended the other one, then go on with the same command and --resume"
    told = f"another process of this run has ended, or didn't come to: {what}"
    return Stopped(Problem("VRLT-S04", told, "parallel.replicas", why, fix))


def is_loss(error: BaseException) -> bool:
    """Whether a call failed because of another process, as far as it says so."""
    said = ("gloo", "Gloo", "NCCL", "ProcessGroup", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in said)
    )


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """The parameters in order, of one dtype and about ``BUCKET`` values each."""
    out: list[list[torch.nn.Parameter]] = []
    values = 0
    for p in parameters:
        if not out or values + p.numel() > BUCKET or p.dtype != out[-1][0].dtype:
            out.append([])
            values = 0
        out[-1].append(p)
        values += p.numel()
    return out
