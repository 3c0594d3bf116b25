"""How far the log-probs of the rollout are from those of the update, token by token: they are meant to be the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LOW, HIGH = 0.8, 1.25


@dataclass
class Mismatch:
    """Sums over tokens of d = logp_train - logp_rollout, in nats."""

    tokens: int = 0
    total: float = 0.0
    most: float = 0.0
    k3: float = 0.0
    outside: int = 0

    def add(self, rollout: torch.Tensor, train: torch.Tensor) -> None:
        """Take the log-probs [n] of some tokens in."""
        gap = (train.detach().double() - rollout.to(train.device).double()).cpu()
        if not len(gap):
            return
        self.tokens += len(gap)
        self.total += float(gap.abs().sum())
        largest = float(gap.abs().max())
        if not math.isnan(self.most):
            self.most = largest if math.isnan(largest) else max(largest, self.most)
        ratio = gap.exp()
        self.k3 += float((ratio - 1 - gap).sum())
        self.outside += int(((ratio < LOW) | (ratio > HIGH)).sum())

    def merge(self, other: Mismatch) -> None:
        """Take another's sums in."""
        self.tokens += other.tokens
        self.total += other.total
        self.most = math.nan if math.isnan(self.most) or math.isnan(other.most) else max(self.most, other.most)
        self.k3 += other.k3
        self.outside += other.outside

    def record(self) -> dict[str, float]:
        """``mean`` and ``max`` |d|, the k3 estimate ``kl`` of KL(rollout || train), and the share ``outside`` of the
        ratios exp(d) that are not in [0.8, 1.25].
        """
        n = max(self.tokens, 1)
        return {"mean": self.total / n, "max": self.most, "kl": self.k3 / n, "outside": self.outside / n}
