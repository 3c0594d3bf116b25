"""policy_coef and policy_loss: every member of the family against its formula and fp64 autograd, and the edge cases."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from tests.kernels.policy_formula import CU, B, N, draw, formula, kl_terms
from vrlt_kernels import (
    LossSpec,
    group_advantages,
    policy_coef,
    policy_coef_ref,
    policy_loss,
    use_backend,
)
from vrlt_kernels.loss_spec import CORRECTION_LEVELS, CORRECTIONS, KL_WEIGHTS, KLS, POLICIES, REDUCTIONS

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
NORMALIZER = {"dapo": 17.0, "dr_grpo": 9.0, "seq_sum_norm": 5.0}
KL_KINDS = [("none", "none"), *itertools.product(KLS[1:], KL_WEIGHTS)]
CORRECTION_KINDS = [("none", "token"), ("icepop", "token")] + [
    (c, level) for c in CORRECTIONS if c not in ("none", "icepop") for level in CORRECTION_LEVELS
]
BOUNDS = {"log_ratio_clamp": 0.6, "kl_clamp_in": 0.5, "kl_clamp_out": 0.1, "gate_delta": 0.05}


def make(policy, kl, reduction, correction, bounded):
    options = dict(BOUNDS) if bounded else {}
    if bounded and policy in ("clip", "gspo", "gspo_token", "luspo"):
        options["delta"] = 1.3
    return LossSpec(
        policy, reduction, kl=kl[0], kl_weight=kl[1], beta=0.3 if kl[0] != "none" else 0.0, clip_high=0.28,
        correction=correction[0], correction_level=correction[1], correction_low=0.6, correction_high=1.5,
        entropy_coef=0.1, reg_eps=0.01, **options,
    )  # fmt: skip


def truth(spec, given, per_token_advantages):
    """The formula's loss and gradients by logp and entropy."""
    logp, entropy = (given[k].double().clone().requires_grad_() for k in ("logp", "entropy"))
    rest = {k: given[f"{k}_logp"].double() for k in ("old", "ref", "rollout")}
    loss = formula(
        logp, CU.tolist(), spec, advantages=per_token_advantages.double(), entropy=entropy, mask=given["mask"],
        token_weight=given["token_weight"].double(), normalizer=NORMALIZER.get(spec.reduction), groups=3, **rest,
    )  # fmt: skip
    return loss.detach(), *torch.autograd.grad(loss, (logp, entropy))


def check(spec, generator, backend, dtype=torch.float64):
    given = draw(generator, dtype)
    # Uneven advantages inside a sequence, where the policy can have them, in every other case.
    own = spec.policy != "reg" and bool(torch.rand(1, generator=generator) > 0.5)
    advantages = torch.randn(N if own else B, generator=generator).to(dtype)
    expected = truth(spec, given, advantages if own else advantages.repeat_interleave(CU.diff()))
    logp, entropy = (given.pop(k).requires_grad_() for k in ("logp", "entropy"))
    keywords = {**given, "advantages": advantages, "groups": 3, "normalizer": NORMALIZER.get(spec.reduction)}
    with use_backend(backend):
        out = policy_loss(logp, CU, spec, entropy=entropy, **keywords)
        got = out.loss.detach(), *torch.autograd.grad(out.loss * 2.0, (logp, entropy))
    plain = policy_coef_ref(logp, CU, spec, entropy=entropy, **keywords)
    tight = {"rtol": 1e-9, "atol": 1e-11}
    for value, true, torch_value, scale in zip(
        got, expected, (plain.loss.sum(), plain.a, plain.e), (1, 2, 2), strict=True
    ):
        if dtype == torch.float64:
            torch.testing.assert_close(value, true * scale, **tight, msg=lambda m: f"{spec}\n{m}")
            torch.testing.assert_close(torch_value, true, **tight, msg=lambda m: f"reference, {spec}\n{m}")
        else:
            error, same_dtype = (value / scale - true).abs().max(), (torch_value - true).abs().max()
            assert error <= 2 * same_dtype + 1e-5, f"{spec}: {error} against {same_dtype}"
    kl = torch.zeros(N, dtype=torch.float64)
    if spec.kl != "none":
        kl = kl_terms(logp.detach().double(), given["ref_logp"].double(), spec) * given["mask"]
    torch.testing.assert_close(out.kl.double(), kl, rtol=1e-4, atol=1e-5)
    assert torch.equal(out.clipped, plain.clipped)
    for name, value in plain.metrics.items():
        torch.testing.assert_close(out.metrics[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("policy", POLICIES)
def test_matrix(policy, generator, seed):
    """Every KL and weight with every policy; with them, in turn, every reduction and correction."""
    rng = random.Random(seed)
    turns = [rng.sample(kinds, len(kinds)) for kinds in (list(REDUCTIONS), CORRECTION_KINDS)]
    for i, kl in enumerate(KL_KINDS):
        spec = make(policy, kl, turns[0][i % 7], turns[1][i % len(turns[1])], bounded=i % 2 == 1)
        check(spec, generator, "reference")
        if i % 3 == seed % 3:
            check(spec, generator, "triton")
            check(spec, generator, "triton", torch.float32)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_whole_matrix(policy, bounded, generator):
    for kl, reduction, correction in itertools.product(KL_KINDS, REDUCTIONS, CORRECTION_KINDS):
        check(make(policy, kl, reduction, correction, bounded), generator, "reference")
    for kl, reduction in itertools.product(KL_KINDS, REDUCTIONS):
        correction = CORRECTION_KINDS[int(torch.randint(len(CORRECTION_KINDS), (1,), generator=generator))]
        check(make(policy, kl, reduction, correction, bounded), generator, "triton")


@BACKENDS
@pytest.mark.parametrize("scale", ["group", "none", "rloo", "pass@k", "opo", "batch", "reinforce++_baseline"])
def test_rewards_in_place_of_advantages(backend, scale, generator):
    rewards = torch.randn(B, generator=generator, dtype=torch.float64)
    rewards[4] = math.nan
    given = draw(generator)
    logp = given.pop("logp")
    for groups, policy in ((3, "clip"), (torch.tensor([0, 2, 2, 3, 6]), "gspo"), (torch.tensor([0, 6]), "reg")):
        spec = LossSpec(policy, reg_eps=0.1)
        lengths = torch.stack([given["mask"][b:e].sum() for b, e in itertools.pairwise(CU.tolist())])
        options = {"eps": 0.01, "ddof": 0}
        with use_backend(backend):
            advantages = group_advantages(
                rewards, groups, scale=scale, lengths=lengths if scale == "opo" else None, **options
            )
            if policy == "reg":
                advantages[4] = math.nan
            expected = policy_coef(logp, CU, spec, advantages=advantages, groups=groups, **given)
            out = policy_coef(
                logp, CU, spec, rewards=rewards, groups=groups, adv_scale=scale, adv_eps=0.01, adv_ddof=0, **given
            )
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(out.a, expected.a, rtol=1e-12, atol=1e-14)
        assert out.loss.isfinite().all()
        assert out.loss[10:13].count_nonzero() == 0  # of the response without a reward


@BACKENDS
@pytest.mark.parametrize("policy", [p for p in POLICIES if p not in ("cispo", "gspo_token")])
def test_gradcheck_of_the_operator(backend, policy, generator):
    """Finite differences; not for losses whose gradient is declared rather than derived."""
    given = draw(generator)
    logp, entropy = (given.pop(k).requires_grad_() for k in ("logp", "entropy"))
    spec = LossSpec(policy, kl="k3", kl_weight="sequence", beta=0.3, entropy_coef=0.1, reg_eps=0.1)
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)

    def loss(x, h):
        return policy_loss(x, CU, spec, entropy=h, advantages=advantages, groups=3, **given).loss

    with use_backend(backend):
        assert torch.autograd.gradcheck(loss, (logp, entropy), fast_mode=True)


def test_gradcheck_of_every_element(generator):
    """One case in full, through the kernel."""
    given = draw(generator, n=7)
    logp, entropy = (given.pop(k).requires_grad_() for k in ("logp", "entropy"))
    spec = LossSpec("gspo", kl="k3", kl_weight="sequence", beta=0.3, entropy_coef=0.1, correction="tis")
    cu, advantages = torch.tensor([0, 3, 7]), torch.tensor([1.0, -0.5], dtype=torch.float64)

    def loss(x, h):
        return policy_loss(x, cu, spec, entropy=h, advantages=advantages, **given).loss

    with use_backend("triton"):
        assert torch.autograd.gradcheck(loss, (logp, entropy))


@BACKENDS
def test_opcheck(backend, generator):
    given = draw(generator)
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    spec = LossSpec("reg", kl="k3", beta=0.1, gate_delta=0.1)
    tensors = [advantages, None, None, given["old_logp"], given["ref_logp"], None, None, None, given["mask"], None]
    names = {"adv_scale": "group", "adv_ddof": 1, "group_size": 3}
    eps = torch.tensor(1e-4, dtype=torch.float64)
    ops = torch.ops.vrlt_kernels
    logp, entropy = given["logp"].requires_grad_(), given["entropy"].requires_grad_()
    a, e, loss = torch.randn(3, N, generator=generator, dtype=torch.float64).unbind()
    with use_backend(backend):
        arguments = (logp.detach(), CU, tensors, spec.names, spec.numbers, eps)
        torch.library.opcheck(ops.policy_coef.default, arguments, names)
    torch.library.opcheck(ops.policy_sum.default, (logp, entropy, loss, a.clone(), e.clone()))
    torch.library.opcheck(ops.policy_sum.default, (logp, None, loss, a.clone(), e.clone()))
    torch.library.opcheck(ops.policy_sum_backward.default, (loss.sum(), logp.detach(), a))
