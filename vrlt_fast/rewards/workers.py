"""Calls that may hang or crash, in processes that are killed and replaced: one item costs itself and no other.

The decoders' workers (:mod:`vrlt_fast.video.workers`) are forks of a process that has imported torch. These import
nothing but what they call, and each is a process group that ends as a whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from vrlt_fast.rewards.child import receive, send

PATIENCE = 8
"""Items in a row that may pass the deadline; the others of their batch then count as late without being tried."""
_BAD_STARTS = 2
_STATUS_S = 1.0
_END_S = 2.0
_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from vrlt_fast.rewards.child import main
main(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
"""


@dataclass(frozen=True)
class Outcome:
    """What became of an item: the ``value``, where ``kind`` is "". Else it is "exception" (raised by the call),
    "timeout" or "crash" (the process ended, or didn't start), and ``detail`` says more in a line.
    """

    value: Any = None
    kind: str = ""
    detail: str = ""


class _Worker:
    """One process group. ``place``: of the item that it works on; ``ready``: it has said that it has started."""

    def __init__(self, target: str, setup: object, paths: Sequence[str]):
        self.channel, theirs = socket.socketpair()
        self.life, life = socket.socketpair()
        self.ready, self.place, self.expires = False, -1, 0.0
        # one thread each: the work is divided by processes; and never a context on the trainer's GPU
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        numbers = [str(theirs.fileno()), str(life.fileno()), str(os.getpid())]
        with theirs, life:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-X", "faulthandler", "-c", _BOOT, json.dumps(list(paths)), *numbers],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), life.fileno()],
                env=env,
                start_new_session=True,
            )
        self.channel.settimeout(_END_S)
        with contextlib.suppress(OSError):  # it has ended already, which reading will tell
            send(self.channel, {"target": target, "setup": setup})

    @property
    def usable(self) -> bool:
        """Of an idle one: nothing has come unasked, its end least of all."""
        return not wait([self.channel], 0)

    def kill(self) -> None:
        self.channel.close()
        self.life.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for a dead disk: the system collects it
            self.process.wait(_END_S)

    def death(self) -> str:
        """How it ended, once its channel has closed."""
        self.life.settimeout(_STATUS_S)
        try:
            status = int(self.life.recv(16))
        except (OSError, ValueError):
            return "its process was lost"
        if status >= 0:
            return f"its process ended with status {status}"
        reason = " (by the system when memory runs out, or by hand)" if status == -signal.SIGKILL else ""
        return f"its process died of signal {-status}{reason}"


class KillablePool:
    """Calls a handler in processes of their own: ``module:function`` of ``target`` is called there with ``setup`` and
    returns the handler, which gets an item and returns a value. Setup, items and values are numbers, texts, lists and
    dictionaries.

    Processes start with the first item and are kept. They see no GPU; what they print goes to stderr. Safe to use from
    several threads, one after the other.

    Args:
        deadline_s: seconds that an item may take.
        workers: most processes.
        start_s: seconds that a process may take to import ``target`` and to make the handler.
        paths: folders to import from, before ``sys.path``.
    """

    def __init__(
        self,
        target: str,
        setup: object = None,
        *,
        deadline_s: float,
        workers: int = 1,
        start_s: float = 120.0,
        paths: Sequence[str] = (),
    ):
        if workers < 1:
            raise ValueError("a pool needs a worker")
        self.target, self.setup, self.paths = target, setup, [*paths, *sys.path]
        self.deadline_s, self.workers, self.start_s = deadline_s, workers, start_s
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._late = self._unstarted = 0

    def __enter__(self) -> KillablePool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all processes. A later call of :meth:`run` starts new ones."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            for worker in self._idle:
                worker.kill()
            self._idle.clear()

    def start(self) -> Outcome:
        """Start a process, where none is there, and say whether that works: its ``kind`` is "" or as in a batch."""
        self._mine()
        with self._lock:
            if self._idle and self._idle[-1].usable:
                return Outcome()
            worker = self._new()
            outcomes: dict[int, Outcome] = {}
            try:
                while not worker.ready and not outcomes:
                    self._collect(outcomes, ())
            finally:
                self._drop_busy()
            return outcomes.get(-1, Outcome())

    def run(self, items: Sequence[Any]) -> list[Outcome]:
        """An outcome for each item, in their order. Items are sent one by one as processes get free.

        Where a process doesn't start twice in a row, or ``PATIENCE`` items in a row are late, of this batch and those
        before, the items that are left get the same outcome without being tried. Of the next batch one a process is.
        """
        self._mine()
        with self._lock:
            waiting, outcomes = deque(range(len(items))), dict[int, Outcome]()
            try:
                while waiting or self._busy:
                    while waiting and (worker := self._take()) is not None:
                        worker.place = waiting.popleft()
                        if worker.ready:
                            self._give(worker, items[worker.place])
                    last = self._collect(outcomes, items)
                    if last and (self._late >= PATIENCE or self._unstarted >= _BAD_STARTS):
                        outcomes |= dict.fromkeys(waiting, last)
                        waiting.clear()
            finally:
                self._drop_busy()
            return [outcomes[place] for place in range(len(items))]

    def _drop_busy(self) -> None:
        """Where a batch was interrupted: an answer that comes later would be taken for that of another item."""
        for worker in self._busy:
            worker.kill()
        self._busy.clear()

    def _mine(self) -> None:
        if os.getpid() != self._owner:
            raise RuntimeError("a pool of workers can't be used in a fork of the process that made it")

    def _new(self) -> _Worker:
        worker = _Worker(self.target, self.setup, self.paths)
        worker.expires = time.monotonic() + self.start_s
        self._busy.append(worker)
        return worker

    def _take(self) -> _Worker | None:
        """An idle worker, or a new one that isn't ready yet; None where all are busy."""
        while self._idle:
            worker = self._idle.pop()
            if worker.usable:
                self._busy.append(worker)
                return worker
            worker.kill()
        return self._new() if len(self._busy) < self.workers else None

    def _give(self, worker: _Worker, item: object) -> None:
        worker.expires = time.monotonic() + self.deadline_s
        worker.channel.settimeout(self.deadline_s)
        with contextlib.suppress(OSError):  # it has ended, which reading will tell
            send(worker.channel, item)

    def _collect(self, outcomes: dict[int, Outcome], items: Sequence[Any]) -> Outcome | None:
        """Wait for one message at least, and take all that are there. Returns the last outcome that cost a process."""
        until = min(worker.expires for worker in self._busy) - time.monotonic()
        ready = wait([worker.channel for worker in self._busy], max(until, 0.0))
        last = None
        for worker in list(self._busy):
            if worker.channel in ready:
                found = self._read(worker, items)
            elif worker.expires <= time.monotonic():
                found = self._late_one(worker)
            else:
                continue
            if found is None:  # it has started, and works on its item now
                continue
            outcomes[worker.place] = found
            self._busy.remove(worker)
            if found.kind in ("timeout", "crash"):
                worker.kill()
                self._late = self._late + 1 if found.kind == "timeout" and worker.ready else 0
                self._unstarted += not worker.ready
                last = found
            else:
                self._late = 0
                self._idle.append(worker)
        return last

    def _late_one(self, worker: _Worker) -> Outcome:
        limit, what = (self.deadline_s, "no result") if worker.ready else (self.start_s, "it didn't start")
        return Outcome(kind="timeout", detail=f"{what} within {limit:g} s")

    def _read(self, worker: _Worker, items: Sequence[Any]) -> Outcome | None:
        """The outcome of the worker's item; None where it has only started."""
        worker.channel.settimeout(max(worker.expires - time.monotonic(), 0.01))
        try:
            answer = receive(worker.channel)
            kind, detail = str(answer["kind"]), str(answer.get("detail", ""))
        except TimeoutError:
            return self._late_one(worker)
        except (OSError, EOFError):
            return Outcome(kind="crash", detail=worker.death())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return Outcome(kind="crash", detail=f"it sent something else than an answer: {error}")
        if worker.ready:
            return Outcome(answer.get("value"), kind, detail)
        if kind:
            return Outcome(kind="crash", detail=detail)
        worker.ready, self._unstarted = True, 0
        if worker.place < 0:  # started without an item
            self._busy.remove(worker)
            self._idle.append(worker)
        else:
            self._give(worker, items[worker.place])
        return None
