"""Runs of random patches, and stores on one folder that keep what they say."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from vrlt_fast.video.store.entry import Run
from vrlt_fast.video.store.eviction import Horizon, hint
from vrlt_fast.video.store.folder import Store


def run(number: int, tubelets: int = 3, row: int = 1176) -> Run:
    return Run(number.to_bytes(16, "little"), tuple((4 * i, 4 * i + 1) for i in range(tubelets)), 4, 6, row)


def patches(of: Run, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, of.shape, dtype=np.uint8))


class Bench:
    """Opens stores on one folder, and keeps what they say."""

    def __init__(self, folder: Path):
        self.folder, self.warnings, self.counts = folder, [], Counter()

    def open(self, budget: int = 1 << 30, **options) -> Store:
        return Store(
            self.folder,
            budget,
            options.pop("horizon", Horizon()),
            warn=self.warnings.append,
            count=lambda what: self.counts.update([what]),
            **options,
        )

    def entries(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("??/*") if p.name.endswith(".vrlt"))

    def asides(self) -> list[Path]:
        return sorted(self.folder.glob("??/.*"))


def put(store: Store, of: Run, content: torch.Tensor, path: str = "v") -> bool:
    if not store.worth(of, hint(path)):
        return False
    with store.claim(of, 0.0) as claim:
        return claim is not None and store.publish(claim, of, hint(path), content)


def in_child(body, *args) -> int:
    """Exit status of ``body(*args)`` in a forked process, negative for a signal."""

    def child():
        torch.set_num_threads(1)  # OpenMP's threads of the parent are not there, and would be waited for
        try:
            body(*args)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    return process.exitcode
