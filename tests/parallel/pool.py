"""Gloo processes that stay for the whole test session and run what tests ask for, all at the same time."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

SECONDS = 100.0


def _serve(rank: int, size: int, port: int, line: Connection) -> None:
    import torch

    from vrlt_fast.parallel.sequence import Peers

    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, size, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    while True:
        function, args = line.recv()
        try:
            line.send((function(Peers(rank, size, torch.distributed.group.WORLD), *args), ""))
        except BaseException:
            line.send((None, traceback.format_exc()))


class Pool:
    """``size`` processes; one whose function failed makes it useless for later calls."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._lines, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self._lines.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(peers, *args)`` returned in each process, by rank. Both must be importable there."""
        for line in self._lines:
            line.send((function, args))
        out: dict[int, Any] = {}
        while len(out) < len(self._lines):
            waited = [line for rank, line in enumerate(self._lines) if rank not in out]
            ready = wait(waited, SECONDS)
            assert ready, f"no answer from others than ranks {sorted(out)}"
            for line in ready:
                value, told = line.recv()
                assert not told, told  # the first that failed: others may be waiting for it
                out[self._lines.index(line)] = value
        return [out[rank] for rank in range(len(self._lines))]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
