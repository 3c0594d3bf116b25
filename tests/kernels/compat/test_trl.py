"""Our stand-ins against TRL 1.16's own functions: values, gradients, signatures; what is refused."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

utils = pytest.importorskip("trl.trainer.utils")
chunked = pytest.importorskip("trl.kernels.chunked_logprob")

from vrlt_kernels import KernelInputError  # noqa: E402
from vrlt_kernels.compat import trl as ours  # noqa: E402

V = 123


def gradients(outputs: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of a fixed weighting of all differentiable outputs."""
    total = sum((x * torch.linspace(0.5, 2.0, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in outputs)
    return list(torch.autograd.grad(total, inputs))


def parity(run: Callable[[Any], Any], mine: Any, theirs: Any, inputs: list[torch.Tensor], atol: float) -> None:
    pairs = []
    for function in (mine, theirs):
        outputs = run(function)
        outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
        slopes = gradients([x for x in outputs if x.requires_grad], inputs)
        pairs.append([x.detach() for x in (*outputs, *slopes)])
    assert len(pairs[0]) == len(pairs[1])
    for a, b in zip(*pairs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=atol)


def rows(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (torch.randn(*shape, V, generator=generator, dtype=torch.float64) * 3).to(dtype).requires_grad_()
    return logits, torch.randint(V, shape, generator=generator)


def test_signatures() -> None:
    for name in ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy"):
        mine, theirs = (inspect.signature(getattr(m, name)).parameters.values() for m in (ours, utils))
        assert [(p.name, p.default, p.kind) for p in mine] == [(p.name, p.default, p.kind) for p in theirs], name
    theirs = list(inspect.signature(chunked.ChunkedLogProbFunction.forward).parameters.values())[1:]
    mine = inspect.signature(ours.chunked_logprob).parameters.values()
    assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(2, 3), (1, 5), (4,)])
def test_selective_log_softmax(generator: torch.Generator, shape: tuple[int, ...], temperature: float) -> None:
    logits, index = rows(generator, torch.float64, *shape)
    parity(
        lambda f: f(logits, index, temperature=temperature),
        *(ours.selective_log_softmax, utils.selective_log_softmax, [logits], 1e-12),
    )


def test_selective_log_softmax_of_several_tokens(generator: torch.Generator) -> None:
    logits, _ = rows(generator, torch.float64, 2, 3)
    index = torch.randint(V, (2, 3, 4), generator=generator)
    parity(lambda f: f(logits, index), ours.selective_log_softmax, utils.selective_log_softmax, [logits], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_trls_bits(generator: torch.Generator, dtype: torch.dtype) -> None:
    logits, index = rows(generator, dtype, 4, 30)
    for name, given in (
        ("selective_log_softmax", (logits, index)),
        ("selective_log_softmax", (logits, index[..., None].repeat(1, 1, 3))),
        ("entropy_from_logits", (logits,)),
        ("selective_log_softmax_and_entropy", (logits, index, True, 1.0, index % 3)),
    ):
        mine, theirs = (getattr(m, name)(*given) for m in (ours, utils))
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (mine, theirs)), strict=True):
            assert a.dtype == b.dtype == dtype
            assert torch.equal(a, b)
    mine, theirs = (m.selective_log_softmax(logits, index, temperature=0.7) for m in (ours, utils))
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def looks(x: torch.Tensor, device: str) -> Any:
    """What is asked of a tensor, as if it were on a device."""
    return SimpleNamespace(
        device=torch.device(device), dtype=x.dtype, ndim=x.ndim, dim=x.dim, shape=x.shape, stride=x.stride
    )


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_fp32_where_trl_has_a_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_TRITON", True)
    found = []
    x = torch.empty(2, 3, 4, 5, dtype=torch.bfloat16)
    for part in (x, x[0], x[0, 0], x[0, :, 1:], x[0, 0, 0], x[0].transpose(1, 2)):
        cases: list[list[Any]] = [[]]
        for shape, dtype in itertools.product((part.shape[:-1], part.shape), (torch.int64, torch.int16)):
            index = torch.zeros(shape, dtype=dtype)
            cases += [[index], *([index, mask] for mask in (index, index != 0, index.float()))]
        for case in cases:
            given = [looks(y, device) for y in (part, *case)]
            found.append(ours._in_a_kernel(*given))
            assert found[-1] == utils._supports_trl_loss_kernel(*given)
    assert any(found) == (device == "cuda")
    assert not all(found)


def test_row_mask(generator: torch.Generator) -> None:
    logits, index = rows(generator, torch.float64, 2, 3)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    parity(
        lambda f: f(logits, index, temperature=1.3, row_mask=mask),
        *(ours.selective_log_softmax_and_entropy, utils.selective_log_softmax_and_entropy, [logits], 1e-12),
    )


def test_masked_rows_may_hold_anything(generator: torch.Generator) -> None:
    logits, index = rows(generator, torch.float32, 2, 3)
    with torch.no_grad():
        logits[0, 1] = float("nan")
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 1] = False
    logp, entropy = ours.selective_log_softmax_and_entropy(logits, index.where(mask, -100), row_mask=mask)
    assert logp[0, 1] == 0
    assert entropy[0, 1] == 0
    (logp.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[0, 1], torch.zeros(V))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("chunk_size", [1, 128])
def test_entropy_from_logits(generator: torch.Generator, chunk_size: int) -> None:
    logits, _ = rows(generator, torch.float64, 2, 3)
    parity(lambda f: f(logits, chunk_size), ours.entropy_from_logits, utils.entropy_from_logits, [logits], 1e-12)


def test_entropy_without_gradient(generator: torch.Generator) -> None:
    logits, index = rows(generator, torch.float64, 2, 3)
    parity(
        lambda f: f(logits, index, entropy_requires_grad=False),
        *(ours.selective_log_softmax_and_entropy, utils.selective_log_softmax_and_entropy, [logits], 1e-12),
    )
    assert not ours.selective_log_softmax_and_entropy(logits, index, False)[1].requires_grad


def test_fused_has_the_arguments_of_the_kernel(generator: torch.Generator) -> None:
    logits, index = rows(generator, torch.float64, 2, 3)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    mine = ours.fused_selective_log_softmax_and_entropy(logits, index, 0.7, mask)
    for a, b in zip(mine, utils.selective_log_softmax_and_entropy(logits, index, True, 0.7, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def head(generator: torch.Generator, bias: bool) -> list[torch.Tensor]:
    shapes = [(7, 16), (V, 16), *([(V,)] if bias else [])]
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy"), ours.OPTIONAL_OUTPUTS])
def test_chunked_logprob(generator: torch.Generator, bias: bool, outputs: tuple[str, ...]) -> None:
    given = head(generator, bias)
    targets = torch.randint(V, (7,), generator=generator)

    def run(function: Any) -> Any:
        hidden, weight, *rest = given
        return function(hidden, weight, rest[0] if rest else None, targets, 0.8, 32, None, 1.5, outputs)

    parity(run, ours.chunked_logprob, chunked.ChunkedLogProbFunction.apply, given, 2e-4)


def test_chunked_logprob_knows_the_top_token(generator: torch.Generator) -> None:
    hidden, weight = head(generator, False)
    best = (hidden @ weight.T).argmax(-1)
    targets = best.where(torch.arange(7) % 2 == 0, (best + 1) % V)
    *_, mine = ours.chunked_logprob(hidden, weight, None, targets, 1.0, 32)
    *_, theirs = chunked.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32)
    assert torch.equal(mine, theirs)
    assert mine.sum() == 4


def test_chunked_logprob_under_autocast(generator: torch.Generator) -> None:
    hidden, weight = head(generator, False)
    targets = torch.randint(V, (7,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = (
            f(hidden, weight, None, targets, 1.0, 32, None, 1.0, ("entropy",))[:2]
            for f in (ours.chunked_logprob, chunked.ChunkedLogProbFunction.apply)
        )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-2)


def test_what_is_refused(generator: torch.Generator) -> None:
    logits, index = rows(generator, torch.float32, 2, 3)
    with pytest.raises(KernelInputError, match="index"):
        ours.selective_log_softmax(logits, index[:1])
    with pytest.raises(KernelInputError, match="temperature"):
        ours.selective_log_softmax(logits, index, 0.0)
    with pytest.raises(KernelInputError, match="row_mask"):
        ours.selective_log_softmax(logits, index, row_mask=torch.ones(2))
    hidden, weight = head(generator, False)
    arguments: list[Any] = [hidden, weight, None, index.view(-1)[:1].expand(7), 1.0, 32]
    with pytest.raises(NotImplementedError, match="softcapping"):
        ours.chunked_logprob(*arguments, 30.0)
    with pytest.raises(NotImplementedError, match="logit_scale"):
        ours.chunked_logprob(*arguments, None, 0.0)
    with pytest.raises(KernelInputError, match="margin"):
        ours.chunked_logprob(*arguments, outputs=("margin",))
    weight.ds_id = 1  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match="ZeRO-3"):
        ours.chunked_logprob(*arguments)


def test_chunked_logprob_of_no_rows() -> None:
    hidden, weight = torch.zeros(0, 16, requires_grad=True), torch.ones(V, 16, requires_grad=True)
    outputs = ours.chunked_logprob(hidden, weight, None, torch.zeros(0, dtype=torch.int64), 1.0, 32)
    assert [x.shape for x in outputs if x is not None] == [(0,)] * 5
    outputs[0].sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(V, 16))
