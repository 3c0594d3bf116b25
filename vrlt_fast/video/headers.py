"""A look into container headers for what PyAV doesn't tell: whether pictures may have to be turned, and how long the
file ought to be. Bounded reads; a file that doesn't parse says nothing.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

_HEAD = 1 << 16
_PLAIN = struct.pack(">9I", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
_PROJECTION = b"\x76\x70"
_SEGMENT, _EBML = b"\x18\x53\x80\x67", b"\x1a\x45\xdf\xa3"


def exact(ratio: Any) -> Fraction:
    """A ratio of PyAV's, which from 19 on are of a type of its own."""
    return Fraction(ratio.numerator, ratio.denominator)


def may_be_turned(path: Path, container: str, codec: str, first: bytes) -> bool:
    """Whether the header or the first packet mentions an orientation; a wrong yes costs one decoded frame."""
    names = set(container.split(","))
    if "mp4" in names:
        with path.open("rb") as file:
            return any(matrix != _PLAIN for matrix in _matrices(file, 0, path.stat().st_size))
    if "matroska" in names:
        with path.open("rb") as file:
            return _PROJECTION in file.read(_HEAD)
    return codec in ("mjpeg", "png", "webp") and b"Exif" in first[:_HEAD]


def promised_bytes(path: Path) -> int:
    """The length that a RIFF or Matroska header promises; 0 where there is none."""
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:4] == b"RIFF" and len(head) >= 8:
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == _EBML:
        at = head.find(_SEGMENT, 0, 256)
        if at >= 0 and at + 12 <= len(head) and head[at + 4]:
            width = 9 - head[at + 4].bit_length()
            size = int.from_bytes(head[at + 4 : at + 4 + width], "big") & ((1 << 7 * width) - 1)
            if size != (1 << 7 * width) - 1:  # all ones: unknown, a live recording
                return at + 4 + width + size
    return 0


def largest_hole(path: Path) -> tuple[int, int]:
    """Start and length in bytes of the longest stretch that was never written, (0, 0) where there is none or the file
    system doesn't say; the first 1,000 are looked at. Downloads that reserve their space leave such holes.
    """
    at, found = 0, (0, 0)
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        end = os.fstat(handle).st_size
        for _ in range(1000):
            hole = os.lseek(handle, at, os.SEEK_HOLE)
            if hole >= end:
                break
            try:
                at = os.lseek(handle, hole, os.SEEK_DATA)
            except OSError:
                at = end
            found = max(found, (hole, at - hole), key=lambda x: x[1])
            if at >= end:
                break
    except OSError:
        pass
    finally:
        os.close(handle)
    return found


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the content of each ISO box; at most 1,000."""
    for _ in range(1000):
        file.seek(start)
        head = file.read(16)
        if start + 8 > end or len(head) < 8:
            return
        size, body = int.from_bytes(head[:4], "big"), 8
        if size == 1 and len(head) == 16:
            size, body = int.from_bytes(head[8:], "big"), 16
        size = size or end - start
        if size < body:
            return
        yield head[4:8], start + body, min(start + size, end)
        start += size


def _matrices(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """The matrices of the movie and of its tracks."""
    for name, body, stop in _boxes(file, start, end):
        if name in (b"moov", b"trak"):
            yield from _matrices(file, body, stop)
        elif name in (b"mvhd", b"tkhd"):
            file.seek(body)
            content = file.read(min(stop - body, 128))
            # ISO 14496-12 8.2.2, 8.3.2: 36 and 40 bytes before the matrix, 12 more in version 1
            at = (36 if name == b"mvhd" else 40) + (12 if content[:1] == b"\1" else 0)
            if len(content) >= at + 36:
                yield content[at : at + 36]
