"""Decoding in processes that may crash or hang: each has a deadline, and is killed and replaced when it passes.

One helper process imports torch and PyAV once and forks workers on demand; it is their parent, reaps them, and takes
them along when this process dies, however it dies. Workers write patches into memory that is shared with this process
and belongs to no file system, so that the size of /dev/shm doesn't matter.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vrlt_fast.errors import VideoError
from vrlt_fast.video.backends.base import DecodeStats
from vrlt_fast.video.plan import DecodePlan
from vrlt_fast.video.preprocess import Geometry
from vrlt_fast.video.workers.wire import receive, send

PIXELS_PER_SECOND = 1e8
"""A slow guess: HEVC on an old core. Deadlines grow with the work at five times what it takes at this rate."""
_GRACE_S = 5.0
_BOOT = """
import json, os, sys
sys.path[:] = json.loads(sys.argv[2])
from vrlt_fast.video.workers.main import serve
serve(int(sys.argv[1]))
os._exit(0)
"""


class WorkerLost(Exception):
    """A worker hung or died; ``blame`` says whether the file it worked on is to blame, as far as one can tell."""

    def __init__(self, why: str, *, blame: bool):
        super().__init__(why)
        self.blame = blame


@dataclass(frozen=True)
class Task:
    """Decode ``plan`` with the backend ``module:class`` and write the patches of its frames.

    ``stands_for``: for each frame of the plan the frames asked for; ``slots``: their places in time; ``size``
    (height, width) after the resize; ``descriptor`` of the shared memory of all patches, ``nbytes`` its size.
    """

    backend: str
    plan: DecodePlan
    stands_for: Mapping[int, Sequence[int]]
    slots: Mapping[int, Sequence[int]]
    size: tuple[int, int]
    geometry: Geometry
    descriptor: int
    nbytes: int

    def message(self) -> dict[str, Any]:
        return {
            "op": "decode",
            "backend": self.backend,
            "plan": self.plan,
            "stands_for": self.stands_for,
            "slots": {frame: self.slots[frame] for names in self.stands_for.values() for frame in names},
            "size": self.size,
            "geometry": (self.geometry.patch, self.geometry.merge),
            "nbytes": self.nbytes,
        }


@dataclass(frozen=True)
class Done:
    """What a worker did; ``shape`` is the source's (height, width), None where no frame came."""

    stats: DecodeStats
    shape: tuple[int, int] | None


@dataclass
class _Worker:
    number: int
    pid: int
    channel: socket.socket
    server: _Server


class _Server:
    """The helper process; all pools of this process with the same ``paths`` share one."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket):
        self.process, self.control = process, control
        self.lock, self.count = threading.Lock(), 0
        self.users: set[int] = set()

    @classmethod
    def start(cls, paths: Sequence[str], start_s: float) -> _Server:
        ours, theirs = socket.socketpair()
        # one thread each: the work is divided by processes; and never a context on the trainer's GPU
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps([*paths, *map(str, sys.path)])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=env,
            )
        ours.settimeout(start_s)
        server = cls(process, ours)
        try:
            hello, _ = receive(ours)
        except (OSError, EOFError) as error:
            server.stop()
            raise RuntimeError(f"the decoder process doesn't start: {error or 'it ended'}") from None
        if hello.get("error"):
            server.stop()
            raise RuntimeError(f"the decoder process doesn't start: {hello['error']}")
        return server

    def ask(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        with self.lock:
            send(self.control, message, descriptors)
            return receive(self.control)[0]

    def fork(self) -> _Worker:
        with self.lock:
            self.count += 1
            number = self.count
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                answer = self.ask({"op": "fork", "number": number}, [theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        return _Worker(number, int(answer["pid"]), ours, self)

    def reap(self, worker: _Worker) -> int | None:
        """Kill a worker; its exit status, negative for a signal it died of before, None where that isn't known."""
        worker.channel.close()
        try:
            status = self.ask({"op": "reap", "number": worker.number}).get("status")
        except (OSError, EOFError):
            return None
        return None if status is None else int(status)

    def stop(self) -> None:
        self.control.close()  # the helper kills its workers and ends
        try:
            self.process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_servers: dict[tuple[int, tuple[str, ...]], _Server] = {}
_servers_lock = threading.Lock()
_numbers = itertools.count()


def _join(user: int, paths: tuple[str, ...], start_s: float) -> _Server:
    """The helper for ``paths``, started where there is none, or where it was killed."""
    key = os.getpid(), paths
    with _servers_lock:
        server = _servers.get(key)
        if server is not None and server.process.poll() is not None:
            server.stop()
            server = None
        if server is None:
            server = _servers[key] = _Server.start(paths, start_s)
        server.users.add(user)
        return server


def _leave(user: int, owner: int) -> None:
    """End the helpers that nobody uses any more."""
    if os.getpid() != owner:
        return
    with _servers_lock:
        for key, server in list(_servers.items()):
            server.users.discard(user)
            if key[0] == owner and not server.users:
                del _servers[key]
                server.stop()


@dataclass
class _Busy:
    worker: _Worker
    place: int
    expires: float
    limit: float


@dataclass
class WorkerPool:
    """At most ``workers`` decoding processes, shared by all threads of this process.

    Args:
        deadline_s: seconds that a task may take, on top of five times its predicted cost.
        start_s: seconds that the start of a process may take.
        paths: folders to import backends from, before ``sys.path``.
    """

    workers: int
    deadline_s: float = 20.0
    start_s: float = 120.0
    paths: Sequence[str] = ()
    _idle: deque[_Worker] = field(default_factory=deque)
    _alive: int = 0

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError("a pool needs a worker")
        self._free = threading.Condition()
        self.owner = os.getpid()
        self._user = next(_numbers)
        weakref.finalize(self, _leave, self._user, self.owner)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes. A later call of :meth:`run` starts them again."""
        if os.getpid() != self.owner:
            return
        with self._free:
            idle = list(self._idle)
            self._idle.clear()
            self._alive -= len(idle)
        for worker in idle:
            worker.server.reap(worker)
        _leave(self._user, self.owner)

    def limit(self, task: Task) -> float:
        """Seconds that the task may take."""
        return self.deadline_s + 5 * task.plan.cost / PIXELS_PER_SECOND

    def run(self, tasks: Sequence[Task]) -> list[Done]:
        """Do all tasks, in parallel as workers get free, the most expensive ones first.

        Raises:
            VideoError: the first error of a task; the other tasks are cancelled.
            WorkerLost: a worker hung or died.
            RuntimeError: a worker can't be started, or failed in a way that is a bug.
        """
        if os.getpid() != self.owner:
            raise RuntimeError("a pool of decoders can't be used in a fork of the process that made it")
        waiting = deque(sorted(range(len(tasks)), key=lambda i: -tasks[i].plan.cost))
        done: dict[int, Done] = {}
        busy: dict[socket.socket, _Busy] = {}
        try:
            while waiting or busy:
                while waiting and (worker := self._take(wait=not busy)) is not None:
                    self._give(worker, tasks, waiting.popleft(), busy)
                self._collect(busy, done)
        except VideoError:
            self._cancel(busy)
            raise
        finally:
            for entry in busy.values():
                self._discard(entry.worker)
        return [done[i] for i in range(len(tasks))]

    def _take(self, *, wait: bool) -> _Worker | None:
        """An idle worker, or a new one; None where there are too many and ``wait`` is false."""
        with self._free:
            while not self._idle and self._alive >= self.workers:
                if not wait:
                    return None
                self._free.wait()
            if self._idle:
                return self._idle.pop()
            self._alive += 1
        try:
            server = _join(self._user, tuple(self.paths), self.start_s)
            try:
                return server.fork()
            except (OSError, EOFError):  # most likely it was killed, and its workers with it
                server.process.kill()
                server.process.wait()
                return _join(self._user, tuple(self.paths), self.start_s).fork()
        except BaseException:
            self._lost()
            raise

    def _lost(self) -> None:
        with self._free:
            self._alive -= 1
            self._free.notify()

    def _release(self, worker: _Worker) -> None:
        with self._free:
            self._idle.append(worker)
            self._free.notify()

    def _discard(self, worker: _Worker) -> int | None:
        """Kill a worker; its exit status where it had ended by itself."""
        try:
            return worker.server.reap(worker)
        finally:
            self._lost()

    def _give(self, worker: _Worker, tasks: Sequence[Task], place: int, busy: dict[socket.socket, _Busy]) -> None:
        task, limit = tasks[place], self.limit(tasks[place])
        worker.channel.settimeout(limit)
        busy[worker.channel] = _Busy(worker, place, time.monotonic() + limit, limit)
        # where the worker died while idle, reading its answer tells
        with contextlib.suppress(OSError):
            send(worker.channel, task.message(), [task.descriptor])

    def _collect(self, busy: dict[socket.socket, _Busy], done: dict[int, Done]) -> None:
        """Wait for one answer at least, and take all that are there."""
        wait = min(entry.expires for entry in busy.values()) - time.monotonic()
        ready, _, _ = select.select(list(busy), [], [], max(wait, 0.0))
        for channel in ready:
            self._answer(busy, channel, done)
        now = time.monotonic()
        for channel, entry in list(busy.items()):
            if entry.expires <= now:
                del busy[channel]
                self._discard(entry.worker)
                raise WorkerLost(f"the decoder gave no result within {entry.limit:.1f} s", blame=True)

    def _answer(self, busy: dict[socket.socket, _Busy], channel: socket.socket, done: dict[int, Done]) -> None:
        entry = busy.pop(channel)
        try:
            answer, _ = receive(channel)
        except (OSError, EOFError):
            status = self._discard(entry.worker)
            raise _death(status) from None
        self._release(entry.worker)
        if "problems" in answer:
            raise VideoError(answer["problems"])
        if "crash" in answer:
            raise RuntimeError(f"a decoder failed:\n{answer['crash']}")
        if not answer.get("cancelled"):
            done[entry.place] = Done(answer["stats"], answer["shape"])

    def _cancel(self, busy: dict[socket.socket, _Busy]) -> None:
        """Ask the busy workers to stop, and keep those that do."""
        for channel in busy:
            with contextlib.suppress(OSError):
                send(channel, {"op": "cancel"})
        until = time.monotonic() + _GRACE_S
        while busy:
            ready, _, _ = select.select(list(busy), [], [], max(until - time.monotonic(), 0.0))
            if not ready:
                return
            for channel in ready:
                with contextlib.suppress(VideoError, RuntimeError, WorkerLost):
                    self._answer(busy, channel, {})


def _death(status: int | None) -> WorkerLost:
    if status is None:
        return WorkerLost("the decoder's process was lost", blame=False)
    if status < 0:
        # SIGKILL comes from outside, most often for want of memory; the file isn't known to be at fault
        reason = " (by the system when memory runs out, or by hand)" if status == -9 else ""
        return WorkerLost(f"the decoder died of signal {-status}{reason}", blame=status != -9)
    return WorkerLost(f"the decoder's process ended with status {status}", blame=True)
