"""``vrlt check``: whether a run fits into this machine's memory, and what would make it less."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from vrlt_fast.config import Config
from vrlt_fast.errors import Problem, SetupError
from vrlt_fast.model.load import ModelInfo, pick_device
from vrlt_fast.train.memory import Estimate, Longest, count, estimate, least
from vrlt_fast.train.setup import Inputs

GB = 10**9
SHOWN = 3
"""Parts that a hint is given for."""


@dataclass(frozen=True)
class Fit:
    """An estimate beside ``capacity`` bytes of ``device``; ``smallest``: with passes and buffers at their smallest."""

    estimate: Estimate
    smallest: Estimate
    capacity: int
    device: str

    @property
    def line(self) -> str:
        """What the plan of a run says."""
        return f"{self.estimate.total / GB:.2f} GB of {self.capacity / GB:.4g} GB ({self.device}), estimated"

    def problem(self) -> Problem | None:
        """E07 where not even the smallest passes fit."""
        if self.smallest.total <= self.capacity:
            return None
        what = (
            f"the run needs {self.smallest.total / GB:.3g} GB at least, {self.device} has {self.capacity / GB:.3g} GB"
        )
        largest = sorted(self.smallest.parts, key=lambda part: -part.nbytes)[:SHOWN]
        why = ", ".join(f"{part.name} {part.nbytes / GB:.3g} GB" for part in largest)
        return Problem("VRLT-E07", what, why=why, fix=f"lower {'; '.join(part.lower for part in largest)}")


def fit(config: Config, info: ModelInfo, longest: Longest, videos: int) -> Fit:
    """The estimate of one process for this machine; ``videos`` of the training set."""
    device = pick_device(config.model.device)
    capacity, name = memory_of(device, config.parallel.replicas * config.parallel.sp)
    counts = count(info, config)
    whole, smallest = (
        estimate(
            info,
            each,
            tokens=longest.tokens,
            patches=longest.patches,
            device=device.type,
            capacity=capacity,
            videos=videos,
            counts=counts,
        )
        for each in (config, least(config))
    )
    return Fit(whole, smallest, capacity, name)


def fit_of(config: Config, inputs: Inputs) -> Fit:
    """As :func:`fit`, for checked inputs."""
    videos = len({sample.video for sample in inputs.train})
    return fit(config, inputs.info, inputs.longest or Longest(0, 0, 0), videos)


def memory_of(device: torch.device, processes: int) -> tuple[int, str]:
    """Bytes that each of so many processes has, and of what."""
    if device.type == "cuda":
        sharing = -(-processes // torch.cuda.device_count())
        return torch.cuda.get_device_properties(device).total_memory // sharing, torch.cuda.get_device_name(device)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else ""
    return min(total, int(text) if text.isdigit() else total) // processes, "host memory"


def report(config: Config, inputs: Inputs, found: Fit) -> str:
    """The table of ``vrlt check``."""
    longest, rollout = inputs.longest, config.rollout
    head = f"longest prompt {longest.tokens} tokens ({inputs.train[longest.sample].id})" if longest else "no prompt"
    head += f", {rollout.group_size} responses of at most {rollout.max_new_tokens} tokens"
    rows = [(p.name, p.nbytes, "" if p.when == "always" else p.when) for p in found.estimate.parts if p.nbytes]
    rows += [("most at a time", found.estimate.total, ""), (found.device, found.capacity, "")]
    width = max(len(name) for name, *_ in rows)
    lines = [head, *(f"  {name:<{width}}  {n / GB:9.3f} GB  {when}".rstrip() for name, n, when in rows)]
    over = found.estimate.total - found.capacity
    if over > 0:
        largest = sorted(found.estimate.parts, key=lambda part: -part.nbytes)[:SHOWN]
        lines.append(f"{over / GB:.3g} GB too much as configured. What makes it less:")
        lines += [f"  {part.name}: {part.lower}" for part in largest]
        if found.problem() is None and config.parallel.sp == 1:
            lines.append("It would go on in smaller pieces (train.micro_tokens is halved where memory runs out).")
    return "\n".join(lines) + "\n"


def check_fits(found: Fit) -> None:
    """Raises SetupError E07 where the run surely doesn't fit."""
    problem = found.problem()
    if problem is not None:
        raise SetupError(problem)
