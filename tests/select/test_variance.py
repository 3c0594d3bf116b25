"""Estimates of variances against brute force and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vrlt_fast.select import variance


def every_outcome(p: float, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All rows of k rewards 0 and 1, and their chances."""
    rows = np.array(list(itertools.product((0.0, 1.0), repeat=k)))
    hits = rows.sum(axis=1)
    return rows, p**hits * (1 - p) ** (k - hits)


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("p", [0.03, 0.4, 0.9])
def test_variance_of_zeros_and_ones_is_exactly_unbiased(p, k):
    rows, chances = every_outcome(p, k)
    assert chances @ variance.variances(rows) == pytest.approx(p * (1 - p))
    hits = rows.sum(axis=1)
    np.testing.assert_allclose(variance.variances(rows), hits * (k - hits) / (k * (k - 1)), atol=1e-12)


@pytest.mark.parametrize("k", [4, 6, 8])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_error_of_the_variance_is_exactly_unbiased(p, k):
    rows, chances = every_outcome(p, k)
    true = chances @ (variance.variances(rows) - p * (1 - p)) ** 2
    assert chances @ variance.variance_errors(rows) == pytest.approx(true)


def test_deviation_of_normal_rewards_by_simulation(seed):
    rewards = np.random.default_rng(seed).normal(3.0, 0.7, size=(200_000, 4))
    assert np.sqrt(variance.variances(rewards)).mean() == pytest.approx(0.7 * variance.c4(4), rel=5e-3)
    assert variance.deviations(rewards).mean() == pytest.approx(0.7, rel=5e-3)
    assert variance.c4(4) == pytest.approx(2 * math.sqrt(2 / (3 * math.pi)))
    assert variance.variance_errors(rewards).mean() == pytest.approx(variance.variances(rewards).var(), rel=0.03)


def test_missing_rewards_count_for_nothing(seed):
    rewards = np.random.default_rng(seed).random((50, 8))
    short = rewards.copy()
    short[:, 5:] = np.nan
    for function in (variance.means, variance.variances, variance.deviations, variance.variance_errors):
        np.testing.assert_allclose(function(short), function(rewards[:, :5]))
    blank = np.full((1, 8), np.nan)
    assert np.isnan(variance.variances(blank)).all()
    blank[0, 0] = 0.5
    assert np.isnan(variance.variances(blank)).all()


def test_beta_prior_is_found_again(seed):
    rng = np.random.default_rng(seed)
    p = rng.beta(0.6, 1.5, size=100_000)
    n = np.full(len(p), 4.0)
    a, b = variance.beta_prior(rng.binomial(4, p).astype(float), n)
    assert a == pytest.approx(0.6, rel=0.05)
    assert b == pytest.approx(1.5, rel=0.05)


def test_beta_binomial_posterior_against_a_grid(seed):
    rng = np.random.default_rng(seed)
    p = rng.beta(0.5, 0.8, size=400)
    rewards = (rng.random((400, 8)) < p[:, None]).astype(float)
    rewards[::2, 4:] = np.nan
    found = variance.shrink(rewards, first=4)
    assert found.kind == "beta-binomial"
    a, b = variance.beta_prior(rewards[:, :4].sum(axis=1), np.full(400, 4.0))
    grid = (np.arange(200_000) + 0.5) / 200_000
    for row in (0, 1, 7):
        known = rewards[row][np.isfinite(rewards[row])]
        hits, misses = known.sum(), len(known) - known.sum()
        log = (a + hits - 1) * np.log(grid) + (b + misses - 1) * np.log1p(-grid)
        weight = np.exp(log - log.max())
        weight /= weight.sum()
        mean = weight @ (grid * (1 - grid))
        deviation = math.sqrt(weight @ (grid * (1 - grid) - mean) ** 2)
        assert found.variances[row] == pytest.approx(mean, rel=1e-2)
        assert found.errors[row] == pytest.approx(deviation, rel=2e-2)


@pytest.mark.parametrize("binary", [True, False])
def test_shrinking_is_nearer_to_the_truth(seed, binary):
    rng = np.random.default_rng(seed)
    if binary:
        p = rng.beta(0.7, 0.7, size=4000)
        true, rewards = p * (1 - p), (rng.random((4000, 8)) < p[:, None]).astype(float)
    else:
        spread = rng.uniform(0.05, 0.3, size=4000)
        true, rewards = spread**2, rng.normal(0.5, spread[:, None], size=(4000, 8))
    found, plain = variance.shrink(rewards), variance.variances(rewards)
    before, after = ((plain - true) ** 2).mean(), ((found.variances - true) ** 2).mean()
    assert after < 0.8 * before
    assert (found.errors**2).mean() == pytest.approx(after, rel=0.25)
    assert found.variances.mean() == pytest.approx(true.mean(), rel=0.05)


def test_samples_that_do_not_differ_are_drawn_together(seed):
    rewards = np.random.default_rng(seed).normal(size=(2000, 8))
    found = variance.shrink(rewards)
    assert found.variances.std() < 0.2 * variance.variances(rewards).std()
    assert variance.relative(found).mean() == pytest.approx(1.0, rel=0.02)


def test_relative_deviations_do_not_depend_on_the_scale_of_a_task(seed):
    rewards = np.random.default_rng(seed).random((300, 8)) ** 3
    a, b = (variance.relative(variance.shrink(rewards * scale)) for scale in (1.0, 0.01))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    assert (variance.relative(variance.shrink(np.ones((5, 4)))) == 0).all()
    assert np.isnan(variance.relative(variance.shrink(np.full((5, 4), np.nan)))).all()
