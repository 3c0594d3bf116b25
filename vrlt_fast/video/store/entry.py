"""The file that holds a run of tubelets: a header, a table, the patches. Every byte is under a checksum.

Little-endian. The first 4096 bytes are the header and its CRC-32; then come the presentation ticks of each tubelet
(int64 [t, 2]) and one 64-bit checksum per MiB of patches; then, from a multiple of 4096 on, the patches as they are in
memory, so that a mapped file is a tensor.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

SCHEMA = 1
MAGIC = b"VRLTPAT\n"
BLOCK = 4096
CHUNK = 1 << 20
"""Bytes under one checksum."""
LARGEST = 64 << 30
MOST = 1 << 16
"""Bytes of patches and tubelets beyond which a header isn't believed."""

_HEAD = struct.Struct("<8sIIIIIQQ16sI")
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14; Python has no name for it
_WORDS = CHUNK // 8


class Damaged(ValueError):
    """A file that isn't an entry, or no longer the one that was written."""


@dataclass(frozen=True)
class Run:
    """Which patches: tubelets of one video in one geometry.

    ``base`` 16 bytes: digest of all that decides the patches but the times; ``ticks``: the presentation ticks of each
    tubelet's frames; ``height`` and ``width`` in patches; ``row``: bytes of one patch.
    """

    base: bytes
    ticks: tuple[tuple[int, int], ...]
    height: int
    width: int
    row: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the patches, uint8."""
        return len(self.ticks) * self.height * self.width, self.row

    @property
    def nbytes(self) -> int:
        return len(self.ticks) * self.height * self.width * self.row

    @functools.cached_property
    def name(self) -> str:
        """64 hexadecimal digits; the first 32 are the base's."""
        times = np.asarray(self.ticks, dtype="<i8").tobytes()
        cells = struct.pack("<3I", self.height, self.width, self.row)
        return self.base.hex() + hashlib.blake2b(times, digest_size=16, key=self.base, salt=cells).hexdigest()

    def part(self, slots: Iterable[int]) -> Run:
        """The run of some of the tubelets."""
        return Run(self.base, tuple(self.ticks[i] for i in slots), self.height, self.width, self.row)


@dataclass(frozen=True)
class Head:
    """A header and its table; ``sums`` uint64, one a MiB of patches."""

    run: Run
    offset: int
    sums: np.ndarray[Any, np.dtype[np.uint64]]


@functools.cache
def _weights() -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Odd 64-bit weights, by SplitMix64."""
    x = np.arange(1, _WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)


def _sum(part: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """Weighted sum of 64-bit words mod 2^64: three times as fast as zlib's CRC-32, and as no weight is even, a change
    within one word never passes.
    """
    whole = len(part) // 8 * 8
    words = part[:whole].view("<u8")
    total = int(np.dot(words, _weights()[: len(words)])) if len(words) else 0
    if whole < len(part):
        total += int.from_bytes(part[whole:].tobytes(), "little") * int(_weights()[len(words)])
    return total % (1 << 64)


def checksums(patches: torch.Tensor, mapped: mmap.mmap | None = None, offset: int = 0) -> np.ndarray[Any, Any]:
    """One checksum a MiB of contiguous uint8 patches, in threads where there is enough to do.

    Args:
        mapped, offset: the file that the patches are mapped from, to have its pages brought in by the same threads.
    """
    content = patches.reshape(-1).numpy()
    starts = range(0, len(content), CHUNK)

    def some(first: int) -> list[int]:
        end = min(first + 16 * CHUNK, len(content))
        if mapped is not None:
            low = (offset + first) // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):  # an old kernel: pages come as they are read
                mapped.madvise(_POPULATE_READ, low, offset + end - low)
        return [_sum(content[i : min(i + CHUNK, end)]) for i in range(first, end, CHUNK)]

    groups = starts[::16]
    threads = min(len(groups), len(os.sched_getaffinity(0)))
    if threads < 2:
        found = [some(first) for first in groups]
    else:
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(some, groups))
    return np.array([value for group in found for value in group], dtype="<u8")


def _offset(tubelets: int, nbytes: int) -> int:
    """Where the patches begin."""
    table = tubelets * 16 + -(-nbytes // CHUNK) * 8
    return -(-(BLOCK + table) // BLOCK) * BLOCK


def file_size(run: Run) -> int:
    """Bytes of the run's file."""
    return _offset(len(run.ticks), run.nbytes) + run.nbytes


def preamble(run: Run, patches: torch.Tensor) -> bytes:
    """All that comes before the patches."""
    offset = _offset(len(run.ticks), run.nbytes)
    table = (np.asarray(run.ticks, dtype="<i8").tobytes() + checksums(patches).tobytes()).ljust(offset - BLOCK, b"\0")
    head = _HEAD.pack(
        MAGIC,
        SCHEMA,
        len(run.ticks),
        run.height,
        run.width,
        run.row,
        offset,
        run.nbytes,
        run.base,
        zlib.crc32(table),
    ).ljust(BLOCK - 4, b"\0")
    return head + struct.pack("<I", zlib.crc32(head)) + table


def read_head(file: int) -> Head:
    """The header of an open file, nothing in it taken on trust.

    Raises:
        Damaged: not a regular file, of another schema, cut short, or changed.
    """
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise Damaged("not a regular file")
    block = os.pread(file, BLOCK, 0)
    if len(block) < BLOCK:
        raise Damaged("shorter than its header")
    magic, schema, tubelets, height, width, row, offset, nbytes, base, crc = _HEAD.unpack_from(block)
    if magic != MAGIC or schema != SCHEMA:
        raise Damaged("of another schema")
    if zlib.crc32(block[:-4]) != int.from_bytes(block[-4:], "little"):
        raise Damaged("its header is damaged")
    if not 0 < nbytes <= LARGEST or tubelets > MOST or tubelets * height * width * row != nbytes:
        raise Damaged("its header contradicts itself")
    start = _offset(tubelets, nbytes)
    if offset != start or status.st_size != start + nbytes:
        raise Damaged("not of the length that its header tells")
    table = os.pread(file, start - BLOCK, BLOCK)
    if len(table) != start - BLOCK or zlib.crc32(table) != crc:
        raise Damaged("its table is damaged")
    ticks = np.frombuffer(table, dtype="<i8", count=2 * tubelets).reshape(tubelets, 2)
    run = Run(base, tuple((int(a), int(b)) for a, b in ticks), height, width, row)
    return Head(run, offset, np.frombuffer(table, dtype="<u8", offset=16 * tubelets, count=-(-nbytes // CHUNK)))


def map_patches(file: int, head: Head, *, verify: bool = True) -> torch.Tensor:
    """The patches of an open file as a tensor on its pages; what a caller writes into it stays with the caller.

    It stays valid after the file is closed or unlinked.

    Raises:
        Damaged: a checksum is wrong.
    """
    mapped = mmap.mmap(file, head.offset + head.run.nbytes, access=mmap.ACCESS_COPY)
    patches = torch.frombuffer(mapped, dtype=torch.uint8, count=head.run.nbytes, offset=head.offset)
    if verify and not np.array_equal(checksums(patches, mapped, head.offset), head.sums):
        raise Damaged("its patches are damaged")
    return patches.view(head.run.shape)
