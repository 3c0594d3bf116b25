"""Schedules by hand, parameter groups, and the step that refuses what isn't finite."""

from __future__ import annotations

import math
import random

import pytest
import torch

from vrlt_fast.config import OptimConfig
from vrlt_fast.train import optim as module
from vrlt_fast.train.checkpoint import load_optimizer_tensors, optimizer_tensors
from vrlt_fast.train.optim import MasterAdamW, apply_step, constant_lr, cosine_lr, make_optimizer, named_trainable


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


NARROW = OptimConfig(states="bfloat16", weight_decay=0.1)
SHAPES = [(), (0,), (1,), (7,), (3, 5), (65, 33), (2, 3, 5)]


def odd_parameters(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    return [(f"p{i}", torch.nn.Parameter(tensor)) for i, tensor in enumerate(made)]


def steps(optimizer, seed, numbers, scale=1.0):
    """Steps with gradients of mean 0.3 and deviation 1 that depend on ``seed`` and the step's number."""
    for number in numbers:
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        for parameter in optimizer.parameters.values():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) + 0.3
            parameter.grad = (gradient * scale).to(parameter.dtype)
        optimizer.update()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_in_bf16_are_right_in_the_mean(seed, dtype):
    """Against fp64: each moment off by a rounding, all of them together by next to nothing; the weights go along."""
    ours = MasterAdamW(odd_parameters(seed, dtype), NARROW, 1e-3, seed)
    exact = [(n, torch.nn.Parameter(m.detach().double())) for n, m in ours.masters.items()]
    right = MasterAdamW(exact, NARROW.model_copy(update={"states": "float32"}), 1e-3)
    start = {name: m.detach().clone() for name, m in right.masters.items()}
    for number in range(200):
        steps(ours, seed, [number])
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        for parameter in right.parameters.values():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) + 0.3
            parameter.grad = gradient.to(dtype).double()
        right.update()
    for name, master in ours.masters.items():
        state, expected = ours.state[master], right.state[right.masters[name]]
        assert state["step"] == 200
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert state["exp_avg"].shape == master.shape
        if master.numel() < 1000:
            continue
        for key, most in (("exp_avg", 0.02), ("exp_avg_sq", 0.05)):
            gap = state[key].double() - expected[key]
            size = float(expected[key].square().mean().sqrt())
            assert float(gap.square().mean().sqrt()) < most * size, key
            assert abs(float(gap.mean())) < most * size / 8, key
        moved, expected_move = master.detach() - start[name], right.masters[name].detach() - start[name]
        assert float((moved - expected_move).norm()) < 0.03 * float(expected_move.norm())


def test_the_second_moment_decays_and_rounding_to_the_nearest_would_not(seed):
    optimizer = MasterAdamW([("w", torch.nn.Parameter(torch.zeros(4096)))], NARROW, 1e-3, seed)
    steps(optimizer, seed, [0], scale=10.0)
    state = optimizer.state[optimizer.masters["w"]]
    before, stuck = state["exp_avg_sq"].double(), state["exp_avg_sq"].clone()
    for _ in range(500):
        optimizer.parameters["w"].grad = torch.zeros(4096)
        optimizer.update()
        stuck = (stuck.float() * 0.999).to(torch.bfloat16)
    assert float((stuck.double() / before).min()) > 0.9
    assert float(state["exp_avg_sq"].double().sum() / before.sum()) == pytest.approx(0.999**500, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_in_bf16_resume_bit_by_bit(seed, dtype):
    whole, before = (MasterAdamW(odd_parameters(seed, dtype), NARROW, 1e-2, seed) for _ in range(2))
    steps(whole, seed, range(6))
    steps(before, seed, range(3))
    saved = {**optimizer_tensors(before, before.masters), **before.copies()}
    assert {t.dtype for k, t in saved.items() if "/exp_avg" in k} == {torch.bfloat16}
    weights = [(n, torch.nn.Parameter(p.detach().clone())) for n, p in before.parameters.items()]
    after = MasterAdamW(weights, NARROW, 1e-2, seed)
    load_optimizer_tensors(after, after.masters, saved)
    after.load_copies(saved)
    torch.rand(3)  # the global generator has no part in it
    steps(after, seed, range(3, 6))
    ours = {**optimizer_tensors(after, after.masters), **after.masters, **after.copies()}
    theirs = {**optimizer_tensors(whole, whole.masters), **whole.masters, **whole.copies()}
    assert ours.keys() == theirs.keys()
    assert [k for k, t in theirs.items() if not torch.equal(ours[k], t)] == []


def test_pieces_and_seeds_change_the_rounding_alone(seed, monkeypatch):
    def run(named, salt):
        optimizer = MasterAdamW(named, NARROW, 1e-2, salt)
        steps(optimizer, seed, range(4))
        return optimizer

    whole, other = run(odd_parameters(seed), seed), run(odd_parameters(seed), seed + 1)
    rng = torch.get_rng_state()
    monkeypatch.setattr(module, "PIECE", 64)
    pieces = run(odd_parameters(seed), seed)
    assert torch.equal(rng, torch.get_rng_state())
    for name, weight in whole.masters.items():  # other random numbers behind the first piece
        assert torch.equal(weight.view(-1)[:64], pieces.masters[name].view(-1)[:64])
        assert torch.allclose(weight, pieces.masters[name], atol=2e-3)
    assert not torch.equal(whole.masters["p5"], other.masters["p5"])
    assert torch.allclose(whole.masters["p5"], other.masters["p5"], atol=2e-3)


def test_parameters_without_a_gradient_keep_weights_and_states(seed):
    optimizer = MasterAdamW(odd_parameters(seed), NARROW, 1e-2, seed)
    steps(optimizer, seed, [0])
    before = {k: t.clone() for k, t in optimizer_tensors(optimizer, optimizer.masters).items()}
    weight = optimizer.masters["p3"].detach().clone()
    for name, parameter in optimizer.parameters.items():
        parameter.grad = None if name == "p3" else torch.ones_like(parameter)
    optimizer.update()
    after = optimizer_tensors(optimizer, optimizer.masters)
    assert torch.equal(optimizer.masters["p3"], weight)
    assert all(torch.equal(after[k], t) for k, t in before.items() if "/p3/" in k)
    assert after["optimizer/p5/step"] == 2
    assert all(p.grad is None for p in optimizer.parameters.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", ["float32", "bfloat16"])
def test_states_in_host_memory_step_as_others_do(seed, dtype, states):
    """On a CPU too they are copies: the weights follow them, and a checkpoint is the same."""
    settings = OptimConfig(states=states, weight_decay=0.1)
    near, far = (
        MasterAdamW(odd_parameters(seed, dtype), s, 1e-2, seed)
        for s in (settings, settings.model_copy(update={"offload": True}))
    )
    for optimizer in (near, far):
        steps(optimizer, seed, range(4))
    for name, parameter in far.parameters.items():
        assert torch.equal(parameter, near.parameters[name])
        assert torch.equal(far.masters[name], near.masters[name])
        assert not parameter.numel() or far.masters[name].data_ptr() != parameter.data_ptr()
    assert far.copied == near.copied
    saved = [{**optimizer_tensors(o, o.masters), **o.copies()} for o in (near, far)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


def test_pieces_of_a_shard_are_parts_of_the_whole_parameters(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 10)
    assert list(module._pieces(0, 25)) == [(0, 0, slice(0, 10)), (10, 0, slice(10, 20)), (20, 0, slice(20, 25))]
    assert list(module._pieces(7, 6)) == [(0, 7, slice(0, 3)), (10, 0, slice(3, 6))]
    assert list(module._pieces(12, 0)) == []
