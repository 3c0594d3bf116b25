"""Rollouts that processes share: the responses of one process, with a share of its keys and values each."""

from __future__ import annotations

import pytest
import torch

from tests.parallel import shared_rollout, shared_run
from vrlt_fast.config import RolloutConfig
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.rollout.joint import merge

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.usefixtures("one_torch_thread")]


@pytest.mark.parametrize(
    ("size", "family", "rows"),
    [(2, "qwen3_vl", 64), (3, "qwen2_5_vl", 3), pytest.param(4, "qwen2_vl", 64, marks=pytest.mark.slow)],
)
def test_together_they_say_what_one_would(tmp_path, pool, seed, size, family, rows):
    """Also where rows wait for others to end (at most ``rows`` at a time)."""
    folder, config = shared_run.make_model(tmp_path / "model", family), RolloutConfig(max_rows=rows)
    alone = shared_rollout.roll(Peers(), folder, seed, config, 5, 12)
    every = pool(size).run(shared_rollout.roll, folder, seed, config, 5, 12)
    for one in every:
        assert one.tokens == every[0].tokens
        assert all(map(torch.equal, one.logprobs, every[0].logprobs))
        assert one.prefills == 3
    same = [mine == right for mine, right in zip(every[0].tokens, alone.tokens, strict=True)]
    assert sum(same) >= len(same) - 1  # a draw may lie between two tokens but for rounding
    pairs = zip(every[0].logprobs, alone.logprobs, strict=True)
    assert all(torch.allclose(*pair, atol=2e-5) for pair, equal in zip(pairs, same, strict=True) if equal)
    if rows == 64 and all(same):
        assert sum(one.read for one in every) == alone.read
        assert max(one.nbytes for one in every) < alone.nbytes / size * 1.35  # chunks and slots are whole numbers


def test_a_group_too_long_for_one_is_everybodys(tmp_path, pool, seed):
    """A byte decides; what is said is the same, and the same in both."""
    folder = shared_run.make_model(tmp_path / "model", "qwen2_5_vl")
    alone = shared_rollout.roll(Peers(), folder, seed, RolloutConfig(), 2, 8).tokens
    for whole in (True, False):
        (first, shared), (second, also) = pool(2).run(shared_rollout.together, folder, seed, 2, 8, whole)
        assert shared == also == (not whole)
        assert first == second
        assert sum(mine == right for mine, right in zip(first, alone, strict=True)) >= len(alone) - 1


def test_parts_merge_to_the_whole(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 2, 7, generator=generator, dtype=torch.float64) * 30
    values = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    none = torch.cat([torch.zeros(3, 2, 4), torch.full((3, 2, 1), -torch.inf)], dim=-1).double()

    def part(keys):
        s = scores[..., keys]
        return torch.cat([s.softmax(-1) @ values[keys], s.logsumexp(-1, keepdim=True)], dim=-1)

    found = merge(torch.stack([part(slice(0, 2)), none, part(slice(2, 7))]))
    assert torch.allclose(found, part(slice(0, 7)), rtol=1e-12)
    assert torch.equal(merge(torch.stack([none, none]))[..., :4], none[..., :4])
