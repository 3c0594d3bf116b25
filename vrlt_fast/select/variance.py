"""What a few rewards of a sample say about how much its rewards vary.

All functions take rewards fp64 [samples, k], NaN where a sample has fewer than k, and return a value a sample, NaN
where it can't be known. Nothing here assumes more of the rewards than its docstring says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def counts(rewards: Values) -> Values:
    """How many rewards each sample has."""
    return np.asarray(np.isfinite(rewards).sum(axis=1), np.float64)


def means(rewards: Values) -> Values:
    """Mean reward of each sample."""
    n = counts(rewards)
    return np.asarray(np.nansum(rewards, axis=1) / np.where(n > 0, n, np.nan))


def squares(rewards: Values) -> Values:
    """Sum of squared deviations from the sample's mean. It never falls as further rewards come."""
    return np.asarray(np.nansum((rewards - means(rewards)[:, None]) ** 2, axis=1))


def variances(rewards: Values) -> Values:
    """Unbiased variance: squares / (n - 1), right on average for rewards of any distribution.

    For rewards 0 and 1 it is h (n - h) / (n (n - 1)) with h ones, the exact unbiased estimate of p (1 - p).
    """
    n = counts(rewards)
    return squares(rewards) / np.where(n > 1, n - 1, np.nan)


def c4(k: int) -> float:
    """Mean of the root of the unbiased variance of k normal values, as a share of their standard deviation; below 1,
    for k = 4 0.921, for k = 8 0.965 (Cochran's theorem).
    """
    return math.sqrt(2 / (k - 1)) * math.exp(math.lgamma(k / 2) - math.lgamma((k - 1) / 2))


def deviations(rewards: Values) -> Values:
    """Standard deviation without the bias of a small k, for rewards that are near normal: root of the unbiased variance
    over c4. Rewards 0 and 1 are far from normal: compare their variances instead.
    """
    n = counts(rewards)
    bias = {k: c4(int(k)) for k in np.unique(n) if k > 1}
    return np.asarray(np.sqrt(variances(rewards)) / np.array([bias.get(k, np.nan) for k in n]))


def variance_errors(rewards: Values) -> Values:
    """Squared standard error of :func:`variances`, unbiased for any distribution with n >= 4 rewards.

    (2 n k2^2 + (n - 1) k4) / (n (n + 1)) with the k-statistics k2 and k4 (Kenney and Keeping, Mathematics of
    Statistics 2, section 7). Of one sample it may be negative; average it over samples before taking a root.
    """
    n = counts(rewards)
    n = np.where(n > 3, n, np.nan)
    centred = rewards - means(rewards)[:, None]
    m2, m4 = np.nansum(centred**2, axis=1) / n, np.nansum(centred**4, axis=1) / n
    k2 = m2 * n / (n - 1)
    k4 = n**2 * ((n + 1) * m4 - 3 * (n - 1) * m2**2) / ((n - 1) * (n - 2) * (n - 3))
    return np.asarray((2 * n * k2**2 + (n - 1) * k4) / (n * (n + 1)))


@dataclass(frozen=True)
class Shrunk:
    """Variances drawn towards what is usual for the task, and the root of the mean squared error that is left.

    ``pooled`` is the mean variance within samples of the task, ``kind`` how it was done.
    """

    variances: Values
    errors: Values
    pooled: float
    kind: str


def is_binary(rewards: Values) -> bool:
    """Whether the rewards take two values (or one)."""
    seen = rewards[np.isfinite(rewards)]
    return bool(seen.size == 0 or np.isin(seen, (seen.min(), seen.max())).all())


def shrink(rewards: Values, first: int = 0) -> Shrunk:
    """Empirical Bayes over the samples of one task: beta-binomial where rewards take two values, linear elsewhere.

    Args:
        first: rewards that every sample has, however it went on; the prior is learnt from these alone (0: all k), since
            whether there are more depends on them.
    """
    enough = counts(rewards) >= 2
    seen = rewards[enough][:, : first or None]
    if not len(seen):
        blank = np.full(len(rewards), np.nan)
        return Shrunk(blank, blank.copy(), 0.0, "none")
    if is_binary(rewards):
        return _beta_binomial(rewards, seen)
    return _linear(rewards, seen)


def beta_prior(hits: Values, n: Values) -> tuple[float, float]:
    """Parameters of the Beta distribution of p over samples, by the method of moments from hits of n trials each.

    E[p] = mean of h / n and E[p^2] = mean of h (h - 1) / (n (n - 1)), both unbiased; a + b = m (1 - m) / var - 1,
    kept within [0.01, 1000].
    """
    m = float(np.mean(hits / n))
    spread = float(np.mean(hits * (hits - 1) / (n * (n - 1)))) - m * m
    total = min(max(m * (1 - m) / spread - 1 if spread > 0 else 1000.0, 0.01), 1000.0)
    m = min(max(m, 1e-6), 1 - 1e-6)
    return m * total, (1 - m) * total


def _beta_binomial(rewards: Values, seen: Values) -> Shrunk:
    """Posterior mean and deviation of p (1 - p), times the squared distance of the two values.

    E[p (1-p)] = A B / (T (T+1)) and E[p^2 (1-p)^2] = A (A+1) B (B+1) / (T (T+1) (T+2) (T+3)) with A = a + h,
    B = b + n - h, T = A + B. The posterior depends on hits and trials alone, not on why sampling ended.
    """
    low, high = np.nanmin(rewards), np.nanmax(rewards)
    gap = float(high - low)
    if gap == 0.0:
        zero = np.where(counts(rewards) > 0, 0.0, np.nan)
        return Shrunk(zero, zero.copy(), 0.0, "beta-binomial")
    a, b = beta_prior((seen == high).sum(axis=1).astype(np.float64), counts(seen))
    n = counts(rewards)
    big_a, big_b = a + (rewards == high).sum(axis=1), b + n - (rewards == high).sum(axis=1)
    t = big_a + big_b
    first = big_a * big_b / (t * (t + 1))
    second = big_a * (big_a + 1) * big_b * (big_b + 1) / (t * (t + 1) * (t + 2) * (t + 3))
    known = n > 0
    found = np.where(known, gap**2 * first, np.nan)
    error = np.where(known, gap**2 * np.sqrt(np.maximum(second - first**2, 0.0)), np.nan)
    return Shrunk(found, error, float(np.mean(variances(seen))), "beta-binomial")


def _linear(rewards: Values, seen: Values) -> Shrunk:
    """The best linear estimate (Buehlmann's credibility): v0 + w (v - v0), w = t / (t + e).

    v0 is the mean of the unbiased variances, e the mean of their squared errors, t = var(v) - e what they truly differ
    by, at least 0. A sample with n rewards instead of n0 has e n0 / n. The error that is left is sqrt(w e).
    """
    v, base = variances(seen), float(np.mean(counts(seen)))
    v0 = float(np.mean(v))
    known = variance_errors(seen)
    known = known[np.isfinite(known)]
    # below four rewards their fourth moment isn't known: that of normal ones is taken
    error = float(np.mean(known)) if known.size else float(np.mean(2 * v**2 / (base + 1)))
    between = max(float(np.var(v)) - error, 0.0)
    own = max(error, 0.0) * base / np.maximum(counts(rewards), 1)
    weight = np.where(between + own > 0, between / np.where(between + own > 0, between + own, 1.0), 1.0)
    own_variance = variances(rewards)
    return Shrunk(v0 + weight * (own_variance - v0), np.sqrt(weight * own), v0, "linear")


def relative(found: Shrunk) -> Values:
    """Standard deviations in units of the task's own: sqrt(variance / mean variance within samples of the task).

    Rewards of tasks can't be compared as they are: a right or wrong answer has a deviation of up to half of its range,
    a tIoU mostly a fraction of that, so that dividing by the range would fill a mixed selection with yes-or-no
    questions whatever they teach. In units of the task's usual deviation, 1 is a sample that varies as samples of its
    task do. A task whose samples differ much among themselves still gets more of the top; how many samples a task
    should have is for quotas to say. The order within a task stays. 0 where nothing varies.
    """
    if found.pooled <= 0.0:
        return np.where(np.isfinite(found.variances), 0.0, np.nan)
    return np.sqrt(np.maximum(found.variances, 0.0) / found.pooled)
