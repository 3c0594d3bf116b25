"""Updates that processes share: the steps of one process on the same rollouts, through the optimizer."""

from __future__ import annotations

import pytest
import torch

from tests.parallel import shared_run, shared_update
from vrlt_fast.parallel.sequence import Peers

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.usefixtures("one_torch_thread")]


@pytest.mark.parametrize(
    ("size", "method", "tokens", "recompute"),
    [(2, "gather_kv", 0, True), (3, "gather_kv", 1, False), (2, "ulysses", 0, False)],
)
def test_ten_steps_end_at_the_same_weights(tmp_path, pool, seed, size, method, tokens, recompute):
    """With a reference, several updates of a rollout, and a trained tower; packed and in stages."""
    folder = shared_run.make_model(tmp_path / "model", "qwen2_5_vl")
    alone = shared_update.steps(Peers(), folder, seed, method, tokens, recompute)
    every = pool(size).run(shared_update.steps, folder, seed, method, tokens, recompute)
    for name, right in alone.weights.items():
        for other in every:
            assert torch.equal(other.weights[name], every[0].weights[name]), name
        error, moved = every[0].weights[name] - right, right - alone.start[name]
        assert float(error.abs().max()) < 1e-4, name
        assert float(error.norm()) < 0.05 * float(moved.norm()), name
    for key in ("loss", "kl", "entropy", "tokens", "tokens_trained", "tokens_logical"):
        together = sum(getattr(one.stats, key) for one in every)
        assert together == pytest.approx(getattr(alone.stats, key), rel=1e-3, abs=1e-6), key
    shares = [one.stats.tokens_trained for one in every]
    assert max(shares) < 0.8 * sum(shares)
