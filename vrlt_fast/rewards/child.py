"""What runs in a killable worker (:mod:`vrlt_fast.rewards.workers`): a watcher, and the worker that it forks.

Both are one process group. The watcher kills the group when the worker ends or when the parent is gone, however it
went, so that nothing that a worker started outlives it. Messages are JSON behind their length.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import struct
import traceback
from typing import Any

LARGEST = 1 << 26
"""Bytes of a message that are accepted."""
_HEAD = struct.Struct("<Q")
_LONGEST_DETAIL = 400


def send(channel: socket.socket, message: object) -> None:
    """Send numbers, texts, lists and dictionaries. NaN and infinities arrive as they are.

    Raises:
        TypeError, ValueError: what can't be written as JSON.
        OSError: the other side is gone, or the socket's timeout passed.
    """
    data = json.dumps(message).encode()
    channel.sendall(_HEAD.pack(len(data)) + data)


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = channel.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def receive(channel: socket.socket) -> Any:
    """The next message.

    Raises:
        EOFError: the other side is gone.
        OSError: also, or the socket's timeout passed.
        ValueError: it isn't JSON, or too long.
    """
    (size,) = _HEAD.unpack(_exactly(channel, _HEAD.size))
    if size > LARGEST:
        raise ValueError(f"a message of {size} bytes")
    return json.loads(_exactly(channel, size))


def describe(error: BaseException) -> str:
    """The last line of a traceback, and where in the called code it was raised."""
    try:
        said = str(error)
    except Exception:
        said = "(its text can't be made)"
    ours = (os.path.dirname(__file__), "<frozen")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    at = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    line = " ".join(f"{type(error).__name__}: {said}".split())
    return line[:_LONGEST_DETAIL] + at


def main(channel_fd: int, life_fd: int, parent: int) -> None:
    """Run as a process group of its own: fork the worker, which does what comes over the channel, and watch it.

    Args:
        life_fd: a socket whose other end the parent keeps open, and over which it is told how the worker ended.
        parent: its process id.
    """
    channel, life = socket.socket(fileno=channel_fd), socket.socket(fileno=life_fd)
    os.dup2(2, 1)  # what a reward prints must not get into the output of a command
    worker = os.fork()
    if worker == 0:
        try:
            life.close()
            _work(channel)
        finally:
            os._exit(0)
    channel.close()
    _watch(life, worker, parent)


def _watch(life: socket.socket, worker: int, parent: int) -> None:
    ended = os.pidfd_open(worker)
    poll = select.poll()
    poll.register(life, select.POLLIN)
    poll.register(ended, select.POLLIN)
    # a fork of the parent may keep the socket open, so the parent's death is looked for, too
    while os.getppid() == parent:
        ready = dict(poll.poll(1000))
        if ended in ready:
            code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
            with contextlib.suppress(OSError):
                life.sendall(f"{code}\n".encode())
        if ready:
            break
    os.killpg(0, signal.SIGKILL)


def _work(channel: socket.socket) -> None:
    """Make the handler that the first message names, then call it with each further one, until the parent is gone."""
    try:
        first = receive(channel)
        module, _, name = first["target"].partition(":")
        handler = getattr(importlib.import_module(module), name)(first["setup"])
        send(channel, {"kind": ""})
    except BaseException as error:
        send(channel, {"kind": "exception", "detail": describe(error)})
        return
    while True:
        try:
            item = receive(channel)
        except (OSError, EOFError):
            return
        try:
            send(channel, {"kind": "", "value": handler(item)})
        except OSError:
            return
        except BaseException as error:  # sys.exit in a reward isn't the end of its process
            send(channel, {"kind": "exception", "detail": describe(error)})
