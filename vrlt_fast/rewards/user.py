"""Rewards of the user's own, ``module:function``, called in processes that may crash or hang."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from numbers import Real
from typing import Any

from vrlt_fast.data.sample import Box, Instance, Moment, Sample
from vrlt_fast.errors import ConfigError, Problem
from vrlt_fast.rewards.base import Parts, Response
from vrlt_fast.rewards.workers import KillablePool, Outcome

LOG = logging.getLogger("vrlt_fast")
KINDS = ("timeout", "crash", "exception", "type", "nan")
"""Why a response earned 0 without being scored: too late, its process ended, the function raised something, or returned
something that isn't a number, or not a finite one."""
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_WORKERS = 4
_FIX = (
    'write reward.user = ["module:function"], where a module in this folder, or an installed one, has '
    "def function(response, sample)"
)


class UserRewards:
    """Functions ``function(response, sample) -> float``, with a :class:`~vrlt_fast.rewards.base.Response` and a
    :class:`~vrlt_fast.data.sample.Sample`, imported in processes of their own only.

    Args:
        names: "module:function"; the module may lie in the current folder.
        weights: one a name; empty: 1 each.
        timeout: seconds that a function may take for one response.
        warn: called once for each function and kind of failure.
        workers: processes a function, at most; default: half the cores, up to 4.

    ``weights`` maps the parts' names ("user:module:function") to their weights, ``counts`` says how many responses
    earned 0 without being scored, by ``KINDS``.

    Raises:
        ConfigError: W01 for a name that isn't of the form "module:function", or that is there twice.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float] = (),
        timeout: float = 10.0,
        warn: Callable[[str], None] = LOG.warning,
        *,
        workers: int | None = None,
    ):
        problems = [_problem(name, "is not module:function") for name in names if not _NAME.fullmatch(name)]
        problems += [_problem(name, "is there twice") for name in sorted(set(names)) if names.count(name) > 1]
        if problems:
            raise ConfigError(problems)
        self.weights = {f"user:{n}": w for n, w in zip(names, weights or [1.0] * len(names), strict=True)}
        self.counts = dict.fromkeys(KINDS, 0)
        self._warn, self._warned = warn, set[tuple[str, str]]()
        count = workers or max(1, min(_WORKERS, (os.cpu_count() or 1) // 2))
        handler = f"{__name__}:load"
        self._pools = {
            name: KillablePool(handler, name, deadline_s=timeout, workers=count, paths=[os.getcwd()]) for name in names
        }

    def __enter__(self) -> UserRewards:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def check(self) -> None:
        """Import each function in its process.

        Raises:
            ConfigError: W01 with a problem for each that can't be imported, or can't be called with two arguments.
        """
        problems = []
        for name, pool in self._pools.items():
            if (found := pool.start()).kind:
                problems.append(_problem(name, "can't be loaded", found.detail))
        if problems:
            raise ConfigError(problems)

    def score(self, responses: Sequence[Response], samples: Sequence[Sample]) -> list[Parts]:
        """For each response to the sample of its place: {"user:module:function": value}, 0 where there is no value.

        Functions work at the same time, on one response a process each.
        """
        told: dict[int, dict[str, Any]] = {}
        for sample in samples:  # those of a group are one object
            if id(sample) not in told:
                told[id(sample)] = asdict(sample)
        items = [{"response": asdict(r), "sample": told[id(s)]} for r, s in zip(responses, samples, strict=True)]
        if not self._pools or not items:
            return [{} for _ in items]
        with ThreadPoolExecutor(len(self._pools)) as threads:
            found = list(threads.map(lambda pool: pool.run(items), self._pools.values()))
        columns = [[self._value(name, one) for one in column] for name, column in zip(self._pools, found, strict=True)]
        return [dict(zip(self.weights, row, strict=True)) for row in zip(*columns, strict=True)]

    def close(self) -> None:
        """Kill the processes. A later call of :meth:`score` starts new ones."""
        for pool in self._pools.values():
            pool.close()

    def _value(self, name: str, outcome: Outcome) -> float:
        kind, detail = outcome.kind, outcome.detail
        if not kind:
            kind, detail = outcome.value["kind"], outcome.value.get("detail", "")
            if not kind:
                return float(outcome.value["value"])
        self.counts[kind] += 1
        if (name, kind) not in self._warned:
            self._warned.add((name, kind))
            self._warn(f"reward.user {name}: {kind}: {detail}; such responses earn 0 (said once)")
        return 0.0


def _problem(name: str, what: str, why: str = "") -> Problem:
    return Problem("VRLT-W01", f"{name!r} {what}", "reward.user", why, _FIX)


def load(name: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Runs in the worker: import a function, and make of it what :class:`UserRewards` calls.

    Raises:
        TypeError: it can't be called with a response and a sample.
        ImportError, AttributeError: there is no such function.
    """
    module, _, path = name.partition(":")
    function: Any = importlib.import_module(module)
    for part in path.split("."):
        function = getattr(function, part)
    if not callable(function):
        raise TypeError(f"{path} is a {type(function).__name__}, not a function")
    if asyncio.iscoroutinefunction(function):
        raise TypeError(f"{path} is async; write it without")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin that doesn't tell
        signature = inspect.Signature([inspect.Parameter("given", inspect.Parameter.VAR_POSITIONAL)])
    try:
        signature.bind(None, None)
    except TypeError:
        raise TypeError(f"{path}{signature} can't be called with a response and a sample") from None

    def call(item: Mapping[str, Any]) -> dict[str, Any]:
        return number(function(Response(**item["response"]), _sample(item["sample"])))

    return call


def number(value: Any) -> dict[str, Any]:
    """A returned value as what is sent back: a finite number, or the kind of failure. Numbers are those of Python and
    NumPy, true and false, and arrays and tensors without dimensions.
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, Real):
        return {"kind": "type", "detail": f"it returned a {type(value).__name__}, not a number"}
    try:
        plain = float(value)
    except OverflowError:
        plain = math.inf
    if not math.isfinite(plain):
        return {"kind": "nan", "detail": f"it returned {plain}"}
    return {"kind": "", "value": plain}


def _boxes(found: Sequence[Mapping[str, float]]) -> tuple[Box, ...]:
    return tuple(Box(**box) for box in found)


def _sample(fields: Mapping[str, Any]) -> Sample:
    """A sample from its fields, as lists and dictionaries."""
    made = {
        "options": tuple(fields["options"]),
        "spans": tuple((start, end) for start, end in fields["spans"]),
        "images": tuple(fields["images"]),
        "boxes": _boxes(fields["boxes"]),
        "instances": tuple(Instance(one["id"], _boxes(one["boxes"])) for one in fields["instances"]),
        "timeline": tuple(Moment(**moment) for moment in fields["timeline"]),
    }
    return Sample(**{**fields, **made})
