"""The cells of ``bench/cases/update.py``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from bench.harness import BenchError, Record, summarize
from bench.measure import cuda_peak
from bench.providers import Arm as Step
from bench.update_arms import PACKED, REPLICATED, Shape, gradients, make_step
from bench.update_peers import TUNED, any_arm, arms_of
from vrlt_fast.model.load import VideoLM
from vrlt_fast.train.scored import ScoredGroup
from vrlt_fast.train.step import UpdateStats

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
NOT_RUN = "not run"
Run = Callable[[], UpdateStats]


def cell(shape: Shape, device: torch.device, rounds: int, seed: int, *, recompute: bool) -> list[Record]:
    """Seconds a step and largest memory of every arm, after their losses and gradients were found to agree.

    Raises:
        BenchError: they don't, or an arm runs out of memory at every size of micro-batch.
    """
    lm, scored = make_step(shape, device, seed, recompute=recompute)
    label = shape.label(recompute)
    wanted, left = arms_of(shape)
    rows = {name: _best_rows(name, lm, scored) if name in TUNED else 1 for name in wanted}
    arms = {name: any_arm(name, lm, scored, count) for name, count in rows.items()}
    records = [summarize(name, label, NOT_RUN, why, [0.0]) for name, why in left.items()]
    records += [summarize(name, label, "rows of a pass", "rows", [rows[name]]) for name in wanted if name in TUNED]
    records += _agree(lm, arms, label)
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(_seconds(lm, arms[name]))
    records += [summarize(name, label, "step", "s", spent) for name, spent in times.items()]
    stats = arms[PACKED]()
    lm.module.zero_grad(set_to_none=True)
    records += [summarize(PACKED, label, "tokens trained", "tokens", [stats.tokens_trained])]
    records += [summarize(PACKED, label, "tokens logical", "tokens", [stats.tokens_logical])]
    for name, run in arms.items():
        on_gpu, count = device.type == "cuda", rows[name]
        peak = cuda_peak(Step(run)) if on_gpu else _resident_peak(shape, name, count, recompute=recompute)
        lm.module.zero_grad(set_to_none=True)
        records.append(summarize(name, label, "peak memory", "B", [peak]))
    return records


def _best_rows(name: str, lm: VideoLM, scored: Sequence[ScoredGroup]) -> int:
    """The number of rows that an arm is fastest with, of those that fit."""
    times = {}
    rows, most = 1, sum(len(s.trained) for s in scored)
    while rows <= most:
        try:
            run = any_arm(name, lm, scored, rows)
            _seconds(lm, run)
            times[rows] = _seconds(lm, run)
        except torch.OutOfMemoryError:
            lm.module.zero_grad(set_to_none=True)
            break
        rows *= 2
    if not times:
        raise BenchError(f"{name} runs out of memory with one row a pass")
    return min(times, key=lambda n: times[n])


def _agree(lm: VideoLM, arms: dict[str, Run], label: str) -> list[Record]:
    """On a GPU what is compared with waits in host memory, so that an arm has the room that it has in training."""
    loss, expected = gradients(lm, arms[REPLICATED])
    expected = {name: gradient.cpu() for name, gradient in expected.items()}
    records = []
    for name, run in arms.items():
        other, found = gradients(lm, run)
        if found.keys() != expected.keys():
            raise BenchError(f"{label}: {name} has gradients of other parameters")
        worst, limit = max(gap_of(found.pop(n).cpu(), g) for n, g in expected.items()), TOLERANCE[lm.dtype]
        if worst > limit or abs(other - loss) > limit * max(abs(loss), 1e-3):
            what = f"gradient {worst:.2g}, loss {other} for {loss}"
            raise BenchError(f"{label}: {name} differs from replicated rows: {what}")
        records.append(summarize(name, label, "largest difference of a gradient", "relative", [worst]))
    return records


def gap_of(found: torch.Tensor, right: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is right."""
    found, right = found.float(), right.float()
    return float((found - right).norm() / right.norm().clamp(min=1e-20))


def _seconds(lm: VideoLM, run: Run) -> float:
    _sync(lm.device)
    begin = perf_counter()
    run()
    _sync(lm.device)
    spent = perf_counter() - begin
    lm.module.zero_grad(set_to_none=True)
    return spent


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _resident_peak(shape: Shape, name: str, rows: int, *, recompute: bool) -> float:
    """Bytes beyond the model, in a process of its own."""
    sizes = (shape.prompt, shape.response, shape.groups, shape.group, int(shape.text))
    words = [shape.size, *map(str, sizes), name, str(rows), str(int(recompute))]
    command = [sys.executable, "-m", "bench.update_peak", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"peak memory of {name}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)
