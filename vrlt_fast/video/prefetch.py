"""Clips loaded ahead of their use, in threads: decoding releases the GIL or runs in worker processes."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vrlt_fast.video.cache import ClipLoader
from vrlt_fast.video.preprocess import Clip

JOIN_S = 5.0
"""Seconds that closing waits for loads in progress; a decoder that hangs is left to its own deadline."""


@dataclass(eq=False)
class _Item:
    """A place in the order. ``wanted``: somebody waits for it; ``gone``: nobody will. ``run`` names the bytes that are
    set aside for it.
    """

    path: Path
    started: bool = False
    wanted: bool = False
    gone: bool = False
    done: bool = False
    run: str = ""
    clip: Clip | None = None
    error: BaseException | None = None


class _State:
    """What the threads share. They hold this, not the prefetcher, so that a forgotten one is collected."""

    def __init__(self, loader: ClipLoader, budget: int):
        self.loader, self.budget = loader, budget
        self.changed = threading.Condition()
        self.items: deque[_Item] = deque()
        self.used, self.stopped = 0, False
        self._held: dict[str, tuple[int, int]] = {}

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.items.clear()
            self.changed.notify_all()

    def work(self) -> None:
        while (item := self._take()) is not None:
            clip, error = None, None
            try:
                run = self.loader.prepare(item.path).run
                if self._reserve(item, run.name, run.nbytes):
                    clip = self.loader.load(item.path)
            except BaseException as raised:  # whatever it is, it belongs to who asks for this clip
                error = raised
            with self.changed:
                item.clip, item.error, item.done = clip, error, True
                if item.gone:
                    self.release(item)
                self.changed.notify_all()
            del item, clip, error  # a thread that waits for work keeps no clip alive

    def _take(self) -> _Item | None:
        """The next item that nobody has started; None when there is nothing to do any more."""
        with self.changed:
            while not self.stopped:
                for item in self.items:
                    if not item.started:
                        item.started = True
                        return item
                self.changed.wait()
            return None

    def _reserve(self, item: _Item, run: str, nbytes: int) -> bool:
        """Wait for room; False when the item isn't needed any more. The first item, and one that is waited for, go
        ahead without room: all others may hold it until they do.
        """
        with self.changed:
            while not (self.stopped or item.gone):
                first = bool(self.items) and self.items[0] is item
                if run in self._held or self.used + nbytes <= self.budget or item.wanted or first:
                    count, _ = self._held.get(run, (0, nbytes))
                    self.used += nbytes if count == 0 else 0
                    self._held[run] = count + 1, nbytes
                    item.run = run
                    return True
                self.changed.wait()
            return False

    def release(self, item: _Item) -> None:
        """Give back an item's bytes; under the lock."""
        item.clip = None
        if item.run:
            count, nbytes = self._held.pop(item.run)
            if count > 1:
                self._held[item.run] = count - 1, nbytes
            else:
                self.used -= nbytes
            item.run = ""


class Prefetcher:
    """A clip loader that works ahead: same clips, same order, same errors as ``loader`` alone.

    Args:
        threads: loads at the same time; 0: nothing is loaded ahead.
        depth: most clips ahead.
        budget: most bytes of clips loaded or being loaded that nobody has asked for yet; the next one may exceed it.
    """

    def __init__(self, loader: ClipLoader, *, threads: int = 2, depth: int = 16, budget: int = 2_000_000_000):
        self.loader, self.depth = loader, depth if threads else 0
        self._state = _State(loader, budget)
        self._order: Iterator[Path] = iter(())
        self._threads = [
            threading.Thread(target=self._state.work, name=f"prefetch-{i}", daemon=True) for i in range(threads)
        ]
        self._finalizer = weakref.finalize(self, self._state.stop)
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def decoded(self) -> int:
        """As the loader's; counts clips that nobody asked for in the end, too."""
        return self.loader.decoded

    @property
    def hits(self) -> int:
        return self.loader.hits

    def expect(self, order: Iterable[Path]) -> None:
        """The files that will be asked for, in order, each as often as it will be; replaces what was expected. May be
        endless: it is read only as far as clips are loaded ahead, in the caller's thread.
        """
        with self._state.changed:
            self._drop(len(self._state.items))
            self._order = iter(order)
            self._fill()

    def load(self, path: Path) -> Clip:
        """As :meth:`ClipLoader.load`. What was expected before ``path`` and not asked for is given up."""
        state = self._state
        with state.changed:
            place = next((i for i, item in enumerate(state.items) if item.path == path), None)
            item = None
            if place is not None:
                self._drop(place)
                item = state.items.popleft()
                item.wanted = True
                self._fill()
            if item is not None and item.started:
                state.changed.notify_all()
                try:
                    while not (item.done or state.stopped):
                        state.changed.wait()
                finally:
                    clip, error = item.clip, item.error
                    item.gone = True
                    if item.done:
                        state.release(item)
                        state.changed.notify_all()
                if error is not None:
                    raise error
                if clip is not None:
                    return clip
        return self.loader.load(path)

    def close(self) -> None:
        """Stop working ahead; what is asked for later is loaded then. Waits for loads in progress, but not for ever."""
        self._finalizer()
        deadline = time.monotonic() + JOIN_S
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _drop(self, count: int) -> None:
        """Give up the first items; under the lock."""
        for _ in range(count):
            item = self._state.items.popleft()
            item.gone = True
            if item.done or not item.started:
                self._state.release(item)

    def _fill(self) -> None:
        """Take more from the order; under the lock."""
        if self._state.stopped:
            return
        for path in itertools.islice(self._order, max(self.depth - len(self._state.items), 0)):
            self._state.items.append(_Item(path))
        self._state.changed.notify_all()
