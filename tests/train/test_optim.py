"""Schedules by hand, parameter groups, and the step that refuses what isn't finite."""

from __future__ import annotations

import math
import random

import pytest
import torch

from vrlt_fast.config import OptimConfig
from vrlt_fast.train.optim import apply_step, constant_lr, cosine_lr, make_optimizer, named_trainable


def test_schedules_by_hand():
    assert [cosine_lr(s, 10, 2.0, 4) for s in (1, 2, 4)] == pytest.approx([0.5, 1.0, 2.0])
    assert cosine_lr(7, 10, 2.0, 4) == pytest.approx(2.0 * 0.55)
    assert cosine_lr(10, 10, 2.0, 4) == pytest.approx(0.2)
    assert cosine_lr(1, 1, 2.0, 0) == pytest.approx(0.2)
    assert [constant_lr(s, 10, 2.0, 4) for s in (1, 3, 4, 10)] == pytest.approx([0.5, 1.5, 2.0, 2.0])
    assert constant_lr(1, 10, 2.0, 0) == 2.0


def set_gradients(lm, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for _, p in named_trainable(lm):
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * scale


def test_decay_falls_on_matrices_only_and_frozen_weights_stay_out(lm):
    lm.module.model.visual.requires_grad_(False)
    optimizer = make_optimizer(lm, OptimConfig(weight_decay=0.5), lr=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for n, p in lm.module.named_parameters() if ".visual." not in n}
    before = {n: p.detach().clone() for n, p in lm.module.named_parameters()}
    for _, p in named_trainable(lm):
        p.grad = torch.zeros_like(p)
    assert apply_step(lm, optimizer, 0.0, 0.1, 1.0) == 0.0
    for name, p in lm.module.named_parameters():
        decays = p.ndim >= 2 and ".visual." not in name
        assert torch.allclose(p, before[name] * (0.95 if decays else 1.0), rtol=1e-12), name


def test_norm_is_reported_and_clipped(lm, seed):
    set_gradients(lm, seed)
    expected = math.sqrt(sum(float(p.grad.square().sum()) for _, p in named_trainable(lm)))
    optimizer = make_optimizer(lm, OptimConfig(betas=(0.9, 0.999)), lr=9.0)
    assert apply_step(lm, optimizer, 1.0, 0.5, grad_clip=0.25) == pytest.approx(expected)
    first_moment = math.sqrt(sum(float(s["exp_avg"].square().sum()) for s in optimizer.state.values()))
    assert first_moment == pytest.approx(0.1 * 0.25, rel=1e-4)
    assert all(group["lr"] == 0.5 for group in optimizer.param_groups)
    assert all(p.grad is None for _, p in named_trainable(lm))


def test_small_steps_of_bf16_weights_are_not_lost(lm, seed):
    lm.module.to(torch.bfloat16)
    optimizer = make_optimizer(lm, OptimConfig(weight_decay=0.0), lr=1e-6)
    start = {n: m.clone() for n, m in optimizer.masters.items()}
    for step in range(3):
        set_gradients(lm, seed + step)
        apply_step(lm, optimizer, 1.0, 1e-6, 1.0)
    assert len(optimizer.copies()) == len(start)
    for name, parameter in named_trainable(lm):
        master = optimizer.masters[name]
        assert master.dtype == torch.float32
        assert float((master != start[name]).float().mean()) > 0.9, name
        assert torch.equal(parameter.detach(), master.detach().to(torch.bfloat16)), name

    other = make_optimizer(lm, OptimConfig(), lr=1e-6)
    other.load_copies(optimizer.copies())
    assert all(torch.equal(other.masters[n], m) for n, m in optimizer.masters.items())


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(lm, seed, bad):
    optimizer = make_optimizer(lm, OptimConfig(), lr=0.1)
    set_gradients(lm, seed)
    apply_step(lm, optimizer, 1.0, 0.1, 1.0)
    weights = [p.detach().clone() for p in lm.module.parameters()]
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    set_gradients(lm, seed + 1)
    rng = random.Random(seed)
    if bad == "gradient":
        victim = rng.choice(named_trainable(lm))[1].grad.view(-1)
        victim[rng.randrange(len(victim))] = rng.choice([math.nan, math.inf])
    norm = apply_step(lm, optimizer, math.nan if bad == "loss" else 1.0, 0.1, 1.0)
    assert math.isfinite(norm) == (bad == "loss")
    assert all(torch.equal(a, b) for a, b in zip(weights, lm.module.parameters(), strict=True))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, optimizer.state.values(), strict=True))
    assert all(p.grad is None for _, p in named_trainable(lm))
