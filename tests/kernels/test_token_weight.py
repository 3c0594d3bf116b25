"""Token weights against a loop in double precision, on both backends, ragged and with every kind of odd logit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from vrlt_kernels._checks import KernelInputError
from vrlt_kernels._launch import use_backend
from vrlt_kernels.linear_token_weight import (
    _chunks,
    linear_group_divergence,
    linear_token_weight,
    linear_token_weight_ref,
)
from vrlt_kernels.token_weight import group_divergence, layout_of, token_weight, token_weight_ref

LENGTHS = [3, 5, 1, 4, 0, 2, 2]
OFFSETS = torch.tensor([0, 3, 5, 7])
CU = torch.tensor([0, *LENGTHS]).cumsum(0)
N = int(CU[-1])
Weights = torch.Tensor


@pytest.fixture(params=["triton", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def looped(
    logits: torch.Tensor, cu: torch.Tensor, offsets: torch.Tensor, *, alpha: float, temperature: float = 1.0,
    clamp: float = 11.0, padded: bool = False,
) -> Weights:  # fmt: skip
    """The definition, one number after the other. A logit of -1e30 stands for -inf; a column that is so in all live
    rows is left out."""
    rows = [torch.log_softmax(row.double() / temperature, 0).tolist() for row in logits]
    vocab, starts = logits.shape[1], cu.tolist()
    lengths = cu.diff().tolist()
    out = torch.zeros(len(rows), dtype=torch.float64)
    for first, last in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        group = range(first, last)
        longest = max(lengths) if padded else max((lengths[s] for s in group), default=0)
        divergences = []
        for t in range(longest):
            live = [s for s in group if t < lengths[s]]
            log_p = [rows[starts[s] + t] if s in live else [-math.log(vocab)] * vocab for s in group]
            total = 0.0
            for v in range(vocab):
                if live and all(rows[starts[s] + t][v] < -1e29 for s in live):
                    continue
                mean = sum(row[v] for row in log_p) / len(log_p)
                gaps = [min(max(mean - row[v], -clamp), clamp) for row in log_p]
                total += sum(math.exp(d) - d - 1.0 for d in gaps)
            divergences.append(total / len(log_p))
        for s in group:
            for t in range(lengths[s]):
                low, high = min(divergences), max(divergences)
                out[starts[s] + t] = 1.0 + (alpha - 1.0) * (divergences[t] - low) / (high - low + 1e-8)
    return out


def plain(logits: torch.Tensor, cu: torch.Tensor, offsets: torch.Tensor, alpha: float) -> Weights:
    """What one would write in the logits' dtype: exp(d) - d - 1 over padded groups."""
    out, sequences = torch.zeros(len(logits), dtype=logits.dtype), logits.log_softmax(1).split(cu.diff().tolist())
    for first, last in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        group = sequences[first:last]
        longest = max(len(s) for s in group)
        padded = torch.full((last - first, longest, logits.shape[1]), -math.log(logits.shape[1]), dtype=logits.dtype)
        for row, sequence in zip(padded, group, strict=True):
            row[: len(sequence)] = sequence
        d = (padded.mean(0) - padded).clamp(-11, 11)
        kl = (d.exp() - d - 1).sum(2).mean(0)
        weight = 1 + (alpha - 1) * (kl - kl.min()) / (kl.max() - kl.min() + 1e-8)
        for s in range(first, last):
            out[cu[s] : cu[s + 1]] = weight[: cu[s + 1] - cu[s]]
    return out


def random_logits(generator: torch.Generator, rows: int = N, vocab: int = 123) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_definition(generator: torch.Generator, backend: str, dtype: torch.dtype, released: bool) -> None:
    logits = random_logits(generator).to(dtype)
    got = token_weight(logits, CU.int(), OFFSETS.int(), alpha=1.7, temperature=0.8, clamp=4.0, released=released)
    want = looped(logits, CU, OFFSETS, alpha=1.7, temperature=0.8, clamp=4.0, padded=released)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
    assert float(got.min()) == 1.0 or released


@pytest.mark.parametrize("vocab", [1, 123, 1000, 1025])
def test_no_worse_than_pytorch(generator: torch.Generator, backend: str, vocab: int) -> None:
    """On the mean of four draws: one whose positions disagree alike divides by a small difference, and then it is
    chance which of the two rounds better."""
    ours = theirs = 0.0
    for _ in range(4):
        logits = random_logits(generator, vocab=vocab).float()
        truth = plain(logits.double(), CU, OFFSETS, 1.7)
        theirs += float((plain(logits, CU, OFFSETS, 1.7).double() - truth).abs().max()) / 4
        ours += float((token_weight(logits, CU, OFFSETS, alpha=1.7).double() - truth).abs().max()) / 4
    assert ours <= 2 * theirs + 2e-6


def test_large_vocabulary(generator: torch.Generator, backend: str) -> None:
    logits = random_logits(generator, rows=6, vocab=151936).float()
    cu, offsets = torch.tensor([0, 2, 3, 6]), torch.tensor([0, 3])
    truth = plain(logits.double(), cu, offsets, 1.4)
    torch.testing.assert_close(token_weight(logits, cu, 3).double(), truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_read_exactly(generator: torch.Generator, backend: str, dtype: torch.dtype) -> None:
    logits = random_logits(generator).to(dtype)
    got = token_weight(logits, CU, OFFSETS)
    assert got.dtype == torch.float32
    assert torch.equal(got, token_weight(logits.float(), CU, OFFSETS))


def test_agreement_has_weight_one(generator: torch.Generator, backend: str) -> None:
    """Groups of one; one position; rows that are equal: 1 exactly, also where a mean of three rounds."""
    logits = random_logits(generator, rows=9).float()
    assert torch.equal(token_weight(logits, torch.tensor([0, 4, 9]), 1, alpha=3.0), torch.ones(9))
    assert torch.equal(token_weight(logits, torch.arange(10), 3, alpha=3.0), torch.ones(9))
    same = logits[:3].repeat(3, 1)
    cu = torch.tensor([0, 3, 6, 9])
    layout = layout_of(same, cu, 3)
    assert torch.equal(
        group_divergence(same, None, torch.tensor([0.7]), *layout, torch.tensor(11.0))[0], torch.zeros(9)
    )
    assert torch.equal(token_weight(same, cu, 3, alpha=3.0), torch.ones(9))


def test_small_disagreement_is_no_rounding(generator: torch.Generator, backend: str) -> None:
    """Rows that differ by 1e-4: D is of the order of 1e-6, where e^d - 1 - d in fp32 is all rounding."""
    logits = (torch.rand(1, 123, generator=generator) + 1e-4 * torch.randn(12, 123, generator=generator)).float()
    layout = layout_of(logits, torch.arange(0, 13, 4), 3)
    want = group_divergence(logits.double(), None, torch.ones(1, dtype=torch.float64), *layout, torch.tensor(11.0))[0]
    got = group_divergence(logits, None, torch.ones(1), *layout, torch.tensor(11.0))[0]
    assert 1e-7 < float(want.min()) < 1e-5
    torch.testing.assert_close(got.double(), want, atol=0, rtol=0.03)


def test_infinite_logits(generator: torch.Generator, backend: str) -> None:
    logits = random_logits(generator)
    holes = torch.rand(logits.shape, generator=generator) < 0.2
    holes[:, 7] = True  # a token that is never allowed
    holes[:, 3] = False
    finite = logits.masked_fill(holes, -1e30)
    want = looped(finite, CU, OFFSETS, alpha=1.7)
    got = token_weight(logits.masked_fill(holes, -torch.inf), CU, OFFSETS, alpha=1.7)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_a_row_of_infinities_and_nan(generator: torch.Generator, backend: str) -> None:
    logits = random_logits(generator)
    logits[1] = -torch.inf
    got = token_weight(logits, CU, OFFSETS)
    assert bool(got.isfinite().all())
    assert float(got[1]) == pytest.approx(1.4)  # nothing disagrees more
    logits[1] = torch.nan
    logits[int(CU[5])] = -torch.inf
    logits[int(CU[6])] = -torch.inf
    got = token_weight(logits, CU, OFFSETS)
    assert bool(got[: CU[3]].isnan().all())
    assert bool(got[CU[3] :].isfinite().all())


def test_order_of_responses(generator: torch.Generator, backend: str) -> None:
    logits = random_logits(generator, rows=9)
    first = token_weight(logits, torch.tensor([0, 3, 5, 9]), 3)
    pieces = logits.split([3, 2, 4])
    second = token_weight(torch.cat([pieces[2], pieces[0], pieces[1]]), torch.tensor([0, 4, 7, 9]), 3)
    torch.testing.assert_close(torch.cat([second[4:], second[:4]]), first, atol=1e-12, rtol=0)
    assert torch.equal(first[:2], first[3:5])
    assert torch.equal(first[:3], first[5:8])


def test_neighbours_and_strides_do_not_matter(generator: torch.Generator, backend: str) -> None:
    logits = random_logits(generator).float()
    whole = token_weight(logits, CU, OFFSETS)
    for first, last in ((0, 3), (3, 5), (5, 7)):
        rows = slice(int(CU[first]), int(CU[last]))
        alone = token_weight(logits[rows], CU[first : last + 1] - CU[first], last - first)
        assert torch.equal(alone, whole[rows])
    padded = torch.full((N, 2, 200), torch.nan)
    padded[:, 1, 9:132] = logits
    assert torch.equal(token_weight(padded[:, 1, 9:132], CU, OFFSETS), whole)
    assert torch.equal(token_weight(logits.t().contiguous().t(), CU, OFFSETS), whole)
    assert torch.equal(token_weight(logits, CU, OFFSETS), whole)


def test_temperature_and_lse(generator: torch.Generator, backend: str) -> None:
    logits = random_logits(generator)
    whole = token_weight(logits, CU, OFFSETS, temperature=0.7)
    rows = torch.full((N,), 0.7, dtype=torch.float64)
    assert torch.equal(token_weight(logits, CU, OFFSETS, temperature=rows), whole)
    assert torch.equal(token_weight(logits, CU, OFFSETS, temperature=rows[0]), whole)
    lse = (logits / 0.7).logsumexp(1)
    torch.testing.assert_close(token_weight(logits, CU, OFFSETS, temperature=0.7, lse=lse), whole, atol=1e-12, rtol=0)


def test_nothing_to_do(backend: str) -> None:
    for cu, groups in ((torch.zeros(1), 2), (torch.zeros(3), 2), (torch.zeros(3), torch.tensor([0, 0, 2, 2]))):
        logits = torch.zeros(0, 5, requires_grad=True)
        out = token_weight(logits, cu.int(), groups, released=True)
        assert out.shape == (0,)
        out.sum().backward()


def test_gradient_of_the_released_weights(generator: torch.Generator, backend: str) -> None:
    logits = random_logits(generator, vocab=11).requires_grad_()
    upstream = torch.randn(2, N, generator=generator, dtype=torch.float64)[:, ::1].t()[:, 1]
    for clamp in (11.0, 0.9):
        options = {"alpha": 1.7, "temperature": 0.8, "clamp": clamp, "released": True}
        ours = token_weight(logits, CU, OFFSETS, **options)
        theirs = token_weight_ref(logits, CU, OFFSETS, **options)
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        (want,) = torch.autograd.grad(theirs, logits, upstream)
        (got,) = torch.autograd.grad(ours, logits, upstream)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)
    assert torch.autograd.gradcheck(
        lambda x: token_weight(x, CU, OFFSETS, alpha=1.7, released=True), (logits,), fast_mode=True
    )


def test_detached_unless_released(generator: torch.Generator, backend: str) -> None:
    logits = random_logits(generator, vocab=11).requires_grad_()
    assert not token_weight(logits, CU, OFFSETS).requires_grad
    out = token_weight(logits, CU, OFFSETS, released=True)
    (first,) = torch.autograd.grad(out.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_gradient_leaves_infinities_alone(generator: torch.Generator, backend: str) -> None:
    logits = random_logits(generator, vocab=11)
    logits[:, 2] = -torch.inf
    logits[4, 5] = -torch.inf
    logits.requires_grad_()
    token_weight(logits, CU, OFFSETS, released=True).square().sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert float(logits.grad[:, 2].abs().sum() + logits.grad[4, 5].abs()) == 0


def test_operators(generator: torch.Generator, backend: str) -> None:
    logits = random_logits(generator, vocab=9).requires_grad_()
    inverse = torch.ones(1, dtype=torch.float64)
    arguments = (logits, None, inverse, *layout_of(logits, CU, OFFSETS))
    torch.library.opcheck(group_divergence, (*arguments, torch.tensor(11.0)))


def test_compiles_without_a_break(generator: torch.Generator, backend: str) -> None:
    logits = random_logits(generator).requires_grad_()
    compiled = torch.compile(token_weight, fullgraph=True, backend="aot_eager")
    options = {"alpha": 1.7, "released": True}
    got, want = compiled(logits, CU, OFFSETS, **options), token_weight(logits, CU, OFFSETS, **options)
    assert torch.equal(got, want)
    (ours,), (theirs,) = torch.autograd.grad(got.sum(), logits), torch.autograd.grad(want.sum(), logits)
    assert torch.equal(ours, theirs)


def head(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((N, 6), (50, 6), (50,)))
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("budget", [1.0, 50 * 8 * 4.0, math.inf])
def test_linear(generator: torch.Generator, backend: str, budget: float) -> None:
    hidden, weight, bias = head(generator)
    options = {"alpha": 1.7, "temperature": torch.linspace(0.5, 2, N, dtype=torch.float64), "bias": bias}
    for released in (False, True):
        ours = linear_token_weight(hidden, weight, CU, OFFSETS, budget_bytes=budget, released=released, **options)
        theirs = linear_token_weight_ref(hidden, weight, CU, OFFSETS, released=released, **options)
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        assert ours.requires_grad == released
    upstream = torch.randn(N, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad(ours, (hidden, weight, bias), upstream)
    want = torch.autograd.grad(theirs, (hidden, weight, bias), upstream)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 100])
def test_chunks_keep_the_budget_and_positions_together(most: int) -> None:
    layout = layout_of(torch.empty(N, 1), CU, OFFSETS)
    position = torch.arange(N) - CU[layout.sequence_of]
    places = list(zip(layout.group_of[layout.sequence_of].tolist(), position.tolist(), strict=True))
    chunks = list(_chunks(layout, most))
    assert sorted(torch.cat([rows for rows, _ in chunks]).tolist()) == list(range(N))
    held = [{places[row] for row in rows.tolist()} for rows, _ in chunks]
    assert all(not a & b for i, a in enumerate(held) for b in held[:i])
    for (rows, cu), here in zip(chunks, held, strict=True):
        assert len(rows) <= most or len(here) == 1
        assert cu.diff().tolist() == [int((layout.sequence_of[rows] == s).sum()) for s in range(len(LENGTHS))]
    assert len(chunks) == 1 or most < N


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(N)}, "logits: got float32"),
        ({"logits": torch.zeros(N, 4, dtype=torch.int64)}, "logits: got int64"),
        ({"logits": torch.zeros(N, 0)}, "logits: got float32"),
        ({"cu_seqlens": CU.float()}, "cu_seqlens: got float32"),
        ({"cu_seqlens": CU[:-1]}, "cu_seqlens: got offsets that end at 15"),
        ({"groups": 2}, "groups: got 2"),
        ({"groups": torch.tensor([0, 3])}, "groups: got offsets that end at 3"),
        ({"alpha": math.inf}, "alpha: got inf"),
        ({"clamp": 0.0}, "clamp: got 0.0"),
        ({"clamp": 90.0}, "clamp: got 90.0"),
        ({"logits": torch.zeros(N, 20000), "clamp": 80.0}, r"clamp: got 80.0, needs a number in \(0, 78.1\]"),
        ({"alpha": None}, "alpha: got None"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"temperature": torch.ones(3)}, "temperature: got float32"),
        ({"lse": torch.zeros(N, dtype=torch.float64)}, "lse: got float64"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    arguments = {"logits": torch.zeros(N, 4), "cu_seqlens": CU, "groups": OFFSETS, **change}
    with pytest.raises(KernelInputError, match=message):
        token_weight(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 3)}, "weight: got"),
        ({"weight": torch.zeros(4, 2, dtype=torch.float64)}, "weight: got float64"),
        ({"bias": torch.zeros(3)}, "bias: got"),
        ({"weight": torch.zeros(0, 2)}, "weight: got .*at least one row"),
        ({"budget_bytes": 0}, "budget_bytes: got 0"),
        ({"budget_bytes": None}, "budget_bytes: got NoneType"),
        ({"groups": 2}, "groups: got 2"),
    ],
)
def test_linear_errors(change: dict[str, object], message: str) -> None:
    arguments = {
        "hidden": torch.zeros(N, 2),
        "weight": torch.zeros(4, 2),
        "cu_seqlens": CU,
        "groups": OFFSETS,
        **change,
    }
    with pytest.raises(KernelInputError, match=message):
        linear_token_weight(**arguments)  # type: ignore[arg-type]


def test_a_group_size_is_offsets(generator: torch.Generator) -> None:
    logits = random_logits(generator, rows=8)
    cu = torch.tensor([0, 3, 4, 6, 8])
    assert torch.equal(token_weight(logits, cu, 2), token_weight(logits, cu, torch.tensor([0, 2, 4])))


def test_a_call_in_inference_mode_leaves_later_ones_alone(generator: torch.Generator) -> None:
    """What is kept between calls must serve a backward pass, whoever made it."""
    logits = random_logits(generator).float()
    options = {"temperature": 0.7731, "released": True}
    with torch.inference_mode():
        token_weight(logits, CU, OFFSETS, **options)
    token_weight(logits.requires_grad_(), CU, OFFSETS, **options).sum().backward()
    assert logits.grad is not None


def test_linear_under_autocast(generator: torch.Generator) -> None:
    hidden, weight, bias = (x.detach().float() for x in head(generator))
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_token_weight(hidden.bfloat16(), weight, CU, OFFSETS, bias=bias)
    halves = (x.bfloat16() for x in (hidden, weight))
    assert torch.equal(ours, linear_token_weight(*halves, CU, OFFSETS, bias=bias.bfloat16()))


def test_linear_operator(generator: torch.Generator) -> None:
    layout = list(layout_of(torch.empty(N, 1), CU, OFFSETS))
    arguments = (*head(generator), torch.ones(1, dtype=torch.float64), layout, torch.tensor(11.0))
    torch.library.opcheck(linear_group_divergence, arguments, {"budget_rows": 4})


def test_the_largest_clamp_is_finite() -> None:
    """A row with most of its tokens at -inf: the sum over the vocabulary, not e^clamp alone, must be finite."""
    logits = torch.zeros(8, 20000)
    logits[2, :15000] = -torch.inf
    weights = token_weight(logits, torch.tensor([0, 2, 4, 6, 8]), 2, clamp=78.0)
    assert bool(weights.isfinite().all())


def test_linear_on_another_default_device(generator: torch.Generator) -> None:
    """The host's own tensors stay on the host under torch.set_default_device."""
    hidden, weight, _ = head(generator)
    with torch.device("meta"):
        ours = linear_token_weight(hidden, weight, CU, OFFSETS)
    assert torch.equal(ours, linear_token_weight(hidden, weight, CU, OFFSETS))
