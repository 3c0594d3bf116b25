"""linear_grpo_loss against its reference: both ways through the budget, sorted rows, precision, memory."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vrlt_kernels import (
    KernelInputError,
    LossSpec,
    linear_grpo_loss,
    linear_grpo_loss_ref,
    policy_loss_ref,
    use_backend,
)
from vrlt_kernels.linear_grpo_loss import TOKEN_POLICIES, check_host_offsets, linear_grpo_fwd, scaled_gradient
from vrlt_kernels.loss_spec import POLICIES

MODULE = importlib.import_module("vrlt_kernels.linear_grpo_loss")  # the package's attribute is the function
D = torch.float64
CU = torch.tensor([0, 4, 4, 11, 14, 20])
N, B, V, K = 20, 5, 31, 6
EXTRAS = (
    {"reduction": "bnpo"},
    {"reduction": "grpo", "kl": "k3", "beta": 0.1, "entropy_coef": 0.05},
    {"reduction": "dr_grpo", "correction": "tis", "kl": "k2", "kl_weight": "token", "beta": 0.05},
    {"reduction": "sum", "correction": "mis", "correction_level": "sequence", "gate_delta": 0.3},
)


class Batch:
    """Operands of the head, and what a loss needs; sequence 3 has advantage 0, the mask has holes."""

    def __init__(self, generator, spec, *, rows=N, vocab=V, width=K):
        hidden, weight, bias = (
            torch.randn(s, generator=generator, dtype=D) for s in ((rows, width), (vocab, width), vocab)
        )
        self.operands = [hidden, weight, bias]
        self.target = torch.randint(vocab, (rows,), generator=generator)
        logits = torch.nn.functional.linear(hidden, weight, bias)
        logp = logits.log_softmax(1).gather(1, self.target[:, None])[:, 0]
        others = logp + 0.3 * torch.randn(3, rows, generator=generator, dtype=D)
        self.inputs = {
            "advantages": torch.randn(B, generator=generator, dtype=D).index_fill(0, torch.tensor(3), 0.0),
            "token_weight": torch.rand(rows, generator=generator, dtype=D),
            "mask": torch.rand(rows, generator=generator) < 0.8,
            **dict(zip(("old_logp", "ref_logp", "rollout_logp"), others, strict=True)),
        }
        if spec.policy == "reg":
            self.inputs["groups"] = torch.tensor([0, 3, 5])
        if spec.reduction in ("dapo", "dr_grpo"):
            self.inputs["normalizer"] = torch.tensor(13.0, dtype=D)

    def leaves(self, dtype=D, frozen=()):
        return [x.clone().to(dtype).requires_grad_(i not in frozen) for i, x in enumerate(self.operands)]

    def run(self, function, spec, *, leaves=None, scale=1.0, **options):
        """Result, and gradients of ``scale`` times the loss."""
        hidden, weight, bias = self.leaves() if leaves is None else leaves
        options = {"temperature": 0.8, **self.inputs, **options}
        out = function(hidden, weight, self.target, CU, spec, bias=bias, **options)
        wanted = [x for x in (hidden, weight, bias) if x.requires_grad]
        return out, torch.autograd.grad(out.loss * scale, wanted, retain_graph=True)


def agree(ours, theirs, **tolerance):
    for got, expected in zip(ours[0][:6], theirs[0][:6], strict=True):
        torch.testing.assert_close(got, expected, **tolerance)
    torch.testing.assert_close(ours[0].metrics, theirs[0].metrics, **tolerance)
    torch.testing.assert_close(ours[1], theirs[1], **tolerance)


@pytest.mark.parametrize("budget", [N, 7])
@pytest.mark.parametrize("extra", EXTRAS, ids=["bnpo", "k3+entropy", "tis+k2", "mis+gate"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(generator, policy, extra, budget, monkeypatch):
    """Loss, fields, metrics, gradients; and that a loss takes the way that is its own."""
    spec, ways = LossSpec(policy=policy, **extra), []
    monkeypatch.setattr(MODULE, "linear_grpo_fwd", lambda *a, **k: ways.append("forward") or linear_grpo_fwd(*a, **k))
    batch = Batch(generator, spec)
    expected = batch.run(linear_grpo_loss_ref, spec, scale=1e3)
    agree(batch.run(linear_grpo_loss, spec, scale=1e3, budget_bytes=budget * V * 8), expected)
    in_forward = budget == 7 and policy in TOKEN_POLICIES and "gate_delta" not in extra
    assert ways == ["forward"] * in_forward


@pytest.mark.parametrize("budget", [N, 7])
@pytest.mark.parametrize("policy", ["clip", "gspo"])
def test_triton(generator, policy, budget):
    for extra in EXTRAS[:2]:
        spec = LossSpec(policy=policy, **extra)
        batch = Batch(generator, spec)
        expected = batch.run(linear_grpo_loss_ref, spec)
        with use_backend("triton"):
            agree(batch.run(linear_grpo_loss, spec, budget_bytes=budget * V * 8), expected)


@pytest.mark.parametrize("budget", [N, 7])
@pytest.mark.parametrize("given", ["advantages", "rewards", "tokens"])
def test_rows_that_earn_nothing_are_left_out(generator, monkeypatch, given, budget):
    """Masked rows get no logits at all; rows of advantage 0 get log-probs and no place in the gradient's products."""
    spec = LossSpec(policy="clip", reduction="bnpo")
    batch = Batch(generator, spec)
    mask = batch.inputs["mask"]
    zero = torch.tensor([False, False, True, True, False])  # by sequence
    if given == "advantages":
        batch.inputs["advantages"] = torch.where(zero, 0.0, batch.inputs["advantages"] + 3)
    elif given == "rewards":
        del batch.inputs["advantages"]
        zero = torch.tensor([True, True, False, False, False])
        batch.inputs |= {"rewards": torch.tensor([0.3, 0.3, 1.0, 0.0, 0.5], dtype=D), "groups": torch.tensor([0, 2, 5])}
    else:
        zero = torch.tensor([True, False, False, False, True])
        spread = torch.rand(N, generator=generator, dtype=D) + 1
        batch.inputs["advantages"] = spread * ~zero.repeat_interleave(CU.diff())
    dead = zero.repeat_interleave(CU.diff())
    expected = batch.run(linear_grpo_loss_ref, spec)
    batch.operands[0][~mask], batch.target[~mask] = math.nan, -5
    for name in ("old_logp", "ref_logp", "rollout_logp"):
        batch.inputs[name][~mask] = math.nan
    projected, multiplied = [], []
    for name in ("vrlt_kernels.linear_logprob", "vrlt_kernels.linear_grpo_loss"):
        module = importlib.import_module(name)
        project = module.project_
        monkeypatch.setattr(module, "project_", lambda o, h, *a, p=project: projected.append(len(h)) or p(o, h, *a))
    add = MODULE.HeadGradients.add

    def count(self, rows, grad, coefficients, *, pick=None, unscale=None):
        multiplied.append(rows.stop - rows.start if isinstance(rows, slice) else len(rows))
        add(self, rows, grad, coefficients, pick=pick, unscale=unscale)

    monkeypatch.setattr(MODULE.HeadGradients, "add", count)
    agree(batch.run(linear_grpo_loss, spec, budget_bytes=budget * V * 8), expected)
    assert sum(projected) == int(mask.sum())
    assert 0 < sum(multiplied) <= int((mask & ~dead).sum())


def test_advantage_zero_counts_where_something_else_moves_the_row(generator):
    for extra in ({"kl": "k3", "beta": 0.2}, {"entropy_coef": 0.1}):
        spec = LossSpec(policy="clip", reduction="sum", **extra)
        batch = Batch(generator, spec)
        batch.inputs["advantages"].zero_()
        ours = batch.run(linear_grpo_loss, spec)
        assert bool(ours[1][0].any())
        agree(ours, batch.run(linear_grpo_loss_ref, spec))
    # the tokens of a sequence share their gradient, also with one whose own advantage is 0
    spec = LossSpec(policy="gspo", reduction="sum")
    batch = Batch(generator, spec)
    batch.inputs["advantages"] = torch.rand(N, generator=generator, dtype=D) * (torch.arange(N) % 2)
    agree(batch.run(linear_grpo_loss, spec), batch.run(linear_grpo_loss_ref, spec))


@pytest.mark.parametrize("policy", ["clip", "gspo"])
@pytest.mark.parametrize("frozen", [(0,), (1, 2), (2,)])
def test_frozen_operands(generator, policy, frozen):
    for extra in EXTRAS[:2]:
        spec = LossSpec(policy=policy, **extra)
        batch = Batch(generator, spec)
        expected = batch.run(linear_grpo_loss_ref, spec, leaves=batch.leaves(frozen=frozen))
        for budget in (N, 7):
            leaves = batch.leaves(frozen=frozen)
            agree(batch.run(linear_grpo_loss, spec, leaves=leaves, budget_bytes=budget * V * 8), expected)


def test_without_gradient(generator):
    spec = LossSpec(policy="clip", reduction="bnpo")
    batch = Batch(generator, spec)
    expected, _ = batch.run(linear_grpo_loss_ref, spec)
    hidden, weight, bias = batch.operands
    options = {"bias": bias, "temperature": 0.8, **batch.inputs}
    for budget in (N, 7):
        out = linear_grpo_loss(hidden, weight, batch.target, CU, spec, budget_bytes=budget * V * 8, **options)
        torch.testing.assert_close(out.loss, expected.loss)
        assert not out.loss.requires_grad


@pytest.mark.parametrize("policy", ["clip", "gspo", "reg"])
def test_nothing_left(generator, policy):
    """All rows masked, or none at all: a 0 with gradients of zeros."""
    spec = LossSpec(policy=policy, **EXTRAS[1])
    batch = Batch(generator, spec)
    batch.inputs["mask"] = torch.zeros(N, dtype=torch.bool)
    for budget in (N, 7):
        out, grads = batch.run(linear_grpo_loss, spec, budget_bytes=budget * V * 8)
        assert out.loss == 0
        assert not any(bool(g.any()) for g in grads)
    hidden, weight, bias = batch.leaves()
    none = {k: v[:0] if len(v) == N else v for k, v in batch.inputs.items()}
    ends = torch.zeros(B + 1, dtype=torch.int64)
    out = linear_grpo_loss(hidden[:0], weight, batch.target[:0], ends, spec, bias=bias, **none)
    out.loss.backward()
    assert out.loss == 0
    assert not weight.grad.any()


@pytest.mark.parametrize("policy", ["clip", "gspo"])
def test_chunks_runs_and_second_passes(generator, policy):
    """Ten chunks equal one to fp32 rounding, two runs are equal, and so are two passes through a graph."""
    spec = LossSpec(policy=policy, reduction="bnpo")
    batch = Batch(generator, spec)
    batch.inputs = {k: v.float() if v.dtype == D else v for k, v in batch.inputs.items()}
    whole = batch.run(linear_grpo_loss, spec, leaves=batch.leaves(torch.float32))
    for budget in (N, 2):
        run = [
            batch.run(linear_grpo_loss, spec, leaves=batch.leaves(torch.float32), budget_bytes=budget * V * 4)
            for _ in range(2)
        ]
        agree(run[0], whole, atol=1e-6, rtol=2e-5)
        assert all(map(torch.equal, (run[0][0].loss, *run[0][1]), (run[1][0].loss, *run[1][1])))
        leaf = batch.leaves(torch.float32)
        out, first = batch.run(linear_grpo_loss, spec, leaves=leaf, budget_bytes=budget * V * 4)
        assert all(map(torch.equal, first, torch.autograd.grad(out.loss, leaf)))


@pytest.mark.parametrize("budget", [N, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(generator, dtype, budget):
    """Errors are at most twice PyTorch's own in the same dtype, for the small gradients of a mean over tokens too."""
    atol = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    for extra in EXTRAS[:2]:
        spec = LossSpec(policy="clip", **extra)
        batch = Batch(generator, spec)
        exact = [x.detach().double().requires_grad_() for x in batch.leaves(dtype)]
        truth = batch.run(linear_grpo_loss_ref, spec, leaves=exact)[1]
        batch.inputs = {k: v.float() if v.dtype == D else v for k, v in batch.inputs.items()}
        plain = batch.run(linear_grpo_loss_ref, spec, leaves=batch.leaves(dtype))[1]
        budget_bytes = budget * V * dtype.itemsize
        ours = batch.run(linear_grpo_loss, spec, leaves=batch.leaves(dtype), budget_bytes=budget_bytes)[1]
        for got, usual, true in zip(ours, plain, truth, strict=True):
            assert got.dtype == dtype
            assert (got.double() - true).abs().max() <= 2 * (usual.double() - true).abs().max() + atol


@pytest.mark.parametrize(
    ("policy", "budget", "fast"), [("clip", N, False), ("clip", 7, True), ("gspo", N, True), ("gspo", 7, True)]
)
def test_gradcheck(generator, policy, budget, fast):
    spec = LossSpec(policy=policy, **EXTRAS[1])
    batch = Batch(generator, spec, vocab=5, width=2)

    def loss(hidden, weight, bias):
        options = {"bias": bias, "budget_bytes": budget * 5 * 8, **batch.inputs}
        return linear_grpo_loss(hidden, weight, batch.target, CU, spec, **options).loss

    assert torch.autograd.gradcheck(loss, tuple(batch.leaves()), fast_mode=fast)


def test_opcheck(generator):
    spec = LossSpec(policy="clip", **EXTRAS[1])
    batch, calls = Batch(generator, spec), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "linear_grpo_fwd", lambda *a, **k: calls.append((a, k)) or linear_grpo_fwd(*a, **k))
        batch.run(linear_grpo_loss, spec, budget_bytes=7 * V * 8)
    (arguments, options) = calls[0]
    arguments = (arguments[0].detach().requires_grad_(), *arguments[1:])
    torch.library.opcheck(linear_grpo_fwd, arguments, options)
    torch.library.opcheck(scaled_gradient, (torch.randn(5000, 3), torch.tensor(2.0), torch.zeros(1).bfloat16()))


@pytest.mark.parametrize("budget", [N, 7])
def test_no_second_derivative(generator, budget):
    spec = LossSpec(policy="clip", reduction="bnpo")
    batch = Batch(generator, spec)
    leaves = batch.leaves()
    options = {**batch.inputs, "budget_bytes": budget * V * 8}
    loss = linear_grpo_loss(*leaves[:2], batch.target, CU, spec, **options).loss
    (first,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("budget", [1000, 7])
def test_compiles(generator, budget):
    torch._dynamo.reset()
    spec = LossSpec(policy="clip", **EXTRAS[1])

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(hidden, weight, target, cu_seqlens, inputs):
        options = {"budget_bytes": budget * V * 8, **inputs}
        return linear_grpo_loss(hidden, weight, target, cu_seqlens, spec, **options).loss

    for rows in (20, 17, 14):
        batch = Batch(generator, spec)
        batch.operands[0][~batch.inputs["mask"]] = math.nan
        given = {k: v if len(v) == B else v[:rows].clone() for k, v in batch.inputs.items()}
        hidden, weight, _ = batch.leaves()
        twins = [hidden.detach()[:rows].clone().requires_grad_(), weight.detach().clone().requires_grad_()]
        leaves = [x.detach().clone().requires_grad_() for x in twins]
        arguments = (batch.target[:rows].clone(), CU.clamp(max=rows))
        with torch._dynamo.config.patch(error_on_recompile=rows != 20):
            step(*leaves, *arguments, given).backward()
        linear_grpo_loss_ref(*twins, *arguments, spec, **given).loss.backward()
        torch.testing.assert_close([x.grad for x in leaves], [x.grad for x in twins])


def peak_bytes(function):
    """Most bytes allocated at a time beyond what was there."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


@pytest.mark.parametrize("policy", ["clip", "gspo"])
@pytest.mark.parametrize("budget", [96, 16])
def test_memory(generator, policy, budget):
    """Beside dW, at most 40 % of what PyTorch allocates, and little beyond the budget."""
    rows, vocab = 96, 150000
    spec = LossSpec(policy=policy, reduction="bnpo")
    hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    target, ends = torch.randint(vocab, (rows,), generator=generator), torch.tensor([0, 20, 96])
    inputs = {"advantages": torch.tensor([1.0, -1.0]), "old_logp": torch.full((rows,), -9.0)}

    def ours():
        options = {"budget_bytes": budget * vocab * 4, **inputs}
        torch.autograd.grad(linear_grpo_loss(hidden, weight, target, ends, spec, **options).loss, (hidden, weight))

    def eager():
        logp = (hidden @ weight.t()).log_softmax(-1).gather(1, target[:, None])[:, 0]
        torch.autograd.grad(policy_loss_ref(logp, ends, spec, **inputs).loss, (hidden, weight))

    extra = weight.nbytes * (2 if budget < rows else 1)  # an fp32 sum, and its scaled copy
    peak = peak_bytes(ours) - extra
    assert peak <= 0.4 * (peak_bytes(eager) - weight.nbytes)
    if budget < rows:
        assert peak <= 1.25 * budget * vocab * 4 + 2**24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(N, 3, dtype=D)}, r"weight: got .*shape \[any, 3\]"),
        ({"weight": torch.zeros(V, K)}, "weight: got float32.*needs float64"),
        ({"target": torch.full((N,), V)}, f"target: got {V}, needs values in"),
        ({"cu_seqlens": torch.tensor([0, 7, 19])}, "cu_seqlens: got"),
        ({"cu_seqlens": torch.tensor([0, 4, 11, 4, 14, 20])}, "cu_seqlens: got .*never decrease"),
        ({"cu_seqlens": [0, 4, 20]}, "cu_seqlens: got list, needs a tensor"),
        ({"cu_seqlens": None}, "cu_seqlens: got NoneType, needs a tensor"),
        ({"advantages": None, "rewards": torch.zeros(B), "groups": 5, "adv_ddof": 1.0}, "adv_ddof: got 1.0"),
        ({"spec": "clip"}, "spec: got str, needs a LossSpec"),
        ({"mask": torch.ones(N)}, "mask: got float32"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask: got .*shape \[20\]"),
        ({"advantages": torch.zeros(7)}, "advantages: got"),
        ({"advantages": None, "rewards": torch.zeros(4), "groups": 5}, "rewards: got"),
        ({"advantages": None, "rewards": torch.zeros(B), "groups": 2}, "groups: got 2"),
        ({"advantages": None, "rewards": torch.zeros(B), "groups": 5, "adv_scale": "x"}, "adv_scale: got 'x'"),
        ({"budget_bytes": -1}, "budget_bytes: got -1"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
    ],
)
def test_errors(generator, change, message):
    batch = Batch(generator, LossSpec())
    hidden, weight, _ = batch.leaves()
    arguments = {"hidden": hidden, "weight": weight, "target": batch.target, "cu_seqlens": CU, "spec": LossSpec()}
    with pytest.raises(KernelInputError, match=message):
        linear_grpo_loss(**{**arguments, **batch.inputs, **{"mask": torch.ones(N, dtype=torch.bool)}, **change})


def test_offsets_of_the_host_are_checked_before_they_leave_it():
    """On a GPU nobody could look at them."""
    hidden = torch.zeros(N, K, device="meta")
    check_host_offsets(hidden, CU, torch.tensor([0, B]))
    with pytest.raises(KernelInputError, match=r"cu_seqlens: got .*never decrease"):
        check_host_offsets(hidden, torch.tensor([0, 30, N]), None)
    with pytest.raises(KernelInputError, match="groups: got offsets that end at 9"):
        check_host_offsets(hidden, CU, torch.tensor([0, 9]))


def test_double_precision_is_not_mixed_under_autocast():
    operands = torch.zeros(N, K, dtype=D), torch.zeros(V, K)
    for hidden, weight in (operands, (operands[0].float(), operands[1].double())):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(KernelInputError, match="weight: got float"):
            linear_grpo_loss(hidden, weight, torch.zeros(N, dtype=torch.int64), CU, LossSpec())
