"""Time, memory and compilations of arms, and what the device can do at best."""

from __future__ import annotations

import argparse
import gc
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from bench.harness import RESULTS, BenchError, Record, summarize
from bench.providers import Arm

_CACHE = 256 * 2**20  # bytes, several times the L2 of any GPU
_CYCLES = 2e6  # of a device's clock in a millisecond, at most


def device_name(device: torch.device) -> str:
    """Short and lower-case: cpu, h200, a100, rtx4090."""
    if device.type == "cpu":
        return "cpu"
    words: list[str] = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    words = [word for word in words if word not in ("nvidia", "geforce", "tesla")]
    return words[0] + words[1] if words[0] == "rtx" else words[0]


def device_memory(device: torch.device) -> int:
    """Bytes in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    kib = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return int(kib[1]) * 1024 if kib else 0


def begin(case: str, options: argparse.Namespace) -> tuple[torch.device, Path, list[Record]]:
    """For a case with ``--device``, ``--small`` and ``--out``: its device, its result file, and a record of the device.

    Raises:
        BenchError: what is tried only would replace a result.
    """
    if options.small and options.out is None:
        raise BenchError("--small needs --out FOLDER: what it measures is no result")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = device_name(device)
    memory = summarize("device", name, "memory", "B", [device_memory(device)])
    return device, (options.out or RESULTS) / f"{case}.{name}.json", [memory]


class Clock:
    """Milliseconds of one step. On CUDA by events, ``cold`` with everything evicted from L2 before."""

    def __init__(self, device: torch.device, *, cold: bool = False) -> None:
        self.device = device
        self.flush = torch.empty(_CACHE, dtype=torch.int8, device=device) if cold else None

    def host(self, arm: Arm) -> float:
        """Milliseconds that the host needs to launch a warm step, of three the least; 0 on the CPU."""
        if self.device.type == "cpu":
            return 0.0
        times = []
        for _ in range(3):
            arm.setup()
            torch.cuda.synchronize()
            start = time.perf_counter()
            found = arm.step()
            times.append(1e3 * (time.perf_counter() - start))
            del found
        return min(times)

    def __call__(self, arm: Arm, ahead: float = 0.0) -> float:
        """``ahead``: milliseconds that the device is kept busy beforehand. With as many as the host needs, launches are
        hidden, as they are in training, where the host is ahead of the device.
        """
        arm.setup()
        if self.device.type == "cpu":
            start = time.perf_counter()
            found = arm.step()
            elapsed = 1e3 * (time.perf_counter() - start)
            del found
            return elapsed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.flush is not None:
            self.flush.zero_()
        if ahead:
            torch.cuda._sleep(int(ahead * _CYCLES))  # type: ignore[no-untyped-call]
        begin.record()
        found = arm.step()
        end.record()
        end.synchronize()
        del found
        return float(begin.elapsed_time(end))


def interleaved(
    arms: dict[str, Arm], clock: Clock, rounds: dict[str, int], host: dict[str, float]
) -> dict[str, list[float]]:
    """Times of each arm, as many as ``rounds`` says, spread evenly: one arm after the other, each round beginning with
    another one. The arms must be warm; ``host``: what `Clock.host` says of them.
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    names, most = list(arms), max(rounds.values())
    gc.disable()
    try:
        for turn in range(most):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                if (turn + 1) * rounds[name] // most > turn * rounds[name] // most:
                    times[name].append(clock(arms[name], 1.3 * host[name]))
            gc.collect()
    finally:
        gc.enable()
    return times


def cuda_peak(arm: Arm) -> int:
    """Bytes that a step needs at its peak beyond its inputs, its results included."""
    arm.setup()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = arm.step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del found
    return int(peak)


def resident_peak(arm: Arm) -> int:
    """The same of the host: growth of the largest resident set. For a process that does nothing else."""
    arm.setup()
    gc.collect()
    with suppress(OSError):  # elsewhere than on Linux: the inputs were made without a peak above their own size
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far counts no more
    before = _status("VmRSS")
    found = arm.step()
    peak = _status("VmHWM") - before
    del found
    return max(peak, 0)


def _status(field: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        text = ""
    kib = re.search(rf"{field}:\s+(\d+)", text)
    return 1024 * (int(kib[1]) if kib else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@contextmanager
def counting_compilations() -> Iterator[Callable[[], int]]:
    """Inside, the function yielded says how many kernels Triton and how many graphs torch.compile have compiled."""
    from torch._dynamo.utils import counters

    count = 0

    def compiled(*args: object, **kwargs: object) -> None:
        nonlocal count
        count += 1

    try:
        from triton import knobs
    except ImportError:  # no Triton here
        knobs = None
    graphs = counters["stats"]["unique_graphs"]
    if knobs is not None:
        before, knobs.runtime.jit_post_compile_hook = knobs.runtime.jit_post_compile_hook, compiled
    try:
        yield lambda: count + counters["stats"]["unique_graphs"] - graphs
    finally:
        if knobs is not None:
            knobs.runtime.jit_post_compile_hook = before


def product(device: torch.device, dtype: torch.dtype) -> tuple[Arm, float]:
    """A large square matrix product, and its FLOPs: the rate that the floor of the linear stage assumes."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return Arm(lambda: torch.mm(left, right, out=out)), 2.0 * size**3


def copy(like: torch.Tensor) -> Arm:
    """A copy of the logits, which reads and writes as many bytes as the floor of the row stage."""
    out = torch.empty_like(like)
    return Arm(lambda: out.copy_(like))
