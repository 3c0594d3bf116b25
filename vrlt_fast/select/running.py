"""What each sample earned in this run so far, and an order of samples that goes by it.

A sample teaches by how much the rewards within one of its groups differ, so squares are taken about the mean of each
group, not about the mean over steps: a sample that was never solved and then always has no deviation. The policy
changes, so at each further group of a sample, what it earned before counts :data:`KEEP` times what it did.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEEP = 0.5
"""What the groups before count, at each further group of the same sample."""
PRIOR = 1.0
"""Degrees of freedom that the task's usual variance counts for, in what is thought of a sample."""
FLOOR = 0.1
"""Exploration: added to each sample's deviation, in units of its task's usual one."""
WINDOW = 0.5
"""Share of the samples that one window of a weighted order holds."""
EQUAL = 1e-9
"""Rewards of a group that differ by no more than this count as equal."""

Values = NDArray[np.float64]
Flags = NDArray[np.bool_]


class RunningStats:
    """Count, mean and squares of the rewards of each sample, by index.

    Args:
        kinds: the task of each sample; deviations are compared within a task.

    With G rewards of mean m in a group, and f = KEEP: ``counts`` c' = f c + G, ``means`` (f c mean + G m) / c',
    ``squares`` f squares + sum (r - m)^2, ``freedom`` (its degrees of freedom) f freedom + G - 1. ``groups`` counts the
    calls of :meth:`update`.
    """

    def __init__(self, kinds: Sequence[str]):
        names = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        self._kinds = np.array([names[kind] for kind in kinds], np.int64)
        self.groups = 0
        self.counts, self.means, self.squares, self.freedom = (np.zeros(len(kinds)) for _ in range(4))

    def __len__(self) -> int:
        return len(self._kinds)

    def update(self, index: int, rewards: Sequence[float]) -> None:
        """Count the rewards of one group of sample ``index``. Raises ValueError for none, and for one not finite."""
        if not rewards or not all(map(math.isfinite, rewards)):
            raise ValueError(f"no rewards, or one that is not finite: {list(rewards)}")
        flat = max(rewards) - min(rewards) <= EQUAL
        mean = rewards[0] if flat else math.fsum(rewards) / len(rewards)
        squares = 0.0 if flat else math.fsum((r - mean) ** 2 for r in rewards)
        before = KEEP * self.counts[index]
        self.counts[index] = before + len(rewards)
        self.means[index] = (before * self.means[index] + len(rewards) * mean) / self.counts[index]
        self.squares[index] = KEEP * self.squares[index] + squares
        self.freedom[index] = KEEP * self.freedom[index] + len(rewards) - 1
        self.groups += 1

    def mean(self, index: int) -> float | None:
        """Mean reward of a sample, recent groups counting most; None where there was none."""
        return float(self.means[index]) if self.counts[index] > 0 else None

    def deviation(self, index: int) -> float | None:
        """Deviation of the rewards within its groups; None where it isn't known."""
        free = self.freedom[index]
        return math.sqrt(self.squares[index] / free) if free > 0 else None

    def relative(self) -> Values:
        """Each sample's deviation in units of its task's usual one, fp64 [n].

        ``sqrt((PRIOR + squares / v) / (PRIOR + freedom))`` with v, the task's sum of squares over its degrees of
        freedom: the task's usual variance counts as PRIOR further degrees of freedom. A sample that wasn't drawn has 1,
        one that is always flat falls towards 0 with each group. Where all of the task is flat (v = 0) squares / v is 0.
        """
        kinds = int(self._kinds.max(initial=-1)) + 1
        squares = np.bincount(self._kinds, self.squares, kinds)
        freedom = np.bincount(self._kinds, self.freedom, kinds)
        usual = np.where(squares > 0, squares / np.where(freedom > 0, freedom, 1.0), np.inf)[self._kinds]
        return np.asarray(np.sqrt((PRIOR + self.squares / usual) / (PRIOR + self.freedom)))

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as JSON: the samples that have rewards."""
        seen = np.flatnonzero(self.counts > 0)
        columns = {name: getattr(self, name)[seen].tolist() for name in ("counts", "means", "squares", "freedom")}
        return {"groups": self.groups, "seen": seen.tolist(), **columns}

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`. Raises ValueError for one of more samples."""
        seen = np.array(state["seen"], np.int64)
        if seen.size and not 0 <= seen.min() <= seen.max() < len(self):
            raise ValueError(f"no such samples in {len(self)}: {seen.min()}..{seen.max()}")
        self.groups = int(state["groups"])
        for name in ("counts", "means", "squares", "freedom"):
            column = np.zeros(len(self))
            column[seen] = state[name]
            setattr(self, name, column)


def without_solved(
    stats: RunningStats, highest: Sequence[float], share: float, *, among: Sequence[int] | None = None, least: int = 1
) -> list[int]:
    """Indices, ascending, of the samples to go on with: those whose mean reward is below ``share`` of the highest that
    they can earn, and those without rewards (Time-R1, arXiv 2503.13377, leaves out IoU above 0.7 after each epoch).

    Args:
        highest: what each sample can earn at most; one with 0 or less always stays.
        share: of it; 0: all samples stay.
        among: the samples that are asked about, ascending; None: all.
        least: where fewer would stay, so many do, those furthest from solved (then the first ones).
    """
    tops = np.asarray(highest, np.float64)
    asked = np.arange(len(stats)) if among is None else np.asarray(among, np.int64)
    if share <= 0:
        return [int(index) for index in asked]
    known = (stats.counts > 0) & (tops > 0)
    reached = np.where(known, stats.means / np.where(tops > 0, tops, 1.0), -np.inf)[asked]
    left = asked[reached < share - EQUAL]
    if len(left) < least:
        left = np.sort(asked[np.argsort(reached, kind="stable")[:least]])
    return [int(index) for index in left]


class SelectedStream:
    """Endless batches of indices like :class:`vrlt_fast.data.stream.BatchStream`, in an order that ``stats`` decides.

    Samples are drawn without putting back in windows. Evenly, a window is an epoch: all samples that are left, in
    random order. ``weighted``, it is WINDOW times as many draws (at least a batch), so that some samples come in every
    window and others rarely: the chance of each draw is in proportion to ``stats.relative() + FLOOR`` among those that
    the window hasn't had (Efraimidis and Spirakis 2006: the largest u^(1 / weight)). At the start of a window samples
    that are ``solved`` leave for good, as :func:`without_solved` says; enough for a batch stay. A batch may span the
    border of two windows; it holds no index twice while so many are left.

    The draws of a batch depend on the seed, on how many batches there were, and on ``stats`` at that time: call
    ``stats.update`` in the same order in each process.

    Args:
        highest: what each sample can earn at most; needed with ``solved``.
    """

    def __init__(
        self,
        stats: RunningStats,
        batch: int,
        seed: int,
        *,
        weighted: bool = True,
        solved: float = 0.0,
        highest: Sequence[float] = (),
    ):
        if len(stats) < 1 or batch < 1:
            raise ValueError(f"samples and batch must be at least 1, not {len(stats)} and {batch}")
        if solved > 0 and len(highest) != len(stats):
            raise ValueError(f"{len(highest)} highest rewards for {len(stats)} samples")
        self.stats, self.batch, self.seed, self.weighted = stats, batch, seed, weighted
        self._solved, self._highest = solved, highest
        self._given, self._rest = 0, 0
        self._open: Flags = np.ones(len(stats), bool)
        self._drawn: Flags = np.zeros(len(stats), bool)

    @property
    def left(self) -> int:
        """How many samples haven't been left out."""
        return int(self._open.sum())

    def next(self) -> list[int]:
        """The next ``batch`` indices."""
        chance = random.Random(f"select-{self.seed}-{self._given}")
        out: list[int] = []
        while len(out) < self.batch:
            if not self._rest:
                self._start_window()
            count = min(self.batch - len(out), self._rest)
            chosen = self._draw(count, out, chance)
            self._drawn[chosen] = True
            self._rest -= count
            out += chosen
        self._given += 1
        return out

    def ahead(self) -> Iterator[list[int]]:
        """The batches that :meth:`next` would give with no further rewards, endless; asking for them moves nothing.

        It looks again when there were further rewards, and never back: each item is of the batch after the last one
        that was told, or of the next one where that has been given already.
        """
        twin, seen, place = self._twin(), self.stats.groups, self._given
        while True:
            place = max(place, self._given)
            if seen != self.stats.groups:
                twin, seen = self._twin(), self.stats.groups
            batch: list[int] = []
            while twin._given <= place:
                batch = twin.next()
            yield batch
            place += 1

    def state(self) -> dict[str, Any]:
        """What :meth:`load` needs to go on after the last batch, as JSON, with the state of ``stats``."""
        return {
            "given": self._given,
            "rest": self._rest,
            "drawn": _packed(self._drawn),
            "open": _packed(self._open),
            "stats": self.stats.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes to the place that ``state`` tells, of a stream that was made with the same arguments; ``stats`` too."""
        drawn, left = (_unpacked(state[name], len(self.stats)) for name in ("drawn", "open"))
        rest = int(state["rest"])
        if not left.any() or not 0 <= rest <= int((left & ~drawn).sum()):
            raise ValueError(f"no such place in a stream of {len(self.stats)} samples: {rest} left of a window")
        self._given, self._rest = int(state["given"]), rest
        self._drawn, self._open = drawn, left
        self.stats.load(state["stats"])

    def _twin(self) -> SelectedStream:
        """A copy to draw from, with the same ``stats``."""
        twin = copy.copy(self)
        twin._drawn, twin._open = self._drawn.copy(), self._open.copy()
        return twin

    def _start_window(self) -> None:
        if self._solved > 0:
            asked = np.flatnonzero(self._open).tolist()
            stays = without_solved(self.stats, self._highest, self._solved, among=asked, least=self.batch)
            self._open = np.zeros(len(self.stats), bool)
            self._open[stays] = True
        self._drawn = np.zeros(len(self.stats), bool)
        whole = self.left
        self._rest = min(whole, max(self.batch, math.ceil(WINDOW * whole))) if self.weighted else whole

    def _draw(self, count: int, beside: Sequence[int], chance: random.Random) -> list[int]:
        """The next indices of the window; none of ``beside`` while there are enough others."""
        fresh = self._open & ~self._drawn
        others = fresh.copy()
        others[list(beside)] = False
        places = np.flatnonzero(others if others.sum() >= count else fresh)
        bits = np.frombuffer(chance.randbytes(8 * len(places)), "<u8")
        waits = -np.log(((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53)
        if self.weighted:
            waits = waits / (self.stats.relative()[places] + FLOOR)
        return [int(index) for index in places[np.argsort(waits, kind="stable")[:count]]]


def _packed(flags: Flags) -> str:
    return np.packbits(flags).tobytes().hex()


def _unpacked(text: str, n: int) -> Flags:
    found = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))
    if len(found) != (n + 7) // 8 * 8 or found[n:].any():
        raise ValueError(f"no such place in a stream of {n} samples: flags of {len(found)}")
    return found[:n].astype(bool)
