"""Working ahead: same clips, order and errors as without; bytes, threads and closing."""

from __future__ import annotations

import gc
import itertools
import random
import threading

import pytest
import torch

from vrlt_fast.config import VideoConfig
from vrlt_fast.errors import VideoError
from vrlt_fast.video import prefetch
from vrlt_fast.video.cache import ClipLoader, decode_plainly
from vrlt_fast.video.prefetch import Prefetcher
from vrlt_fast.video.preprocess import Geometry

VIDEO = {"sampling": "fps", "fps": 2.0, "min_pixels": 784, "max_pixels": 4704, "min_frames": 2}


def loader(decode=decode_plainly, cache_gb=0.1) -> ClipLoader:
    return ClipLoader(VideoConfig(**VIDEO, cache_gb=cache_gb), Geometry(), decode=decode)


class Gate:
    """Decodes when it is let; ``begun`` are the names of files in the order in which decoding began."""

    def __init__(self, is_open: bool = False):
        self.changed, self.begun, self.let = threading.Condition(), [], threading.Event()
        if is_open:
            self.let.set()

    def __call__(self, index, frames, size, geometry):
        with self.changed:
            self.begun.append(index.path.stem)
            self.changed.notify_all()
        assert self.let.wait(60)
        return decode_plainly(index, frames, size, geometry)

    def wait_for(self, *names: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: set(names) <= set(self.begun), 60)


@pytest.fixture
def paths(studio):
    found = []
    for name in "abcdef":
        studio.seed += 1
        found.append(studio.film(f"{name}.mp4", count=8 + 8 * (name < "c"), size=(32, 32)))
    return found


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("prefetch-")]


@pytest.mark.parametrize("depth", [1, 4])
def test_same_clips_and_errors_as_without(paths, studio, seed, depth):
    rng = random.Random(seed)
    bad = studio.text("bad.mp4", b"no video")
    order = rng.choices([*paths, bad], k=30)

    def outcomes(clips, asked):
        for path in asked:
            try:
                yield clips.load(path)
            except VideoError as error:
                yield str(error)

    plain = list(outcomes(loader(cache_gb=0), order))
    with Prefetcher(loader(), depth=depth, budget=50_000) as ahead:
        ahead.expect(order)
        found = list(outcomes(ahead, order))
        assert ahead._state.used == 0
        assert ahead.decoded == len({p for p in order if p != bad})
    for a, b in zip(plain, found, strict=True):
        if isinstance(a, str):
            assert a == b
        else:
            assert (a.key, a.times) == (b.key, b.times)
            assert torch.equal(a.patches, b.patches)
    assert not threads()


def test_it_works_ahead_and_a_hit_is_the_clip_itself(paths):
    gate = Gate()
    with Prefetcher(loader(gate), threads=2, depth=3) as ahead:
        ahead.expect(itertools.cycle(paths))
        gate.wait_for("a", "b")
        gate.let.set()
        gate.wait_for("c")
        first = ahead.load(paths[0])
        gate.wait_for("d")  # as one was taken
        assert "e" not in gate.begun
        assert ahead.loader.load(paths[0]) is first
        assert [ahead.load(path).key for path in paths[1:4]] == [loader().load(path).key for path in paths[1:4]]


def test_an_error_comes_when_its_clip_is_asked_for_and_once(paths):
    failures = [RuntimeError("first"), None]

    def decode(index, frames, size, geometry):
        error = failures.pop(0) if index.path.stem == "b" else None
        if error is not None:
            raise error
        return decode_plainly(index, frames, size, geometry)

    error = failures[0]
    with Prefetcher(loader(decode), threads=1) as ahead:
        ahead.expect(paths[:3])
        ahead.load(paths[0])
        with pytest.raises(RuntimeError) as raised:
            ahead.load(paths[1])
        assert raised.value is error
        assert ahead.load(paths[1]).n_tokens > 0
        assert ahead.load(paths[2]).n_tokens > 0


def test_the_budget_is_kept(paths):
    most, gate = [], Gate(is_open=True)
    sizes = {path.stem: loader().prepare(path).run.nbytes for path in paths}
    budget = max(sizes.values()) + min(sizes.values())

    def decode(*args):
        most.append(ahead._state.used)
        return gate(*args)

    with Prefetcher(loader(decode, cache_gb=0), threads=3, depth=6, budget=budget) as ahead:
        ahead.expect(paths * 4)
        for path in paths * 4:
            ahead.load(path)
    # what the consumer waits for, and what is next, may exceed it by themselves
    assert max(most) <= budget + 2 * max(sizes.values())
    gate = Gate()
    with Prefetcher(loader(gate, cache_gb=0), threads=3, depth=6, budget=sizes["a"]) as ahead:
        ahead.expect(paths)
        gate.wait_for("a")
        gate.let.set()
        for path in paths:  # one after the other, without a deadlock
            ahead.load(path)


def test_what_is_skipped_is_given_up(paths):
    with Prefetcher(loader(), threads=2, depth=6) as ahead:
        ahead.expect([*paths[:4], paths[5]])
        assert ahead.load(paths[3]).key == loader().load(paths[3]).key
        assert ahead.load(paths[4]).key == loader().load(paths[4]).key  # not expected at all
        assert ahead.load(paths[5]).key == loader().load(paths[5]).key
        ahead.expect(paths)
        ahead.expect([paths[1]])
        ahead.load(paths[1])
    assert ahead._state.used == 0


def test_closing_does_not_wait_for_a_decoder_that_hangs(paths, monkeypatch):
    monkeypatch.setattr(prefetch, "JOIN_S", 0.1)
    gate = Gate()
    ahead = Prefetcher(loader(gate), threads=1)
    ahead.expect(paths)
    gate.wait_for("a")
    running = threads()
    ahead.close()
    ahead.close()
    assert len(running) == 1
    assert running[0].is_alive()
    gate.let.set()
    running[0].join(60)
    assert gate.begun == ["a"]
    assert ahead.load(paths[1]).n_tokens > 0


def test_closing_wakes_who_waits(paths):
    gate, found = Gate(), []
    ahead = Prefetcher(loader(gate), threads=1)
    ahead.expect(paths)
    gate.wait_for("a")
    waiting = threading.Thread(target=lambda: found.append(ahead.load(paths[0])))
    waiting.start()
    ahead._state.stop()
    gate.let.set()
    waiting.join(60)
    ahead.close()
    assert found[0].key == loader().load(paths[0]).key


def test_a_consumer_that_fails_leaves_no_thread(paths):
    def consume():
        with Prefetcher(loader(), threads=2) as ahead:
            ahead.expect(itertools.cycle(paths))
            ahead.load(paths[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert not threads()


def test_a_forgotten_one_ends_its_threads(paths):
    ahead = Prefetcher(loader(), threads=2)
    ahead.expect(itertools.cycle(paths))
    ahead.load(paths[0])
    running = threads()
    assert len(running) == 2
    del ahead
    gc.collect()
    for thread in running:
        thread.join(60)
    assert not threads()


def test_without_threads_it_is_the_loader(paths):
    with Prefetcher(loader(), threads=0) as ahead:
        ahead.expect(paths)
        assert ahead.decoded == 0
        assert ahead.load(paths[0]).key == loader().load(paths[0]).key
        assert (ahead.decoded, ahead.hits) == (1, 0)
