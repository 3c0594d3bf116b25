"""Which cached clips make room for another one: those that are used again last.

Where the order of use is known, a clip is never evicted for one that is used later (Belady's rule, with bypass). Where
it isn't, what is cached stays, except for one newcomer in 32 and for entries idle for very long: a scan over more than
the budget, which a training epoch is, then still finds most of what fits, and LRU would find nothing.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

SLACK = 256
"""How far ahead of its place in the order a use may come and still count as that place."""
RARE = 32
"""One of so many newcomers of unknown future replaces the least recently used entry of unknown future."""
IDLE = 8
"""Budgets' worth of bytes asked for, after which an entry of unknown future that wasn't is given up."""


def hint(path: Path | str) -> str:
    """16 hexadecimal digits for a path: which clip an entry belongs to, for eviction only."""
    return hashlib.blake2b(str(path).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


class Horizon:
    """The known order of future uses, and the past in bytes asked for. Safe to use from several threads."""

    def __init__(self) -> None:
        self.clock = 0
        self._lock = threading.Lock()
        self._places: dict[str, list[int]] = {}
        self._now = self._slack = 0

    def expect(self, order: Iterable[Path | str]) -> None:
        """Replace the order of future uses by these paths, the next one first."""
        places: dict[str, list[int]] = {}
        for place, path in enumerate(order):
            places.setdefault(hint(path), []).append(place)
        with self._lock:
            self._places, self._now, self._slack = places, 0, min(SLACK, len(places) // 2)

    def used(self, name: str, nbytes: int) -> None:
        """A clip of the hint ``name`` with so many bytes is asked for now."""
        with self._lock:
            self.clock += nbytes
            place = self._next(name)
            if place is not None and place - self._now <= self._slack:
                self._now = place + 1

    def distance(self, name: str) -> float:
        """Uses until the clip of this hint is used again; infinite where that isn't known."""
        with self._lock:
            place = self._next(name)
            return float("inf") if place is None else place - self._now

    def _next(self, name: str) -> int | None:
        places = self._places.get(name, [])
        at = bisect_left(places, self._now)
        return places[at] if at < len(places) else None


@dataclass
class Entry:
    """What eviction knows of an entry: bytes, the hint of its path, the horizon's clock at its last use."""

    size: int
    hint: str
    last: int


class Evictor:
    """Chooses victims for one tier."""

    def __init__(self, horizon: Horizon):
        self._horizon, self._newcomers = horizon, 0

    def victims(
        self, new: Entry, budget: int, entries: Mapping[str, Entry], *, admitted: bool = False
    ) -> list[str] | None:
        """Names to evict so that ``new`` fits into ``budget`` bytes; None when it isn't worth it. ``admitted``: it was
        found worth it before, among entries of unknown future.
        """
        if new.size > budget:
            return None
        excess = sum(entry.size for entry in entries.values()) + new.size - budget
        if excess <= 0:
            return []
        later = self._horizon.distance(new.hint)
        ranked = sorted(
            ((self._horizon.distance(entry.hint), -entry.last, name) for name, entry in entries.items()), reverse=True
        )
        unknown = later == float("inf")
        if unknown and not admitted:
            self._newcomers += 1
            admitted = self._newcomers % RARE == 0
        chosen = []
        for distance, last, name in ranked:
            idle = self._horizon.clock + last > IDLE * budget
            if distance < later or (distance == later and not (unknown and (idle or admitted))):
                return None
            chosen.append(name)
            excess -= entries[name].size
            if excess <= 0:
                return chosen
        return None
