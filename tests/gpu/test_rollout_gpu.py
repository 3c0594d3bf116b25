"""Rollouts on a CUDA device: graphs against plain steps, weights that change in place, one captured step a bucket."""

from __future__ import annotations

import pytest
import torch

from bench.rollout_arms import make_model, make_prompt
from vrlt_fast.config import RolloutConfig
from vrlt_fast.rollout.engine import GroupEngine
from vrlt_fast.rollout.group import RolloutRequest
from vrlt_fast.rollout.sampler import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def lm():
    return make_model("demo", torch.device("cuda"), 4096)


def requests(lm, n=(5, 1, 3)):
    prompts = [make_prompt(lm, 300 + 100 * i, i) for i in range(len(n))]
    return [RolloutRequest(p, k, Sampling(12, 1.0), seed=i) for i, (p, k) in enumerate(zip(prompts, n, strict=True))]


def assert_same(found, expected):
    for group, right in zip(found, expected, strict=True):
        for mine, other in zip(group.completions, right.completions, strict=True):
            assert mine.tokens == other.tokens
            torch.testing.assert_close(mine.logprobs, other.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("budget", [0.0, 0.003])
def test_graphs_give_what_plain_steps_give(lm, budget):
    work = requests(lm)
    plain, _ = GroupEngine(lm, RolloutConfig(cuda_graphs=False)).generate(work)
    engine = GroupEngine(lm, RolloutConfig(kv_gb=budget))
    for _ in range(2):  # captured, then replayed
        assert_same(engine.generate(work)[0], plain)


def test_weights_updated_in_place_keep_graphs_valid(lm):
    work, engine = requests(lm), GroupEngine(lm)
    first, _ = engine.generate(work)
    captured = dict(engine._decoder._captured)
    saved = {name: p.detach().clone() for name, p in lm.module.named_parameters()}
    with torch.no_grad():
        for p in lm.module.parameters():
            p.mul_(0.9)
    changed, _ = engine.generate(work)
    assert all(engine._decoder._captured[key][0] is graph for key, (graph, *_) in captured.items())
    assert_same(changed, GroupEngine(lm, RolloutConfig(cuda_graphs=False)).generate(work)[0])
    with torch.no_grad():
        for name, p in lm.module.named_parameters():
            p.copy_(saved[name])
    assert_same(engine.generate(work)[0], first)


def test_weights_that_moved_are_captured_anew(lm):
    work, engine = requests(lm), GroupEngine(lm)
    engine.generate(work)
    captured = dict(engine._decoder._captured)
    for p in lm.module.parameters():
        p.data = 0.9 * p.data
    again, _ = engine.generate(work)
    assert all(engine._decoder._captured[key][0] is not graph for key, (graph, *_) in captured.items())
    assert_same(again, GroupEngine(lm, RolloutConfig(cuda_graphs=False)).generate(work)[0])
