"""One run of the case ``kernels``: cell after cell, each written as it finishes."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from bench import measure
from bench.cases import kernels
from bench.cells import Cell
from bench.harness import ROOT, BenchError, Record, records_of, summarize, write_result
from bench.plots import bars
from bench.problem import FAR, Problem, make_problem, relative_error, truth
from bench.providers import Arm, Provider, all_providers

LENGTHS = 20
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_PARITY_WIDTH = 128  # smallest hidden size that all peers take


class Run:
    """``options`` as of `bench.cases.kernels.run`."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        if os.environ.get("TRITON_INTERPRET"):
            raise BenchError("TRITON_INTERPRET is set: unset it, times of the interpreter mean nothing")
        kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(kind)
        if kind == "cuda" and not torch.cuda.is_available():
            raise BenchError("--device cuda: torch sees no CUDA device")
        self.options, self.seed, self.began = options, seed, time.monotonic()
        self.dtype = torch.bfloat16 if kind == "cuda" else torch.float32
        self.rounds = options.rounds or (2 if options.small else 20 if kind == "cuda" else 7)
        self.name = measure.device_name(self.device)
        self.path: Path = kernels.result_path(options, self.name)
        dtype = str(self.dtype).removeprefix("torch.")
        total = summarize(kernels.DEVICE, f"{self.name} {dtype}", "memory", "B", [measure.device_memory(self.device)])
        self.records = [total, *self._kept()]

    def _kept(self) -> list[Record]:
        """Of an earlier run that was interrupted, or of other cells."""
        if not self.options.keep or not self.path.is_file():
            return []
        measured = {str(cell) for cell, _ in kernels.plan_of(self.options, self.device.type)}
        records = records_of(json.loads(self.path.read_text(encoding="utf-8")))
        return [r for r in records[1:] if r.shape not in measured]

    def all_cells(self) -> None:
        """Measure what the options ask for."""
        providers = self._able()
        if self.options.list:
            return
        plan = kernels.plan_of(self.options, self.device.type)
        widest = any("*" in patterns for _, patterns in plan)
        last = max(i for i, (_, patterns) in enumerate(plan) if ("*" in patterns) == widest)
        right: dict[tuple[str, str], Provider] = {}
        for index, (cell, patterns) in enumerate(plan):
            if self._late():
                self._say(f"{cell}: left out, {self.options.minutes:g} minutes are over")
                continue
            chosen = [p for p in providers if p.stage == cell.stage and _matches(p.name, patterns)]
            try:
                passed = self._cell(cell, chosen)
            except torch.OutOfMemoryError as error:
                self._refuse("all arms", f"{cell}: {error}")
                continue
            right |= {(p.name, p.stage): p for p in passed}
            self._write()
            if index == last and not self.options.no_lengths:
                self._count_compilations(list(right.values()))
                self._write()

    def _cell(self, cell: Cell, providers: list[Provider]) -> list[Provider]:
        passed = self._parity(cell, providers)
        problem = self._problem(cell)
        passed = self._time(problem, passed)
        if not (self.options.no_memory or cell.skip):
            self._memory(problem, passed)
        return passed

    def _late(self) -> bool:
        return time.monotonic() - self.began > 60 * float(self.options.minutes)

    def _say(self, text: str) -> None:
        sys.stdout.write(f"[{time.monotonic() - self.began:6.1f} s] {text}\n")
        sys.stdout.flush()

    def _add(self, arm: str, shape: object, metric: str, unit: str, values: Iterable[float]) -> Record:
        record = summarize(arm, str(shape), metric, unit, list(values))
        self.records.append(record)
        return record

    def _able(self) -> list[Provider]:
        """Those that can run here; for the others a record whose shape is the reason."""
        able = []
        for provider in all_providers():
            if not _matches(provider.name, self.options.arm or ("*",)):
                continue
            reason = provider.obstacle(self.device)
            if not reason:
                able.append(provider)
                if self.options.list:
                    self._say(f"{provider.stage:<7} {provider.name}")
            else:
                self._refuse(provider.name, f"{provider.stage}: {reason}")
        return able

    def _refuse(self, name: str, reason: str) -> None:
        self._say(f"not run: {name}: {reason}")
        self._add(name, reason, kernels.NOT_RUN, "", [0.0])

    def _parity(self, cell: Cell, providers: list[Provider]) -> list[Provider]:
        """Those whose loss and gradients are right on few tokens of the cell's vocabulary; the others are refused."""
        problem = self._problem(cell.small(), gaps=FAR, width=min(cell.width, _PARITY_WIDTH))
        scale = float((problem.terms.weight * problem.terms.advantage).abs().sum())
        passed, expected = (
            [],
            {kind: truth(problem, cross_entropy=kind) for kind in {p.cross_entropy for p in providers}},
        )
        for provider in providers:
            try:
                arm = provider.prepare(problem)
                arm.setup()
                found = [x.detach() for x in arm.collect(arm.step())]
                reference = expected[provider.cross_entropy]
                size = float(reference[0].abs()) if provider.cross_entropy else scale
                error = relative_error(found, reference, size)
            except Exception as failure:  # of somebody else's code, on somebody's machine
                self._refuse(provider.name, f"{cell}: {_brief(failure)}")
                continue
            limit = 1e-2 if provider.rough and self.dtype == torch.float32 else _TOLERANCE[self.dtype]
            if not error <= limit:
                self._refuse(provider.name, f"{cell}: its error is {error:.1e}, at most {limit:.0e} is right")
                continue
            self._add(provider.name, cell, "error", "relative", [error])
            passed.append(provider)
        self._forget_graphs()
        return passed

    def _time(self, problem: Problem, providers: list[Provider]) -> list[Provider]:
        """Those that could be timed. Arms that are not `LEADING` get a third of the rounds."""
        cell = problem.cell
        arms: dict[str, Arm] = {}
        if cell.stage == "linear":
            best, flops = measure.product(self.device, self.dtype)
        else:
            best, flops = measure.copy(problem.logits), 0.0
        clock = measure.Clock(self.device)
        makers: list[tuple[str, Callable[[Problem], Arm]]] = [(kernels.DEVICE, lambda _: best)]
        for name, make in [*makers, *((p.name, p.prepare) for p in providers)]:
            try:
                arm = make(problem)
                for _ in range(3 if self.device.type == "cuda" else 1):
                    clock(arm)
            except Exception as failure:
                self._refuse(name, f"{cell}: {_brief(failure)}")
                continue
            arms[name] = arm
        rounds = {n: self.rounds if n in kernels.LEADING else max(min(2, self.rounds), self.rounds // 3) for n in arms}
        host = {name: clock.host(arm) for name, arm in arms.items()}
        for metric, cold in (("time", False), ("time cold", True)):
            if cold and self.device.type != "cuda":
                continue
            times = measure.interleaved(arms, measure.Clock(self.device, cold=cold), rounds, host)
            for name, values in times.items():
                record = self._add(name, cell, metric, "ms", values)
                if not cold and name != kernels.DEVICE:
                    self._say(f"{cell}: {name}: {record.median:.4g} ms")
        if self.device.type == "cuda":
            for name, value in host.items():
                self._add(name, cell, "host", "ms", [value])
        self._rates(cell, flops)
        return [p for p in providers if p.name in arms]

    def _rates(self, cell: Cell, product_flops: float) -> None:
        """Rates and shares of the floor, from the medians and the device's own arm."""
        times = {r.arm: r for r in self.records if (r.shape, r.metric) == (str(cell), "time")}
        device = times.pop(kernels.DEVICE, None)
        if device is None:
            return
        work = cell.flops if cell.stage == "linear" else cell.passes(self.dtype.itemsize)
        floor = cell.flops / product_flops * device.median if product_flops else device.median
        unit, giga = ("TFLOP/s", 1e-9) if cell.stage == "linear" else ("GB/s", 1e-6)
        self._add(kernels.DEVICE, cell, "rate", unit, [giga * (product_flops or work) / device.median])
        for name, record in times.items():
            self._add(name, cell, "rate", unit, [giga * work / record.median])
            self._add(name, cell, "floor", "share", [floor / record.median])

    def _memory(self, problem: Problem, providers: list[Provider]) -> None:
        """Peak bytes beyond the inputs; in the linear stage also of the step without the gradient of the weight."""
        cell = problem.cell
        aside = (
            replace(problem, cell=replace(cell, frozen=True)) if cell.stage == "linear" and not cell.frozen else None
        )
        for provider in providers:
            self._add(provider.name, cell, "memory", "B", [self._peak(problem, provider)])
            if aside is not None:
                self._add(provider.name, cell, "memory beyond dW", "B", [self._peak(aside, provider)])

    def _peak(self, problem: Problem, provider: Provider) -> int:
        if self.device.type == "cuda":
            return measure.cuda_peak(provider.prepare(problem))
        command = [sys.executable, "-m", "bench.peak", str(problem.cell), provider.name, str(self.seed)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment())
        if done.returncode:
            raise BenchError(f"{' '.join(command)} failed\n{done.stderr}")
        return int(done.stdout.split()[-1])

    def _count_compilations(self, providers: list[Provider]) -> None:
        """Over random lengths after a first one: sequences, tokens and padding all change."""
        draw = random.Random(self.seed)
        lengths = [[draw.randrange(3, 40) for _ in range(draw.randrange(2, 6))] for _ in range(LENGTHS + 1)]
        for provider in providers:
            if self._late():
                self._say(f"{provider.name}: compilations not counted, {self.options.minutes:g} minutes are over")
                continue
            cell, first = Cell(provider.stage, "tiny", 40), 0
            with measure.counting_compilations() as count:
                for index, each in enumerate(lengths):
                    arm = provider.prepare(self._problem(cell, lengths=each))
                    arm.setup()
                    arm.step()
                    first = count() if index == 0 else first
                self._add(provider.name, provider.stage, "recompilations", "count", [count() - first])
        self._forget_graphs()

    def _problem(self, cell: Cell, **options: object) -> Problem:
        return make_problem(cell, self.device, self.dtype, seed=self.seed, **options)  # type: ignore[arg-type]

    def _forget_graphs(self) -> None:
        """A graph that was compiled for one shape would be made dynamic for the next one, and slower."""
        torch._dynamo.reset()

    def _write(self) -> None:
        path = write_result("kernels", self.name, self.records, kernels.claims, self.seed, self.path)
        plot = path.with_suffix(".svg")
        plot.write_text(bars(self.records, self.name), encoding="utf-8")
        self._say(f"wrote {path}")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _brief(failure: Exception) -> str:
    return " ".join(f"{type(failure).__name__}: {failure}".split())[:300]


def _environment() -> dict[str, str]:
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
