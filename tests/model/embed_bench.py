"""Embeddings of known content, caches that may have a "GPU" on the CPU, and the tiers as plain dictionaries."""

from __future__ import annotations

import functools
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from vrlt_fast.model.embed_cache import EmbeddingCache, embedding_key
from vrlt_fast.model.embed_store import DiskTier
from vrlt_fast.model.embed_tiers import PageTier, TensorTier

VISION = "tower"
CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def key(number: int) -> str:
    return embedding_key(f"clip {number}", VISION)


@functools.cache
def entry(number: int, scale: int = 1) -> tuple[torch.Tensor, ...]:
    """One to four tensors of random bits, NaNs included."""
    draw = np.random.default_rng(number)
    rows, parts = int(draw.integers(1, 8)) * scale, int(draw.integers(1, 5))
    dtype = DTYPES[number % 3]
    return tuple(
        torch.from_numpy(draw.integers(0, 256, rows * 24 * dtype.itemsize, dtype=np.uint8)).view(dtype).view(rows, 24)
        for _ in range(parts)
    )


def same(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> bool:
    return len(found) == len(wanted) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))
        for a, b in zip(found, wanted, strict=True)
    )


def no_warning(line: str) -> None:
    raise AssertionError(line)


def disk(folder: Path, budget: int = 1 << 30, vision: str = VISION, warn=no_warning, count=lambda what: None):
    return DiskTier(folder, budget, vision, min_free=0, warn=warn, count=count)


def cache(host=0, gpu=0, files=0, folder: Path | None = None, paged=False, warn=no_warning, fingerprint=VISION):
    """A cache with budgets in bytes; its GPU is the CPU."""
    made = EmbeddingCache(
        gpu_gb=0, host_gb=0, disk_gb=0, folder=None, device=CPU, fingerprint=fingerprint, warn=no_warning
    )
    if gpu:
        made._gpu = TensorTier(gpu, made._to_host, CPU)
    if host and paged:
        made._host = PageTier(host, made._off_host, CPU, pin=False, warn=warn)
    elif host:
        made._host = TensorTier(host, made._off_host, CPU)
    if files:
        made._disk = DiskTier(folder, files, fingerprint, min_free=0, warn=warn, count=made._count)
    return made


class Model:
    """What a cache should do. ``sizes(number)``: bytes in the GPU, host and disk tiers."""

    def __init__(self, budgets: dict[str, int], sizes):
        self.budgets, self.sizes = budgets, sizes
        self.tiers = {name: OrderedDict() for name in budgets}
        self.counts = dict.fromkeys(f"{a}_{b}" for a in ("hits", "evicted") for b in budgets)
        self.counts = dict.fromkeys([*self.counts, "misses", "bypassed"], 0)

    def restart(self) -> None:
        self.tiers["gpu"].clear()
        self.tiers["host"].clear()

    def used(self, tier: str) -> int:
        return sum(self.tiers[tier].values())

    def add(self, tier: str, number: int) -> bool:
        held, size = self.tiers[tier], self.sizes(number)[tier]
        held.pop(number, None)
        if size > self.budgets[tier]:
            return False
        while self.used(tier) + size > self.budgets[tier]:
            oldest, _ = held.popitem(last=False)
            self.counts[f"evicted_{tier}"] += 1
            if tier == "gpu" and oldest in self.tiers["host"]:
                self.tiers["host"].move_to_end(oldest)
            elif tier == "gpu":
                self.add("host", oldest)
        held[number] = size
        return True

    def place(self, number: int) -> bool:
        if self.add("gpu", number):
            self.tiers["host"].pop(number, None)
            return True
        return self.add("host", number)

    def put(self, number: int) -> None:
        placed = self.place(number)
        if number in self.tiers["disk"]:
            self.tiers["disk"].move_to_end(number)
        else:
            placed |= self.add("disk", number)
        self.counts["bypassed"] += not (placed or number in self.tiers["disk"])

    def get(self, number: int) -> bool:
        where = next((tier for tier in self.tiers if number in self.tiers[tier]), None)
        self.counts["misses" if where is None else f"hits_{where}"] += 1
        if where is None:
            return False
        for tier in {where, "disk"}:
            if number in self.tiers[tier]:
                self.tiers[tier].move_to_end(number)
        if where == "host":
            self.add("gpu", number)
        if where == "disk":
            self.place(number)
        return True


def ops(draw: random.Random, count: int, keys: int):
    """Random operations; some keys are asked for more often."""
    for _ in range(count):
        number = min(draw.randrange(keys), draw.randrange(keys))
        yield draw.choices(("get", "put", "restart"), (60, 38, 2))[0], number
