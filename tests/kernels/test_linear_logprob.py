"""linear_logprob against the fp64 formula: budgets, dropped rows, frozen operands, precision."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vrlt_kernels import KernelInputError, _native, linear_logprob, linear_logprob_ref, use_backend
from vrlt_kernels._head import partition, rows_within
from vrlt_kernels.linear_logprob import linear_logprob_bwd, linear_logprob_fwd

MODULE = importlib.import_module("vrlt_kernels.linear_logprob")  # the package's attribute is the function
N, K, V = 13, 6, 37
D = torch.float64


@pytest.fixture(params=["reference", "triton", "native"])
def backend(request):
    if request.param == "native" and not _native.available():
        pytest.skip(_native.reason())
    with use_backend(request.param):
        yield request.param


class Head:
    """Random operands, leaves of any dtype, and targets."""

    def __init__(self, generator, rows=N, width=K, vocab=V):
        draw = (torch.randn(s, generator=generator, dtype=D) for s in ((rows, width), (vocab, width), (vocab,)))
        self.operands = tuple(draw)
        self.target = torch.randint(vocab, (rows,), generator=generator)

    def leaves(self, dtype=D, frozen=()):
        return [x.clone().to(dtype).requires_grad_(i not in frozen) for i, x in enumerate(self.operands)]

    def run_values(self, function, leaves, **options):
        return function(*leaves[:2], self.target, 0.7, bias=leaves[2], **options).logp

    def run(self, function, leaves, upstream, temperature=0.7, **options):
        """Values, and gradients for the upstream ones; None where frozen."""
        hidden, weight, bias = leaves
        out = function(hidden, weight, self.target, temperature, bias=bias, **options)
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        pairs = [(x, g.to(x)) for x, g in zip(out[:2], upstream, strict=True) if g is not None]
        grads = torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], retain_graph=True)
        return [x.detach() for x in out if x is not None], grads


@pytest.mark.parametrize("budget", [100, N, 8, 1])
def test_values_and_gradients(backend, generator, budget):
    """All ways through the budget, with gradients of log-prob, entropy and both, dead rows, sum p^2, temperatures."""
    head = Head(generator)
    a, e = torch.randn(2, N, generator=generator, dtype=D)
    dead = torch.rand(N, generator=generator) < 0.4
    heats = (0.7, torch.rand(N, generator=generator, dtype=D) + 0.5)
    cases = itertools.product(heats, (False, True), ("a", "e", "both"), (False, True))
    if backend == "triton":  # the interpreter is slow
        cases = [(heats[1], True, "a", True), (0.7, False, "both", False)]
    for heat, sparse, kind, p2 in cases:
        upstream = [None if kind == "e" else a.clone(), None if kind == "a" else e.clone()]
        if sparse:
            upstream = [x if x is None else x.masked_fill(dead, 0.0) for x in upstream]
        ours = head.run(linear_logprob, head.leaves(), upstream, heat, want_sum_p2=p2, budget_bytes=budget * V * 8 + 7)
        torch.testing.assert_close(ours, head.run(linear_logprob_ref, head.leaves(), upstream, heat, want_sum_p2=p2))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("budget", [N, 4])
def test_frozen_operands(generator, frozen, budget, monkeypatch):
    head = Head(generator)
    upstream = torch.randn(2, N, generator=generator, dtype=D)
    made = []
    monkeypatch.setattr(
        MODULE.HeadGradients,
        "results",
        lambda self: made.append((self.dh.numel(), self.dw.numel(), self.db.numel())) or (self.dh, self.dw, self.db),
    )
    leaves = head.leaves(frozen=frozen)
    ours = head.run(linear_logprob, leaves, upstream, budget_bytes=budget * V * 8)
    assert [bool(n) for n in made[0]] == [i not in frozen for i in range(3)]
    torch.testing.assert_close(ours, head.run(linear_logprob_ref, leaves, upstream))


def test_no_gradient_keeps_no_logits(generator, monkeypatch):
    head, kept = Head(generator), []
    monkeypatch.setattr(MODULE, "partition", lambda *a: kept.append(partition(*a)) or partition(*a))
    with torch.no_grad():
        linear_logprob(*head.leaves()[:2], head.target)
    linear_logprob(*head.leaves(frozen=(0, 1))[:2], head.target)
    assert {k for k, _ in kept} == {0}
    linear_logprob(*head.leaves()[:2], head.target)
    assert kept[-1] == (N, N // 4 + 1)


@pytest.mark.parametrize(("rows", "budget"), [(13, 100), (13, 13), (13, 12), (13, 1), (0, 5), (1, 1)])
def test_partition_stays_in_the_budget(rows, budget):
    kept, step = partition(rows, budget)
    assert 0 <= kept <= rows
    assert step >= 1
    assert kept + (step if kept < rows else 0) <= max(budget, 1)
    weight = torch.empty(V, K)
    assert rows_within(10 * V * 4 + 3, weight, 4) == 10
    assert rows_within(1, weight, 4) == 1


def test_chosen_rows(backend, generator):
    """Rows that aren't live get the same values, no gradient, and no NaN of theirs reaches dW."""
    head = Head(generator)
    live = torch.rand(N, generator=generator) < 0.6
    live[0], live[1] = True, False
    upstream = torch.randn(2, N, generator=generator, dtype=D)
    heat = torch.rand(N, generator=generator, dtype=D) + 0.5
    for budget in (N, 3):
        options = {"live": live, "want_sum_p2": True}
        ours = head.run(linear_logprob, head.leaves(), upstream, heat, budget_bytes=budget * V * 8, **options)
        torch.testing.assert_close(ours, head.run(linear_logprob_ref, head.leaves(), upstream, heat, **options))
        spoilt = Head(torch.Generator().manual_seed(0))
        spoilt.operands, spoilt.target = tuple(x.clone() for x in head.operands), head.target
        spoilt.operands[0][~live] = math.nan
        _, grads = spoilt.run(linear_logprob, spoilt.leaves(), upstream, heat, budget_bytes=budget * V * 8, **options)
        torch.testing.assert_close(grads, ours[1])
        dropped = [x.masked_fill(~live, 0.0) for x in upstream]
        _, grads = spoilt.run(linear_logprob, spoilt.leaves(), dropped, heat, budget_bytes=budget * V * 8)
        torch.testing.assert_close(grads, ours[1])


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(backend, generator, rows):
    head = Head(generator, rows=rows)
    upstream = torch.ones(2, rows, dtype=D)
    ours = head.run(linear_logprob, head.leaves(), upstream)
    torch.testing.assert_close(ours, head.run(linear_logprob_ref, head.leaves(), upstream))


def test_no_live_row_is_a_zero_with_gradients(generator):
    head = Head(generator)
    for upstream in ([torch.zeros(N), None], [torch.zeros(N), torch.zeros(N)]):
        for budget in (N, 3):
            _, grads = head.run(linear_logprob, head.leaves(), upstream, budget_bytes=budget * V * 8)
            assert not any(bool(g.any()) for g in grads)


def test_chunks_and_runs(generator):
    """Eight chunks equal one to fp32 rounding of the largest value: sums cancel, and a small one rounds as what
    it is made of does. Two runs are equal.
    """
    head = Head(generator, rows=32, vocab=500)
    upstream = [torch.randn(32, generator=generator), None]
    whole = head.run(linear_logprob, head.leaves(torch.float32), upstream)
    for budget in (32, 4):
        runs = [
            head.run(linear_logprob, head.leaves(torch.float32), upstream, budget_bytes=budget * 500 * 4)
            for _ in range(2)
        ]
        for ours, right in zip((*runs[0][0], *runs[0][1]), (*whole[0], *whole[1]), strict=True):
            assert float((ours - right).abs().max()) <= 2e-6 * max(1.0, float(right.abs().max()))
        assert all(map(torch.equal, *(run[0] for run in runs)))
        assert all(map(torch.equal, *(run[1] for run in runs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [64, 10])
def test_precision(generator, dtype, budget):
    """The error is at most twice PyTorch's own in the same dtype."""
    head = Head(generator, rows=64, width=32, vocab=300)
    atol = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    for upstream in ([torch.randn(64, generator=generator), None], torch.randn(2, 64, generator=generator)):
        leaves = head.leaves(dtype)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        truth = head.run(linear_logprob_ref, exact, [None if u is None else u.double() for u in upstream])
        plain = head.run(linear_logprob_ref, leaves, upstream)
        ours = head.run(linear_logprob, leaves, upstream, budget_bytes=budget * 300 * dtype.itemsize)
        for got, usual, true in zip(ours[0] + [*ours[1]], plain[0] + [*plain[1]], truth[0] + [*truth[1]], strict=True):
            bound = 2 * (usual.double() - true).abs().max() + atol * max(1.0, true.abs().max().item())
            assert (got.double() - true).abs().max() <= bound


@pytest.mark.parametrize("budget", [256, 16])
def test_small_gradients_survive_fp16(budget):
    """a h = 2e-8 is 0 in fp16; the sum of 256 of them is not."""
    hidden = torch.full((256, 4), 0.1, dtype=torch.float16)
    weight = torch.zeros(50, 4, dtype=torch.float16, requires_grad=True)
    logp = linear_logprob(hidden, weight, torch.full((256,), 3), budget_bytes=budget * 50 * 2).logp
    (gradient,) = torch.autograd.grad(logp, weight, torch.full((256,), 2e-7))
    torch.testing.assert_close(gradient[3].float(), torch.full((4,), 256 * 2e-8 * 0.98), rtol=0.03, atol=0)


def test_tied_embeddings(generator):
    table = torch.randn(V, K, generator=generator, dtype=D)
    ids, target = torch.randint(V, (2, N), generator=generator)
    grads = []
    for function in (linear_logprob, linear_logprob_ref):
        weight = table.clone().requires_grad_()
        function(weight[ids].tanh(), weight, target).logp.sum().backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


def test_strided_operands(generator):
    head = Head(generator)
    hidden, weight, _ = head.leaves()
    upstream = torch.randn(N, 2, generator=generator, dtype=D)[:, 0]
    results = []
    for function in (linear_logprob, linear_logprob_ref):
        for leaf in (hidden, weight):
            leaf.grad = None
        logp = function(
            hidden.t().contiguous().t(), weight.t().contiguous().t(), head.target.repeat(2, 1).t()[:, 0]
        ).logp
        logp.backward(upstream * 1e3)
        results.append((logp.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("budget", "fast"), [(100, True), (3, True), (2, False)])
def test_gradcheck(backend, generator, budget, fast):
    head = Head(generator, rows=4, width=2, vocab=5)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, head.target, 0.8, bias=b, budget_bytes=budget * 5 * 8)[:2],
        tuple(head.leaves()),
        fast_mode=fast,
    )


@pytest.mark.parametrize("budget_rows", [100, 6])
def test_opcheck(backend, generator, budget_rows):
    head = Head(generator)
    options = {"temperature": 0.7, "want_sum_p2": True, "budget_rows": budget_rows, "trained": 11}
    given = (*head.leaves(), head.target, None)
    torch.library.opcheck(linear_logprob_fwd, given, options)
    operands = list(head.operands)
    logp, entropy, lse, _, rest = linear_logprob_fwd(*operands, head.target, None, **options)
    a = torch.randn(N, generator=generator, dtype=D)
    options = {"temperature": 0.7, "budget_rows": budget_rows, "trained": 11, "needs": [True, True, False]}
    for e in (None, a):
        arguments = (rest, operands, head.target, None, [logp, entropy, lse], a, e)
        torch.library.opcheck(linear_logprob_bwd, arguments, options)


def test_no_second_derivative(generator):
    head = Head(generator)
    hidden, weight, _ = head.leaves()
    logp = linear_logprob(hidden, weight, head.target).logp
    (first,) = torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


def test_compiles_without_breaks_or_recompilation(generator):
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(hidden, weight, target, heat):
        out = linear_logprob(hidden * 2, weight, target, heat)
        return out.logp + out.entropy

    def once(rows, temperature):
        head = Head(generator, rows=rows)
        leaves, twins = head.leaves()[:2], head.leaves()[:2]
        step(*leaves, head.target, torch.tensor(temperature, dtype=D)).sum().backward()
        out = linear_logprob_ref(twins[0] * 2, twins[1], head.target, temperature)
        (out.logp + out.entropy).sum().backward()
        torch.testing.assert_close([x.grad for x in leaves], [x.grad for x in twins])

    once(5, 0.7)
    with torch._dynamo.config.patch(error_on_recompile=True):
        once(9, 0.7)
        once(14, 1.3)


def test_autocast_and_checkpointing(generator):
    head = Head(generator)
    results = []
    for mixed in (False, True):
        hidden, weight, bias = head.leaves(torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            given = (hidden, weight, bias) if mixed else (x.bfloat16() for x in (hidden, weight, bias))
            h, w, b = given
            logp = checkpoint(
                lambda h, w, b: linear_logprob(h, w, head.target, bias=b).logp.sum(), h, w, b, use_reentrant=False
            )
            logp.backward()
        assert {x.grad.dtype for x in (hidden, weight, bias)} == {torch.float32}
        results.append((logp.detach(), hidden.grad, weight.grad, bias.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden: got .*\[3\]"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int32)}, "hidden: got int32"),
        ({"weight": torch.zeros(5, 3)}, r"weight: got .*\[5, 3\].*shape \[any, 4\]"),
        ({"weight": torch.zeros(0, 4)}, "weight: got .*at least one row"),
        ({"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}, "weight: got bfloat16.*needs float32"),
        ({"weight": torch.zeros(5, 4, device="meta")}, "weight: got .*needs a tensor on cpu"),
        ({"bias": torch.zeros(4)}, r"bias: got .*shape \[5\]"),
        ({"target": torch.tensor([0, 5, 1])}, r"target: got 5, needs values in \[0, 5\)"),
        ({"target": torch.tensor([0, 1])}, r"target: got .*shape \[3\]"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"temperature": 1e-45}, "temperature: got 1.*needs values from"),
        ({"temperature": 1e300}, "temperature: got 1e.300"),
        ({"temperature": torch.tensor([1.0, 1e-45, 1.0])}, "temperature: got 1"),
        ({"budget_bytes": 0}, "budget_bytes: got 0"),
        ({"budget_bytes": None}, "budget_bytes: got NoneType"),
        ({"logits_dtype": torch.float64}, "logits_dtype: got torch.float64"),
        ({"live": torch.ones(2, dtype=torch.bool)}, r"live: got .*shape \[3\]"),
        ({"live": torch.ones(3)}, "live: got float32"),
        ({"live": torch.ones(3, dtype=torch.bool, device="meta")}, "live: got .*needs a tensor on the CPU"),
    ],
)
def test_errors(change, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(KernelInputError, match=message):
        linear_logprob(**{**arguments, **change})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [64, 10])
def test_logits_in_fp32(generator, dtype, budget):
    """Products of halves as verl's kernel has them: unrounded, so log-probs agree with fp64 to fp32 rounding."""
    head = Head(generator, rows=64, width=100, vocab=300)
    upstream = torch.randn(2, 64, generator=generator)
    leaves = head.leaves(dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = head.run(linear_logprob_ref, exact, upstream.double())
    options = {"logits_dtype": torch.float32, "budget_bytes": budget * 300 * 6}
    ours = head.run(linear_logprob, leaves, upstream, **options)
    torch.testing.assert_close(ours[0], [x.float() for x in truth[0]], atol=2e-5, rtol=2e-5)
    assert [x.dtype for x in ours[1]] == [dtype] * 3
    plain = head.run(linear_logprob_ref, leaves, upstream, **options)
    for got, usual, true in zip(ours[1], plain[1], truth[1], strict=True):
        error = (usual.double() - true).abs().max()
        assert (got.double() - true).abs().max() <= 2 * error + torch.finfo(dtype).eps * true.abs().max()
    with torch.no_grad():
        assert torch.equal(head.run_values(linear_logprob, leaves, **options), ours[0][0])


def test_no_forward_mode(generator):
    head = Head(generator)
    hidden, weight, _ = head.leaves()
    with pytest.raises(RuntimeError, match="linear_logprob has no forward-mode derivative"):
        torch.func.jvp(lambda h: linear_logprob(h, weight, head.target).logp, (hidden.detach(),), (hidden.detach(),))
    with torch.autograd.forward_ad.dual_level():  # a level alone does no harm
        linear_logprob(hidden, weight, head.target)
