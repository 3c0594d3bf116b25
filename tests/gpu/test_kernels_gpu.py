"""Every operator of vrlt_kernels on a CUDA device, against fp64: bf16 and fp32, at real vocabularies.

With GPU_CHECK_SMALL=1 and no device the same tests run on the CPU with tiny shapes, which tries the tests themselves.
"""

from __future__ import annotations

import math
import os
import random

import pytest
import torch

from bench.measure import counting_compilations
from vrlt_kernels import (
    LossSpec,
    _native,
    group_advantages,
    grpo_loss,
    grpo_loss_ref,
    linear_grpo_loss,
    linear_grpo_loss_ref,
    linear_logprob,
    linear_logprob_ref,
    linear_token_weight,
    linear_token_weight_ref,
    padded_grpo_loss,
    policy_coef,
    policy_coef_ref,
    token_logprob,
    token_logprob_ref,
    token_weight,
    token_weight_ref,
    use_backend,
)
from vrlt_kernels._rows import inverse_of, row_fused_
from vrlt_kernels.group_advantage import SCALES
from vrlt_kernels.loss_spec import POLICIES, REDUCTIONS

CUDA = torch.cuda.is_available()
SMALL = not CUDA and bool(os.environ.get("GPU_CHECK_SMALL"))
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = (torch.bfloat16, torch.float32)
ATOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
VOCABS = (123, 1000) if SMALL else (123, 1000, 151665, 151936, 152064)
WIDE = VOCABS[-1]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA or SMALL), reason="needs a CUDA device, or GPU_CHECK_SMALL=1 to try it without"),
]


def native_on_cuda():
    """Why the compiled operators can't run on the device; empty where they can."""
    if not _native.available():
        return _native.reason()
    if SMALL:
        return ""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("vrlt_native::row_fused_", "CUDA"):
        return "the library was built without CUDA"
    return "" if torch.cuda.get_device_capability()[0] >= 9 else "needs compute capability 9.0"


@pytest.fixture(params=["reference", "native"] if SMALL else ["triton", "native"])
def backend(request):
    if request.param == "native" and native_on_cuda():
        pytest.skip(native_on_cuda())
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def generator(seed):
    return torch.Generator(DEVICE).manual_seed(seed)


@pytest.fixture
def poisoned(monkeypatch):
    """NaN in everything that is allocated without a value."""

    def wrap(function):
        def filled(*args, **kwargs):
            out = function(*args, **kwargs)
            return out.fill_(math.nan) if out.is_floating_point() else out

        return filled

    monkeypatch.setattr(torch, "empty", wrap(torch.empty))
    monkeypatch.setattr(torch, "empty_like", wrap(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", wrap(torch.Tensor.new_empty))


def normal(generator, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=generator, device=DEVICE) * scale).to(dtype)


def choose(generator, limit, *shape):
    return torch.randint(limit, shape, generator=generator, device=DEVICE)


def rows_of(generator, count, vocab, dtype):
    return normal(generator, count, vocab, dtype=dtype, scale=3.0), choose(generator, vocab, count)


def close(ours, plain, exact, dtype, label=""):
    """No further from fp64 than twice PyTorch in the same type."""
    for i, (got, usual, true) in enumerate(zip(ours, plain, exact, strict=True)):
        assert got.shape == true.shape
        error, allowed = (got.double() - true).abs().max(), (usual.double() - true).abs().max()
        assert error <= 2 * allowed + ATOL[dtype] * max(1.0, float(true.abs().max())), (
            f"{label} result {i}: {error:.3g}, PyTorch's {allowed:.3g}"
        )


def as_double(values):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in values.items()}


def logprob_and_gradient(function, logits, target, temperature, a, e, **options):
    leaf = logits.detach().clone().requires_grad_()
    out = function(leaf * 1, target, temperature, want_sum_p2=True, **options)
    (gradient,) = torch.autograd.grad((out.logp, out.entropy), leaf, (a.to(out.logp), e.to(out.logp)))
    return *(x.detach() for x in out), gradient


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("vocab", VOCABS)
def test_token_logprob(backend, poisoned, generator, vocab, dtype, inplace):
    if SMALL and backend == "native" and dtype == torch.float16:
        pytest.skip("the CPU operators take no fp16")
    logits, target = rows_of(generator, 5, vocab, dtype)
    logits[1, : vocab // 2] = -math.inf
    target[1] = vocab - 1
    a, e = normal(generator, 5), normal(generator, 5)
    heat = torch.rand(5, generator=generator, device=DEVICE) + 0.5
    truth = logprob_and_gradient(token_logprob_ref, logits.double(), target, heat.double(), a, e)
    plain = logprob_and_gradient(token_logprob_ref, logits, target, heat, a, e)
    close(logprob_and_gradient(token_logprob, logits, target, heat, a, e, inplace=inplace), plain, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_one_read_leaves_onehot_minus_p(backend, poisoned, generator, vocab, dtype):
    logits, target = rows_of(generator, 300, vocab, dtype)
    p = (logits.double() / 0.8).softmax(1)
    exact = torch.nn.functional.one_hot(target, vocab) - p
    logp, entropy, lse = row_fused_(rest := logits.clone(), target, inverse_of(0.8, None, logits))
    close([rest], [exact.to(dtype)], [exact], dtype)
    z = logits.double() / 0.8
    truth = [z.log_softmax(1).gather(1, target[:, None])[:, 0], -(p * p.log()).sum(1), z.logsumexp(1)]
    close([logp, entropy, lse], [x.float() for x in truth], truth, torch.float32)


def test_rows_do_not_depend_on_others(backend, generator):
    logits, target = rows_of(generator, 40, WIDE, torch.bfloat16)
    ones = torch.ones(40, device=DEVICE)
    whole = logprob_and_gradient(token_logprob, logits, target, 0.9, ones, ones)
    alone = logprob_and_gradient(token_logprob, logits[7:8], target[7:8], 0.9, ones[:1], ones[:1])
    for every, single in zip(whole, alone, strict=True):
        assert torch.equal(every[7:8], single)


def test_more_than_two_to_the_31_elements(backend, generator):
    count = 64 if SMALL else 2**31 // WIDE + 70
    logits = torch.randn(count, WIDE, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    target = choose(generator, WIDE, count)
    picked = [0, count // 2, count - 2, count - 1]
    kept = logits[picked].double()
    rest = logits.clone()
    logp = row_fused_(rest, target, inverse_of(1.0, None, logits))[0]
    exact = torch.nn.functional.one_hot(target[picked], WIDE) - kept.softmax(1)
    close([rest[picked]], [exact.bfloat16()], [exact], torch.bfloat16)
    del rest
    leaf = logits.requires_grad_()
    out = token_logprob(leaf, target, inplace=True)
    (gradient,) = torch.autograd.grad(out.logp.sum(), leaf)
    close([gradient[picked]], [exact.bfloat16()], [exact], torch.bfloat16)
    truth = kept.log_softmax(1).gather(1, target[picked, None])[:, 0]
    for found in (out.logp, logp):
        close([found[picked]], [truth.float()], [truth], torch.float32)


def test_targets_outside_the_vocabulary_give_nan(backend, generator):
    if SMALL:
        pytest.skip("the CPU raises")
    logits, target = rows_of(generator, 6, WIDE, torch.bfloat16)
    target[2], target[4] = WIDE, -1
    out = token_logprob(logits, target)
    assert out.logp.isnan().tolist() == [False, False, True, False, True, False]


def sequences(generator, dtype, count=None, longest=9):
    """cu_seqlens and the inputs of a loss of 8 sequences in 2 groups, one of them empty."""
    rng = random.Random(int(torch.randint(2**31, (), generator=generator, device=DEVICE)))
    lengths = [rng.randrange(1, longest) for _ in range(8)]
    lengths[rng.randrange(8)] = 0
    cu = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    total = int(cu[-1])
    names = ("old_logp", "ref_logp", "rollout_logp")
    given = {name: normal(generator, total, dtype=dtype, scale=0.3) for name in names}
    given["advantages"] = normal(generator, 8, dtype=dtype)
    given["token_weight"] = torch.rand(total, generator=generator, device=DEVICE).to(dtype) + 0.5
    given["mask"] = torch.rand(total, generator=generator, device=DEVICE) > 0.2
    return cu, given


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_policy_coef(poisoned, generator, policy, reduction):
    cu, given = sequences(generator, torch.float32)
    total = int(cu[-1])
    spec = LossSpec(
        policy, reduction, kl="k3", beta=0.1, entropy_coef=0.1, correction="tis", correction_high=1.5, reg_eps=0.1
    )
    logp, entropy = normal(generator, total, scale=0.3), normal(generator, total).abs()
    given |= {"groups": 4, "normalizer": 13.0 if reduction in ("dapo", "dr_grpo", "seq_sum_norm") else None}
    ours = policy_coef(logp, cu, spec, entropy=entropy, **given)
    plain = policy_coef_ref(logp, cu, spec, entropy=entropy, **given)
    exact = policy_coef_ref(logp.double(), cu, spec, entropy=entropy.double(), **as_double(given))
    close(ours[:4], plain[:4], exact[:4], torch.float32)
    assert torch.equal(ours.clipped, plain.clipped)
    for name, value in exact.metrics.items():
        assert abs(ours.metrics[name] - value) <= 1e-4 * (1 + abs(value)), name


@pytest.mark.parametrize("scale", SCALES)
def test_group_advantages(poisoned, generator, scale):
    rewards = normal(generator, 24)
    rewards[3] = math.nan
    lengths = choose(generator, 50, 24) + 1
    options = {"scale": scale, "lengths": lengths if scale == "opo" else None}
    for groups in (6, torch.tensor([0, 1, 9, 24], device=DEVICE)):
        with use_backend("reference"):
            exact = group_advantages(rewards.double(), groups, **options)
            plain = group_advantages(rewards, groups, **options)
        close([group_advantages(rewards, groups, **options)], [plain], [exact], torch.float32)


def add_logp(given, logits, target):
    """The policy's log-probs to those of the others, which then are close to it."""
    logp = logits.log_softmax(1).gather(1, target[:, None])[:, 0].float()
    for name in ("old_logp", "ref_logp", "rollout_logp"):
        given[name] = given[name] + logp


SPECS = [
    LossSpec(),
    LossSpec("gspo", "dapo"),
    LossSpec("cispo", kl="k3", beta=0.1),
    LossSpec("sapo", "dr_grpo", entropy_coef=0.1),
    LossSpec("gmpo", correction="tis", correction_high=1.3),
]


def loss_and_gradients(function, variables, target, cu, spec, given, **options):
    leaves = [x.detach().clone().requires_grad_() for x in variables]
    rows = [leaves[0] * 1, *leaves[1:]]
    out = function(*rows, target, cu, spec, **given, **options)
    return [out.loss.detach(), out.logp, out.entropy, out.kl, *torch.autograd.grad(out.loss * 3.0, leaves)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.policy)
def test_grpo_loss(backend, poisoned, generator, spec, dtype):
    cu, given = sequences(generator, torch.float32)
    logits, target = rows_of(generator, int(cu[-1]), WIDE, dtype)
    add_logp(given, logits.double(), target)
    given["normalizer"] = 13.0 if spec.reduction in ("dapo", "dr_grpo") else None
    exact = loss_and_gradients(grpo_loss_ref, [logits.double()], target, cu, spec, as_double(given))
    plain = loss_and_gradients(grpo_loss_ref, [logits], target, cu, spec, given)
    for inplace in (False, True):
        ours = loss_and_gradients(grpo_loss, [logits], target, cu, spec, given, inplace=inplace)
        close(ours, plain, exact, dtype)


@pytest.mark.parametrize("budget_rows", [1000, 12])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.policy)
def test_linear_grpo_loss(backend, poisoned, generator, spec, dtype, budget_rows):
    cu, given = sequences(generator, torch.float32)
    hidden = normal(generator, int(cu[-1]), 256, dtype=dtype)
    weight = normal(generator, WIDE, 256, dtype=dtype, scale=0.15)
    target = choose(generator, WIDE, len(hidden))
    add_logp(given, hidden.double() @ weight.double().t(), target)
    given["normalizer"] = 13.0 if spec.reduction in ("dapo", "dr_grpo") else None
    variables = [hidden, weight]
    exact = loss_and_gradients(
        linear_grpo_loss_ref, [x.double() for x in variables], target, cu, spec, as_double(given)
    )
    plain = loss_and_gradients(linear_grpo_loss_ref, variables, target, cu, spec, given)
    budget = budget_rows * WIDE * hidden.element_size()
    ours = loss_and_gradients(linear_grpo_loss, variables, target, cu, spec, given, budget_bytes=budget)
    close(ours, plain, exact, dtype, f"{spec}")
    again = loss_and_gradients(linear_grpo_loss, variables, target, cu, spec, given, budget_bytes=budget)
    assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True)), "two runs differ"


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("budget_rows", [1000, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_logprob(backend, poisoned, generator, dtype, budget_rows, entropy):
    hidden, bias = normal(generator, 40, 256, dtype=dtype), normal(generator, WIDE, dtype=dtype)
    weight = normal(generator, WIDE, 256, dtype=dtype, scale=0.15)
    target, a = choose(generator, WIDE, 40), normal(generator, 2, 40)
    a[0, 5] = a[1, 5] = 0.0

    def run(function, kind, **options):
        leaves = [x.detach().to(kind).requires_grad_() for x in (hidden, weight, bias)]
        out = function(*leaves[:2], target, 0.9, bias=leaves[2], **options)
        total = (out.logp * a[0]).sum() + (out.entropy * a[1]).sum() * entropy
        return [out.logp.detach(), out.entropy.detach(), *torch.autograd.grad(total, leaves)]

    ours = run(linear_logprob, dtype, budget_bytes=budget_rows * WIDE * hidden.element_size())
    close(ours, run(linear_logprob_ref, dtype), run(linear_logprob_ref, torch.float64), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_weight(poisoned, generator, dtype):
    cu, _ = sequences(generator, torch.float32)
    hidden = normal(generator, int(cu[-1]), 256, dtype=dtype)
    weight = normal(generator, WIDE, 256, dtype=dtype, scale=0.15)
    logits = hidden @ weight.t()
    close(
        [token_weight(logits, cu, 4)],
        [token_weight_ref(logits, cu, 4)],
        [token_weight_ref(logits.double(), cu, 4)],
        dtype,
    )
    budget = 12 * WIDE * hidden.element_size()
    close(
        [linear_token_weight(hidden, weight, cu, 4, budget_bytes=budget)],
        [linear_token_weight_ref(hidden, weight, cu, 4)],
        [linear_token_weight_ref(hidden.double(), weight.double(), cu, 4)],
        dtype,
    )


def test_padding_full_of_nan_stays_outside(backend, generator):
    logits, target = rows_of(generator, 4 * 6, WIDE, torch.bfloat16)
    mask = torch.ones(4, 6, dtype=torch.bool, device=DEVICE)
    mask[1, 3:] = mask[3, 1:] = False
    clean = logits.view(4, 6, WIDE)
    dirty = clean.masked_fill(~mask[..., None], math.nan)
    results = []
    for x in (clean, dirty):
        leaf = x.clone().requires_grad_()
        out = padded_grpo_loss(leaf, target.view(4, 6), mask, LossSpec(), advantages=normal(generator, 4) * 0 + 1.5)
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, leaf)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1] * mask[..., None], results[1][1])


def all_of_one_length(generator, lengths, clip):
    cu = torch.tensor([0, *lengths]).cumsum(0)
    hidden = normal(generator, int(cu[-1]), 128, dtype=torch.bfloat16).requires_grad_()
    weight = normal(generator, 1000, 128, dtype=torch.bfloat16).requires_grad_()
    target = choose(generator, 1000, len(hidden))
    spec = LossSpec(clip_high=clip, kl="k3", beta=clip / 3)
    given = {"advantages": torch.randn(len(lengths)), "ref_logp": normal(generator, len(hidden))}
    linear_grpo_loss(hidden, weight, target, cu, spec, temperature=clip + 0.5, **given).loss.backward()
    on_device = {k: v.to(DEVICE) for k, v in given.items()}
    logits = (hidden @ weight.t()).detach().requires_grad_()
    grpo_loss(logits, target, cu.to(DEVICE), spec, temperature=clip + 0.5, **on_device).loss.backward()
    token_weight(logits.detach(), cu.to(DEVICE), len(lengths))


def test_nothing_is_compiled_for_new_lengths_or_hyper_parameters(generator, seed):
    rng = random.Random(seed)
    with counting_compilations() as count:
        all_of_one_length(generator, [5, 9], 0.2)
        first = count()
        for _ in range(20):
            lengths = [rng.randrange(1, 200) for _ in range(rng.randrange(1, 7))]
            all_of_one_length(generator, lengths, rng.uniform(0.1, 0.4))
        assert count() == first
        assert SMALL or first > 0


def test_the_loss_does_not_wait_for_the_gpu(generator):
    """With mask, lengths and advantages on the host, which is where they are known first."""
    if SMALL:
        pytest.skip("there is nothing to wait for")
    cu = torch.tensor([0, 30, 64])
    hidden = normal(generator, 64, 256, dtype=torch.bfloat16).requires_grad_()
    weight = normal(generator, WIDE, 256, dtype=torch.bfloat16).requires_grad_()
    target, old = choose(generator, WIDE, 64), normal(generator, 64)
    given = {"advantages": torch.tensor([1.0, 0.0]), "mask": torch.arange(64) % 5 > 0, "old_logp": old}

    def step():
        out = linear_grpo_loss(hidden, weight, target, cu, LossSpec(), **given)
        torch.autograd.grad(out.loss, (hidden, weight))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
