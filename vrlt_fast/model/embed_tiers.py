"""The memory tiers of the embedding cache: each a byte budget, and what was used least recently makes room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vrlt_fast.model.embed_store import Tensors, flat_bytes

PAGE = 2 << 20
"""Bytes of a page of page-locked memory; a power of two, because torch rounds such memory up to one."""

_Evicted = Callable[[str, Tensors | None], None]


@dataclass
class _Held:
    """What a tier has of an entry: its content, and the bytes that it costs."""

    content: Any
    cost: int


class _Tier:
    """Entries under a budget of bytes; the least recently used make room.

    Args:
        evicted: called with the key and the tensors of what makes room; None in their place where the tier would have
            to copy them, or they were written to.
    """

    def __init__(self, budget: int, evicted: _Evicted):
        self.budget, self.nbytes = budget, 0
        self._evicted = evicted
        self._held: OrderedDict[str, _Held] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def keys(self) -> list[str]:
        """The least recently used first."""
        return list(self._held)

    def touch(self, key: str) -> None:
        self._held.move_to_end(key)

    def get(self, key: str) -> Tensors | None:
        """None, too, when the entry is there but was written to."""
        self.touch(key)
        return self._load(self._held[key].content)

    def put(self, key: str, tensors: Tensors, *, own: bool = False) -> bool:
        """False when it doesn't fit. ``own``: nobody else writes to the tensors, and their memory is theirs alone."""
        self.remove(key)
        cost = self._cost(tensors)
        if cost > self.budget:
            return False
        while self.nbytes + cost > self.budget:
            oldest = next(iter(self._held))
            held = self._pop(oldest)
            self._evicted(oldest, self._demote(held.content))
            self._release(held.content)
        content = self._store(tensors, own)
        if content is None:
            return False
        self._held[key] = _Held(content, cost)
        self.nbytes += cost
        return True

    def remove(self, key: str) -> None:
        if key in self._held:
            self._release(self._pop(key).content)

    def clear(self) -> None:
        for key in self.keys():
            self.remove(key)

    def _pop(self, key: str) -> _Held:
        held = self._held.pop(key)
        self.nbytes -= held.cost
        return held

    def _cost(self, tensors: Tensors) -> int:
        return sum(x.nbytes for x in tensors)

    def _store(self, tensors: Tensors, own: bool) -> Any:
        raise NotImplementedError

    def _load(self, content: Any) -> Tensors | None:
        raise NotImplementedError

    def _demote(self, content: Any) -> Tensors | None:
        return None

    def _release(self, content: Any) -> None:
        pass


class TensorTier(_Tier):
    """Tensors of one device, handed out as they are: readers share them. One that was written to isn't handed out."""

    def __init__(self, budget: int, evicted: _Evicted, device: torch.device):
        super().__init__(budget, evicted)
        self.device = device

    def _store(self, tensors: Tensors, own: bool) -> Any:
        try:
            kept = tensors if own else tuple(x.to(self.device, copy=True).contiguous() for x in tensors)
        except torch.OutOfMemoryError:
            return None
        return kept, tuple(x._version for x in kept)

    def _load(self, content: Any) -> Tensors | None:
        tensors, versions = content
        return tensors if versions == tuple(x._version for x in tensors) else None

    _demote = _load


class PageTier(_Tier):
    """Bytes in pages of page-locked memory, handed out as copies on the device.

    Pages are taken when they are needed and kept: torch never gives such memory back, and with pages of one size what
    is kept stays within the budget. All copies run on one stream, so that a page is written after it was read.

    Args:
        pin: False: ordinary memory.
        warn: called with one line when there is no more memory to lock.
    """

    def __init__(
        self, budget: int, evicted: _Evicted, device: torch.device, *, pin: bool = True, warn: Callable[[str], None]
    ):
        super().__init__(budget // PAGE * PAGE, evicted)
        self.device, self._pin, self._warn = device, pin, warn
        self._free: list[torch.Tensor] = []
        self._made = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _cost(self, tensors: Tensors) -> int:
        return -(-super()._cost(tensors) // PAGE) * PAGE

    def _store(self, tensors: Tensors, own: bool) -> Any:
        needed = self._cost(tensors) // PAGE
        if not self._make(needed):
            return None
        pages, self._free = self._free[:needed], self._free[needed:]
        tensors = tuple(x.contiguous() for x in tensors)
        if self._stream is None:
            _copy(tensors, pages, to_pages=True)
        elif all(x.is_cuda for x in tensors):
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                _copy(tensors, pages, to_pages=True)
            for x in tensors:
                x.record_stream(self._stream)
        else:
            self._stream.synchronize()  # the CPU writes at once
            _copy(tuple(x.cpu() for x in tensors), pages, to_pages=True)
        return pages, [(x.dtype, x.shape) for x in tensors]

    def _load(self, content: Any) -> Tensors | None:
        pages, specs = content
        if self._stream is None:
            tensors = tuple(torch.empty(shape, dtype=dtype, device=self.device) for dtype, shape in specs)
            _copy(tensors, pages, to_pages=False)
            return tensors
        with torch.cuda.stream(self._stream):
            tensors = tuple(torch.empty(shape, dtype=dtype, device=self.device) for dtype, shape in specs)
            _copy(tensors, pages, to_pages=False)
        reader = torch.cuda.current_stream(self.device)
        reader.wait_stream(self._stream)
        for x in tensors:
            x.record_stream(reader)
        return tensors

    def _release(self, content: Any) -> None:
        self._free += content[0]

    def _make(self, needed: int) -> bool:
        try:
            while len(self._free) < needed:
                self._free.append(torch.empty(PAGE, dtype=torch.uint8, pin_memory=self._pin))
                self._made += 1
        except RuntimeError as error:
            self.budget = self._made * PAGE
            why = str(error).splitlines()[0]
            self._warn(f"no more than {self.budget / 1e9:.2f} GB of host memory for embeddings ({why})")
            return False
        return True


def _copy(tensors: Tensors, pages: Sequence[torch.Tensor], *, to_pages: bool) -> None:
    """All bytes of contiguous tensors, one after the other, into pages or back."""
    at = 0
    for content in map(flat_bytes, tensors):
        done = 0
        while done < len(content):
            number, offset = divmod(at, PAGE)
            size = min(PAGE - offset, len(content) - done)
            page, piece = pages[number][offset : offset + size], content[done : done + size]
            target, source = (page, piece) if to_pages else (piece, page)
            target.copy_(source, non_blocking=True)
            done, at = done + size, at + size
