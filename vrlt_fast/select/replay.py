"""Groups with signal of earlier steps, to stand in for groups without (VL-Rethinker's Selective Sample Replay, arXiv
2504.08837).

There, responses are drawn one by one in proportion to |advantage|^alpha; here whole groups are, by the mean of it, as a
prompt is computed once for its group. (Released code: github.com/TIGER-AI-Lab/VL-Rethinker resamples within the
responses of one step, with alpha 1.) What a replayed group needs to be trained on is what a rollout has: its tokens,
its advantages as they were, and the log-probs of the policy that wrote it, which is not today's: the ratio isn't 1 at
the first update, so that these log-probs must be the old ones of the loss, and its clip bounds how far an old group
can push.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def priority(advantages: Sequence[float], alpha: float = 1.0) -> float:
    """``(mean |advantage|) ^ alpha`` of a group's responses that are trained; 0.0 where there is no signal."""
    mean = math.fsum(map(abs, advantages)) / len(advantages) if advantages else 0.0
    return mean**alpha if mean > 0 else 0.0


@dataclass(frozen=True)
class _Held(Generic[T]):
    entry: T
    priority: float
    step: int


class Replay(Generic[T]):
    """At most ``size`` entries, the newest ones, each under a number of its own.

    Drawing changes nothing but the count of draws: an entry may come again in later steps, until newer ones push it
    out.
    """

    def __init__(self, size: int, seed: int):
        if size < 0:
            raise ValueError(f"size must be at least 0, not {size}")
        self.size, self.seed = size, seed
        self._added, self._draws = 0, 0
        self._held: dict[int, _Held[T]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, entry: T, priority: float, step: int) -> None:
        """Keep a group that was rolled out in ``step``; one of priority 0, that has no signal, isn't kept.

        Raises ValueError for a priority below 0, or not finite.
        """
        if not (math.isfinite(priority) and priority >= 0):
            raise ValueError(f"priority must be a number of at least 0, not {priority}")
        if priority == 0 or self.size == 0:
            return
        self._held[self._added] = _Held(entry, priority, step)
        self._added += 1
        if len(self._held) > self.size:
            del self._held[min(self._held)]

    def take(self, count: int, step: int) -> list[T]:
        """As many entries as the groups of ``step`` without signal, or all there are, in the order they were drawn.

        Each draw is in proportion to the priorities of those left, without putting back. Groups of ``step`` itself, and
        later ones, aren't drawn: they are trained on anyway.
        """
        chance = random.Random(f"replay-{self.seed}-{self._draws}")
        self._draws += 1
        # Efraimidis and Spirakis: the first to come of exponential waiting times, whose rates are the priorities
        waits = {number: -math.log(1.0 - chance.random()) / held.priority for number, held in self._held.items()}
        earlier = [number for number, held in self._held.items() if held.step < step]
        return [self._held[number].entry for number in sorted(earlier, key=waits.__getitem__)[: max(count, 0)]]

    def entries(self) -> dict[int, T]:
        """The entries by their numbers, oldest first: what the checkpoint has to keep beside :meth:`state`."""
        return {number: held.entry for number, held in self._held.items()}

    def state(self) -> dict[str, Any]:
        """All but the entries, for the checkpoint, as JSON."""
        return {
            "added": self._added,
            "draws": self._draws,
            "held": [[number, held.priority, held.step] for number, held in self._held.items()],
        }

    def load(self, state: dict[str, Any], entries: Mapping[int, T]) -> None:
        """Inverse of :meth:`state` and :meth:`entries`. Raises ValueError where they don't fit each other."""
        told = [(int(number), float(priority), int(step)) for number, priority, step in state["held"]]
        if {number for number, _, _ in told} != set(entries):
            raise ValueError(f"{len(told)} replayed groups in the state, {len(entries)} beside it, or others")
        self._added, self._draws = int(state["added"]), int(state["draws"])
        kept = told[max(len(told) - self.size, 0) :]
        self._held = {number: _Held(entries[number], priority, step) for number, priority, step in kept}
