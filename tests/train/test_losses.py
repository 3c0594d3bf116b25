"""Every loss that the configuration names, in a step of several micro-batches, against its formula on replicated rows.

The formulas are written down here a second time, a response or a group at a time, from the definitions in
docs/kernels.md.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.train.test_step import T, gradients, groups, perturbed, row_logprobs, same  # noqa: F401
from vrlt_fast.config_rl import GrpoConfig
from vrlt_fast.parallel.replicas import Replicas
from vrlt_fast.train.passes import How, of_groups
from vrlt_fast.train.scored import over_batch, with_rewards
from vrlt_fast.train.step import grpo_backward, score_old

LONGEST = 7


def clipped(ratio, a, low, high, delta=None):
    first = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(first * a, ratio.clamp(1 - low, 1 + high) * a)


def policy_term(grpo, logp, old, advantage):
    """L_t [n] of a response."""
    ratio, mean = (logp - old).exp(), (logp - old).mean().exp()
    if grpo.policy == "clip":
        return clipped(ratio, advantage, grpo.clip_low, grpo.clip_high, grpo.delta or None)
    if grpo.policy == "cispo":
        return -ratio.clamp(1 - grpo.clip_low, 1 + grpo.clip_high).detach() * advantage * logp
    if grpo.policy == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantage
    if grpo.policy in ("gspo", "luspo"):
        times = len(logp) if grpo.policy == "luspo" else 1
        return times * clipped(mean, advantage, grpo.clip_low, grpo.clip_high).expand(len(logp))
    if grpo.policy == "gspo_token":
        return clipped(mean.detach() * (logp - logp.detach()).exp(), advantage, grpo.clip_low, grpo.clip_high)
    if grpo.policy == "gmpo":
        d = logp - old
        d = d.clamp(max=grpo.clip_high) if advantage > 0 else d.clamp(min=-grpo.clip_low)
        return (-advantage * d.mean().exp()).expand(len(logp))
    return -advantage * logp


def kl_term(name, logp, ref):
    u = ref - logp
    return {"k1": -u, "abs": u.abs(), "k2": u * u / 2, "k3": u.exp() - u - 1}[name]


def step_loss(grpo, rows, entropies):
    """The loss of a step; ``rows``: by group, (log-probs, old, reference, rollout's, advantage) of each response."""
    every = [row for group in rows for row in group]
    tokens = sum(len(row[0]) for row in every)
    total = torch.zeros((), dtype=every[0][0].dtype)
    for group in rows:
        rho = torch.stack([(logp - old).sum() for logp, old, *_ in group])
        z = (rho - rho.mean()) / (rho.std() + grpo.reg_eps) if len(group) > 1 else torch.zeros_like(rho)
        for i, (logp, old, ref, rollout, advantage) in enumerate(group):
            term = policy_term(grpo, logp, old, advantage)
            if grpo.policy == "reg":
                term = ((advantage - z[i]) ** 2).expand(len(logp))
            if grpo.correction == "tis":
                term = term * (old - rollout).exp().clamp(max=grpo.correction_high)
            term = term + grpo.beta * kl_term(grpo.kl, logp, ref)
            if grpo.entropy:
                term = term - grpo.entropy * entropies[id(logp)]
            weight = {
                "token": 1 / tokens,
                "sequence": 1 / (len(every) * len(logp)),
                "constant": 1 / (len(every) * LONGEST),
            }[grpo.reduction]
            total = total + weight * term.sum()
    return total


CASES = [
    {"policy": "clip", "delta": 1.4, "clip_low": 0.1, "clip_high": 0.15},
    {"policy": "clip", "reduction": "constant", "scale": "none"},
    {"policy": "clip", "kl": "k2", "beta": 0.2},
    {"policy": "clip", "kl": "abs", "beta": 0.2, "reduction": "sequence"},
    {"policy": "cispo", "clip_low": 0.1, "clip_high": 0.1},
    {"policy": "sapo"},
    {"policy": "gspo", "clip_low": 0.02, "clip_high": 0.02, "reduction": "sequence"},
    {"policy": "gspo_token", "clip_low": 0.02, "clip_high": 0.02, "reduction": "sequence"},
    {"policy": "luspo", "clip_low": 0.02, "clip_high": 0.02, "reduction": "sequence"},
    {"policy": "gmpo", "clip_low": 0.05, "clip_high": 0.05, "reduction": "sequence"},
    {"policy": "reinforce", "scale": "rloo"},
    {"policy": "reg", "reduction": "sequence", "beta": 0.1, "reg_eps": 0.05},
    {"policy": "clip", "correction": "tis", "correction_high": 1.1},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_loss_and_gradient(lm, groups, seed, case):  # noqa: F811
    grpo = GrpoConfig(**{"beta": 0.0, **case})
    generator = torch.Generator().manual_seed(seed)
    rewards = [torch.rand(len(g.completions), generator=generator, dtype=torch.float64).tolist() for g in groups]
    scored = with_rewards(groups, [[{"format": r} for r in group] for group in rewards], rewards, grpo)
    before, reference = perturbed(lm, seed + 1, 0.01), perturbed(lm, seed + 2, 0.01) if grpo.beta else None
    how = How(temperature=T, micro_rows=5, micro_tokens=0 if of_groups(grpo) else 150, whole=of_groups(grpo))
    old = score_old(before, scored, how)
    stats = grpo_backward(lm, reference, scored, grpo, how, old=old)
    ours = gradients(lm)
    rows = []
    for s in scored:
        prompt, row = s.group.request.prompt, []
        for completion, advantage in zip(s.group.completions, s.advantages, strict=True):
            with torch.no_grad():
                was = row_logprobs(before, prompt, completion.tokens)
                ref = row_logprobs(reference, prompt, completion.tokens) if reference else was
            rollout = completion.logprobs.to(was.dtype)
            row.append((row_logprobs(lm, prompt, completion.tokens), was, ref, rollout, advantage))
        rows.append(row)
    loss = step_loss(grpo, rows, {})
    torch.autograd.backward(loss)
    same(ours, gradients(lm), 3e-5)
    assert stats.loss == pytest.approx(float(loss.detach()), rel=2e-5, abs=1e-7)


def test_token_weights_are_those_of_whole_groups(lm, groups, seed):  # noqa: F811
    """Micro-batches don't change them, and without disagreement they change nothing."""
    grpo = GrpoConfig(beta=0.0, token_weight=1.7)
    rewards = [[float(i) for i, _ in enumerate(g.completions)] for g in groups]
    scored = with_rewards(groups, [[{} for _ in group] for group in rewards], rewards, grpo)
    found = []
    for rows in (64, 4):
        grpo_backward(lm, None, scored, grpo, How(T, rows, alpha=1.7, whole=True))
        found.append(gradients(lm))
    grpo_backward(lm, None, scored, grpo, How(T, 64))
    plain = gradients(lm)
    same(found[1], found[0], 1e-5)
    assert any(float((plain[n] - g).norm()) > 1e-3 * float(g.norm()) for n, g in found[0].items())
    alone = with_rewards([groups[0]], [[{}] * 2], [[0.0, 1.0]], grpo)
    twice = [replace_rows(alone[0])]
    for alpha in (1.0, 1.7):
        grpo_backward(lm, None, twice, grpo, How(T, 64, alpha=alpha, whole=True))
        found.append(gradients(lm))
    same(found[-1], found[-2], 1e-5)


def replace_rows(scored):
    """The first response of a group twice: they agree everywhere."""
    from dataclasses import replace

    group = replace(scored.group, completions=(scored.group.completions[0],) * 2)
    return replace(scored, group=group)


def test_the_entropy_bonus_has_a_gradient(lm, groups, seed):  # noqa: F811
    """Against finite differences of the mean entropy in a direction of the weights."""
    grpo = GrpoConfig(beta=0.0, entropy=0.5)
    rewards = [[1.0] * len(g.completions) for g in groups]
    scored = with_rewards(groups, [[{}] * len(r) for r in rewards], rewards, grpo)
    how = How(T, 64, entropy_grad=True)
    stats = grpo_backward(lm, None, scored, grpo, how)
    ours = gradients(lm)
    assert stats.loss == pytest.approx(-0.5 * stats.entropy / stats.tokens, rel=1e-5)
    generator = torch.Generator().manual_seed(seed)
    named = dict(lm.module.named_parameters())
    way = {n: torch.randn(named[n].shape, generator=generator, dtype=torch.float64).to(named[n].dtype) for n in ours}
    slope = sum(float((ours[n].double() * way[n].double()).sum()) for n in ours)
    values = []
    step = 1e-4 / math.sqrt(sum(float(w.double().square().sum()) for w in way.values())) * 30
    for sign in (1, -1):
        with torch.no_grad():
            for n, w in way.items():
                named[n] += sign * step * w
        moved = grpo_backward(lm, None, scored, GrpoConfig(beta=0.0), How(T, 64))
        values.append(-0.5 * moved.entropy / moved.tokens)
        with torch.no_grad():
            for n, w in way.items():
                named[n] -= sign * step * w
        lm.module.zero_grad()
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_advantages_of_the_whole_batch(groups):  # noqa: F811
    grpo = GrpoConfig(scale="batch")
    rewards = [[0.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0, 2.0, 3.0], [0.5] * 4]
    scored = with_rewards(groups, [[{}] * len(r) for r in rewards], rewards, grpo)
    assert scored[2].advantages == (-1.0, 0.0, 1.0)
    found = over_batch(scored, grpo, Replicas())
    spread = float(torch.tensor([r for group in rewards for r in group], dtype=torch.float64).std()) + 1e-4
    assert found[2].advantages == pytest.approx((-1 / spread, 0.0, 1 / spread))
    assert found[3].advantages == (0.0,) * 4
