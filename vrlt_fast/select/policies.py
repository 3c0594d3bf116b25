"""Which samples to keep: filters, then a policy that ranks or draws, then quotas. Pure functions of columns of scores.

A policy is a weight w >= 0 a sample and whether samples are *ranked* by it (highest first) or *drawn* with chances in
proportion to it, without putting back. Drawing uses a random number u of each sample's own, from the seed and its id
(Efraimidis and Spirakis: the n smallest of -log(u) / w), so that neither the order of the samples nor that of the files
matters, and a larger count takes the same ones and more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vrlt_fast.errors import ConfigError, DataError, Problem
from vrlt_fast.select import variance
from vrlt_fast.select.scores import Table
from vrlt_fast.select.stopping import FLAT

Policy = Literal["variance", "sigma", "buckets", "gauss", "random"]
POLICIES: tuple[Policy, ...] = ("variance", "sigma", "buckets", "gauss", "random")
CLASSES = ("wrong", "informative", "right")
WRONG, INFORMATIVE, RIGHT = range(3)
BUCKETS = ("hard", "medium", "easy")
Values = NDArray[np.float64]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """What ``vrlt select pick`` was asked for; docs/select.md has the formulas.

    ``size`` is a number of samples or a share (0 < size < 1) of those that pass the filters; None: all of them.
    ``quotas`` maps tasks to numbers; ``equal`` gives all tasks the same.
    """

    policy: Policy = "variance"
    size: float | None = None
    drop_flat: bool = False
    least_std: float = 0.0
    mean: tuple[float, float] = (0.0, 1.0)
    alpha: float = 1.0
    tau: float = 0.5
    ratio: tuple[float, float, float] = (1.0, 6.0, 3.0)
    target: float = 0.3
    width: float = 0.15
    quotas: Mapping[str, int] | None = None
    equal: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Columns:
    """What is known of each sample: ``mean`` of its shares, ``std`` in units of its task's usual deviation (shrunk),
    ``raw`` the root of its unbiased variance as a share of the highest reward, ``classes``, and ``hits`` of ``n``
    rewards at or above tau.
    """

    mean: Values
    std: Values
    raw: Values
    classes: Numbers
    hits: Numbers
    n: Numbers


def columns(table: Table, tau: float) -> Columns:
    """Statistics of all samples; standard deviations are shrunk and normalised within each task."""
    shares = table.shares
    std = np.full(len(shares), np.nan)
    for task in range(len(table.names)):
        mine = table.tasks == task
        std[mine] = variance.relative(variance.shrink(shares[mine], table.header.first))
    n = variance.counts(shares).astype(np.int64)
    with np.errstate(invalid="ignore"):
        hits = (shares >= tau - 1e-9).sum(axis=1)
    found = classes(shares, table.header.repeats)
    return Columns(variance.means(shares), std, np.sqrt(variance.variances(shares)), found, hits, n)


def classes(shares: Values, k: int) -> Numbers:
    """The class of each sample, numbers into CLASSES (:func:`vrlt_fast.select.stopping.class_of`)."""
    right = np.where(variance.means(shares) >= 0.5, RIGHT, WRONG)
    return np.where(variance.squares(shares) >= (k - 1) * FLAT**2, INFORMATIVE, right)


def uniforms(ids: Sequence[str], seed: int) -> Values:
    """A number in (0, 1) of each sample's own."""
    key = str(seed).encode()
    raw = b"".join(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8, key=key).digest() for name in ids)
    return (np.frombuffer(raw, np.uint64).astype(np.float64) + 0.5) / 2.0**64


def passed(found: Columns, choice: Choice) -> Flags:
    """The filters, in this order (which doesn't matter to what is left): flat samples, deviation, mean."""
    ok = np.ones(len(found.mean), bool)
    if choice.drop_flat:
        ok &= found.classes == INFORMATIVE
    if choice.least_std > 0:
        ok &= found.std >= choice.least_std
    low, high = choice.mean
    return ok & (found.mean >= low) & (found.mean <= high)


def buckets(found: Columns) -> Numbers:
    """RITA's difficulty: hard with hits <= 0.2 n, easy with hits >= 0.8 n, else medium; -1 without a hit."""
    share = found.hits / np.maximum(found.n, 1)
    hard_or_not = np.where(share <= 0.2 + 1e-9, 0, np.where(share >= 0.8 - 1e-9, 2, 1))
    return np.where(found.hits == 0, -1, hard_or_not)


def gauss_weights(mean: Values, ok: Flags, target: float, width: float) -> Values:
    """Weights with which the means of what is drawn follow a normal density around ``target``, as far as there are
    samples: that density over the one of the samples (a histogram of 20 bins).
    """
    bins = np.clip((mean * 20).astype(np.int64), 0, 19)
    density = np.bincount(bins[ok], minlength=20)
    return np.exp(-0.5 * ((mean - target) / width) ** 2) / np.maximum(density[bins], 1)


def pick(table: Table, choice: Choice) -> Numbers:
    """Places of the samples to keep, ascending.

    Raises:
        DataError: L03 nothing is left, or an unknown task has a quota.
        ConfigError: C02 a size, ratio or bound that can't be.
    """
    _check(choice, table.names)
    found = columns(table, choice.tau)
    ok = passed(found, choice)
    order = _order(table, found, choice, ok)
    keep = np.zeros(len(ok), bool)
    for task, count in _counts(table, choice, ok, found).items():
        mine = ok if task < 0 else ok & (table.tasks == task)
        keep[_best(order, found, choice, mine, count)] = True
    places = np.flatnonzero(keep)
    if not len(places):
        what = f"none of {len(ok)} samples is left"
        raise DataError(Problem("VRLT-L03", what, "vrlt select pick", fix="loosen the filters: docs/select.md"))
    return places


def _check(choice: Choice, names: Sequence[str]) -> None:
    unknown = sorted(set(choice.quotas or ()) - set(names))
    if unknown:
        why = f"tasks with scores: {', '.join(names)}"
        raise DataError(Problem("VRLT-L03", f"no sample of task {unknown[0]}", "--quota", why))
    size = choice.size
    bad = {
        "--count or --share": size is not None and size <= 0,
        "--ratio": min(choice.ratio) < 0 or sum(choice.ratio) <= 0,
        "--width": choice.width <= 0,
        "--alpha": choice.alpha < 0,
        "--mean": choice.mean[0] > choice.mean[1],
        "--quota": any(count < 0 for count in (choice.quotas or {}).values()),
    }
    if faults := [name for name, wrong in bad.items() if wrong]:
        raise ConfigError(
            Problem("VRLT-C02", f"{', '.join(faults)} out of range", "command line", fix="docs/select.md")
        )


def _order(table: Table, found: Columns, choice: Choice, ok: Flags) -> Values:
    """A number a sample: the smallest are taken first; inf: never."""
    u = uniforms(table.ids, choice.seed)
    std = np.nan_to_num(found.std)
    if choice.policy == "variance":
        # equal deviations, of which discrete rewards have many: the larger plain deviation first, then at random
        rank = np.empty(len(std))
        rank[np.lexsort((u, -np.nan_to_num(found.raw), -std))] = np.arange(len(std))
        return rank
    weight = np.ones(len(std))
    if choice.policy in ("sigma", "buckets"):
        weight = std**choice.alpha
    if choice.policy == "buckets":
        weight = np.where(buckets(found) >= 0, weight, 0.0)
    if choice.policy == "gauss":
        weight = gauss_weights(found.mean, ok, choice.target, choice.width)
    return np.where(weight > 0, -np.log(u) / np.where(weight > 0, weight, 1.0), np.inf)


def _counts(table: Table, choice: Choice, ok: Flags, found: Columns) -> dict[int, int]:
    """How many of each task (-1: of all together)."""
    left = {task: int((ok & (table.tasks == task)).sum()) for task in range(len(table.names))}
    whole = sum(left.values())
    size = whole if choice.size is None else round(choice.size * whole) if choice.size < 1 else int(choice.size)
    if choice.quotas:
        return {table.names.index(task): count for task, count in choice.quotas.items()}
    if not choice.equal:
        return {-1: size}
    return shared_out(size, left)


def shared_out(size: int, left: Mapping[int, int]) -> dict[int, int]:
    """``size`` in equal parts; what a task can't fill goes to the others. Rests go to the first tasks."""
    counts = dict.fromkeys(left, 0)
    while size > 0:
        open_tasks = [task for task in left if counts[task] < left[task]]
        if not open_tasks:
            break
        each = max(size // len(open_tasks), 1)
        for task in open_tasks:
            more = min(each, left[task] - counts[task], size)
            counts[task] += more
            size -= more
    return counts


def _best(order: Values, found: Columns, choice: Choice, mine: Flags, count: int) -> Numbers:
    if choice.policy != "buckets":
        return _smallest(order, mine, count)
    kinds = buckets(found)
    left = {kind: int((mine & (kinds == kind) & np.isfinite(order)).sum()) for kind in range(3)}
    # no bucket may be short of its part: the ratio holds, and where samples don't suffice there are fewer in all
    whole = sum(choice.ratio)
    scale = min([float(count), *(left[i] * whole / r for i, r in enumerate(choice.ratio) if r > 0 and left[i])])
    wanted = rounded([scale * r / whole for r in choice.ratio])
    return np.concatenate([_smallest(order, mine & (kinds == i), n) for i, n in enumerate(wanted)])


def rounded(parts: Sequence[float]) -> list[int]:
    """Whole numbers with the (rounded) sum of the parts: the largest remainders are rounded up."""
    down = [int(part + 1e-9) for part in parts]
    rest = round(sum(parts)) - sum(down)
    up = sorted(range(len(parts)), key=lambda i: down[i] - parts[i])[: max(rest, 0)]
    return [n + (i in up) for i, n in enumerate(down)]


def _smallest(order: Values, mine: Flags, count: int) -> Numbers:
    places = np.flatnonzero(mine & np.isfinite(order))
    if count >= len(places):
        return places
    return places[np.argpartition(order[places], count)[:count]] if count > 0 else places[:0]
