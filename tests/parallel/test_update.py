"""Updates that processes share: the steps of one process on the same rollouts, through the optimizer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.parallel import shared_run, shared_update
from tests.parallel.shared_update import Ways
from vrlt_fast.parallel.sequence import Peers

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.usefixtures("one_torch_thread")]


@pytest.mark.parametrize(
    ("size", "ways"),
    [
        (2, Ways(sp=2, recompute=True)),
        (2, Ways(shard=2, micro_tokens=30)),
        (3, Ways(sp=3, shard=3, micro_tokens=1, freeze=True)),
        (4, Ways(sp=2, shard=2, method="ulysses")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (3, Ways(sp=3, micro_tokens=1)),
                (2, Ways(sp=2, method="ulysses")),
                (2, Ways(sp=2, shard=2, recompute=True)),
                (3, Ways(shard=3, states="bfloat16")),
                (4, Ways(sp=2, shard=4, recompute=True)),
                (4, Ways(shard=2, micro_tokens=30)),
            ]
        ),
    ],
    ids=str,
)
def test_ten_steps_end_at_the_same_weights(tmp_path, pool, seed, size, ways):
    """With a reference, several updates of a rollout, and a trained tower; packed and in stages."""
    folder = shared_run.make_model(tmp_path / "model", "qwen2_5_vl")
    if ways.sp == 1:
        shared_run.untie(folder)
    alone = shared_update.steps(Peers(), folder, seed, replace(ways, sp=1, shard=1))
    every = pool(size).run(shared_update.steps, folder, seed, ways)
    for name, gradient in alone.gradients.items():
        error = every[0].gradients[name] - gradient
        assert float(error.abs().max()) < 2e-5 * max(float(gradient.abs().max()), 0.1), name
    assert every[0].gradients.keys() == alone.gradients.keys()
    for name, right in alone.weights.items():
        for other in every:
            assert torch.equal(other.weights[name], every[0].weights[name]), name
        error, moved = every[0].weights[name] - right, right - alone.start[name]
        assert float(error.abs().max()) < 1e-4, name
        assert float(error.norm()) < 0.05 * float(moved.norm()) or torch.equal(error, moved), name  # frozen: no move
    for key in ("loss", "kl", "entropy", "tokens", "tokens_trained", "tokens_logical"):
        together = sum(getattr(one.stats, key) for one in every)
        assert together == pytest.approx(getattr(alone.stats, key), rel=1e-3, abs=1e-6), key
    shares = [one.stats.tokens_trained for one in every]
    assert max(shares) < 0.8 * sum(shares)
