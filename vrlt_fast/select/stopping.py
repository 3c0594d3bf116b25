"""When a sample needs no further responses: its class is clear.

Classes of a sample with k rewards, each as a share of the highest that its task can earn: *informative* where their
unbiased standard deviation is at least FLAT (for rewards 0 and 1: where they aren't all equal), else *right* (mean of a
half or more) or *wrong*. What is asked of a rule that stops after n < k is that the class is the one that all k rewards
would give.

Informative is certain as soon as the squares about the mean reach (k - 1) FLAT^2, because that sum never falls: this
holds for any reward and any order, at an error of 0.

Flat isn't: four equal rewards say little about the next four (under a uniform prior of p the chance that all eight are
equal is 5/9), and no prior that is written down beforehand makes it little or much. So the run measures it. Of the flat
samples of a task and side (right or wrong) that were drawn to the end, x of m left their class; the next one does so
with chance c = (x + 1/2) / (m + 1), the predictive chance of a binomial with Jeffreys' prior, to which its own
deviation sqrt(c (1 - c) / (m + 2)) is added. It assumes that samples come in no particular order, and nothing of the
rewards. With f for the share of such samples among all, stopping them changes f c of all decisions. Kinds stop, the
lowest c first, while the sum of f c is at most the allowed error; one in AUDIT of them goes on, so that c stays honest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import fmean

FLAT = 0.05
"""Standard deviation, as a share of the task's highest reward, below which rewards count as equal."""
AUDIT = 8
"""One in so many flat samples is drawn to the end whatever is known."""
INFORMATIVE, RIGHT, WRONG = "informative", "right", "wrong"


def squares(rewards: Sequence[float]) -> float:
    """Sum of squared deviations from the mean."""
    mean = fmean(rewards)
    return sum((r - mean) ** 2 for r in rewards)


def class_of(shares: Sequence[float], k: int) -> str:
    """The class of a sample by the rewards that it has (as shares of the highest), ``k`` being those it could have."""
    if squares(shares) >= (k - 1) * FLAT**2:
        return INFORMATIVE
    return RIGHT if fmean(shares) >= 0.5 else WRONG


Kind = tuple[str, str]
"""Task and side of flat samples."""


@dataclass
class Stopping:
    """The rule, with what it has learnt. ``repeats`` is k, ``first`` n, ``error`` the share of all samples that may get
    another class than all k rewards would give them.
    """

    repeats: int
    first: int
    error: float
    seen: int = 0
    flat: dict[Kind, int] = field(default_factory=lambda: defaultdict(int))
    tried: dict[Kind, int] = field(default_factory=lambda: defaultdict(int))
    left: dict[Kind, int] = field(default_factory=lambda: defaultdict(int))
    _stopped: frozenset[Kind] | None = None

    @property
    def waves(self) -> bool:
        """Whether there are two waves at all."""
        return 0 < self.first < self.repeats

    def chance(self, kind: Kind) -> float:
        """That a flat sample of this kind would leave its class, plus the deviation of what is known of it."""
        m = self.tried[kind]
        c = (self.left[kind] + 0.5) / (m + 1)
        return c + sqrt(c * (1 - c) / (m + 2))

    def stopped(self) -> frozenset[Kind]:
        """The kinds of flat samples that stop after the first wave."""
        if self._stopped is None:
            rest, found = self.error, []
            for kind in sorted(self.flat, key=lambda kind: (self.chance(kind), kind)):
                cost = self.chance(kind) * self.flat[kind] / self.seen
                if cost <= rest:
                    rest -= cost
                    found.append(kind)
            self._stopped = frozenset(found)
        return self._stopped

    def clear(self, task: str, shares: Sequence[float], ticket: int) -> bool:
        """Whether a sample can stop after its first wave; ``ticket`` is a number that belongs to it, for the audit."""
        side = class_of(shares, self.repeats)
        return side == INFORMATIVE or (ticket % AUDIT > 0 and (task, side) in self.stopped())

    def learn(self, task: str, shares: Sequence[float]) -> None:
        """Take in a sample that was drawn, whether it stopped or not."""
        self.seen += 1
        self._stopped = None
        kind = (task, class_of(shares[: self.first], self.repeats))
        if kind[1] == INFORMATIVE:
            return
        self.flat[kind] += 1
        if len(shares) == self.repeats:
            self.tried[kind] += 1
            self.left[kind] += class_of(shares, self.repeats) != kind[1]
