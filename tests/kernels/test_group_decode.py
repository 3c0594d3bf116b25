"""Decode attention against a loop in double precision: ragged groups, empty parts, NaN wherever no row may read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from vrlt_kernels import _native, group_decode, group_decode_ref, report, use_backend
from vrlt_kernels._checks import KernelInputError
from vrlt_kernels.group_decode import _decode

ATOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
CACHES = ("prefix_key", "prefix_value", "suffix_key", "suffix_value")
Problem = dict[str, Any]


@pytest.fixture(params=["triton", "native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """With NaN in all that is allocated without a value."""
    if request.param == "native" and not _native.available():
        pytest.skip(_native.reason())
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend(request.param):
            yield request.param
    finally:
        torch.use_deterministic_algorithms(False)


def half(backend: str) -> torch.dtype:
    """A type of 16 bits that the backend takes on a CPU."""
    return torch.bfloat16 if backend == "native" else torch.float16


def problem(
    generator: torch.Generator, *, rows: list[int], prefixes: list[int], suffixes: list[int], ratio: int = 3,
    shared: int = 1, dim: int = 16, padding: int = 0, dtype: torch.dtype = torch.float32,
) -> Problem:  # fmt: skip
    """Rows and prefix of each group, suffix of each row. What no row may read, and the query of padding, is NaN."""

    def full(*shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    def fill(cache: torch.Tensor) -> None:
        cache.copy_(torch.randn(cache.shape, generator=generator).to(dtype))

    live, count = sum(rows), sum(rows) + padding
    order = torch.randperm(len(rows), generator=generator).tolist()
    starts, at = [0] * len(rows), 5
    for group in order:
        starts[group] = at
        at += prefixes[group] + 3
    slots = torch.randperm(count + 2, generator=generator)[:count]
    x: Problem = {"query": full(count, shared * ratio, dim)}
    x |= {name: full(at, shared, dim) for name in CACHES[:2]}
    x |= {name: full(count + 2, max(suffixes, default=0) + 2, shared, dim) for name in CACHES[2:]}
    fill(x["query"][:live])
    for name in CACHES[:2]:
        for start, length in zip(starts, prefixes, strict=True):
            fill(x[name][start : start + length])
    for name in CACHES[2:]:
        for slot, length in zip(slots[:live].tolist(), suffixes, strict=True):
            fill(x[name][slot, :length])
    ends = torch.tensor([0, *rows]).cumsum(0).int()
    x |= {
        "prefix_start": torch.tensor(starts, dtype=torch.int64),
        "prefix_length": torch.tensor(prefixes, dtype=torch.int32),
    }
    return x | {
        "row_offsets": ends,
        "slots": slots,
        "suffix_length": torch.tensor([*suffixes, *[-7] * padding], dtype=torch.int64),
    }


def looped(x: Problem, scale: float | None = None) -> torch.Tensor:
    """The definition, a row and a head at a time."""
    query = x["query"].double()
    out, ends = torch.zeros_like(query), x["row_offsets"].tolist()
    ratio = query.shape[1] // x["prefix_key"].shape[1]
    for group, (first, last) in enumerate(pairwise(ends)):
        start = int(x["prefix_start"][group])
        tokens = slice(start, start + int(x["prefix_length"][group]))
        for row in range(first, last):
            slot, own = int(x["slots"][row]), int(x["suffix_length"][row])
            for head in range(query.shape[1]):
                key, value = (
                    torch.cat([x[f"prefix_{k}"][tokens, head // ratio], x[f"suffix_{k}"][slot, :own, head // ratio]])
                    for k in ("key", "value")
                )
                scores = key.double() @ query[row, head] * (query.shape[2] ** -0.5 if scale is None else scale)
                out[row, head] = scores.softmax(0) @ value.double()
    return out


def check(x: Problem, **options: Any) -> torch.Tensor:
    got = group_decode(**x, **options)
    assert got.dtype == x["query"].dtype
    assert got.shape == x["query"].shape
    want = looped(x, options.get("scale"))
    torch.testing.assert_close(got.double(), want, atol=ATOL[got.dtype], rtol=2 * torch.finfo(got.dtype).eps)
    return got


RAGGED: dict[str, Any] = {"rows": [2, 0, 1], "prefixes": [75, 4, 33], "suffixes": [3, 1, 9], "padding": 1}


@pytest.mark.parametrize(
    ("shared", "ratio", "dim", "dtype"),
    [(2, 1, 20, None), (1, 3, 80, torch.float32), (1, 7, 64, torch.float32), (1, 3, 128, None)],
)
def test_ragged(
    generator: torch.Generator, backend: str, shared: int, ratio: int, dim: int, dtype: torch.dtype | None
) -> None:
    x = problem(generator, **RAGGED, shared=shared, ratio=ratio, dim=dim, dtype=dtype or half(backend))
    assert not check(x)[-1].any()


def test_reference(generator: torch.Generator) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16):
        x = problem(generator, **RAGGED, dtype=dtype)
        for options in ({}, {"scale": 0.7}):
            torch.testing.assert_close(
                group_decode_ref(**x, **options).double(), looped(x, options.get("scale")), atol=ATOL[dtype], rtol=1e-3
            )
    check(problem(generator, **RAGGED, dtype=torch.float64))


@pytest.mark.parametrize("group", [1, 8])
def test_group_size(generator: torch.Generator, backend: str, group: int) -> None:
    """8 rows of 3 heads are two tiles in fp32, 4 splits of the prefix."""
    suffixes = torch.randint(1, 20, (group,), generator=generator).tolist()
    x = problem(generator, rows=[group], prefixes=[801], suffixes=suffixes)
    check(x, max_group=group)


@pytest.mark.parametrize("length", [32, 257])
def test_prefix_lengths_about_a_block(generator: torch.Generator, backend: str, length: int) -> None:
    check(problem(generator, rows=[1], prefixes=[length], suffixes=[1], ratio=1))


def test_threads_do_not_matter(generator: torch.Generator) -> None:
    """Of the compiled operator: to the bit, in every type."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = problem(generator, rows=[9, 5], prefixes=[1300, 700], suffixes=[7] * 14, dim=64, dtype=dtype)
        found, before = [], torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(group_decode(**x))
        finally:
            torch.set_num_threads(before)
        check(x)
        assert all(torch.equal(found[0], other) for other in found[1:]) or not _native.available()


def test_a_query_of_any_strides(generator: torch.Generator, backend: str) -> None:
    x = problem(generator, **RAGGED)
    y = x | {"query": x["query"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert torch.equal(group_decode(**y), group_decode(**x))


def test_keys_of_score_minus_infinity_weigh_nothing(generator: torch.Generator) -> None:
    """A whole part of them, in front of others."""
    x = problem(generator, rows=[1], prefixes=[600], suffixes=[1], ratio=1)
    start, ones = int(x["prefix_start"][0]), torch.ones(16)
    x["query"][0, 0] = ones
    x["prefix_key"][start : start + 520] = -3e38
    x["suffix_key"][x["slots"][0], 0] = -3e38
    if _native.available():
        got = group_decode(**x, scale=1.0, backend="native")
        keys = slice(start + 520, start + 600)
        weights = (x["prefix_key"][keys, 0].double() @ ones.double()).softmax(0)
        torch.testing.assert_close(
            got[0, 0].double(), weights @ x["prefix_value"][keys, 0].double(), atol=1e-5, rtol=1e-5
        )


def test_further_layers_need_not_be_looked_at(generator: torch.Generator, backend: str) -> None:
    x = problem(generator, **RAGGED)
    assert torch.equal(group_decode(**x, validate=False), group_decode(**x))


def test_more_heads_than_a_tile(generator: torch.Generator, backend: str) -> None:
    check(problem(generator, rows=[1], prefixes=[20], suffixes=[3], ratio=20))


def test_a_suffix_in_splits(generator: torch.Generator, backend: str) -> None:
    check(problem(generator, rows=[1, 2], prefixes=[40, 3], suffixes=[1100, 512, 513], ratio=2))


def test_more_groups_than_rows(generator: torch.Generator, backend: str) -> None:
    rows = [0] * 70
    rows[3] = rows[66] = 1
    prefixes = [i % 5 for i in range(70)]
    check(problem(generator, rows=rows, prefixes=prefixes, suffixes=[2, 3], ratio=1))


def test_empty_parts(generator: torch.Generator, backend: str) -> None:
    x = problem(generator, rows=[3, 2], prefixes=[0, 20], suffixes=[0, 3, 0, 0, 2], ratio=1)
    x["slots"][0] = x["slots"][3] = 10**6
    x["prefix_start"][0] = -1
    x["suffix_length"][1] = 0
    got = group_decode(**x)
    x["slots"].clamp_(max=6)
    torch.testing.assert_close(got.double(), looped(x), atol=1e-5, rtol=1e-5)
    assert not got[:3].any()


def test_nothing_to_do(generator: torch.Generator, backend: str) -> None:
    x = problem(generator, rows=[], prefixes=[], suffixes=[], padding=3)
    assert not group_decode(**x).any()
    x = problem(generator, rows=[0, 0], prefixes=[4, 0], suffixes=[])
    assert group_decode(**x).shape == (0, 3, 16)
    x = problem(generator, rows=[0, 0], prefixes=[4, 0], suffixes=[], padding=2)
    assert not group_decode(**x, max_group=1).any()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_scores(generator: torch.Generator, backend: str, size: float) -> None:
    """Scores up to 1e4 of either sign, the largest in any part."""
    x = problem(generator, rows=[2], prefixes=[300], suffixes=[3, 5], ratio=2)
    for name in ("query", "prefix_key", "suffix_key"):
        x[name] = torch.where(x[name].isnan(), x[name], x[name].sign())
    x["suffix_key"][x["slots"][0], 1] = x["query"][0, 0]
    got = group_decode(**x, scale=size / 16)
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got.double(), looped(x, size / 16), atol=1e-3, rtol=1e-3)


def test_equal_values_come_out_as_they_are(generator: torch.Generator, backend: str) -> None:
    x = problem(generator, rows=[2], prefixes=[290], suffixes=[4, 9], dtype=half(backend))
    for name in ("prefix_value", "suffix_value"):
        x[name] = torch.where(x[name].isnan(), x[name], 0.75)
    torch.testing.assert_close(group_decode(**x), torch.full_like(x["query"], 0.75), atol=5e-4, rtol=0)


def test_strides(generator: torch.Generator, backend: str) -> None:
    """Layers in one tensor, heads before tokens, a query that is part of a projection."""
    x = problem(generator, **RAGGED, shared=2, ratio=1)
    want = group_decode(**x)
    y = dict(x)
    for name in CACHES[:2]:
        y[name] = x[name].transpose(0, 1).contiguous().transpose(0, 1)
    for name in CACHES[2:]:
        y[name] = torch.stack([x[name], x[name]], 1)[:, 1]
    y["query"] = torch.cat([x["query"], x["query"]], 2)[..., 16:]
    for name in ("slots", "suffix_length", "prefix_start"):
        y[name] = y[name].int()
    got = group_decode(**y, max_prefix=1000)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert backend == "reference" or torch.equal(got, want)
    assert torch.equal(group_decode(**x), want), "two runs differ"


@pytest.mark.parametrize("slots", [[1, 3, 5], [5, 0, 7]])
def test_slots_in_any_order(generator: torch.Generator, backend: str, slots: list[int]) -> None:
    x = problem(generator, rows=[3], prefixes=[9], suffixes=[3, 3, 3], ratio=1)
    for name in CACHES[2:]:
        cache = torch.full((8, *x[name].shape[1:]), torch.nan)
        cache[slots] = x[name][x["slots"]]
        x[name] = cache
    x["slots"] = torch.tensor(slots)
    check(x)


def test_a_row_does_not_depend_on_others(generator: torch.Generator, backend: str) -> None:
    """To the bit with Triton, if NumPy, which multiplies for the interpreter, finds the row at the same place of a
    tile; of the compiled operator always; of the reference to rounding."""
    x = problem(generator, rows=[3, 0, 2], prefixes=[333, 8, 21], suffixes=[5, 5, 5, 2, 7], ratio=2)
    whole = group_decode(**x, max_group=4)
    for first, last, ends, same in (
        (0, 1, [0, 1, 1, 1], True),
        (1, 4, [0, 2, 2, 3], False),
        (3, 5, [0, 0, 0, 2], True),
    ):
        y = x | {name: x[name][first:last] for name in ("query", "slots", "suffix_length")}
        alone = group_decode(**y | {"row_offsets": torch.tensor(ends)}, max_group=4)
        torch.testing.assert_close(alone, whole[first:last], atol=1e-6, rtol=1e-6)
        assert torch.equal(alone, whole[first:last]) or backend == "reference" or (backend == "triton" and not same)


def test_wrong_numbers_give_nan_where_they_cannot_be_looked_at(generator: torch.Generator) -> None:
    """As on a GPU: the operator without the checks, which read the values on the CPU. Nothing else is touched."""
    x = problem(generator, rows=[2, 2], prefixes=[20, 20], suffixes=[3, 3, 3, 3], ratio=2)
    want = group_decode(**x)
    changes = (
        ("prefix_start", 0, 10**12, [0, 1]), ("prefix_length", 1, -1, [2, 3]), ("slots", 2, 6, [2]),
        ("suffix_length", 0, 6, [0]), ("row_offsets", 1, 4, [2, 3]),
    )  # fmt: skip
    with use_backend("triton"):
        for name, at, value, rows in changes:
            y = dict(x)
            y[name] = x[name].clone()
            y[name][at] = value
            got = _decode(*y.values(), 0.25, 64, 2)
            bad = torch.zeros(4, dtype=torch.bool).index_fill(0, torch.tensor(rows), True)
            assert bool(got[bad].isnan().all()), name
            assert name == "row_offsets" or torch.allclose(got[~bad], want[~bad], atol=1e-5), name
        y = x | {"row_offsets": torch.tensor([0, -5, 99])}
        assert _decode(*y.values(), 0.25, 64, 2).shape == want.shape


def test_operator(generator: torch.Generator, backend: str) -> None:
    x = problem(generator, rows=[1, 1], prefixes=[5, 3], suffixes=[1, 2])
    torch.library.opcheck(_decode, (*x.values(), 0.25, 8, 2))


def test_compiles_without_a_break(generator: torch.Generator, backend: str) -> None:
    x = problem(generator, **RAGGED)
    compiled = torch.compile(group_decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**x, max_group=2), group_decode(**x, max_group=2))


def test_backend_of_a_call(generator: torch.Generator) -> None:
    x = problem(generator, rows=[1], prefixes=[5], suffixes=[1])
    group_decode(**x, backend="triton")
    assert report()["group_decode"] == "triton (as asked)"
    group_decode(**x, backend="reference")
    assert report()["group_decode"] == "reference (as asked)"
    group_decode(**x)
    assert report()["group_decode"] == "native" or not _native.available()
    with pytest.raises(KernelInputError, match="backend: got 'fast'"):
        group_decode(**x, backend="fast")  # type: ignore[arg-type]


def test_no_gradient(generator: torch.Generator) -> None:
    x = problem(generator, rows=[1], prefixes=[5], suffixes=[1])
    for name in ("query", "prefix_value"):
        y = x | {name: x[name].clone().requires_grad_()}
        with pytest.raises(KernelInputError, match=f"{name}: got a tensor that requires grad"):
            group_decode(**y)
        with torch.no_grad():
            assert torch.equal(group_decode(**y), group_decode(**x))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", torch.zeros(3, 6), "query: got float32"),
        ("query", torch.zeros(3, 6, 16, dtype=torch.int64), "query: got int64"),
        ("query", torch.zeros(3, 6, 300), "a head dimension of 1 to 256"),
        ("query", torch.zeros(3, 5, 16), "prefix_key: got .* KV heads that divide the 5"),
        ("query", torch.zeros(3, 6, 16, dtype=torch.float64), "prefix_key: got .* needs float64"),
        ("query", torch.zeros(3, 6, 16, device="meta"), "prefix_key: got .* a tensor on meta"),
        ("query", torch.zeros(2, 6, 16), "slots: got"),
        ("prefix_key", torch.zeros(9, 2, 8), "prefix_key: got"),
        ("prefix_value", torch.zeros(9, 2, 16), "prefix_value: got"),
        ("prefix_value", torch.zeros(61, 16, 2).mT, "prefix_value: got"),
        ("suffix_key", torch.zeros(9, 8, 1, 16), "suffix_key: got"),
        ("suffix_value", torch.zeros(9, 8, 2, 16), "suffix_value: got"),
        ("row_offsets", torch.tensor([1, 2, 3]), "row_offsets: got"),
        ("row_offsets", torch.tensor([0, 2, 4]), "row_offsets: got offsets that end at 4"),
        ("row_offsets", torch.tensor([0, 3]), "prefix_start: got"),
        ("row_offsets", torch.tensor([0, 3, 3]), "row_offsets: got 3 rows for group 0"),
        ("prefix_start", torch.zeros(2), "prefix_start: got float32"),
        ("prefix_start", torch.tensor([0, 50]), "prefix_start: got 20 tokens from 50 for group 1"),
        ("prefix_length", torch.tensor([-1, 5]), "prefix_start: got -1 tokens"),
        ("slots", torch.tensor([0, 5, 1]), "slots: got 5 for row 1"),
        ("suffix_length", torch.tensor([1, 1, 9]), "suffix_length: got 9 for row 2"),
        ("scale", "1", "scale: got '1'"),
        ("max_prefix", 0, "max_prefix: got 0"),
        ("max_group", 1.5, "max_group: got 1.5"),
    ],
)
def test_errors(generator: torch.Generator, name: str, value: object, message: str) -> None:
    x = problem(generator, rows=[1, 2], prefixes=[30, 20], suffixes=[1, 2, 3], shared=2)
    with pytest.raises(KernelInputError, match=message):
        group_decode(**{**x, "max_group": 2, name: value})


def test_launch_config() -> None:
    triton = pytest.importorskip("vrlt_kernels.group_decode_triton")
    shape = triton.Shape(90, 132, torch.bfloat16, 128, 7, 4, 1, 8, 16384, 1024)
    config = triton.launch_config(shape)
    assert (config["BLOCK_M"], config["splits"], config["suffix_splits"]) == (64, 32, 2)
    assert triton.launch_config(shape._replace(groups=32))["splits"] == 3
    assert triton.launch_config(shape._replace(groups=10**6))["splits"] == 1
    assert triton.launch_config(shape._replace(max_prefix=0, columns=0))["suffix_splits"] == 1
    assert triton.launch_config(shape._replace(max_group=10**6))["BLOCK_M"] == 128
    assert triton.launch_config(shape._replace(capability=80, max_group=16))["BLOCK_M"] == 64
    assert triton.launch_config(shape._replace(dtype=torch.float32))["BLOCK_M"] == 16
    assert triton.launch_config(shape._replace(head_dim=20))["BLOCK_D"] == 32
