"""group_attention on a CUDA device: torch's varlen flash attention, both calls merged, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_group_attention import CASES, HEADS, run, tensors
from vrlt_kernels import GroupSpans, chunk_attention, chunk_attention_ref, group_attention, group_attention_ref

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_device(inputs, dtype):
    return [x.detach().to("cuda", dtype).requires_grad_() for x in inputs]


def error(found, right):
    return float((found.detach().double().cpu() - right.detach()).norm() / right.detach().norm().clamp(min=1e-6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spans", CASES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_equals_the_reference_in_fp64(spans, heads, dtype, seed):
    inputs = tensors(spans, heads, 64, seed, dtype)
    exact = run(group_attention_ref, [x.detach().double().requires_grad_() for x in inputs], spans, 0.2)
    found = run(group_attention, on_device(inputs, dtype), spans, 0.2)
    for mine, right in zip((found[0], *found[1]), (exact[0], *exact[1]), strict=True):
        assert bool(mine.isfinite().all())
        assert error(mine, right) < 6 * torch.finfo(dtype).eps


@pytest.mark.parametrize("past", [0, 1, 300])
def test_a_chunk_sees_its_past(past, seed):
    q, k, v = (x.detach() for x in tensors(GroupSpans.of([past + 40], [[]]), (6, 2), 64, seed, torch.bfloat16))
    arguments = (q[past:], k[past:], v[past:], k[:past], v[:past])
    exact = chunk_attention_ref(*(x.double() for x in arguments), 0.2)
    assert error(chunk_attention(*(x.cuda() for x in arguments), 0.2), exact) < 6 * torch.finfo(torch.bfloat16).eps
