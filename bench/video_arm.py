"""The process of one arm of the case ``video``: it does one job again and again, when it is told to, and says what that
took. Standard library only, as peers live in an interpreter of their own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Job:
    """What an arm does.

    Args:
        arm: its name within the program that runs it.
        video: path of the file.
        frames: frame numbers, any order.
        spread: ``frames`` are what qwen-vl-utils chooses itself for their number.
        size: height and width after resizing.
        stage: "pixels": frames to model-ready patches; "frames": to RGB frames of the source's size.
        workers: processes or threads it may use.
        folder: where it may keep files.
    """

    arm: str
    video: str
    frames: list[int]
    spread: bool
    size: tuple[int, int]
    stage: str
    workers: int
    folder: str


class Arm(Protocol):
    """An arm made ready for its job."""

    def step(self) -> dict[str, float]:
        """Do the job, keep the result; counts worth recording."""

    def save(self, path: Path) -> None:
        """Write the result of the last step: ``levels.npy`` uint8 [rows, columns], and where it is normalised fp32 its
        first rows as ``head.npy``.
        """

    def drop(self) -> None:
        """Let go of the result."""


def serve(job: Job, make: Callable[[Job], Arm]) -> int:
    """Answer commands, a JSON line each on stdin: ``{"do": "run"}``, ``{"do": "save", "path": …}``; until it ends.

    Answers go to stdout, a JSON line each: wall and CPU seconds of the step (of this process and all below it), its
    counts, and the largest resident set so far in bytes. What libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    arm = make(job)
    answers.write("{}\n")
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        answer: dict[str, Any] = {}
        if command["do"] == "save":
            arm.save(Path(command["path"]))
        else:
            arm.drop()
            cpu, wall = cpu_seconds(), time.perf_counter()
            counts = arm.step()
            answer = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu, "counts": counts}
            if not command.get("keep"):
                arm.drop()
            answer["peak"] = largest_resident_set()
        answers.write(json.dumps(answer) + "\n")
    return 0


def cpu_seconds() -> float:
    """CPU seconds of this process, its ended children, and every living process below it."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    for pid in below(os.getpid()):
        fields = _stat(pid)
        total += sum(int(fields[i]) for i in (11, 12, 13, 14)) / _TICK if fields else 0.0
    return total


def largest_resident_set() -> int:
    """Bytes at this process's peak. Not ``ru_maxrss``, which begins with the size of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def below(pid: int) -> Iterator[int]:
    """The processes that descend from this one."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        fields = _stat(int(entry)) if entry.isdigit() else []
        if fields:
            children.setdefault(int(fields[1]), []).append(int(entry))
    waiting = children.get(pid, [])
    while waiting:
        child = waiting.pop()
        yield child
        waiting += children.get(child, [])


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name: state, parent, …; none when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
