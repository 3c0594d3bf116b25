"""group_attention against its reference and against replicated rows; every gradient, ragged and empty spans."""

from __future__ import annotations

import random
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from vrlt_kernels import (
    GroupSpans,
    KernelInputError,
    _native,
    chunk_attention,
    chunk_attention_ref,
    group_attention,
    group_attention_ref,
    report,
    use_backend,
)
from vrlt_kernels import group_attention_flash as flash
from vrlt_kernels.group_attention import group_attention_bwd, group_attention_fwd

CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

CASES = [
    GroupSpans.of([5], [[]]),
    GroupSpans.of([7], [[3, 1, 4]]),
    GroupSpans.of([6, 1, 40], [[2, 9], [1], [5] * 8]),
    GroupSpans.of([0, 3], [[4, 2], [0, 3, 0]]),
    GroupSpans.of([3, 0, 2], [[], [0], []]),
    GroupSpans.of([300], [[70, 65, 1]]),
    GroupSpans.of([], []),
]
HEADS = [(4, 4), (4, 2), (7, 1), (6, 2)]


def tensors(spans, heads, dim, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hq, hk = heads
    shapes = [(spans.tokens, h, dim) for h in (hq, hk, hk)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def run(function, inputs, spans, scale=None):
    out = function(*inputs, spans, scale)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return out, torch.autograd.grad((out * weight).sum(), inputs, materialize_grads=True)


compiled = pytest.mark.skipif(not _native.available(), reason=_native.reason())
BACKENDS = [pytest.param("native", marks=compiled), "flash"]


@pytest.mark.parametrize("spans", CASES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference(spans, heads, backend, seed):
    inputs = tensors(spans, heads, 16, seed)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    with use_backend(backend):
        out, grads = run(group_attention, inputs, spans, 0.3)
    exact, exact_grads = run(group_attention_ref, doubles, spans, 0.3)
    torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=2e-6)
    for ours, right in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(ours.double(), right, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("lengths", [[70, 65, 1], [0, 3, 0], [1] * 9], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 300])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_rows_behind_a_prefix_that_was_computed_before(lengths, prefix, heads, backend, seed):
    """The tail of the packed call; its gradients when no gradient comes in at the prefix."""
    spans = GroupSpans.of([prefix], [lengths])
    inputs = tensors(spans, heads, 16, seed)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    rows = partial(group_attention, rows_only=True)
    with use_backend(backend):
        tail = inputs[0].detach()[prefix:].requires_grad_()
        out, grads = run(lambda q, k, v, *rest: rows(q, k, v, *rest), [tail, *inputs[1:]], spans, 0.3)
    exact, exact_grads = run(lambda *x: group_attention_ref(*x)[prefix:], doubles, spans, 0.3)
    torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=2e-6)
    for ours, right in zip(grads, (exact_grads[0][prefix:], *exact_grads[1:]), strict=True):
        torch.testing.assert_close(ours.double(), right, atol=4e-5, rtol=2e-5)


TRITON_CASES = [
    (GroupSpans.of([6, 1, 40], [[2, 9], [1], [5] * 8]), (2, 1), 5),
    (GroupSpans.of([0, 3], [[4, 2], [0, 3, 0]]), (2, 2), 16),
    (GroupSpans.of([70], [[40, 18, 1]]), (2, 1), 16),
]


@pytest.mark.parametrize(("spans", "heads", "dim"), TRITON_CASES, ids=str)
def test_triton_equals_the_reference(spans, heads, dim, seed):
    """In the interpreter, which is slow."""
    inputs = tensors(spans, heads, dim, seed)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact, exact_grads = run(group_attention_ref, doubles, spans, 0.3)
    with use_backend("triton"):
        out, grads = run(group_attention, inputs, spans, 0.3)
        assert report()["group_attention"] == "triton (as asked)"
        found = [((out, *grads), (exact, *exact_grads))]
        if len(spans.prefix) == 1:
            prefix = spans.prefix[0]
            tail = [inputs[0].detach()[prefix:].requires_grad_(), *inputs[1:]]
            out, grads = run(partial(group_attention, rows_only=True), tail, spans, 0.3)
            exact, exact_grads = run(lambda *x: group_attention_ref(*x)[prefix:], doubles, spans, 0.3)
            found.append(((out, *grads), (exact, exact_grads[0][prefix:], *exact_grads[1:])))
    for ours, right in (pair for both in found for pair in zip(*both, strict=True)):
        torch.testing.assert_close(ours.double(), right, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("block", [3, 16])
@pytest.mark.parametrize("spans", CASES, ids=str)
def test_tiles_meet_every_pair_once(spans, block):
    """What queries of a tile see of keys by the tables, against the mask, from both sides."""
    device = torch.device("cpu")
    token, floors = torch.arange(spans.tokens), spans.floors(device)
    prefix_of = torch.zeros(spans.tokens, 2, dtype=torch.int64)
    for start, end, prefix in zip(spans.starts[:-1], spans.starts[1:], spans.prefix, strict=True):
        prefix_of[start + prefix : end] = torch.tensor([start, start + prefix])
    own = (token[None] >= floors[:, None]) & (token[None] <= token[:, None])
    sees = own | ((token[None] >= prefix_of[:, :1]) & (token[None] < prefix_of[:, 1:]))

    def span(begin, end):
        return (token >= begin) & (token < end)

    for side in ("queries", "keys"):
        found = torch.zeros_like(sees, dtype=torch.int64)
        for first, end, bound, begin, stop in spans.tiles(side, block, device).tolist():
            assert first < end <= first + block
            tile, others = span(first, end), span(begin, stop)
            near = span(bound, end) if side == "queries" else span(first, bound)
            for seen, mask in ((near, own), (others, torch.ones_like(own))):
                rows, columns = (tile, seen) if side == "queries" else (seen, tile)
                found += rows[:, None] & columns[None] & mask
        assert torch.equal(found, sees.long())


def test_rows_alone_need_one_group(seed):
    spans = GroupSpans.of([4, 1], [[2], [1]])
    with pytest.raises(KernelInputError, match="one group"):
        group_attention(*(x.detach() for x in tensors(spans, (4, 2), 8, seed)), spans, rows_only=True)


@compiled
def test_pieces_of_a_long_prefix_are_added_up_alike_with_any_threads(seed):
    """A group so long that its backward pass is cut into pieces, with heads of a width that fills no vectors."""
    spans = GroupSpans.of([1500, 3], [[40, 7], [2]])
    inputs = tensors(spans, (4, 2), 61, seed)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(group_attention, inputs, spans))
    finally:
        torch.set_num_threads(before)
    assert report()["group_attention"] == "native"
    for one, three in zip((results[0][0], *results[0][1]), (results[1][0], *results[1][1]), strict=True):
        assert torch.equal(one, three)
    with use_backend("flash"):
        out, grads = run(group_attention, inputs, spans)
    for ours, flashes in zip((results[0][0], *results[0][1]), (out, *grads), strict=True):
        torch.testing.assert_close(ours, flashes, atol=2e-5, rtol=2e-4)


@compiled
def test_heads_too_wide_for_the_compiled_operator_take_flash(seed):
    spans = GroupSpans.of([4], [[2]])
    group_attention(*tensors(spans, (2, 2), 257, seed), spans)
    assert report()["group_attention"] == "flash"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_torch(dtype, seed):
    spans = GroupSpans.of([33, 5], [[7, 20, 1], [4]])
    inputs = tensors(spans, (6, 2), 32, seed, dtype)
    exact = run(group_attention_ref, [x.detach().double().requires_grad_() for x in inputs], spans)
    ours = run(group_attention, inputs, spans)
    for mine, right in zip((ours[0], *ours[1]), (exact[0], *exact[1]), strict=True):
        error = (mine.double() - right).norm() / right.norm()
        assert float(error.detach()) < 3 * torch.finfo(dtype).eps, error


def test_equals_replicated_rows(seed):
    rng = random.Random(seed)
    spans = GroupSpans.of([9, 4], [[rng.randint(1, 6) for _ in range(3)], [rng.randint(1, 6) for _ in range(2)]])
    inputs = tensors(spans, (4, 2), 8, seed, torch.float64)
    out = group_attention(*inputs, spans)
    for g, (start, prefix) in enumerate(zip(spans.starts, spans.prefix, strict=False)):
        for begin, length in zip(spans.row_starts[g], spans.rows[g], strict=True):
            places = [*range(start, start + prefix), *range(begin, begin + length)]
            q, k, v = (x[places].transpose(0, 1) for x in inputs)
            alone = F.scaled_dot_product_attention(
                q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0), is_causal=True
            )
            torch.testing.assert_close(out[places], alone.transpose(0, 1), atol=1e-12, rtol=1e-12)


def test_gradcheck_and_opcheck(seed):
    spans = GroupSpans.of([3, 2], [[2, 1], []])
    inputs = tensors(spans, (2, 1), 4, seed, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: group_attention(*x, spans), inputs)
    rest = ([3, 2], [2, 0], [2, 1], 0.5, 0)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(group_attention_fwd, (*inputs, *rest), test_utils=tests)
    plain = [x.detach() for x in inputs]
    out, lse = group_attention_fwd(*plain, *rest)
    torch.library.opcheck(group_attention_bwd, (out, *plain, out, lse, *rest), test_utils=tests[:2])


def test_any_stride_of_tokens_and_heads(seed):
    spans = GroupSpans.of([5, 2], [[3, 3], [1]])
    q, k, v = (x.detach() for x in tensors(spans, (4, 2), 8, seed))
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    torch.testing.assert_close(group_attention(*strided, spans), group_attention(q, k, v, spans))
    last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(group_attention(*last, spans), group_attention(q, k, v, spans))


def test_large_scores_stay_finite(seed):
    spans = GroupSpans.of([20], [[5, 5]])
    inputs = [(x * 100).detach().requires_grad_() for x in tensors(spans, (2, 2), 16, seed)]
    out, grads = run(group_attention, inputs, spans)
    assert all(bool(x.isfinite().all()) for x in (out, *grads))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:-1], k, v), "query: got"),
        (lambda q, k, v: (q, k[:, :, :4], v), "key: got"),
        (lambda q, k, v: (q, k, v.double()), "value: got"),
        (lambda q, k, v: (q, k[:, [0, 1, 1]], v[:, [0, 1, 1]]), "heads that divide"),
        (lambda q, k, v: (q.int(), k, v), "query: got"),
        (lambda q, k, v: (None, k, v), "a tensor"),
    ],
)
def test_wrong_arguments_are_named(change, message, seed):
    spans = GroupSpans.of([4], [[2]])
    with pytest.raises(KernelInputError, match=message):
        group_attention(*change(*(x.detach() for x in tensors(spans, (4, 2), 8, seed))), spans)


def test_wrong_spans_are_named():
    with pytest.raises(KernelInputError, match="one entry for each"):
        GroupSpans.of([1, 2], [[1]])
    with pytest.raises(KernelInputError, match="at least 0"):
        GroupSpans.of([1], [[-1]])


def by_segments(function, tensors, cu_q, cu_k):
    """Calls ``function`` on the slices of packed queries (first list) and keys (second), [1, H, n, d] each."""
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        parts = [t[a:b] if n == "q" else t[c:d] for n, t in tensors]
        yield slice(a, b), slice(c, d), function(*(p.transpose(0, 1)[None] for p in parts)) if b > a and d > c else None


def varlen(query, key, value, cu_q, cu_k, *rest, scale):
    """aten's varlen flash attention by its schema: lse [H, N], +inf for queries without keys."""
    longest_q, longest_k, _, causal, _ = rest
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (longest_q, longest_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    repeat = query.shape[1] // key.shape[1]
    out, lse = torch.zeros_like(query), query.new_full(query.shape[:2][::-1], float("inf"))
    wide = [("q", query), *(("k", t.repeat_interleave(repeat, 1)) for t in (key, value))]
    run = partial(CPU, dropout_p=0.0, is_causal=causal, scale=scale)
    for rows, _, found in by_segments(run, wide, cu_q, cu_k):
        if found is not None:
            out[rows], lse[:, rows] = found[0][0].transpose(0, 1), found[1][0]
    return out, lse, None, None, None


def varlen_backward(grad, query, key, value, *rest, scale):
    """Its backward pass, by the schema."""
    out, lse, cu_q, cu_k, _, _, _, causal, _, _ = rest
    repeat = query.shape[1] // key.shape[1]
    wide = [("q", grad), ("q", query), *(("k", t.repeat_interleave(repeat, 1)) for t in (key, value))]
    wide += [("q", out), ("q", lse.transpose(0, 1)[..., None])]

    def run(g, q, k, v, o, sums):
        return CPU_BACKWARD(g, q, k, v, o, sums[..., 0], 0.0, causal, scale=scale)

    dq, dk, dv = (torch.zeros_like(t) for t in (query, key, value))
    for rows, keys, found in by_segments(run, wide, cu_q, cu_k):
        if found is not None:
            dq[rows] = found[0][0].transpose(0, 1)
            for into, more in ((dk, found[1]), (dv, found[2])):
                into[keys] = more[0].transpose(0, 1).unflatten(1, (key.shape[1], repeat)).sum(2)
    return dq, dk, dv


@pytest.mark.parametrize("spans", [c for c in CASES if c.tokens], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_the_two_varlen_calls_of_cuda_are_put_together(spans, heads, seed, monkeypatch):
    """The index arithmetic and merging of the CUDA path, with CPU calls of the same schema in place of its kernels."""
    monkeypatch.setattr(flash, "_cuda", varlen)
    monkeypatch.setattr(flash, "_cuda_backward", varlen_backward)
    inputs = tensors(spans, heads, 16, seed)
    x = flash.Packed(*(t.detach() for t in inputs), spans, 0.3)
    out, lse = flash._forward_cuda(x)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    grads = flash._backward_cuda(weight, x, out, lse)
    exact, exact_grads = run(group_attention_ref, [t.detach().double().requires_grad_() for t in inputs], spans, 0.3)
    torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=2e-6)
    for ours, right in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(ours.double(), right, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("past", [0, 1, 37])
@pytest.mark.parametrize("heads", HEADS)
def test_a_chunk_sees_its_past(past, heads, seed):
    """Against the tail of plain causal attention over the whole sequence."""
    n = 11
    whole = [x.detach() for x in tensors(GroupSpans.of([past + n], [[]]), heads, 16, seed)]
    expected = group_attention(*whole, GroupSpans.of([past + n], [[]]), 0.2)[past:]
    query, key, value = (x[past:] for x in whole)
    pasts = [x[:past] for x in whole[1:]]
    with use_backend("flash"):
        by_flash = chunk_attention(query, key, value, *pasts, 0.2)
    for found in (
        chunk_attention(query, key, value, *pasts, 0.2),
        by_flash,
        chunk_attention_ref(query, key, value, *pasts, 0.2),
    ):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)


def test_a_chunk_with_gradients_or_another_past_is_refused(seed):
    q, k, v = tensors(GroupSpans.of([4], [[]]), (2, 2), 8, seed)
    with pytest.raises(KernelInputError, match="no_grad"):
        chunk_attention(q, k, v, k, v)
    q, k, v = (x.detach() for x in (q, k, v))
    with pytest.raises(KernelInputError, match="past_key"):
        chunk_attention(q, k, v, k.double(), v.double())
    with pytest.raises(KernelInputError, match="past_value"):
        chunk_attention(q, k, v, k, v[:2])


def test_no_second_derivative(seed):
    spans = GroupSpans.of([3], [[2]])
    inputs = tensors(spans, (2, 2), 4, seed)
    first = torch.autograd.grad(group_attention(*inputs, spans).square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
