"""The compiled decoder layer against its formula in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vrlt_kernels import KernelInputError, _native, group_decode_ref, report, use_backend
from vrlt_kernels.decode_layer import (
    DecodeCaches,
    DecodeNumbers,
    LayerWeights,
    chosen,
    decode_head,
    decode_layer,
    obstacle,
)

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.reason())
EPS = 1e-6
LINEAR = ("query", "key", "value", "output")


class Problem:
    """Rows of three groups, one without rows, one without a prefix."""

    def __init__(
        self, generator: torch.Generator, rows: tuple[int, int], *, biases: bool = True, norms: bool = False,
        hidden: int = 48, heads: int = 6, kv_heads: int = 2, dim: int = 16, inner: int = 70,
        dtype: torch.dtype = torch.float64,
    ):  # fmt: skip
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        count, prefixes = sum(rows), (37, 5, 0)
        wide, narrow = heads * dim, kv_heads * dim
        shapes = {"query": (wide, hidden), "key": (narrow, hidden), "value": (narrow, hidden), "output": (hidden, wide)}
        made: dict[str, Any] = {name: draw(*shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
        made |= {f"{name}_bias": draw(shapes[name][0]) if biases else None for name in LINEAR}
        made |= {f"{name}_norm": draw(dim) if norms else None for name in ("query", "key")}
        made |= {"gate": draw(inner, hidden) / 7, "up": draw(inner, hidden) / 7, "down": draw(hidden, inner) / 8}
        self.weights = LayerWeights(input_norm=draw(hidden), post_norm=draw(hidden), **made)
        self.hidden = draw(count, hidden)
        angles = draw(count, dim // 2).repeat(1, 2)
        self.rotation = (angles.cos(), angles.sin())
        self.caches = DecodeCaches(*(draw(50, kv_heads, dim) for _ in range(2)), *self.slab(draw, count, kv_heads, dim))
        own = torch.randint(1, 6, (count,), generator=generator)
        self.numbers = DecodeNumbers(
            prefix_start=torch.tensor([3, 44, 0]),
            prefix_length=torch.tensor(prefixes),
            row_offsets=torch.tensor([0, rows[0], rows[0], count]),
            slots=torch.randperm(count + 2, generator=generator)[:count],
            columns=own - 1,
            suffix_length=own,
        )
        self.max_group = max(*rows, 1)

    @staticmethod
    def slab(draw: Any, count: int, kv_heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one layer among two, so that its strides aren't those of its shape."""
        both = draw(2, count + 2, 2, 7, kv_heads, dim)
        return both[0, :, 1], both[1, :, 1]

    def run(self, **changed: Any) -> tuple[torch.Tensor, DecodeCaches]:
        """Output, and the caches behind it."""
        given = {name: getattr(self, name) for name in ("hidden", "weights", "rotation", "caches", "numbers")}
        given |= {"max_group": self.max_group} | changed
        given["caches"] = DecodeCaches(*(c.clone() for c in given["caches"]))
        return decode_layer(**given, scale=0.3, eps=EPS), given["caches"]

    def formula(self) -> tuple[torch.Tensor, DecodeCaches]:
        w, caches, n = self.weights, DecodeCaches(*(c.clone() for c in self.caches)), self.numbers
        dim = self.rotation[0].shape[1]

        def turned(x: torch.Tensor) -> torch.Tensor:
            a, b = x.chunk(2, dim=-1)
            cos, sin = (r[:, None] for r in self.rotation)
            return x * cos + torch.cat([-b, a], -1) * sin

        def heads(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
            x = x.unflatten(1, (-1, dim))
            return turned(x if norm is None else F.rms_norm(x, norm.shape, norm, EPS))

        x = F.rms_norm(self.hidden, w.input_norm.shape, w.input_norm, EPS)
        query = heads(F.linear(x, w.query, w.query_bias), w.query_norm)
        caches.suffix_key[n.slots, n.columns] = heads(F.linear(x, w.key, w.key_bias), w.key_norm)
        caches.suffix_value[n.slots, n.columns] = F.linear(x, w.value, w.value_bias).unflatten(1, (-1, dim))
        layout = {name: value for name, value in n._asdict().items() if name != "columns"}
        attended = group_decode_ref(query, *caches, scale=0.3, **layout)
        out = self.hidden + F.linear(attended.flatten(1), w.output, w.output_bias)
        x = F.rms_norm(out, w.post_norm.shape, w.post_norm, EPS)
        return out + F.linear(F.silu(F.linear(x, w.gate)) * F.linear(x, w.up), w.down), caches


@pytest.mark.parametrize("rows", [(1, 0), (3, 2), (8, 33)], ids=str)
@pytest.mark.parametrize(("biases", "norms"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_formula(
    generator: torch.Generator, rows: tuple[int, int], biases: bool, norms: bool, dtype: torch.dtype
) -> None:
    problem = Problem(generator, rows, biases=biases, norms=norms, dtype=dtype)
    close: dict[str, Any] = {"atol": 1e-11, "rtol": 0} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 2e-5}
    (out, caches), (right, right_caches) = problem.run(), problem.formula()
    torch.testing.assert_close(out, right, **close)
    for ours, theirs in zip(caches, right_caches, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_odd_sizes(generator: torch.Generator) -> None:
    for hidden, heads, kv_heads, dim, inner in ((1, 1, 1, 2, 1), (13, 7, 1, 6, 5), (300, 3, 3, 130, 1000)):
        problem = Problem(generator, (2, 1), hidden=hidden, heads=heads, kv_heads=kv_heads, dim=dim, inner=inner)
        torch.testing.assert_close(problem.run()[0], problem.formula()[0], atol=1e-11, rtol=1e-11)


def test_a_row_depends_on_itself_alone(generator: torch.Generator) -> None:
    """To the bit, whatever the other rows and the number of threads."""
    problem = Problem(generator, (30, 40), dtype=torch.float32, hidden=200, inner=300)
    whole, before = problem.run()[0], torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(problem.run()[0], whole)
    finally:
        torch.set_num_threads(before)
    for first, last, offsets in ((0, 1, [0, 1, 1, 1]), (7, 30, [0, 23, 23, 23]), (29, 34, [0, 1, 1, 5])):
        n = problem.numbers
        part = {name: getattr(n, name)[first:last] for name in ("slots", "columns", "suffix_length")}
        numbers = n._replace(row_offsets=torch.tensor(offsets), **part)
        rotation = tuple(r[first:last] for r in problem.rotation)
        alone, _ = problem.run(hidden=problem.hidden[first:last], rotation=rotation, numbers=numbers)
        assert torch.equal(alone, whole[first:last])


def test_large_and_small_gates(generator: torch.Generator) -> None:
    """silu where exp would overflow or vanish."""
    problem = Problem(generator, (3, 2), dtype=torch.float32)
    for size in (1e-30, 1e4):
        problem.weights = problem.weights._replace(gate=problem.weights.gate * size)
        (out, _), (right, _) = problem.run(), problem.formula()
        assert bool(out.isfinite().all())
        torch.testing.assert_close(out, right, atol=1e-5 * float(right.abs().max()), rtol=1e-4)


def test_nan_stays(generator: torch.Generator) -> None:
    """In its row alone."""
    problem = Problem(generator, (3, 2), dtype=torch.float32)
    problem.hidden[1, 5] = torch.nan
    out, _ = problem.run()
    assert out.isnan().any(1).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_head(generator: torch.Generator, bias: bool, dtype: torch.dtype) -> None:
    hidden, norm = (torch.randn(*s, generator=generator, dtype=dtype) for s in ((5, 40), (40,)))
    weight = torch.randn(301, 40, generator=generator, dtype=dtype)
    shift = torch.randn(301, generator=generator, dtype=dtype) if bias else None
    right = F.linear(F.rms_norm(hidden, (40,), norm, EPS), weight, shift)
    torch.testing.assert_close(decode_head(hidden, norm, weight, shift, EPS), right, atol=2e-5, rtol=1e-5)
    assert decode_head(hidden[:0], norm, weight, shift, EPS).shape == (0, 301)


def test_choice() -> None:
    weight = torch.zeros(2, 2)
    with use_backend(None):
        assert chosen(weight)
        assert report()["decode_layer"] == "native"
        assert not chosen(weight.half())
    for other in ("reference", "triton"):
        with use_backend(other):  # type: ignore[arg-type]
            assert not chosen(weight)
    assert "fp32" in obstacle(torch.device("cpu"), torch.bfloat16)
    with pytest.raises(KernelInputError, match="hidden: got float16"):
        decode_head(weight.half(), weight[0].half(), weight.half(), None, EPS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"hidden": p.hidden[:, :-1]}, "hidden"),
        (lambda p: {"hidden": p.hidden.float()}, "q_proj"),
        (lambda p: {"weights": p.weights._replace(down=p.weights.down.T)}, "down_proj"),
        (lambda p: {"weights": p.weights._replace(key_bias=p.hidden[0])}, "k_proj.bias"),
        (lambda p: {"weights": p.weights._replace(query=p.weights.query[:-1])}, "q_proj"),
        (lambda p: {"rotation": (p.rotation[0][:-1], p.rotation[1])}, "cos"),
        (lambda p: {"numbers": p.numbers._replace(slots=p.numbers.slots + 100)}, "slots"),
        (lambda p: {"numbers": p.numbers._replace(columns=p.numbers.columns - 9)}, "columns"),
        (lambda p: {"numbers": p.numbers._replace(prefix_length=torch.tensor([99, 0, 0]))}, "prefix_start"),
        (lambda p: {"caches": p.caches._replace(prefix_key=p.caches.prefix_key[..., :-1])}, "prefix_key"),
        (lambda p: {"max_group": 1}, "max_group"),
    ],
)
def test_wrong_arguments(generator: torch.Generator, change: Any, message: str) -> None:
    problem = Problem(generator, (3, 2))
    with pytest.raises(RuntimeError, match=message):
        problem.run(**change(problem))
