"""group_attention on a CUDA device: torch's varlen flash attention, both calls merged, forward and backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.kernels.test_group_attention import CASES, HEADS, run, tensors
from vrlt_kernels import (
    GroupSpans,
    chunk_attention,
    chunk_attention_ref,
    group_attention,
    group_attention_ref,
    report,
    use_backend,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_device(inputs, dtype):
    return [x.detach().to("cuda", dtype).requires_grad_() for x in inputs]


def error(found, right):
    return float((found.detach().double().cpu() - right.detach()).norm() / right.detach().norm().clamp(min=1e-6))


@pytest.mark.parametrize("backend", ["flash", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spans", CASES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_equals_the_reference_in_fp64(spans, heads, dtype, backend, seed):
    inputs = tensors(spans, heads, 64, seed, dtype)
    exact = run(group_attention_ref, [x.detach().double().requires_grad_() for x in inputs], spans, 0.2)
    with use_backend(backend):
        found = run(group_attention, on_device(inputs, dtype), spans, 0.2)
    for mine, right in zip((found[0], *found[1]), (exact[0], *exact[1]), strict=True):
        assert bool(mine.isfinite().all())
        assert error(mine, right) < 6 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", ["flash", "triton"])
@pytest.mark.parametrize("prefix", [0, 1, 700])
def test_rows_behind_a_prefix_that_was_computed_before(prefix, backend, seed):
    spans = GroupSpans.of([prefix], [[70, 1, 129]])
    inputs = tensors(spans, (6, 2), 128, seed, torch.bfloat16)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = run(lambda *x: group_attention_ref(*x)[prefix:], doubles, spans, 0.2)
    query, key, value = on_device(inputs, torch.bfloat16)
    tail = query.detach()[prefix:].requires_grad_()
    with use_backend(backend):
        found = run(partial(group_attention, rows_only=True), [tail, key, value], spans, 0.2)
    for mine, right in zip((found[0], *found[1]), (exact[0], exact[1][0][prefix:], *exact[1][1:]), strict=True):
        assert error(mine, right) < 6 * torch.finfo(torch.bfloat16).eps


def test_fp32_takes_triton(seed):
    spans = GroupSpans.of([40, 3], [[9, 2], [1]])
    inputs = tensors(spans, (4, 2), 64, seed)
    exact = run(group_attention_ref, [x.detach().double().requires_grad_() for x in inputs], spans)
    found = run(group_attention, on_device(inputs, torch.float32), spans)
    assert report()["group_attention"].startswith("triton")
    for mine, right in zip((found[0], *found[1]), (exact[0], *exact[1]), strict=True):
        assert error(mine, right) < 1e-5


@pytest.mark.parametrize("past", [0, 1, 300])
def test_a_chunk_sees_its_past(past, seed):
    q, k, v = (x.detach() for x in tensors(GroupSpans.of([past + 40], [[]]), (6, 2), 64, seed, torch.bfloat16))
    arguments = (q[past:], k[past:], v[past:], k[:past], v[:past])
    exact = chunk_attention_ref(*(x.double() for x in arguments), 0.2)
    assert error(chunk_attention(*(x.cuda() for x in arguments), 0.2), exact) < 6 * torch.finfo(torch.bfloat16).eps
