"""Advantages against the published formulas, on both backends."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vrlt_kernels import KernelInputError, group_advantages, group_advantages_ref, use_backend
from vrlt_kernels.group_advantage import COMBINE, SCALES

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
RAGGED = torch.tensor([0, 4, 5, 5, 8, 15])


def formula(rewards, ends, scale, *, eps, ddof, singleton, lengths):
    """fp64 advantages as lists, group by group, from the formulas."""
    known = [r for r in rewards if math.isfinite(r)]
    out = [0.0] * len(rewards)

    def spread(values, weights):
        mean = sum(v * w for v, w in zip(values, weights, strict=True)) / max(sum(weights), 1)
        square = sum(w * (v - mean) ** 2 for v, w in zip(values, weights, strict=True))
        return mean, math.sqrt(square / max(sum(weights) - ddof, 1))

    for begin, end in itertools.pairwise(ends):
        at = [i for i in range(begin, end) if math.isfinite(rewards[i])]
        group = [rewards[i] for i in at]
        for i, r in zip(at, group, strict=True):
            mean = sum(group) / len(group)
            alone = len(group) == 1 and scale != "reinforce++"
            if alone:
                out[i] = 0.0 if singleton == "zero" else r / (1 + eps if scale == "group" else 1)
            elif scale == "group":
                out[i] = (r - mean) / (spread(group, [1] * len(group))[1] + eps)
            elif scale == "rloo":
                out[i] = r - (sum(group) - r) / (len(group) - 1)
            elif scale == "opo":
                size = [lengths[j] for j in at]
                out[i] = r - sum(x * y for x, y in zip(size, group, strict=True)) / sum(size)
            elif scale == "pass@k":
                best, second = sorted(group, reverse=True)[:2]
                out[i] = best - second if i == at[group.index(best)] else 0.0
            else:
                out[i] = r if scale == "reinforce++" else r - mean
    live = [i for i, r in enumerate(rewards) if math.isfinite(r)]
    if scale == "batch":
        std = spread(known, [1] * len(known))[1]
        out = [a / (std + eps) for a in out]
    elif scale == "gpg":
        out = [a * len(known) / sum(r != 0 for r in known) for a in out]
    elif scale.startswith("reinforce"):
        mean, std = spread([out[i] for i in live], [1 if lengths is None else lengths[i] for i in live])
        for i in live:
            out[i] = (out[i] - mean) / (std + eps)
    return torch.tensor(out, dtype=torch.float64)


@BACKENDS
@pytest.mark.parametrize("scale", SCALES)
def test_formulas(backend, scale, generator):
    for dtype, ddof, singleton, weighed in itertools.product(
        (torch.float64, torch.float32), (0, 1), ("zero", "raw"), (False, True)
    ):
        rewards = torch.randn(15, generator=generator, dtype=dtype)
        rewards[6], rewards[9] = math.nan, math.inf
        lengths = torch.randint(1, 50, (15,), generator=generator)
        given = lengths if weighed or scale == "opo" else None
        options = {"eps": 1e-3, "ddof": ddof, "singleton": singleton, "lengths": given}
        with use_backend(backend):
            out = group_advantages(rewards, RAGGED, scale=scale, **options)
        options["lengths"] = None if given is None else lengths.tolist()
        truth = formula(rewards.double().tolist(), RAGGED.tolist(), scale, **options)
        assert out.dtype == dtype
        tolerance = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
        torch.testing.assert_close(out.double(), truth, **tolerance)


@BACKENDS
@pytest.mark.parametrize("scale", [s for s in SCALES if s not in ("reinforce++", "opo")])
def test_equal_rewards_get_exactly_zero(backend, scale):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rewards = torch.tensor([0.1] * 7 + [0.3] * 5 + [0.7], dtype=dtype)
        with use_backend(backend):
            out = group_advantages(rewards, torch.tensor([0, 7, 12, 13]), scale=scale, eps=0.0)
        if scale == "reinforce++_baseline":
            assert out.abs().max() == 0
        assert out.count_nonzero() == 0, out


@BACKENDS
@pytest.mark.parametrize("scale", [s for s in SCALES if s not in ("opo", "reinforce++", "reinforce++_baseline")])
def test_equal_rewards_with_raw_singletons(backend, scale):
    """Where the spread of the batch divides, nothing is left of equal rewards; else singletons keep theirs."""
    cases = (([5.0, 5.0], 1), ([5.0], 1), ([5.0, math.nan, 5.0, 5.0], 2), ([0.0, 0.0], 1), ([5.0] * 4, 2))
    for (rewards, size), eps in itertools.product(cases, (0.0, 1e-3)):
        values = torch.tensor(rewards, dtype=torch.float64)
        with use_backend(backend):
            out = group_advantages(values, size, scale=scale, singleton="raw", eps=eps)
        alone = values.isfinite().view(-1, size).sum(1, keepdim=True) == 1
        kept = values.nan_to_num() * alone.expand(-1, size).flatten() / (1 + eps if scale == "group" else 1)
        torch.testing.assert_close(out, torch.zeros_like(kept) if scale == "batch" else kept)


@BACKENDS
@pytest.mark.parametrize("scale", ["group", "pass@k", "none"])
def test_a_response_without_rewards_is_left_out_of_whitening(backend, scale):
    rewards = torch.tensor([[math.nan, math.inf], [1, 2], [3, 0], [2, 4]], dtype=torch.float64)
    options = {"scale": scale, "combine": "normalize_then_sum_then_whiten", "eps": 0.0}
    with use_backend(backend):
        out = group_advantages(rewards, 4, **options)
        alone = group_advantages(rewards[1:], 3, **options)
        assert group_advantages(rewards.fill_(math.nan), 4, **options).tolist() == [0.0] * 4
    assert out[0] == 0
    torch.testing.assert_close(out[1:], alone)


@BACKENDS
def test_weights_are_finite_constants(backend, monkeypatch):
    rewards = torch.tensor([[0.0, 5.0], [1, 2], [3, 0], [2, 4]])
    with use_backend(backend):
        for weights in ([1.0, math.nan], [math.inf, 1.0], torch.tensor([1.0, math.nan]), ["a", 1.0], [None, 1.0]):
            with pytest.raises(KernelInputError, match=r"^weights: got .*, needs finite numbers"):
                group_advantages(rewards, 2, weights=weights)
        for weights in (3.0, [1.0]):
            with pytest.raises(KernelInputError, match=r"^weights: got .*, needs shape \[2\]"):
                group_advantages(rewards, 2, weights=weights)
        given = torch.tensor([1.0, -2.0], requires_grad=True)
        out = group_advantages(rewards, 2, weights=given)
        assert not out.requires_grad
        assert torch.equal(out, group_advantages(rewards, 2, weights=(1, -2)))
        # on a GPU, and in a graph, values aren't looked at
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        for combine in COMBINE:
            assert group_advantages(rewards, 2, weights=torch.tensor([1.0, math.nan]), combine=combine).isnan().all()


def test_other_numbers_compile_nothing_new():
    rewards = torch.tensor([[0.0, 5.0], [1, 2], [3, 0], [2, 4]])
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    def run(first, second, eps):
        return group_advantages(rewards, 2, weights=[first, second], eps=eps)

    torch.compiler.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for i in range(12):
        numbers = (0.5 + 0.1 * i, 2.0 - 0.1 * i, 1e-3 * (i + 1))
        torch.testing.assert_close(compiled(*numbers), run(*numbers))
    assert len(frames) <= 2


@BACKENDS
def test_by_hand(backend):
    rewards = torch.tensor([1.0, 0.0, 2.0, 5.0, 5.0, 3.0])
    ends = torch.tensor([0, 3, 5, 6], dtype=torch.int32)
    with use_backend(backend):
        assert group_advantages(rewards, ends, eps=0.0).tolist() == pytest.approx([0.0, -1.0, 1.0, 0.0, 0.0, 0.0])
        assert group_advantages(rewards, ends, scale="none").tolist() == [0.0, -1.0, 1.0, 0.0, 0.0, 0.0]
        assert group_advantages(rewards, 3, scale="pass@k").tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
        assert group_advantages(rewards[:0], 4).shape == (0,)
        assert group_advantages(rewards[:0], torch.tensor([0])).shape == (0,)
        assert group_advantages(torch.full((3,), math.nan), 3).tolist() == [0.0] * 3
        assert group_advantages(torch.full((3,), math.nan), 3, scale="reinforce++").tolist() == [0.0] * 3


@BACKENDS
def test_many_rewards_of_a_response(backend, generator):
    rewards = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    weights = [1.0, 0.5, -2.0]
    with use_backend(backend):
        first = group_advantages(rewards, 4, weights=weights)
        torch.testing.assert_close(first, group_advantages(rewards @ torch.tensor(weights).double(), 4))
        apart = group_advantages(rewards, 4, weights=weights, combine="normalize_then_sum")
        columns = [w * group_advantages(rewards[:, k], 4) for k, w in enumerate(weights)]
        torch.testing.assert_close(apart, sum(columns))
        white = group_advantages(rewards, 4, weights=weights, combine="normalize_then_sum_then_whiten", eps=1e-6)
        plain = group_advantages(rewards, 4, weights=weights, combine="normalize_then_sum", eps=1e-6)
        torch.testing.assert_close(white, (plain - plain.mean()) / (plain.std() + 1e-6))
        rewards[1] = math.nan
        rewards[2, 0] = math.nan
        out = group_advantages(rewards, 4, weights=torch.tensor(weights))
        assert out[1] == 0
        torch.testing.assert_close(out, group_advantages(torch.nansum(rewards * torch.tensor(weights).double(), 1)
                                                         .index_fill(0, torch.tensor(1), math.nan), 4))  # fmt: skip
        assert group_advantages(rewards[:, :0], 4).tolist() == [0.0] * 8


@BACKENDS
def test_strides_large_groups_and_repetition(backend, generator):
    wide = torch.randn(600, 2, generator=generator)
    with use_backend(backend):
        for scale in ("group", "pass@k", "batch"):
            out = group_advantages(wide[:, 1], 300, scale=scale)
            assert torch.equal(out, group_advantages(wide[:, 1].contiguous(), 300, scale=scale))
            torch.testing.assert_close(out, group_advantages_ref(wide[:, 1], 300, scale=scale))
    assert not group_advantages(wide[:, 0].requires_grad_(), 300).requires_grad


@BACKENDS
def test_opcheck(backend):
    rewards, eps = torch.tensor([1.0, 0.5, 2.0, 3.0]), torch.tensor(1e-4, dtype=torch.float64)
    names = {"scale": "reinforce++", "ddof": 1, "singleton": "zero"}
    op = torch.ops.vrlt_kernels.group_advantages.default
    with use_backend(backend):
        torch.library.opcheck(op, (rewards, 2, None, None, eps), names)
        torch.library.opcheck(op, (rewards.double(), 0, torch.tensor([0, 1, 4]), torch.arange(4), eps), names)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (([1.0], 1), "rewards"),
        ((torch.zeros(4, dtype=torch.int64), 2), "rewards"),
        ((torch.zeros(2, 2, 2), 2), "rewards"),
        ((torch.zeros(4), 3), "groups"),
        ((torch.zeros(4), 0), "groups"),
        ((torch.zeros(4), True), "groups"),
        ((torch.zeros(4), [2, 2]), "groups"),
        ((torch.zeros(4), torch.tensor([0, 3])), "groups"),
        ((torch.zeros(4), torch.tensor([0, 3, 2, 4])), "groups"),
    ],
)
def test_refused_arguments(arguments, name):
    with pytest.raises(KernelInputError, match=rf"^{name}: got .*, needs"):
        group_advantages(*arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "std"},
        {"eps": -1.0},
        {"eps": math.nan},
        {"eps": math.inf},
        {"eps": None},
        {"eps": "1"},
        {"ddof": 2},
        {"ddof": 1.0},
        {"ddof": True},
        {"singleton": "one"},
        {"combine": "mean"},
        {"weights": [1.0]},
        {"lengths": torch.ones(3)},
        {"scale": "opo"},
    ],
)
def test_refused_options(options):
    name = "lengths" if options == {"scale": "opo"} else next(iter(options))
    with pytest.raises(KernelInputError, match=rf"^{name}: got .*, needs"):
        group_advantages(torch.zeros(4), 2, **options)
    if name == "weights":
        with pytest.raises(KernelInputError, match=r"^weights: got .*, needs shape \[3\]"):
            group_advantages(torch.zeros(4, 3), 2, **options)
    assert set(COMBINE) == {"sum_then_normalize", "normalize_then_sum", "normalize_then_sum_then_whiten"}
