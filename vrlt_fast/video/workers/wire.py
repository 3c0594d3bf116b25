"""Messages between this process and its decoders: JSON and raw arrays over a Unix socket, with file descriptors."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vrlt_fast.errors import Problem
from vrlt_fast.video.backends.base import DecodeStats
from vrlt_fast.video.index import Packets, VideoIndex
from vrlt_fast.video.plan import DecodePlan, Segment

_HEAD = struct.Struct("<QQ")
_TYPES: dict[str, type] = {
    kind.__name__: kind for kind in (VideoIndex, Packets, DecodePlan, Segment, DecodeStats, Problem)
}


def _pack(value: Any, blobs: list[bytes]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        blobs.append(np.ascontiguousarray(value).tobytes())
        return {"array": [value.dtype.str, list(value.shape), len(blobs[-1])]}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, Fraction):
        return {"fraction": [value.numerator, value.denominator]}
    if is_dataclass(value) and type(value).__name__ in _TYPES:
        parts = {f.name: _pack(getattr(value, f.name), blobs) for f in fields(value)}
        return {"object": [type(value).__name__, parts]}
    if isinstance(value, Mapping):
        return {"map": [[_pack(k, blobs), _pack(v, blobs)] for k, v in value.items()]}
    for kind in (tuple, frozenset, list):
        if isinstance(value, kind):
            return {kind.__name__: [_pack(v, blobs) for v in value]}
    raise TypeError(f"{type(value).__name__} can't be sent")


def _unpack(value: Any, blobs: bytearray, place: list[int]) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "array":
        dtype, shape, size = content
        start, place[0] = place[0], place[0] + size
        return np.frombuffer(blobs, np.dtype(dtype), offset=start, count=size // np.dtype(dtype).itemsize).reshape(
            shape
        )
    if kind == "path":
        return Path(content)
    if kind == "fraction":
        return Fraction(*content)
    if kind == "object":
        name, parts = content
        return _TYPES[name](**{key: _unpack(part, blobs, place) for key, part in parts.items()})
    if kind == "map":
        return {_unpack(k, blobs, place): _unpack(v, blobs, place) for k, v in content}
    items = [_unpack(item, blobs, place) for item in content]
    return {"tuple": tuple, "frozenset": frozenset, "list": list}[kind](items)


def send(channel: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send one message of numbers, texts, containers, arrays and the types of the video path.

    Raises:
        OSError: the other side is gone, or the socket's timeout passed.
    """
    blobs: list[bytes] = []
    head = json.dumps(_pack(dict(message), blobs)).encode()
    size = sum(map(len, blobs))
    # the descriptors travel with the first byte
    socket.send_fds(channel, [bytes([len(descriptors)])], list(descriptors))
    channel.sendall(b"".join((_HEAD.pack(len(head), size), head, *blobs)))


def _exactly(channel: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        part = channel.recv_into(view[got:])
        if not part:
            raise EOFError
        got += part
    return data


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next message and its descriptors, which are the caller's to close.

    Raises:
        EOFError: the other side is gone.
        OSError: also, or the socket's timeout passed.
    """
    first, descriptors, _, _ = socket.recv_fds(channel, 1, 4)
    if not first:
        raise EOFError
    head, size = _HEAD.unpack(bytes(_exactly(channel, _HEAD.size)))
    text = _exactly(channel, head)
    return _unpack(json.loads(bytes(text)), _exactly(channel, size), [0]), descriptors
