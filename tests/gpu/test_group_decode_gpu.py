"""group_decode on a CUDA device against fp64, as it is called and as a captured graph whose lengths change.

With GPU_CHECK_SMALL=1 and no device the same tests run on the CPU, which tries the tests themselves.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from bench.measure import counting_compilations
from vrlt_kernels import group_decode, group_decode_ref, report

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ATOL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
HEADS = [(28, 4, 128), (16, 8, 128), (12, 2, 64), (16, 16, 80), (8, 4, 256), (9, 3, 20)]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (CUDA or os.environ.get("GPU_CHECK_SMALL")),
        reason="needs a CUDA device, or GPU_CHECK_SMALL=1 to try it without",
    ),
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="for a device")


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def caches(
    generator: torch.Generator, heads: tuple[int, int, int], dtype: torch.dtype, *, rows: int, tokens: int, columns: int
) -> dict[str, torch.Tensor]:
    queries, shared, dim = heads

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

    out = {"query": normal(rows, queries, dim)}
    out |= {f"prefix_{name}": normal(tokens, shared, dim) for name in ("key", "value")}
    return out | {f"suffix_{name}": normal(rows + 3, columns, shared, dim) for name in ("key", "value")}


def layout(rows: list[int], prefixes: list[int], suffixes: list[int], padding: int) -> dict[str, torch.Tensor]:
    """Prefixes one after the other with a gap of 2, slots backwards."""
    starts = torch.tensor([0, *(p + 2 for p in prefixes)]).cumsum(0)[:-1]
    count = sum(rows) + padding
    parts: dict[str, Any] = {"prefix_start": starts, "prefix_length": torch.tensor(prefixes)}
    parts |= {"row_offsets": torch.tensor([0, *rows]).cumsum(0).int(), "slots": torch.arange(count).flip(0)}
    parts["suffix_length"] = torch.tensor([*suffixes, *[0] * padding])
    return {name: value.to(DEVICE) for name, value in parts.items()}


def exact(x: dict[str, torch.Tensor], where: dict[str, torch.Tensor]) -> torch.Tensor:
    return group_decode_ref(**{name: value.double() for name, value in x.items()}, **where)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, atol=ATOL[got.dtype], rtol=2 * torch.finfo(got.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", HEADS)
def test_ragged(generator: torch.Generator, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    prefixes, rows = [3000, 17, 0, 512], [8, 0, 3, 20]
    suffixes = [1, 1200, 512, 513, 7, *[i % 90 for i in range(26)]]
    x = caches(generator, heads, dtype, rows=33, tokens=sum(prefixes) + 8, columns=1200)
    where = layout(rows, prefixes, suffixes, 2)
    got = group_decode(**x, **where, max_group=20)
    close(got, exact(x, where))
    assert not got[-2:].any()
    assert torch.equal(got, group_decode(**x, **where, max_group=20)), "two runs differ"
    assert not CUDA or report()["group_decode"] == "triton"


@needs_cuda
def test_a_row_does_not_depend_on_others(generator: torch.Generator) -> None:
    rows, prefixes, suffixes = [8, 0, 3, 5], [3000, 17, 40, 700], [*range(1, 17)]
    x = caches(generator, HEADS[0], torch.bfloat16, rows=16, tokens=4000, columns=64)
    where = layout(rows, prefixes, suffixes, 0)
    whole = group_decode(**x, **where, max_group=8)
    for group, row in ((0, 0), (0, 5), (2, 9), (3, 15)):
        ends = torch.tensor([0] * (group + 1) + [1] * (4 - group), device=DEVICE, dtype=torch.int32)
        only = {name: where[name][row : row + 1] for name in ("slots", "suffix_length")} | {"row_offsets": ends}
        alone = group_decode(**x | {"query": x["query"][row : row + 1]}, **where | only, max_group=8)
        assert torch.equal(alone[0], whole[row]), row


@needs_cuda
def test_a_captured_graph_follows_its_buffers(generator: torch.Generator) -> None:
    """Lengths, slots and groups change between replays; nothing is compiled, and nothing waits for the device."""
    x = caches(generator, HEADS[0], torch.bfloat16, rows=24, tokens=9000, columns=300)
    capacity: Any = {"max_group": 16, "max_prefix": 8000}
    plans = [
        ([8, 8, 0], [2000, 300, 1], [*range(1, 17)], 8),
        ([16, 0, 8], [7999, 5, 30], [299] * 24, 0),
        ([0, 1, 2], [0, 0, 700], [4, 5, 6], 21),
    ]
    buffers = layout(*plans[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        group_decode(**x, **buffers, **capacity)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = group_decode(**x, **buffers, **capacity)
    with counting_compilations() as count:
        for plan in plans:
            where = layout(*plan)
            for name, value in where.items():
                buffers[name].copy_(value)
            x["query"].normal_(generator=generator)
            graph.replay()
            close(out, exact(x, where))
            assert torch.equal(out, group_decode(**x, **where, **capacity))
        assert count() == 0


@needs_cuda
def test_nothing_waits_for_the_device(generator: torch.Generator) -> None:
    x = caches(generator, HEADS[2], torch.bfloat16, rows=3, tokens=50, columns=8)
    where = layout([1, 2], [20, 20], [1, 2, 3], 0)
    group_decode(**x, **where)
    torch.cuda.set_sync_debug_mode("error")
    try:
        group_decode(**x, **where)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_wrong_numbers_give_nan(generator: torch.Generator) -> None:
    x = caches(generator, HEADS[2], torch.bfloat16, rows=4, tokens=50, columns=8)
    where = layout([2, 2], [20, 20], [1, 2, 3, 4], 0)
    want = exact(x, where)
    for name, at, value, rows in (("prefix_start", 0, 10**12, [0, 1]), ("slots", 2, -1, [2]), ("slots", 3, 10**9, [3])):
        wrong = where | {name: where[name].clone()}
        wrong[name][at] = value
        got = group_decode(**x, **wrong)
        bad = torch.zeros(4, dtype=torch.bool, device=DEVICE).index_fill(0, torch.tensor(rows, device=DEVICE), True)
        assert bool(got[bad].isnan().all())
        close(got[~bad], want[~bad])


@needs_cuda
@pytest.mark.slow
def test_an_arena_of_more_than_two_to_the_31_elements(generator: torch.Generator) -> None:
    """A prefix behind element 2^31, read where it lies."""
    tokens = 2**31 // 512 + 1000
    arena = torch.empty(2, tokens, 4, 128, dtype=torch.bfloat16, device=DEVICE)
    x = caches(generator, HEADS[0], torch.bfloat16, rows=8, tokens=900, columns=9)
    arena[0, -900:], arena[1, -900:] = x["prefix_key"], x["prefix_value"]
    where = layout([8], [900], [9] * 8, 0)
    want = group_decode(**x, **where, max_prefix=900)
    far = where | {"prefix_start": where["prefix_start"] + tokens - 900}
    got = group_decode(**x | {"prefix_key": arena[0], "prefix_value": arena[1]}, **far, max_prefix=900)
    assert torch.equal(got, want)
