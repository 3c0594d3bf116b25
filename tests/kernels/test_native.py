"""The compiled row operators against fp64: every width, dtype and special value they promise something about."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from vrlt_kernels import _native

ROOT = Path(__file__).resolve().parent.parent.parent
WIDTHS = (1, 7, 123, 1000, 151665, 151936, 152064)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ATOL = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}

built = pytest.mark.skipif(not _native.available(), reason=_native.reason())
pytestmark = pytest.mark.timeout(300)  # some compile, on a machine that may be busy
ops = torch.ops.vrlt_native


class Rows(NamedTuple):
    logits: torch.Tensor
    target: torch.Tensor
    inverse: torch.Tensor
    a: torch.Tensor
    e: torch.Tensor


class Outcome(NamedTuple):
    """Everything the operators give, as fp64."""

    logp: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor
    sum_p2: torch.Tensor
    grad: torch.Tensor
    rest: torch.Tensor  # onehot - p


def rows(generator, n, width, dtype, spread=3.0):
    logits = (torch.randn(n, width, generator=generator, dtype=torch.float64) * spread).to(dtype)
    target = torch.randint(width, (n,), generator=generator)
    small = torch.float64 if dtype == torch.float64 else torch.float32
    inverse = (0.5 + torch.rand(n, generator=generator, dtype=torch.float64)).to(small)
    a, e = torch.randn(2, n, generator=generator, dtype=torch.float64).to(small)
    return Rows(logits, target, inverse, a, e)


def by_torch(r, dtype):
    """The formulas in plain PyTorch, computed in ``dtype``."""
    inverse = r.inverse.to(dtype)[:, None]
    z = r.logits.to(dtype) * inverse
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    hit = torch.nn.functional.one_hot(r.target, z.shape[1]).to(dtype)
    slope = torch.where(p > 0, p * (log_p + entropy[:, None]), 0.0)
    grad = inverse * (r.a.to(dtype)[:, None] * (hit - p) - r.e.to(dtype)[:, None] * slope)
    logp = log_p.gather(1, r.target[:, None])[:, 0]
    return Outcome(*(x.double() for x in (logp, entropy, z.logsumexp(-1), p.square().sum(-1), grad, hit - p)))


def by_ops(r, *, in_place=False):
    logp, entropy, lse, sum_p2 = ops.row_stats(r.logits, r.target, r.inverse, True)
    logits = r.logits.clone() if in_place else r.logits
    out = logits if in_place else torch.full_like(r.logits, math.nan)
    ops.row_grad_(out, logits, r.target, r.inverse, lse, entropy, r.a, r.e)
    rest = r.logits.clone()
    again = ops.row_fused_(rest, r.target, r.inverse)
    assert all(torch.equal(x, y) or x.isnan().any() for x, y in zip(again, (logp, entropy, lse), strict=True))
    return Outcome(*(x.double() for x in (logp, entropy, lse, sum_p2, out, rest)))


def assert_within_yardstick(r):
    truth, ours, theirs = by_torch(r, torch.float64), by_ops(r), by_torch(r, r.logits.dtype)
    for name, want, got, plain in zip(Outcome._fields, truth, ours, theirs, strict=True):
        allowed = 2 * float((plain - want).abs().max()) + ATOL[r.logits.dtype] * max(1.0, float(want.abs().max()))
        assert float((got - want).abs().max()) <= allowed, name


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_against_fp64(generator, width, dtype):
    assert_within_yardstick(rows(generator, 3 if width > 1000 else 9, width, dtype))


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_bitwise_the_same(generator, dtype):
    r = rows(generator, 5, 1003, dtype)
    assert torch.equal(by_ops(r).grad, by_ops(r, in_place=True).grad)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_temperature_is_the_same_in_every_row(generator, dtype):
    r = rows(generator, 5, 77, dtype)
    one, number = r._replace(inverse=r.inverse[:1]), r._replace(inverse=r.inverse[0])
    each = r._replace(inverse=r.inverse[:1].repeat(5))
    for other in (one, number):
        assert all(torch.equal(x, y) for x, y in zip(by_ops(each), by_ops(other), strict=True))


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_and_columns(generator, dtype):
    r = rows(generator, 6, 130, dtype)
    wide = torch.full((12, 150), math.nan, dtype=dtype)
    wide[::2, 11:141] = r.logits
    twice = [torch.stack([x, x.new_full(x.shape, 3)], dim=1).flatten()[::2] for x in (r.target, r.inverse, r.a, r.e)]
    strided = Rows(wide[::2, 11:141], *twice)
    assert not any(x.is_contiguous() for x in strided)
    expected = by_ops(r)
    assert all(torch.equal(x, y) for x, y in zip(expected, by_ops(strided), strict=True))
    lse, entropy = expected.lse.to(r.a.dtype), expected.entropy.to(r.a.dtype)
    ops.row_grad_(strided.logits, *strided[:3], lse, entropy, r.a, r.e)
    assert torch.equal(wide[::2, 11:141].double(), expected.grad)
    assert wide[1::2].isnan().all()
    assert wide[:, :11].isnan().all()
    assert wide[:, 141:].isnan().all()


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_logits(generator, dtype):
    r = rows(generator, 8, 300, dtype)
    r.logits[torch.rand(8, 300, generator=generator) < 0.5] = -math.inf
    r.logits[torch.arange(8), r.target] = 1.0
    assert_within_yardstick(r)
    r.logits[3, r.target[3]] = -math.inf
    ours, truth = by_ops(r), by_torch(r, torch.float64)
    assert ours.logp[3] == -math.inf
    torch.testing.assert_close(ours.entropy, truth.entropy, rtol=0, atol=2e-6)
    torch.testing.assert_close(ours.rest, truth.rest, rtol=0, atol=ATOL[dtype])


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_a_finite_logit(generator, dtype):
    r = rows(generator, 3, 200, dtype)
    r.logits[1] = -math.inf
    out = by_ops(r)
    assert (out.logp[1], out.entropy[1], out.lse[1], out.sum_p2[1]) == (-math.inf, 0.0, -math.inf, 0.0)
    assert bool((out.grad[1] == 0).all())
    assert bool((out.rest[1] == 0).all())
    assert torch.isfinite(out.grad).all()


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_far_from_zero(generator, dtype, shift):
    """Rounding the log-sum-exp to fp32 there would cost p half of its digits."""
    r = rows(generator, 6, 400, dtype)
    r.logits.add_(shift)
    r.inverse.fill_(1.0)
    truth, ours = by_torch(r, torch.float64), by_ops(r)
    tight = 1e-2 if dtype == torch.bfloat16 else 3e-6 if dtype == torch.float32 else 1e-12
    for name in ("logp", "entropy", "sum_p2", "grad", "rest"):
        got, want = getattr(ours, name), getattr(truth, name)
        scale = max(1.0, float(want.abs().max()))
        assert float((got - want).abs().max()) <= tight * scale, name


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_logits(generator, dtype):
    r = rows(generator, 2, 64, dtype)
    r.logits[0, 5], r.logits[1, 6] = 3e38, -3e38
    r.inverse.fill_(1.0)
    r.target[0], r.target[1] = 5, 7
    truth, ours = by_torch(r, torch.float64), by_ops(r)
    for name in ("logp", "entropy", "sum_p2", "grad", "rest"):
        torch.testing.assert_close(getattr(ours, name), getattr(truth, name), rtol=0, atol=ATOL[dtype])


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row_and_not_where_there_is_no_gradient(generator, dtype):
    r = rows(generator, 4, 99, dtype)
    clean = by_ops(r)
    r.logits[1, 50], r.logits[2, 98] = math.nan, math.nan
    r.a[1] = r.e[1] = 0.0
    out = by_ops(r)
    assert bool((out.grad[1] == 0).all())
    assert bool(out.grad[2].isnan().all())
    assert bool(out.logp[1:3].isnan().all())
    assert bool(out.entropy[1:3].isnan().all())
    for name in Outcome._fields:
        assert torch.equal(getattr(out, name)[[0, 3]], getattr(clean, name)[[0, 3]])


@built
def test_entropy_of_no_interest_may_be_anything(generator):
    r = rows(generator, 4, 50, torch.float32)
    _, entropy, lse, _ = ops.row_stats(*r[:3], False)
    out, poisoned = torch.empty_like(r.logits), torch.empty_like(r.logits)
    ops.row_grad_(out, *r[:3], lse, entropy, r.a, torch.zeros(4))
    ops.row_grad_(poisoned, *r[:3], lse, torch.full((4,), math.nan), r.a, torch.zeros(4))
    assert torch.equal(out, poisoned)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shard_of_the_vocabulary_with_the_lse_of_all(generator, dtype):
    """The gradient trusts the log-sum-exp it is given, also where that is too large to be exact."""
    r = rows(generator, 4, 600, dtype)
    r.logits.add_(200.0)
    _, entropy, lse, _ = ops.row_stats(*r[:3], False)
    whole = torch.empty_like(r.logits)
    ops.row_grad_(whole, *r[:3], lse, entropy, r.a, r.e)
    part = torch.empty_like(r.logits)[:, :250]
    target = torch.full_like(r.target, 249)
    ops.row_grad_(part, r.logits[:, :250], target, r.inverse, lse, entropy, r.a, r.e)
    off_target = r.target[:, None] != torch.arange(249)
    torch.testing.assert_close(part[:, :249][off_target], whole[:, :249][off_target], rtol=2e-2, atol=1e-5)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype):
    empty = torch.empty(0, dtype=torch.float32)
    logits, target, inverse = torch.empty(0, 7, dtype=dtype), torch.empty(0, dtype=torch.int64), torch.ones(1)
    assert [x.shape for x in ops.row_stats(logits, target, inverse, True)] == [(0,)] * 4
    assert [x.shape for x in ops.row_fused_(logits, target, inverse)] == [(0,)] * 3
    ops.row_grad_(logits, logits, target, inverse, empty, empty, empty, empty)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_neighbours_change_no_bit(generator, dtype):
    r = rows(generator, 7, 40011, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = by_ops(r)
        torch.set_num_threads(2)
        two = by_ops(r)
    finally:
        torch.set_num_threads(threads)
    alone = [by_ops(Rows(*(x[i : i + 1].clone() for x in r))) for i in range(7)]
    for name in Outcome._fields:
        assert torch.equal(getattr(one, name), getattr(two, name))
        assert torch.equal(getattr(one, name), torch.cat([getattr(x, name) for x in alone]))


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(generator, dtype):
    r = rows(generator, 3, 40, dtype)
    inputs = r[:3]
    _, entropy, lse, _ = ops.row_stats(*inputs, False)
    for want_p2 in (False, True):
        torch.library.opcheck(ops.row_stats.default, (*inputs, want_p2))
    torch.library.opcheck(ops.row_fused_.default, (r.logits.clone(), *inputs[1:]))
    torch.library.opcheck(ops.row_grad_.default, (r.logits.clone(), *inputs, lse, entropy, r.a, r.e))


@built
def test_in_a_compiled_graph(generator):
    r = rows(generator, 3, 40, torch.float32)

    def loss(logits):
        logp, entropy, lse, _ = ops.row_stats(logits * 2.0, r.target, r.inverse, False)
        return logp + entropy - lse

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(r.logits), loss(r.logits))


GOOD = Rows(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), torch.ones(1), torch.ones(2), torch.ones(2))
WRONG = {
    "logits: got 1 dimensions": GOOD._replace(logits=torch.zeros(5)),
    "logits: got V = 0": GOOD._replace(logits=torch.zeros(2, 0)),
    "logits: got column stride 2": GOOD._replace(logits=torch.zeros(5, 2).T),
    "logits: got Half": GOOD._replace(logits=torch.zeros(2, 5, dtype=torch.float16)),
    "target: got 5 in row 1": GOOD._replace(target=torch.tensor([0, 5])),
    "target: got -100 in row 0": GOOD._replace(target=torch.tensor([-100, 5])),
    "target: got 3 values": GOOD._replace(target=torch.zeros(3, dtype=torch.int64)),
    "target: got Float": GOOD._replace(target=torch.zeros(2)),
    "inv_temperature: got 3 values": GOOD._replace(inverse=torch.ones(3)),
    "inv_temperature: got Half": GOOD._replace(inverse=torch.ones(1, dtype=torch.float16)),
    "inv_temperature: got -1": GOOD._replace(inverse=-torch.ones(1)),
    "inv_temperature: got nan": GOOD._replace(inverse=torch.tensor([1.0, math.nan])),
    "inv_temperature: got inf": GOOD._replace(inverse=torch.tensor([math.inf])),
}


@built
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    r, ones = WRONG[message], torch.ones(2)
    with pytest.raises(RuntimeError, match=message):
        ops.row_stats(*r[:3], False)
    with pytest.raises(RuntimeError, match=message):
        ops.row_fused_(*r[:3])
    with pytest.raises(RuntimeError, match=message):
        ops.row_grad_(torch.zeros(2, 5, dtype=r.logits.dtype), *r[:3], ones, ones, r.a, r.e)


@built
@pytest.mark.parametrize(
    ("out", "a", "message"),
    [
        (torch.zeros(2, 6), torch.ones(2), r"out: got \[2, 6\]"),
        (torch.zeros(2, 5, dtype=torch.float64), torch.ones(2), "out: got Double"),
        (torch.zeros(5).expand(2, 5), torch.ones(2), "out: got row stride 0"),
        (torch.zeros(2, 5), torch.ones(1), "a: got 1 values"),
        (torch.zeros(2, 5), torch.ones(2, dtype=torch.int64), "a: got Long"),
    ],
)
def test_wrong_gradient_arguments(out, a, message):
    ones = torch.ones(2)
    with pytest.raises(RuntimeError, match=message):
        ops.row_grad_(out, *GOOD[:3], ones, ones, a, ones)


@built
def test_rows_that_overlap_are_read_but_not_written():
    row = torch.randn(5)
    logp = ops.row_stats(row.expand(2, 5), GOOD.target, GOOD.inverse, False)[0]
    assert logp[0] == logp[1]
    with pytest.raises(RuntimeError, match="logits: got row stride 0"):
        ops.row_fused_(row.expand(2, 5), GOOD.target, GOOD.inverse)


def source_copy(folder):
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copytree(ROOT / "vrlt_fast", folder / "vrlt_fast", ignore=shutil.ignore_patterns("__pycache__"))


def run(folder, *arguments, **environment):
    command = [sys.executable, *arguments]
    clean = {name: value for name, value in os.environ.items() if name not in ("VRLT_NATIVE", "CXX")}
    return subprocess.run(
        command, cwd=folder, env={**clean, **environment}, capture_output=True, text=True, timeout=280, check=False
    )


def test_a_failed_build_is_a_warning_unless_asked_for(tmp_path):
    source_copy(tmp_path)
    build = ("setup.py", "build_ext", "--inplace")
    done = run(tmp_path, *build, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "no-such-compiler" in done.stderr + done.stdout
    done = run(tmp_path, *build, CXX="no-such-compiler", VRLT_NATIVE="1")
    assert done.returncode != 0
    assert "no-such-compiler" in done.stderr + done.stdout
    assert run(tmp_path, *build, CXX="no-such-compiler", VRLT_NATIVE="0").returncode == 0
    program = "from vrlt_kernels import _native; print(_native.available(), _native.reason())"
    done = run(tmp_path, "-c", program, PYTHONPATH=str(tmp_path / "kernels"), XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.startswith("False the compiled operators are not built"), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_source_distribution_builds_a_wheel_with_the_operators(tmp_path):
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    source.mkdir()
    source_copy(source)
    done = run(source, "setup.py", "-q", "sdist", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), unpacked, filter="data")
    folder = next(unpacked.iterdir())
    assert {p.name for p in (ROOT / "csrc").iterdir()} == {p.name for p in (folder / "csrc").iterdir()}
    pip = ("-m", "pip", "--disable-pip-version-check", "-q")
    wheel = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), ".")
    done = run(folder, *pip, *wheel, VRLT_NATIVE="1")
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), site, format="zip")
    program = "from vrlt_kernels import _native; assert _native.available(), _native.reason(); print(_native.__file__)"
    done = run(tmp_path, "-c", program, PYTHONPATH=str(site))
    assert done.stdout.startswith(str(site)), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_build_on_request(tmp_path):
    source_copy(tmp_path)
    cache = {"PYTHONPATH": str(tmp_path / "kernels"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = run(tmp_path, "-c", "from vrlt_kernels import _native; print(_native.build())", **cache)
    assert done.stdout.startswith(str(tmp_path / "cache")), done.stderr
    assert not list((tmp_path / "kernels").rglob("*.so"))
    done = run(tmp_path, "-c", "from vrlt_kernels import _native; print(_native.available())", **cache)
    assert done.stdout == "True\n", done.stderr
    (tmp_path / "csrc" / "row_core.h").open("a").write("// changed\n")
    done = run(tmp_path, "-c", "from vrlt_kernels import _native; print(_native.available())", **cache)
    assert done.stdout == "False\n", done.stderr
