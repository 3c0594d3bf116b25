"""grpo_loss against its reference: every policy and reduction, masks, extreme values, in place."""

from __future__ import annotations

import math

import pytest
import torch

from vrlt_kernels import KernelInputError, LossSpec, grpo_loss, grpo_loss_ref, use_backend
from vrlt_kernels.loss_spec import POLICIES, REDUCTIONS

D = torch.float64
CU = torch.tensor([0, 4, 4, 11, 14, 20])
N, B, V = 20, 5, 31
EXTRAS = (
    {},
    {"kl": "k3", "beta": 0.1, "entropy_coef": 0.05},
    {"correction": "tis", "kl": "k2", "kl_weight": "token", "beta": 0.05},
)
NEEDS_NORMALIZER = ("dapo", "dr_grpo", "seq_sum_norm")


def tokens(generator, spec, dtype=D, vocab=V):
    """Logits, targets and what a loss needs beside them, with holes in the mask."""
    logits = torch.randn(N, vocab, generator=generator, dtype=D)
    target = torch.randint(vocab, (N,), generator=generator)
    logp = logits.log_softmax(1).gather(1, target[:, None])[:, 0]
    others = logp + 0.3 * torch.randn(3, N, generator=generator, dtype=D)
    inputs = {
        "advantages": torch.randn(B, generator=generator, dtype=D),
        "token_weight": torch.rand(N, generator=generator, dtype=D),
        "mask": torch.rand(N, generator=generator) < 0.8,
        **dict(zip(("old_logp", "ref_logp", "rollout_logp"), others, strict=True)),
    }
    inputs = {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in inputs.items()}
    if spec.policy == "reg":
        inputs["groups"] = torch.tensor([0, 3, 5])
    if spec.reduction in NEEDS_NORMALIZER:
        inputs["normalizer"] = 13.0
    return logits.to(dtype), target, inputs


def agree(ours, theirs, leaf, twin, scale=1.0):
    for got, expected in zip(ours[1:6], theirs[1:6], strict=True):
        torch.testing.assert_close(got, expected)
        assert not got.requires_grad
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.metrics, theirs.metrics)
    grads = [torch.autograd.grad(x.loss * scale, y)[0] for x, y in ((ours, leaf), (theirs, twin))]
    torch.testing.assert_close(*grads)
    return grads[0]


@pytest.mark.parametrize("extra", EXTRAS, ids=["plain", "k3+entropy", "tis+k2"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_and_reduction(generator, policy, extra):
    for reduction in REDUCTIONS:
        spec = LossSpec(policy=policy, reduction=reduction, **extra)
        logits, target, inputs = tokens(generator, spec)
        leaf, twin = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        ours = grpo_loss(leaf * 1, target, CU, spec, temperature=0.8, inplace=reduction == "dapo", **inputs)
        theirs = grpo_loss_ref(twin, target, CU, spec, temperature=0.8, **inputs)
        gradient = agree(ours, theirs, leaf, twin, 1e3)
        assert not gradient[~inputs["mask"]].any()
        if reduction == "sum" and policy in ("cispo", "sapo", "reinforce", "reg"):  # elsewhere all may be clipped
            assert gradient.any()


@pytest.mark.parametrize("policy", ["clip", "gspo"])
def test_triton(generator, policy):
    spec = LossSpec(policy=policy, **EXTRAS[1])
    logits, target, inputs = tokens(generator, spec)
    leaf, twin = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    with use_backend("triton"):
        agree(grpo_loss(leaf, target, CU, spec, **inputs), grpo_loss_ref(twin, target, CU, spec, **inputs), leaf, twin)


@pytest.mark.parametrize("policy", ["clip", "sapo", "gspo", "luspo", "gmpo", "reinforce"])
def test_gradcheck(generator, policy):
    """Of the policies whose gradient is the derivative of their value (cispo and gspo_token stop some of it)."""
    spec = LossSpec(policy=policy, **EXTRAS[1])
    logits, target, inputs = tokens(generator, spec, vocab=4)
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, target, CU, spec, **inputs).loss, logits.requires_grad_(), fast_mode=policy != "clip"
    )


def test_rewards_in_place_of_advantages(generator):
    spec = LossSpec()
    logits, target, inputs = tokens(generator, spec)
    del inputs["advantages"]
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25, math.nan], dtype=D)
    leaf, twin = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    more = {"rewards": rewards, "groups": torch.tensor([0, 3, 5]), "adv_scale": "rloo", **inputs}
    agree(grpo_loss(leaf, target, CU, spec, **more), grpo_loss_ref(twin, target, CU, spec, **more), leaf, twin)


def test_on_policy(generator):
    """Without old log-probs every surrogate has the gradient of -A logp."""
    logits, target, inputs = tokens(generator, LossSpec())
    del inputs["old_logp"]
    gradients = []
    for policy in ("clip", "cispo", "reinforce"):
        leaf = logits.clone().requires_grad_()
        grpo_loss(leaf, target, CU, LossSpec(policy=policy), **inputs).loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[2])


def test_masked_rows_may_be_anything(generator):
    spec = LossSpec(**EXTRAS[1])
    logits, target, inputs = tokens(generator, spec)
    mask = inputs["mask"]
    mask[-1] = False
    clean = logits.clone().requires_grad_()
    expected = grpo_loss(clean, target, CU, spec, **inputs)
    logits[~mask], target[~mask] = math.nan, -100
    for name in ("old_logp", "ref_logp", "rollout_logp", "token_weight"):
        inputs[name][~mask] = math.nan
    leaf = logits.requires_grad_()
    out = grpo_loss(leaf, target, CU, spec, **inputs)
    assert all(map(torch.equal, out[:6], expected[:6]))
    grads = [torch.autograd.grad(x.loss, y)[0] for x, y in ((out, leaf), (expected, clean))]
    assert torch.equal(*grads)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_left(generator, policy):
    """All rows masked, or none at all: a 0 with a gradient of zeros."""
    spec = LossSpec(policy=policy, **EXTRAS[1])
    logits, target, inputs = tokens(generator, spec)
    inputs["mask"] = torch.zeros(N, dtype=torch.bool)
    leaf = logits.requires_grad_()
    out = grpo_loss(leaf, target, CU, spec, **inputs)
    assert out.loss == 0
    out.loss.backward()
    assert not leaf.grad.any()
    empty = torch.zeros(0, V, requires_grad=True)
    none = {k: v[:0].float() if v.dtype == D and len(v) == N else v for k, v in inputs.items() if k != "mask"}
    out = grpo_loss(empty, target[:0], torch.zeros(B + 1, dtype=torch.int64), spec, **none)
    out.loss.backward()
    assert out.loss == 0
    assert empty.grad.shape == (0, V)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "reg"])
def test_far_from_the_old_policy(generator, policy):
    """Log-ratios of +-100: everything stays finite, and as the reference has it."""
    for sign in (1.0, -1.0):
        spec = LossSpec(policy=policy, log_ratio_clamp=20.0, kl="k3", beta=0.1, kl_clamp_in=20.0)
        logits, target, inputs = tokens(generator, spec, dtype=torch.float32)
        inputs["old_logp"], inputs["ref_logp"] = inputs["old_logp"] - 100 * sign, inputs["ref_logp"] + 100 * sign
        leaf, twin = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        ours = grpo_loss(leaf, target, CU, spec, **inputs)
        gradient = agree(ours, grpo_loss_ref(twin, target, CU, spec, **inputs), leaf, twin)
        assert bool(torch.isfinite(gradient).all())
        assert bool(torch.isfinite(ours.loss))


def test_twice(generator):
    spec = LossSpec(policy="gspo")
    logits, target, inputs = tokens(generator, spec)
    leaf = logits.requires_grad_()
    out = grpo_loss(leaf, target, CU, spec, **inputs)
    first = torch.autograd.grad(out.loss, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.loss, leaf)[0])
    assert torch.equal(out.loss, grpo_loss(leaf, target, CU, spec, **inputs).loss)
    out = grpo_loss(leaf * 1, target, CU, spec, inplace=True, **inputs)
    assert torch.equal(first, torch.autograd.grad(out.loss, leaf, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="inplace"):
        out.loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(generator, dtype):
    """The gradient's error is at most twice that of PyTorch in the same dtype."""
    spec = LossSpec(policy="clip", clip_high=0.28)
    logits, target, inputs = tokens(generator, spec, dtype=torch.float32)
    leaves = [logits.to(dtype).requires_grad_(), logits.to(dtype).requires_grad_()]
    exact = leaves[0].detach().double().requires_grad_()
    truth = grpo_loss_ref(
        exact, target, CU, spec, **{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    )
    ours, plain = grpo_loss(leaves[0], target, CU, spec, **inputs), grpo_loss_ref(leaves[1], target, CU, spec, **inputs)
    for out in (ours, plain, truth):
        (out.loss * 64).backward()
    errors = [(x.grad.double() - exact.grad).abs().max() for x in leaves]
    assert errors[0] <= 2 * errors[1] + {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(ours.loss.double(), truth.loss, atol=1e-5, rtol=1e-5)


def test_compiles_without_breaks_or_recompilation(generator):
    torch._dynamo.reset()
    spec = LossSpec(policy="clip", **EXTRAS[1])

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(logits, target, cu_seqlens, inputs):
        return grpo_loss(logits * 2, target, cu_seqlens, spec, **inputs).loss

    def once(rows):
        logits, target, inputs = tokens(generator, spec)
        inputs = {k: v if len(v) == B else v[:rows].clone() for k, v in inputs.items()}
        leaf, twin = logits[:rows].clone().requires_grad_(), logits[:rows].clone().requires_grad_()
        cu_seqlens = CU.clamp(max=rows)
        step(leaf, target[:rows].clone(), cu_seqlens, inputs).backward()
        grpo_loss_ref(twin * 2, target[:rows], cu_seqlens, spec, **inputs).loss.backward()
        torch.testing.assert_close(leaf.grad, twin.grad)

    once(N)
    with torch._dynamo.config.patch(error_on_recompile=True):
        once(12)
        once(17)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4, 3, 2)}, "logits: got"),
        ({"target": torch.full((N,), V)}, f"target: got {V}, needs values in"),
        ({"cu_seqlens": torch.tensor([0, 7, 19])}, "cu_seqlens: got offsets that end at 19, needs 20"),
        ({"cu_seqlens": torch.tensor([0.0, 20.0])}, "cu_seqlens: got float32"),
        ({"spec": "clip"}, "spec: got str, needs a LossSpec"),
        ({"mask": torch.ones(N)}, "mask: got float32"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask: got .*shape \[20\]"),
        ({"advantages": torch.zeros(7)}, "advantages: got"),
        ({"advantages": None}, "advantages: got"),
        ({"old_logp": torch.zeros(N, 1)}, "old_logp: got"),
        ({"temperature": 0}, "temperature: got 0"),
    ],
)
def test_errors(generator, change, message):
    logits, target, inputs = tokens(generator, LossSpec())
    arguments = {"logits": logits, "target": target, "cu_seqlens": CU, "spec": LossSpec(), **inputs, **change}
    with pytest.raises(KernelInputError, match=message):
        grpo_loss(**arguments)


def test_unknown_arguments_are_refused(generator):
    logits, target, inputs = tokens(generator, LossSpec())
    with pytest.raises(TypeError, match="ratio"):
        grpo_loss(logits, target, CU, LossSpec(), ratio=1, **inputs)


@pytest.mark.parametrize("junk", [math.nan, 0.0, -1.0])
def test_temperatures_behind_the_mask_count_nowhere(generator, junk):
    spec = LossSpec(policy="clip", **EXTRAS[1])
    logits, target, inputs = tokens(generator, spec)
    mask = torch.arange(N) % 3 != 1
    heat = torch.rand(N, generator=generator) + 0.5
    losses = [
        grpo_loss(logits, target, CU, spec, temperature=torch.where(mask, heat, fill), **{**inputs, "mask": mask}).loss
        for fill in (1.0, junk)
    ]
    assert torch.equal(*losses)
