"""What runs in the helper process that forks decoding workers, and in the workers."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vrlt_fast.errors import VideoError
from vrlt_fast.video.backends.pyav import Cancelled
from vrlt_fast.video.ffmpeg_log import quiet
from vrlt_fast.video.fill import PatchSink, grid_of, patch_shape
from vrlt_fast.video.preprocess import Geometry
from vrlt_fast.video.workers.shared import map_bytes
from vrlt_fast.video.workers.wire import receive, send

_PR_SET_PDEATHSIG = 1
_REAP_S = 2.0


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def _quiet() -> None:
    """Native code of decoders prints to descriptors 1 and 2."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    os.close(null)


class _Children:
    """Workers by number."""

    def __init__(self) -> None:
        self.pids: dict[int, int] = {}
        self.ended: dict[int, int] = {}

    def collect(self) -> None:
        for number, pid in list(self.pids.items()):
            with contextlib.suppress(ChildProcessError):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.ended[number] = os.waitstatus_to_exitcode(status)
                    del self.pids[number]

    def reap(self, number: int) -> int | None:
        """Kill one; the status with which it ended. Where it doesn't end at once (it waits for a dead disk), it is
        collected later.
        """
        self.collect()
        if (pid := self.pids.get(number)) is not None:
            os.kill(pid, signal.SIGKILL)
            until = time.monotonic() + _REAP_S
            while number in self.pids and time.monotonic() < until:
                time.sleep(0.001)
                self.collect()
        return self.ended.pop(number, None)


def _warm_up() -> None:
    """The first use of an operator imports a good deal, which each worker would do again."""
    geometry = Geometry()
    size = (geometry.factor, geometry.factor)
    out = torch.empty(patch_shape(grid_of(2, size, geometry), geometry), dtype=torch.uint8)
    PatchSink(out, {0: (0, 1)}, size, geometry, Path())(0, torch.zeros(60, 60, 3, dtype=torch.uint8))


def serve(descriptor: int) -> None:
    """Fork workers when asked, until the other side is gone."""
    control, parent = socket.socket(fileno=descriptor), os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _quiet()
    try:
        quiet()
        torch.set_num_threads(1)
        _warm_up()
        send(control, {"op": "hello"})
    except Exception:
        send(control, {"error": traceback.format_exc()})
        return
    wake, waker = socket.socketpair()
    wake.setblocking(False)
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno())
    children = _Children()
    try:
        # a fork of the other side may keep the socket open, so the parent's death is looked for, too
        while os.getppid() == parent:
            ready, _, _ = select.select([control, wake], [], [], 1.0)
            with contextlib.suppress(BlockingIOError):
                wake.recv(4096)
            children.collect()
            if control in ready:
                _answer(control, children, (wake, waker))
    except (OSError, EOFError):
        pass
    finally:
        for number in list(children.pids):
            children.reap(number)


def _answer(control: socket.socket, children: _Children, ours: tuple[socket.socket, socket.socket]) -> None:
    message, descriptors = receive(control)
    number = int(message["number"])
    if message["op"] == "reap":
        send(control, {"status": children.reap(number)})
        return
    me = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _die_with_parent(me)
            for other in (control, *ours):
                other.close()
            _work(socket.socket(fileno=descriptors[0]))
        finally:
            os._exit(0)
    children.pids[number] = pid
    os.close(descriptors[0])
    send(control, {"pid": pid})


def _work(channel: socket.socket) -> None:
    """Do tasks until the other side is gone."""
    backends: dict[str, Any] = {}
    poll = select.poll()
    poll.register(channel, select.POLLIN | select.POLLHUP)
    while True:
        try:
            message, descriptors = receive(channel)
        except (OSError, EOFError):
            return
        if message["op"] != "decode":  # a cancellation that came too late
            continue
        try:
            answer = _decode(message, descriptors[0], backends, lambda: bool(poll.poll(0)))
        except VideoError as error:
            answer = {"problems": error.problems}
        except Cancelled:
            answer = {"cancelled": True}
        except Exception:
            answer = {"crash": traceback.format_exc()}
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        try:
            send(channel, answer)
        except OSError:
            return


def load_backend(name: str) -> Any:
    """An instance of the class ``module:class``, made with the text arguments that follow, if any, as in
    ``module:class:argument``.

    Raises:
        ImportError: there is no such module, or it can't be imported.
    """
    module, kind, *arguments = name.split(":")
    return getattr(importlib.import_module(module), kind)(*arguments)


def _decode(
    message: dict[str, Any], descriptor: int, backends: dict[str, Any], cancelled: Callable[[], bool]
) -> dict[str, Any]:
    name, plan, stands_for = message["backend"], message["plan"], message["stands_for"]
    if name not in backends:
        backends[name] = load_backend(name)
    backend, geometry = backends[name], Geometry(*message["geometry"])
    size = message["size"]
    out = map_bytes(descriptor, message["nbytes"]).view(-1, patch_shape((1, 1, 1), geometry)[1])
    sink = PatchSink(out, message["slots"], size, geometry, plan.index.path)
    if hasattr(backend, "attempt"):
        stats = backend.attempt(plan, stands_for, sink, cancelled)
    else:

        def named(number: int, picture: torch.Tensor) -> None:
            for frame in stands_for[number]:
                sink(frame, picture)

        stats = backend.decode(plan, named)
    return {"stats": stats, "shape": sink.shape}
