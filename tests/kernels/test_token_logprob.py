"""token_logprob against fp64 formulas, on every backend that runs here."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vrlt_kernels import KernelInputError, _native, token_logprob, token_logprob_ref, use_backend
from vrlt_kernels._rows import inverse_of, row_fused_, row_grad_
from vrlt_kernels.token_logprob import token_logprob_bwd, token_logprob_bwd_, token_logprob_fwd

ATOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.fixture(params=["reference", "triton", "native"])
def backend(request):
    if request.param == "native" and not _native.available():
        pytest.skip(_native.reason())
    with use_backend(request.param):
        yield request.param


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


def draw(generator, rows, vocab, dtype=torch.float32, scale=4.0):
    logits = (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)
    return logits, torch.randint(vocab, (rows,), generator=generator)


def run(function, logits, target, temperature, a, e, **options):
    """Log-probs, entropies, sum p^2 and the gradient for upstream gradients a and e."""
    leaf = logits.detach().clone().requires_grad_()
    # In place needs logits that aren't a leaf.
    out = function(leaf * 1, target, temperature, want_sum_p2=True, **options)
    (gradient,) = torch.autograd.grad((out.logp, out.entropy), leaf, (a.to(out.logp), e.to(out.logp)))
    return *(x.detach() for x in out), gradient


def agree(ours, plain, truth, dtype, cut=0.0):
    """``cut``: how far, relatively, a bf16 result may be off, which Triton's interpreter cuts off and doesn't round."""
    for got, usual, exact in zip(ours, plain, truth, strict=True):
        bound = 2 * (usual.double() - exact).abs().max() + ATOL[dtype]
        bound += cut * exact.abs().max() if got.dtype == torch.bfloat16 else 0.0
        assert (got.double() - exact).abs().max() <= bound


def test_reference(generator):
    """The reference itself against softmax, by hand and by finite differences."""
    logits, target = draw(generator, 5, 9, torch.float64, 1.0)
    logits.requires_grad_()
    for temperature in (0.3, 1.0, 2.5):
        logp, entropy, sum_p2 = token_logprob_ref(logits, target, temperature, want_sum_p2=True)
        p = (logits / temperature).softmax(-1)
        torch.testing.assert_close(logp, p[torch.arange(5), target].log())
        torch.testing.assert_close(entropy, -(p * p.log()).sum(-1))
        torch.testing.assert_close(sum_p2, p.square().sum(-1).detach())
        assert torch.autograd.gradcheck(lambda x, t=temperature: token_logprob_ref(x, target, t)[:2], logits)
    cut = torch.tensor([[0.0, -math.inf, 0.0]])
    logp, entropy, _ = token_logprob_ref(cut, torch.tensor([0]))
    assert logp.item() == pytest.approx(-math.log(2))
    assert entropy.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("rows", "vocab", "inplace"),
    [
        (2, 151936, False),
        (1, 152064, True),
        (1, 151665, False),
        (7, 1000, False),
        (7, 1000, True),
        (11, 123, False),
        (3, 1, False),
        (1, 7, True),
    ],
)
def test_values_and_gradients(backend, poisoned, generator, rows, vocab, inplace):
    logits, target = draw(generator, rows, vocab)
    a, e = torch.randn(2, rows, generator=generator)
    for temperature in (0.7, torch.rand(rows, generator=generator) + 0.5)[: 1 if vocab > 150000 else 2]:
        exact = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
        truth = run(token_logprob_ref, logits.double(), target, exact, a, e)
        ours = run(token_logprob, logits, target, temperature, a, e, inplace=inplace)
        agree(ours, run(token_logprob_ref, logits, target, temperature, a, e), truth, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["reference", "native", "triton"])
def test_half_precision(poisoned, generator, name, dtype):
    if name == "native" and (dtype == torch.float16 or not _native.available()):
        pytest.skip("no such operator here")
    logits, target = draw(generator, 9, 1000, dtype)
    a, e = torch.randn(2, 9, generator=generator)
    truth = run(token_logprob_ref, logits.double(), target, 0.7, a, e)
    with use_backend(name):
        ours = run(token_logprob, logits, target, 0.7, a, e)
    assert [x.dtype for x in ours] == [torch.float32] * 3 + [dtype]
    cut = 2**-7 if name == "triton" and dtype == torch.bfloat16 else 0.0
    agree(ours, run(token_logprob_ref, logits, target, 0.7, a, e), truth, dtype, cut)


@pytest.mark.parametrize("temperature", [1.0, 0.6, "0-d", "per row"])
def test_gradcheck(backend, generator, temperature):
    if isinstance(temperature, str):
        count = () if temperature == "0-d" else (5,)
        temperature = torch.rand(count, generator=generator, dtype=torch.float64) + 0.5
    logits, target = draw(generator, 5, 9, torch.float64, 1.0)
    logits[1, 3] = logits[2, target[2] - 1] = -40.0
    fast = not isinstance(temperature, float) or temperature != 0.6
    assert torch.autograd.gradcheck(
        lambda x: token_logprob(x, target, temperature)[:2], logits.requires_grad_(), fast_mode=fast
    )


def test_opcheck(backend, generator):
    logits, target = draw(generator, 4, 23, torch.float64)
    heat = torch.rand(4, dtype=torch.float64) + 0.5
    for temperatures in (None, heat):
        options = {"temperature": 0.7, "want_sum_p2": True, "inplace": False}
        torch.library.opcheck(token_logprob_fwd, (logits.requires_grad_(), target, temperatures), options)
    logits = logits.detach()
    _, entropy, lse, _ = token_logprob_fwd(logits, target, None, temperature=0.7, want_sum_p2=False, inplace=False)
    for op in (token_logprob_bwd, token_logprob_bwd_):
        for e in (None, heat):
            torch.library.opcheck(op, (logits.clone(), target, None, lse, entropy, heat, e), {"temperature": 0.7})


def test_infinite_logits(backend, poisoned, generator):
    logits, target = draw(generator, 4, 5000, torch.float64)
    logits[0, ::3] = -math.inf
    logits[0, target[0]] = 1.0
    logits[1] = -math.inf
    logits[1, target[1]] = 2.0
    logits[2, target[2]] = -math.inf
    logits[3] = -math.inf
    leaf = logits.clone().requires_grad_()
    logp, entropy, sum_p2 = token_logprob(leaf, target, 0.7, want_sum_p2=True)
    a, e = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    gradient = torch.autograd.grad((logp, entropy), leaf, (a, e))[0]
    kept = logits[0] > -math.inf
    small = logits[0, kept][None].requires_grad_()
    place = kept[: target[0]].sum()[None]
    expected = run(token_logprob_ref, small, place, 0.7, a[:1], e[:1])
    for got, exact in zip((logp, entropy, sum_p2, gradient[:, kept]), expected, strict=True):
        torch.testing.assert_close(got[:1], exact)
    assert not gradient[0, ~kept].any()
    assert [x[1].item() for x in (logp, entropy, sum_p2)] == [0.0, 0.0, 1.0]
    assert logp[2] == -math.inf
    assert bool(torch.isfinite(gradient).all())
    assert [x[3].item() for x in (logp, entropy, sum_p2)] == [-math.inf, 0.0, 0.0]
    assert not gradient[3].any()


@pytest.mark.parametrize(
    ("offset", "spread", "temperature"),
    [(50.0, 10.0, 0.1), (0.0, 3.0, 0.01), (1e3, 3.0, 1.0), (1e4, 3.0, 0.7), (-1e4, 3.0, 1.3)],
)
def test_a_large_logsumexp_costs_no_digits(backend, poisoned, generator, offset, spread, temperature):
    """The gradient from logits and the one left in their place; rows of an ordinary log-sum-exp are among them."""
    logits, target = draw(generator, 6, 700, scale=spread)
    logits[:4] += offset
    a, e = torch.rand(2, 6, generator=generator)
    truth = run(token_logprob_ref, logits.double(), target, temperature, a, e)
    ours = run(token_logprob, logits, target, temperature, a, e)
    for got, exact in zip(ours[:3], truth, strict=False):
        assert (got.double() - exact).abs().max() <= 2e-6 * (1 + exact.abs().max())
    assert (ours[3].double() - truth[3]).abs().max() <= 5e-6 / temperature
    assert torch.equal(ours[3], run(token_logprob, logits, target, temperature, a, e, inplace=True)[3])
    alone = run(token_logprob, logits[1:2], target[1:2], temperature, a[1:2], e[1:2])
    assert torch.equal(ours[3][1:2], alone[3])
    p = (logits.double() / temperature).softmax(1)
    row_fused_(logits, target, inverse_of(temperature, None, logits))
    left = torch.nn.functional.one_hot(target, 700) - p
    assert (logits.double() - left).abs().max() <= 5e-6


def test_largest_logits(backend, poisoned, generator):
    """Their difference, and what a temperature makes of them, is beyond fp32."""
    logits, target = draw(generator, 2, 6000)
    logits[0, 5], logits[0, 5900], logits[1, 6] = -3e38, 3e38, -3e38
    target[0] = 5900
    a, e = torch.ones(2, 2)
    truth = run(token_logprob_ref, logits.double(), target, 0.7, a, e)
    for got, exact in zip(run(token_logprob, logits, target, 0.7, a, e), truth, strict=True):
        torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)


def test_a_part_of_the_vocabulary_with_the_logsumexp_of_all(backend, generator):
    logits, target = draw(generator, 3, 600)
    logits[:2] += 200.0
    lse = logits.logsumexp(1)
    out, ones = torch.empty(3, 250), torch.ones(3)
    row_grad_(out, logits[:, :250], target.clamp(max=249), ones[:1], lse, ones, a=-ones, e=None)
    p = (logits - lse[:, None])[:, :250].exp()
    p[torch.arange(3), target.clamp(max=249)] -= 1.0
    torch.testing.assert_close(out, p, rtol=1e-4, atol=1e-6)


def test_rows_without_gradient_get_zeros_even_from_nan(backend, poisoned, generator):
    logits, target = draw(generator, 3, 1000)
    logits[1] = math.nan
    leaf = logits.requires_grad_()
    out = token_logprob(leaf, target)
    assert bool(out.logp[1].isnan())
    assert bool(out.entropy[1].isnan())
    weights = torch.tensor([1.0, 0.0, 2.0])
    gradient = torch.autograd.grad((out.logp, out.entropy), leaf, (weights, weights))[0]
    assert not gradient[1].any()
    assert bool(torch.isfinite(gradient).all())


def test_no_rows(backend):
    logits = torch.zeros(0, 11, requires_grad=True)
    out = token_logprob(logits, torch.zeros(0, dtype=torch.int64), want_sum_p2=True)
    assert [x.shape for x in out] == [(0,)] * 3
    out.logp.sum().backward()
    assert logits.grad.shape == (0, 11)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2, 7:107],
        lambda x: x.t()[:100, :6],
        lambda x: x.t().contiguous().t()[:3],
        lambda x: x[:1, :50].expand(4, 50),
    ],
    ids=["slice", "transposed", "columns first", "expanded"],
)
def test_strides(backend, poisoned, generator, view, inplace):
    """Logits, targets and upstream gradients that aren't contiguous; upstream gradients of any size."""
    wide, _ = draw(generator, 6, 300, torch.float64)
    leaf, twin = wide.clone().requires_grad_(), wide.clone().requires_grad_()
    rows, vocab = view(wide).shape
    goal = (torch.arange(2 * rows) % vocab).int()[::2]
    a, e = torch.randn(rows, 3, generator=generator, dtype=torch.float64)[:, :2].t() * 1e4
    out = token_logprob(view(leaf * 1), goal, 0.9, inplace=inplace)
    expected = token_logprob_ref(view(twin), goal.long(), 0.9)
    torch.autograd.backward((out.logp, out.entropy), (a, e))
    torch.autograd.backward((expected.logp, expected.entropy), (a, e))
    torch.testing.assert_close(out.logp, expected.logp)
    torch.testing.assert_close(leaf.grad, twin.grad)


def test_a_row_is_alone_and_runs_repeat(backend, generator):
    logits, target = draw(generator, 5, 9001)
    e = torch.rand(5, generator=generator)
    whole = run(token_logprob, logits, target, 0.8, e, e)
    assert all(map(torch.equal, whole, run(token_logprob, logits, target, 0.8, e, e)))
    for rows in (slice(3, 4), slice(1, 3), slice(0, 5, 2)):
        part = run(token_logprob, logits[rows], target[rows], 0.8, e[rows], e[rows])
        assert all(torch.equal(x[rows], y) for x, y in zip(whole, part, strict=True))


def test_graph_is_kept_unless_in_place(backend, generator):
    logits, target = draw(generator, 3, 50, torch.float64)
    leaf = logits.requires_grad_()
    out = token_logprob(leaf * 1, target)
    first = torch.autograd.grad(out.logp.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.logp.sum(), leaf)[0])
    hidden = leaf * 1
    out = token_logprob(hidden, target, inplace=True)
    torch.testing.assert_close(torch.autograd.grad(out.logp.sum(), leaf, retain_graph=True)[0], first)
    torch.testing.assert_close(hidden.detach(), first)
    with pytest.raises(RuntimeError, match="inplace"):
        out.logp.sum().backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_no_second_derivative(backend, generator, inplace):
    logits, target = draw(generator, 3, 50, torch.float64)
    leaf = logits.requires_grad_()

    def twice():
        out = token_logprob(leaf * 1, target, inplace=inplace)
        torch.autograd.grad(out.logp.sum(), leaf, create_graph=True)[0].sum().backward()

    with pytest.raises(RuntimeError, match=r"second derivative|inplace"):
        twice()


def test_compiles_without_breaks_or_recompilation(backend, generator):
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(logits, target, heat):
        out = token_logprob(logits * 2, target, heat, inplace=True)
        return out.logp + out.entropy

    def once(rows, temperature):
        logits, target = draw(generator, rows, 40, torch.float64)
        leaf, twin = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        heat = torch.tensor(temperature, dtype=torch.float64)
        step(leaf, target, heat).sum().backward()
        out = token_logprob_ref(twin * 2, target, temperature)
        (out.logp + out.entropy).sum().backward()
        torch.testing.assert_close(leaf.grad, twin.grad)

    once(5, 0.7)
    with torch._dynamo.config.patch(error_on_recompile=True):
        once(9, 0.7)
        once(14, 1.3)


def test_checkpointing(backend, generator):
    logits, target = draw(generator, 4, 60, torch.float64)
    leaf, twin = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    checkpoint(lambda x: token_logprob(x * 2, target).logp.sum(), leaf, use_reentrant=False).backward()
    token_logprob(twin * 2, target).logp.sum().backward()
    assert torch.equal(leaf.grad, twin.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits: got .*\[3\].*shape \[any, any\]"),
        ({"logits": torch.zeros(3, 5, dtype=torch.int64)}, "logits: got int64"),
        ({"logits": torch.zeros(3, 0)}, "logits: got .* at least one column"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, r"target: got .*\[4\].* needs shape \[3\]"),
        ({"target": torch.zeros(3)}, "target: got float32"),
        ({"target": torch.tensor([0, 5, 1])}, r"target: got 5, needs values in \[0, 5\)"),
        ({"target": torch.tensor([0, -1, 1])}, "target: got -1"),
        ({"target": torch.zeros(3, dtype=torch.int64, device="meta")}, "target: got .* needs a tensor on cpu"),
        ({"temperature": 0.0}, "temperature: got 0.0, needs a finite number above 0"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"temperature": torch.tensor([1.0, -2.0, 1.0])}, "temperature: got -2.0"),
        ({"temperature": torch.ones(2)}, r"temperature: got .*\[2\].*shape \[3\]"),
        ({"temperature": torch.ones(3, dtype=torch.int64)}, "temperature: got int64"),
        ({"temperature": torch.ones(3, requires_grad=True)}, "temperature: got a tensor that requires a gradient"),
    ],
)
def test_errors(change, message):
    arguments = {"logits": torch.zeros(3, 5), "target": torch.zeros(3, dtype=torch.int64), **change}
    with pytest.raises(KernelInputError, match=message):
        token_logprob(**arguments)
