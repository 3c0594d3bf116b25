"""One decode step of all live rows: the numbers it needs, in buffers, and the model on them; on CUDA as a graph."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vrlt_fast.model.language import Inputs, run_text
from vrlt_fast.model.load import VideoLM
from vrlt_fast.rollout.cpu_step import CpuStep, cpu_step
from vrlt_fast.rollout.kv import KvStore
from vrlt_fast.rollout.passes import DecodePass
from vrlt_fast.rollout.rows import Resident, Row
from vrlt_kernels import availability

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Rows of a graph: a step takes the smallest that holds its rows."""

Live = Sequence[tuple[Resident, Row]]


@dataclass
class Numbers:
    """What changes from step to step, int64. ``rows`` [5, rows]: token, position, slot, column and own length of each
    row; ``prompts`` [2, prompts]: start and length of each prefix; ``offsets`` [prompts + 1]: where its rows begin.
    """

    rows: torch.Tensor
    prompts: torch.Tensor
    offsets: torch.Tensor
    prefix_tokens: int = 0  # of prompts that have rows

    @staticmethod
    def of(live: Live, rows: int, prompts: int, padding_slot: int) -> Numbers:
        """Of rows that are sorted by prompt, on the CPU, padded to so many rows and prompts."""
        columns = [len(row.tokens) - 1 for _, row in live]
        after = zip(live, columns, strict=True)
        padding, starts = [0] * (rows - len(live)), _starts(live)
        residents = [live[i][0] for i in starts]
        lengths, absent = [len(r.prompt) for r in residents], [0] * (prompts - len(starts))
        table = [
            [row.tokens[-1] for _, row in live] + padding,
            [resident.prompt.next_position + column for (resident, _), column in after] + padding,
            [row.slot for _, row in live] + [padding_slot] * len(padding),
            columns + padding,
            [column + 1 for column in columns] + padding,
        ]
        return Numbers(
            torch.tensor(table),
            torch.tensor([[r.start for r in residents] + absent, lengths + absent]),
            torch.tensor(starts + [len(live)] * (len(absent) + 1)),
            sum(lengths),
        )

    def to(self, device: torch.device) -> Numbers:
        """The same on a device."""
        rows, prompts, offsets = (x.to(device) for x in (self.rows, self.prompts, self.offsets))
        return Numbers(rows, prompts, offsets, self.prefix_tokens)

    def copy_(self, other: Numbers) -> None:
        """Take another's values; the buffers stay where they are."""
        for mine, theirs in ((self.rows, other.rows), (self.prompts, other.prompts), (self.offsets, other.offsets)):
            mine.copy_(theirs, non_blocking=True)


def _starts(live: Live) -> list[int]:
    """The first row of each prompt."""
    return [i for i, (resident, _) in enumerate(live) if not i or live[i - 1][0] is not resident]


class Decoder:
    """Decode steps over the buffers of a store.

    With ``graphs``, on CUDA, a step is a graph, captured once a bucket of rows. It holds addresses: of the store's
    buffers, and of the weights, so that weights that are updated in place keep it valid. Where weights moved, graphs
    are dropped.
    """

    def __init__(self, lm: VideoLM, store: KvStore, *, graphs: bool):
        self.lm, self.store = lm, store
        self.graphs, self.max_group = graphs and lm.device.type == "cuda" and _capturable(lm), store.plan.group
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Numbers, torch.Tensor]] = {}
        self._weights: tuple[int, ...] = ()
        self._pool: Any = None
        self._cpu: CpuStep | None = None

    def begin(self) -> None:
        """Before a call: free all room, and drop graphs of weights that are elsewhere now."""
        self.store.clear()
        self._cpu = cpu_step(self.lm)
        weights = tuple(p.data_ptr() for p in self.lm.module.parameters()) if self.graphs else ()
        if weights != self._weights:
            self._captured.clear()
            self._weights, self._pool = weights, None

    def step(self, live: Live) -> tuple[torch.Tensor, int]:
        """Logits [rows, V] behind the rows' latest tokens, whose keys and values go to the store, and how many prefix
        tokens attention is told to read. Rows are sorted by prompt. With graphs the next step overwrites the tensor.
        """
        if not self.graphs or len(live) > BUCKETS[-1]:
            numbers = self.numbers(live, len(live), len(_starts(live)))
            return self._run(numbers.to(self.lm.device)), numbers.prefix_tokens
        bucket = BUCKETS[bisect_left(BUCKETS, len(live))]
        numbers = self.numbers(live, bucket, self.store.plan.prompts)
        if bucket not in self._captured:
            self._captured[bucket] = self._capture(numbers)
        graph, buffers, logits = self._captured[bucket]
        buffers.copy_(numbers)
        graph.replay()
        return logits[: len(live)], numbers.prefix_tokens

    def numbers(self, live: Live, rows: int, prompts: int) -> Numbers:
        """What attention is told, on the CPU, padded to so many rows and prompts."""
        return Numbers.of(live, rows, prompts, self.store.plan.slots)

    def _run(self, numbers: Numbers) -> torch.Tensor:
        tokens, positions, slots, columns, own = numbers.rows
        start, length = numbers.prompts
        most = min(self.max_group, len(tokens))
        group_pass = DecodePass(self.store, slots, columns, own, start, length, numbers.offsets, most)
        if self._cpu is not None:
            return self._cpu.logits(tokens, positions, group_pass)
        embeds = self.lm.module.get_input_embeddings()(tokens)
        hidden = run_text(self.lm, Inputs(embeds, positions.expand(3, -1)), group_pass)
        logits: torch.Tensor = self.lm.module.lm_head(hidden)
        return logits

    def _capture(self, like: Numbers) -> tuple[torch.cuda.CUDAGraph, Numbers, torch.Tensor]:
        """A graph for numbers of this size, its inputs and its output."""
        device = self.lm.device
        rows, prompts, offsets = (torch.zeros_like(x, device=device) for x in (like.rows, like.prompts, like.offsets))
        buffers = Numbers(rows, prompts, offsets)
        buffers.rows[2] = self.store.plan.slots  # what the capture writes goes to the slot of padding rows
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # compiles kernels and allocates workspaces, which a capture can't
            self._run(buffers)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads, which load clips ahead, may go on using the device
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._run(buffers)
        self._pool = graph.pool()
        return graph, buffers, logits


def _capturable(lm: VideoLM) -> bool:
    """Whether a step's attention runs on Triton, which reads nothing back from the device."""
    forced = os.environ.get("VRLT_KERNELS_BACKEND", "triton") or "triton"
    return forced == "triton" and not availability(lm.device)["triton"] and lm.dtype.itemsize < 8
