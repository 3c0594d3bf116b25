"""The GRPO gradient: by hand from replicated rows, across micro-batches, and its edge cases."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch

from vrlt_fast.config import OptimConfig
from vrlt_fast.config_rl import GrpoConfig
from vrlt_fast.model.load import VideoLM, enable_recompute
from vrlt_fast.model.vision import StepVision, normalise
from vrlt_fast.rollout.engine import GroupEngine, generate
from vrlt_fast.rollout.group import RolloutRequest
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.train.optim import apply_step, make_optimizer
from vrlt_fast.train.passes import How
from vrlt_fast.train.plan import update_units
from vrlt_fast.train.scored import StepSize, with_gradient, with_rewards
from vrlt_fast.train.step import grpo_backward, score_old

T = 1.3


def gradients(lm):
    found = {n: p.grad.clone() for n, p in lm.module.named_parameters() if p.grad is not None}
    lm.module.zero_grad()
    return found


def same(ours, expected, rel):
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((ours[name] - gradient).norm()) <= rel * float(gradient.norm()) + 1e-10, name


def row_logprobs(lm, prompt, tokens):
    """Log-probs [n] of a response at temperature T by transformers' forward over the whole row."""
    ids = torch.cat([prompt.ids, torch.tensor(tokens)])[None]
    after = torch.arange(len(tokens)).expand(3, -1) + prompt.next_position
    logits = lm.module(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.cat([prompt.positions, after], dim=1)[:, None],
        pixel_values_videos=normalise(lm, prompt.clip.patches),
        video_grid_thw=torch.tensor([prompt.clip.grid]),
    ).logits[0, len(prompt) - 1 : -1]
    return (logits / T).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def perturbed(lm, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    other = VideoLM(lm.info, copy.deepcopy(lm.module))
    with torch.no_grad():
        for p in other.module.parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return other


@pytest.fixture
def groups(lm, prompts, seed):
    """Four groups, of 2, 4, 3 and 4 responses."""
    requests = [(prompts[0], 2), (prompts[1], 4), (prompts[4], 3), (prompts[5], 4)]
    out = []
    for i, (prompt, n) in enumerate(requests):
        rolled, _ = generate(lm, [RolloutRequest(prompt, n, Sampling(7, T), seed=seed + i)])
        out += rolled
    lm.module.zero_grad()
    return out


def scored_at_random(groups, seed, config, same_in_group=False):
    rng = random.Random(seed)
    rewards = [
        [rng.random()] * len(g.completions) if same_in_group else [rng.random() for _ in g.completions] for g in groups
    ]
    parts = [[{"format": r} for r in group] for group in rewards]
    return with_rewards(groups, parts, rewards, config)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_gradient_by_hand_from_replicated_rows(lm, groups, seed, reduction):
    config = GrpoConfig(beta=0.3, reduction=reduction, clip_low=0.1, clip_high=0.15)
    scored = scored_at_random(groups, seed, config)
    reference, before = perturbed(lm, seed + 1, 0.01), perturbed(lm, seed + 2, 0.01)
    old = score_old(before, scored, How(temperature=T, micro_rows=5))
    stats = grpo_backward(lm, reference, scored, config, How(temperature=T, micro_rows=5), old=old)
    ours = gradients(lm)

    tokens = sum(len(c.tokens) for g in groups for c in g.completions)
    rows = sum(len(g.completions) for g in groups)
    loss = kl_sum = clipped = 0.0
    for s in scored:
        prompt = s.group.request.prompt
        for completion, advantage in zip(s.group.completions, s.advantages, strict=True):
            logp = row_logprobs(lm, prompt, completion.tokens)
            with torch.no_grad():
                old_row = row_logprobs(before, prompt, completion.tokens)
                ref_row = row_logprobs(reference, prompt, completion.tokens)
            ratio = (logp - old_row).exp()
            bounded = ratio.clamp(0.9, 1.15)
            kl = (ref_row - logp).exp() - (ref_row - logp) - 1
            weight = 1 / tokens if reduction == "token" else 1 / (rows * len(completion.tokens))
            part = ((-torch.minimum(ratio * advantage, bounded * advantage) + 0.3 * kl) * weight).sum()
            part.backward()
            loss, kl_sum = loss + float(part.detach()), kl_sum + float(kl.detach().sum())
            clipped += float((bounded * advantage < ratio * advantage).sum())
    same(ours, gradients(lm), 1e-5)
    assert stats.loss == pytest.approx(loss, rel=1e-5, abs=1e-8)
    assert stats.kl == pytest.approx(kl_sum, rel=1e-4)
    assert (stats.clipped, stats.tokens) == (clipped, tokens)
    assert stats.kl > 0


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_micro_batches_do_not_change_the_gradient(lm, groups, seed, reduction):
    config = GrpoConfig(beta=0.1, reduction=reduction)
    scored = scored_at_random(groups, seed, config)
    reference = perturbed(lm, seed, 0.01)
    found = []
    for micro_rows, tokens in ((64, 0), (4, 0), (1, 0), (64, 1), (64, 3 * len(scored[0].group.request.prompt) // 2)):
        vision = StepVision(lm)
        how = How(temperature=T, micro_rows=micro_rows, micro_tokens=tokens)
        stats = grpo_backward(lm, reference, scored, config, how, held=vision)
        found.append((gradients(lm), stats))
    assert [len(update_units(scored, n)) for n in (64, 4, 1)] == [1, 4, 4]
    assert len(update_units(scored, 64, 1)[1]) == 4
    for gradient, stats in found[1:]:
        same(gradient, found[0][0], 1e-6)
        assert (stats.loss, stats.kl, stats.entropy) == pytest.approx(
            (found[0][1].loss, found[0][1].kl, found[0][1].entropy), rel=1e-6, abs=1e-9
        )
        assert stats.tokens_trained == found[0][1].tokens_trained  # a prompt is computed once, in stages too


def test_kl_has_no_gradient_where_reference_and_policy_agree(lm, groups, seed):
    twin = VideoLM(lm.info, copy.deepcopy(lm.module))
    scored = scored_at_random(groups, seed, GrpoConfig())
    grpo_backward(lm, None, scored, GrpoConfig(beta=0.0), How(temperature=T, micro_rows=64))
    without = gradients(lm)
    stats = grpo_backward(lm, twin, scored, GrpoConfig(beta=10.0), How(temperature=T, micro_rows=64))
    same(gradients(lm), without, 1e-6)
    assert stats.kl == pytest.approx(0.0, abs=1e-12)


def test_groups_without_signal_give_no_gradient(lm, groups, seed):
    config = GrpoConfig(beta=0.0)
    scored = scored_at_random(groups, seed, config, same_in_group=True)
    assert not any(s.has_signal for s in scored)
    grpo_backward(lm, None, scored, config, How(temperature=T, micro_rows=64))
    found = gradients(lm)
    assert found
    assert all(not g.any() for g in found.values())


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_leaving_groups_without_signal_out_changes_nothing(lm, groups, seed, reduction):
    config = GrpoConfig(beta=0.0, reduction=reduction)
    scored = scored_at_random(groups, seed, config)
    flat = scored_at_random(groups, seed, config, same_in_group=True)
    mixed = [flat[0], scored[1], flat[2], scored[3]]
    grpo_backward(lm, None, mixed, config, How(temperature=T, micro_rows=4))
    whole = gradients(lm)
    active = with_gradient(mixed, flat=False)
    assert active == [scored[1], scored[3]]
    assert with_gradient(mixed, flat=True) == mixed
    stats = grpo_backward(lm, None, active, config, How(temperature=T, micro_rows=4), size=StepSize.of(mixed))
    same(gradients(lm), whole, 1e-9)
    assert stats.tokens == sum(s.tokens for s in active)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_truncated_responses_can_be_left_out(lm, groups, seed, reduction):
    """The gradient by hand, from the responses that ended themselves; rewards of the others count in the group."""
    config = GrpoConfig(beta=0.0, reduction=reduction, truncated="drop")
    rng = random.Random(seed)
    reasons = [[rng.choice(["stop", "length"]) for _ in g.completions] for g in groups]
    reasons[0], reasons[1][:2] = ["length", "length"], ["stop", "length"]
    ended = [
        replace(g, completions=tuple(
            replace(c, response=replace(c.response, finish_reason=reason))
            for c, reason in zip(g.completions, of_group, strict=True)
        ))
        for g, of_group in zip(groups, reasons, strict=True)
    ]  # fmt: skip
    scored = scored_at_random(ended, seed, config)
    active = with_gradient(scored, flat=False)
    assert scored[0] not in active
    grpo_backward(lm, None, active, config, How(temperature=T, micro_rows=4), size=StepSize.of(scored))
    ours = gradients(lm)
    kept = [
        (s.group.request.prompt, c, a)
        for s, of_group in zip(scored, reasons, strict=True)
        for c, a, reason in zip(s.group.completions, s.advantages, of_group, strict=True)
        if reason == "stop"
    ]
    tokens, rows = sum(len(c.tokens) for _, c, _ in kept), sum(len(g.completions) for g in groups)
    for prompt, completion, advantage in kept:
        logp = row_logprobs(lm, prompt, completion.tokens)
        weight = 1 / tokens if reduction == "token" else 1 / (rows * len(completion.tokens))
        (-advantage * weight * logp).sum().backward()
    same(ours, gradients(lm), 1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_replicated_prompts_give_the_same_step(lm, groups, seed, recompute):
    config = GrpoConfig(beta=0.2)
    scored, reference = scored_at_random(groups, seed, config), perturbed(lm, seed, 0.01)
    found = []
    for prefix in ("shared", "replicated"):
        how = How(temperature=T, micro_rows=5, prefix=prefix)
        old = score_old(reference, scored, how)
        if recompute:
            enable_recompute(lm)
        stats = grpo_backward(lm, reference, scored, config, how, old=old)
        found.append((gradients(lm), stats))
    (ours, stats), (right, slow) = found
    same(ours, right, 1e-6)
    assert (stats.loss, stats.kl) == pytest.approx((slow.loss, slow.kl), rel=1e-6)
    assert stats.tokens_trained < slow.tokens_trained == slow.tokens_logical == stats.tokens_logical


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_twenty_recorded_steps_end_at_the_same_weights(lm, groups, seed):
    """In fp32, through the optimizer: rounding doesn't build up."""
    lm.module.float()
    ends, config = [], GrpoConfig(beta=0.2)
    for prefix in ("shared", "replicated"):
        policy = VideoLM(lm.info, copy.deepcopy(lm.module))
        optimizer = make_optimizer(policy, OptimConfig(), 1e-4)
        for step in range(20):
            scored = scored_at_random(groups, seed + step, config)
            stats = grpo_backward(policy, lm, scored, config, How(temperature=T, micro_rows=8, prefix=prefix))
            apply_step(policy, optimizer, stats.loss, 1e-4, 1.0)
        ends.append({name: p.detach() for name, p in policy.module.named_parameters()})
    moved = max(float((ends[0][name] - p.detach()).abs().max()) for name, p in lm.module.named_parameters())
    apart = max(float((ends[0][name] - p).abs().max()) for name, p in ends[1].items())
    assert moved > 1e-3
    assert apart < 1e-4


def test_recomputed_layers_give_the_same_gradient(lm, groups, seed):
    """To the bit, and layers begin twice: their activations weren't kept."""
    scored, calls = scored_at_random(groups, seed, GrpoConfig()), []
    layers = [lm.module.model.language_model.layers[1].mlp, lm.module.model.visual.blocks[0].mlp]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, *_: calls.append(module))
    found = []
    for recompute in (False, True):
        if recompute:
            enable_recompute(lm)
        vision = StepVision(lm)
        lm.module.eval()  # as in the rollout, where clips go through the tower
        vision.take(clip for s in scored for clip in s.group.request.prompt.media)
        lm.module.train()
        grpo_backward(lm, None, scored, GrpoConfig(beta=0.0), How(temperature=T, micro_rows=64), held=vision)
        found.append((gradients(lm), [calls.count(layer) for layer in layers]))
        calls.clear()
    assert [times for _, times in found] == [[1, 1], [2, 2]]
    assert all(torch.equal(found[0][0][name], gradient) for name, gradient in found[1][0].items())


def test_old_logprobs_are_those_of_the_rollout(lm, groups, seed):
    scored = scored_at_random(groups, seed, GrpoConfig())
    old = score_old(lm, scored, How(temperature=T, micro_rows=5))
    for group in groups:
        for i, completion in enumerate(group.completions):
            torch.testing.assert_close(old[id(group), i].float(), completion.logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("micro_rows", [64, 4])
def test_a_trained_tower_runs_once_for_rollout_and_all_micro_batches(lm, prompts, seed, micro_rows):
    """Two prompts about one clip in different micro-batches among them; gradients as without sharing."""
    config = GrpoConfig(beta=0.2)
    reference = perturbed(lm, seed, 0.01)
    clips = []
    hook = lm.module.model.visual.register_forward_pre_hook(
        lambda _, args, kwargs: clips.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    vision = StepVision(lm)
    requests = [RolloutRequest(p, 3, Sampling(6, T), seed=seed + i) for i, p in enumerate(prompts[:4])]
    try:
        rolled, stats = GroupEngine(lm).generate(requests, vision=vision)
        scored = scored_at_random(rolled, seed, config)
        shared = grpo_backward(lm, reference, scored, config, How(temperature=T, micro_rows=micro_rows), held=vision)
        assert sum(clips) == stats.clips_encoded == len({p.clip.key for p in prompts[:4]}) < 4
    finally:
        hook.remove()
    ours = gradients(lm)
    plain = grpo_backward(lm, reference, scored, config, How(temperature=T, micro_rows=micro_rows))
    same(ours, gradients(lm), 1e-6)  # the tower's norms are in fp32, and its batches differ
    assert shared.loss == pytest.approx(plain.loss, rel=1e-6, abs=1e-9)
