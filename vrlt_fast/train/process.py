"""What a run does to its process: threads, determinism, signals, and how much memory it had."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from vrlt_fast.config import Config


def peak_gb() -> float:
    """Largest memory so far in GB (10^9 bytes): of the GPU where one is used, else resident memory of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024) / 1e9


def threads_and_determinism(config: Config) -> None:
    """Set what ``train.threads`` and ``train.deterministic`` say."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)


class signals:
    """SIGTERM and SIGINT ask for an orderly stop; a second SIGINT interrupts at once."""

    def __init__(self, stop: Callable[[str], None]):
        self._stop = stop
        self._before: dict[int, Any] = {}

    def __enter__(self) -> signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._stop(signal.Signals(number).name)
        signal.signal(number, self._before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
