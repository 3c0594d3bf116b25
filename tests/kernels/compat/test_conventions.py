"""Result types, shapes and memory of the stand-ins, as the peers' own tests ask for them; no peer is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vrlt_kernels import KernelInputError
from vrlt_kernels.compat import _rows, easyr1, open_r1, trl, verl

HALF = (torch.float16, torch.bfloat16)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])


def same(mine: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """As TRL's tests compare: in half precision to the bit."""
    assert mine.dtype == dtype
    if dtype in HALF:
        assert torch.equal(mine, expected)
    else:
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@DTYPES
@pytest.mark.parametrize("function", [trl.selective_log_softmax, open_r1.selective_log_softmax])
def test_selective_log_softmax(generator: torch.Generator, dtype: torch.dtype, function: Callable[..., Any]) -> None:
    logits = torch.randn(4, 32, 1024, generator=generator).to(dtype)
    ids = torch.randint(1024, (4, 32), generator=generator)
    same(function(logits, ids), logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0], dtype)


@DTYPES
@pytest.mark.parametrize("k", [1, 8])
def test_selective_log_softmax_of_several(generator: torch.Generator, dtype: torch.dtype, k: int) -> None:
    logits = torch.randn(4, 32, 1024, generator=generator).to(dtype)
    ids = torch.randint(1024, (4, 32, k), generator=generator)
    same(trl.selective_log_softmax(logits, ids), logits.log_softmax(-1).gather(-1, ids), dtype)


@DTYPES
@pytest.mark.parametrize("chunk_size", [1, 16])
@pytest.mark.parametrize("shape", [(), (32,), (8, 16), (2, 4, 8)])
def test_entropy(generator: torch.Generator, dtype: torch.dtype, chunk_size: int, shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, 768, generator=generator).to(dtype)
    logs = logits.log_softmax(-1)
    mine = trl.entropy_from_logits(logits, chunk_size=chunk_size)
    same(mine, -(logs.exp() * logs).sum(-1), dtype)
    joint = trl.selective_log_softmax_and_entropy(logits, torch.zeros(shape, dtype=torch.int64))
    assert torch.equal(joint[1], mine)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_has_the_gradient_of_fp32(generator: torch.Generator, dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 50, generator=generator).to(dtype).requires_grad_()
    with torch.no_grad():
        logits[0, 0, 4] = float("-inf")
    ids = torch.randint(5, 50, (2, 3), generator=generator)
    mine = trl.selective_log_softmax_and_entropy(logits, ids)
    wide = trl.fused_selective_log_softmax_and_entropy(logits, ids)
    for a, b in zip(mine, wide, strict=True):
        assert (a.dtype, b.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2)
        assert torch.equal(*(torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (a, b)))
    warm = trl.selective_log_softmax(logits, ids, temperature=0.7)
    assert torch.equal(warm, trl.fused_selective_log_softmax_and_entropy(logits, ids, 0.7)[0].to(dtype))


def test_fp32_where_trl_runs_its_kernel(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "_in_a_kernel", lambda *given: True)
    logits = torch.randn(2, 3, 50, generator=generator).bfloat16()
    ids = torch.randint(50, (2, 3), generator=generator)
    found = (trl.selective_log_softmax(logits, ids), trl.entropy_from_logits(logits))
    assert [x.dtype for x in (*found, *trl.selective_log_softmax_and_entropy(logits, ids))] == [torch.float32] * 4
    assert trl.selective_log_softmax(logits, ids[..., None]).dtype == torch.bfloat16


def test_a_masked_label_of_several_counts_nowhere(generator: torch.Generator) -> None:
    logits = torch.randn(2, 3, 50, generator=generator).bfloat16()
    ids = torch.randint(50, (2, 3, 2), generator=generator)
    mask = torch.rand(2, 3, 2, generator=generator) > 0.5
    mine = trl.selective_log_softmax(logits, ids.where(mask, -100), row_mask=mask)
    assert torch.equal(mine, trl.selective_log_softmax(logits, ids).where(mask, 0))


def test_types_of_verl(generator: torch.Generator) -> None:
    logits = torch.randn(2, 3, 50, generator=generator).bfloat16()
    labels = torch.randint(50, (2, 3), generator=generator)
    assert verl.logprobs_from_logits(logits, labels).dtype == torch.float32
    assert verl.entropy_from_logits_with_chunking(logits).dtype == torch.float32
    assert verl.entropy_from_logits(logits).dtype == torch.bfloat16
    assert verl.calculate_sum_pi_squared_from_logits(logits).dtype == torch.bfloat16


@pytest.mark.parametrize("function", [lambda x, y: verl.logprobs_from_logits(x, y, False),
                                      easyr1.log_probs_from_logits])  # fmt: skip
def test_labels_may_have_another_shape(generator: torch.Generator, function: Callable[..., Any]) -> None:
    logits = torch.randn(6, 50, generator=generator)
    labels = torch.randint(50, (1, 6), generator=generator)
    expected = logits.log_softmax(-1).gather(-1, labels[0][:, None])[:, 0]
    torch.testing.assert_close(function(logits, labels), expected)
    torch.testing.assert_close(function(logits.view(2, 3, 50), labels), expected.view(2, 3))
    with pytest.raises(KernelInputError, match=r"^labels: got .*, needs one for each row"):
        function(logits, labels[:, 1:])
    with pytest.raises(KernelInputError, match=r"^labels: got 50, needs values in"):
        function(logits, labels.fill_(50))


SLICES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "but the last": lambda x: x[:, :-1],
    "the last two": lambda x: x[:, -2:],
    "every second": lambda x: x[::2, 1:],
    "a part of the vocabulary": lambda x: x[:, :-1, 3:40],
    "four dimensions": lambda x: x.view(2, 2, 5, 50)[:, :, 1:],
}


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_is_not_copied(generator: torch.Generator, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(4, 5, 50, generator=generator, dtype=torch.float64).requires_grad_()
    part = SLICES[name](whole)
    labels = torch.randint(part.shape[-1], part.shape[:-1], generator=generator)
    seen: list[int] = []
    run = _rows.token_logprob

    def spy(rows: torch.Tensor, *given: Any, **options: Any) -> Any:
        seen.append(rows.untyped_storage().data_ptr())
        return run(rows, *given, **options)

    monkeypatch.setattr(_rows, "token_logprob", spy)
    for function in (
        lambda x: verl.logprobs_from_logits(x, labels, False),
        lambda x: trl.selective_log_softmax(x, labels),
        lambda x: open_r1.selective_log_softmax(x, labels),
        trl.entropy_from_logits,
        verl.entropy_from_logits,
    ):
        seen.clear()
        mine, upstream = function(part), torch.randn(labels.shape, generator=generator, dtype=torch.float64)
        assert set(seen) == {whole.untyped_storage().data_ptr()}
        copied = function(part.contiguous())
        assert torch.equal(mine, copied)
        assert torch.equal(*(torch.autograd.grad(x, whole, upstream, retain_graph=True)[0] for x in (mine, copied)))


@pytest.mark.parametrize("function", [verl.logprobs_from_logits, easyr1.log_probs_from_logits])
def test_in_place_has_no_effect_on_a_slice(generator: torch.Generator, function: Callable[..., Any]) -> None:
    leaf = torch.randn(2, 4, 50, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(50, (2, 3), generator=generator)
    scaled = leaf * 1.0
    function(scaled[:, :-1], labels).sum().backward()
    expected = torch.nn.functional.one_hot(labels, 50) - leaf.detach()[:, :-1].softmax(-1)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad[:, :-1], expected)
    assert leaf.grad[:, -1].count_nonzero() == 0
    assert torch.equal(scaled, leaf)


def test_verl_linear_cross_entropy_by_verls_own_test(generator: torch.Generator) -> None:
    """Its recipe and tolerances: the products stay in fp32."""
    rows, width, vocab, heat = 24, 896, 20000, 1.5
    hidden, weight = (
        (torch.rand(*shape, generator=generator) - 0.5).bfloat16().requires_grad_()
        for shape in ((1, rows, width), (vocab, width))
    )
    labels = torch.randint(vocab, (1, rows), generator=generator)
    logits = hidden[0].float() @ weight.float().T / heat
    logs = logits.log_softmax(-1)
    logp, entropy = logs.gather(-1, labels[0][:, None])[:, 0], -(logs.exp() * logs).sum(-1)
    torch.testing.assert_close(verl.logprobs_from_logits(logits, labels, False), logp, atol=1e-4, rtol=1e-4)
    mine = verl.linear_cross_entropy(hidden, weight, labels, heat)
    torch.testing.assert_close(mine[0], logp, atol=1e-3, rtol=2e-4)
    torch.testing.assert_close(mine[1], entropy, atol=5e-3, rtol=5e-4)
    upstream = [(torch.rand(rows, generator=generator) - 0.5) * scale for scale in (2, 1)]
    slopes = [torch.autograd.grad(x, (hidden, weight), upstream) for x in (mine, (logp, entropy))]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=4e-2)
