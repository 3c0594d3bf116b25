"""Decode steps by the compiled layer: when they are taken, and that they are those of transformers' modules."""

from __future__ import annotations

import pytest
import torch

from vrlt_fast.rollout.cpu_step import _say, cpu_step
from vrlt_fast.rollout.engine import GroupEngine
from vrlt_fast.rollout.group import RolloutRequest
from vrlt_fast.rollout.sampler import Sampling
from vrlt_kernels import availability, use_backend

pytestmark = pytest.mark.skipif(bool(availability()["native"]), reason=availability()["native"])


def rollouts(engine: GroupEngine, prompts, length: int = 9):
    requests = [RolloutRequest(p, 3, Sampling(length, 1.0), seed=i) for i, p in enumerate(prompts)]
    return [c for g in engine.generate(requests)[0] for c in g.completions]


def test_same_as_the_modules(lm, prompts):
    engine = GroupEngine(lm)
    assert cpu_step(lm) is not None
    ours = rollouts(engine, prompts)
    with use_backend("reference"):
        assert cpu_step(lm) is None
        theirs = rollouts(engine, prompts)
    assert [c.tokens for c in ours] == [c.tokens for c in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=5e-5, rtol=1e-5)


def test_changed_and_replaced_weights_are_used(lm, prompts):
    engine, layer = GroupEngine(lm), lm.module.model.language_model.layers[0].mlp
    before, kept = rollouts(engine, prompts[:1]), layer.down_proj.weight
    try:
        with torch.no_grad():
            kept.mul_(3)
        changed = rollouts(engine, prompts[:1])
        with torch.no_grad():
            kept.div_(3)
        layer.down_proj.weight = torch.nn.Parameter(kept.detach() * 3)
        replaced = rollouts(engine, prompts[:1])
    finally:
        layer.down_proj.weight = kept
    assert [c.tokens for c in changed] == [c.tokens for c in replaced] != [c.tokens for c in before]


def test_hooks_and_replaced_layers_are_called(lm, prompts, caplog):
    """What somebody put into the model runs, as the modules do."""
    calls, text = [], lm.module.model.language_model
    hook = text.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    _say.cache_clear()
    try:
        with caplog.at_level("INFO", "vrlt_fast"):
            assert cpu_step(lm) is None
        assert "transformers' modules: 0.mlp is replaced, has a hook" in caplog.text
        rollouts(GroupEngine(lm), prompts[:1], length=4)
        assert len(calls) == 4, "a prefill and three steps"
    finally:
        hook.remove()

    layer, linear = text.layers[1], torch.nn.Linear

    class Adapted(linear):
        pass

    for parent, name, other in (
        (layer.self_attn, "q_proj", Adapted(192, 192)),
        (layer.mlp, "down_proj", linear(layer.mlp.down_proj.in_features, 192)),
        (layer.mlp, "act_fn", torch.nn.GELU()),
        (layer, "input_layernorm", torch.nn.LayerNorm(192)),
        (text, "norm", torch.nn.RMSNorm(192)),
    ):
        plain = getattr(parent, name)
        setattr(parent, name, other)
        try:
            assert cpu_step(lm) is None, name
        finally:
            setattr(parent, name, plain)
    layer.input_layernorm.variance_epsilon *= 2
    assert cpu_step(lm) is None
    layer.input_layernorm.variance_epsilon /= 2
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert cpu_step(lm) is None
    hook.remove()
    assert cpu_step(lm) is not None
