"""rms_norm and swiglu against their references: forward, every gradient, odd shapes and extremes."""

from __future__ import annotations

import pytest
import torch

from vrlt_kernels import KernelInputError, _native, report, rms_norm, rms_norm_ref, swiglu, swiglu_ref, use_backend

compiled = pytest.mark.skipif(not _native.available(), reason=_native.reason())
SHAPES = [(130, 192), (3, 5, 7), (2, 64, 33), (2,), (4, 3), (0, 8)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def draw(generator, *shapes, dtype):
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def agree(function, reference, inputs, generator):
    """Result and gradients, against the reference in fp64."""
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    out, exact = function(*inputs), reference(*doubles)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad(out, inputs, grad)
    expected = torch.autograd.grad(exact, doubles, grad.double())
    eps = torch.finfo(out.dtype).eps
    for ours, right in zip((out, *grads), (exact, *expected), strict=True):
        assert ours.dtype == out.dtype
        largest = float(right.detach().abs().max()) if right.numel() else 0.0
        torch.testing.assert_close(ours.double(), right, atol=16 * eps * largest, rtol=8 * eps)


@compiled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(shape, dtype, generator):
    inputs = draw(generator, shape, shape[-1:], dtype=dtype)
    agree(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_ref(x, w, 1e-5), inputs, generator)


@compiled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(shape, dtype, generator):
    inputs = draw(generator, shape, shape, dtype=dtype)
    agree(swiglu, swiglu_ref, inputs, generator)


@compiled
def test_any_strides_and_threads(generator):
    """Bits don't depend on threads; sums over rows are of fixed pieces."""
    x, w, g = draw(generator, (24, 300), (24,), (24, 300), dtype=torch.float32)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = rms_norm(x.t(), w, 1e-6)
            found.append((out, *torch.autograd.grad(out.square().sum(), (x, w))))
    finally:
        torch.set_num_threads(before)
    assert report()["rms_norm"] == "native"
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch.testing.assert_close(found[0][0], rms_norm_ref(x.t(), w, 1e-6))
    torch.testing.assert_close(swiglu(x.t(), g.t()), swiglu_ref(x.t(), g.t()))


@compiled
def test_extremes():
    gate = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4, float("inf"), float("nan")], requires_grad=True)
    up = torch.ones(8, requires_grad=True)
    out = swiglu(gate, up)
    torch.testing.assert_close(out, swiglu_ref(gate, up), equal_nan=True, atol=1e-30, rtol=1e-6)
    dgate, dup = torch.autograd.grad(out[:6].sum(), (gate, up))
    assert bool(dgate[:6].isfinite().all())
    assert bool(dup[:6].isfinite().all())
    x = torch.tensor([[0.0, 0.0], [1e18, -1e18], [1e-18, 0.0]])
    torch.testing.assert_close(rms_norm(x, torch.ones(2), 1e-6), rms_norm_ref(x, torch.ones(2), 1e-6))


def test_gradcheck(generator):
    x, w = draw(generator, (3, 5), (5,), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-6), (x, w))
    assert torch.autograd.gradcheck(swiglu, (x, x.detach().flip(0).requires_grad_()))


@compiled
def test_backends_and_refusals(generator):
    x, w = draw(generator, (3, 5), (5,), dtype=torch.float32)
    with use_backend("reference"):
        assert torch.equal(rms_norm(x, w, 1e-6), rms_norm_ref(x, w, 1e-6))
    assert torch.equal(rms_norm(x.half(), w.half(), 1e-6), rms_norm_ref(x.half(), w.half(), 1e-6))
    assert rms_norm(x, w.double(), 1e-6).dtype == torch.float64
    grad = torch.autograd.grad(swiglu(x, x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda a: swiglu(a, a), (x.detach(),), (x.detach(),))
    for call, name in (
        (lambda: rms_norm(x, w[:4], 1e-6), "weight"),
        (lambda: rms_norm(None, w, 1e-6), "x"),
        (lambda: swiglu(x, x.double()), "up"),
        (lambda: swiglu(x, x[:2]), "up"),
        (lambda: swiglu(x.int(), x), "gate"),
    ):
        with pytest.raises(KernelInputError, match=name):
            call()


@compiled
def test_compiles(generator):
    x, w = draw(generator, (3, 8), (8,), dtype=torch.float32)
    run = torch.compile(lambda a, b: swiglu(rms_norm(a, b, 1e-6), a), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x, w), swiglu_ref(rms_norm_ref(x, w, 1e-6), x))
