"""Real worker processes: decoders that hang, crash or print; what is left of them afterwards."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from vrlt_fast.errors import Problem, VideoError
from vrlt_fast.video.index import probe
from vrlt_fast.video.plan import plan_decode
from vrlt_fast.video.preprocess import Geometry
from vrlt_fast.video.workers import pool as workers_module
from vrlt_fast.video.workers.pool import Task, WorkerLost, WorkerPool
from vrlt_fast.video.workers.shared import map_bytes, shared_bytes
from vrlt_fast.video.workers.wire import receive, send

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = '''
"""Decoders that misbehave."""
import ctypes, os, signal, time
from pathlib import Path
import torch
from vrlt_fast.errors import Problem, VideoError
from vrlt_fast.video.backends.base import Availability, DecodeStats

class Base:
    name, device, isolate = "hostile", "cpu", True
    def availability(self): return Availability(True)
    def supports(self, index): return ""

class Good(Base):
    def decode(self, plan, sink):
        for frame in plan.frames:
            sink(frame, torch.full((8, 8, 3), frame, dtype=torch.uint8))
        return DecodeStats(decoded=len(plan.frames))

class Sleeper(Base):
    def decode(self, plan, sink):
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL})
        while True:
            ctypes.CDLL(None).pause()

class Segfault(Base):
    def decode(self, plan, sink):
        ctypes.string_at(0)

class Quits(Base):
    def decode(self, plan, sink):
        os._exit(3)

class KilledOnce(Base):
    def decode(self, plan, sink):
        mark = Path(__file__).with_name("killed")
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Good().decode(plan, sink)

class Refuses(Base):
    def decode(self, plan, sink):
        raise VideoError(Problem("VRLT-V05", "no such frame", str(plan.index.path), "why", "fix"))

class Bug(Base):
    def decode(self, plan, sink):
        raise ZeroDivisionError("a bug")

class Loud(Base):
    def decode(self, plan, sink):
        os.write(1, b"native noise"), os.write(2, b"native noise")
        return Good().decode(plan, sink)
'''


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostile_decoders.py").write_text(HOSTILE)
    return str(folder)


@pytest.fixture(scope="module")
def pool(hostile):
    with WorkerPool(2, deadline_s=100, paths=(hostile,)) as pool:
        yield pool


class Bench:
    """Tasks that fill a shared memory of 8 x 8 pictures."""

    def __init__(self, path: Path, frames: int = 4):
        self.index, self.frames, self.geometry = probe(path), frames, Geometry(4, 2)
        self.nbytes = frames // 2 * 4 * 3 * 2 * 16
        self.descriptor, self.memory = shared_bytes(self.nbytes)

    def task(self, kind: str, frames=None) -> Task:
        plan = plan_decode(self.index, range(self.frames) if frames is None else frames)
        names = {frame: (frame,) for frame in plan.frames}
        slots = {frame: (frame,) for frame in range(self.frames)}
        spec = f"hostile_decoders:{kind}"
        return Task(spec, plan, names, slots, (8, 8), self.geometry, self.descriptor, self.nbytes)

    def values(self) -> list[list[int]]:
        """The distinct values of each picture."""
        pictures = self.memory.view(self.frames // 2, 4, 3, 2, 16).permute(0, 3, 1, 2, 4).flatten(0, 1)
        return [picture.unique().tolist() for picture in pictures]


@pytest.fixture
def bench(kinds):
    bench = Bench(kinds["h264"])
    yield bench
    os.close(bench.descriptor)


def children_of(pid: int) -> list[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        text = " ".join(Path(f"/proc/{pid}/task/{tid}/children").read_text() for tid in threads)
    except OSError:
        return []
    return [int(child) for child in text.split()]


def ended(pid: int, seconds: float = 20.0) -> bool:
    """Whether a process that may not be ours ends in time; a zombie has not."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


def helper(pool: WorkerPool) -> int:
    return workers_module._servers[os.getpid(), tuple(pool.paths)].process.pid


def mine(pool: WorkerPool) -> list[int]:
    """Its idle workers; their helper may have other pools' workers, too."""
    return [worker.pid for worker in pool._idle]


def test_tasks_write_into_shared_memory(pool, bench):
    first, second = pool.run([bench.task("Good", [0, 1]), bench.task("Good", [2, 3])])
    assert (first.stats.decoded, first.shape, second.shape) == (2, (8, 8), (8, 8))
    assert bench.values() == [[0], [1], [2], [3]]


def test_more_tasks_than_workers_and_several_callers(pool, kinds):
    def call(results: list, kinds_path: Path):
        mine = Bench(kinds_path, 8)
        pool.run([mine.task("Good", [i]) for i in range(8)])
        os.close(mine.descriptor)
        results.append(mine.values())

    results: list = []
    threads = [threading.Thread(target=call, args=(results, kinds["h264"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [[[i] for i in range(8)]] * 4
    assert 1 <= len(mine(pool)) <= 2
    assert set(mine(pool)) <= set(children_of(helper(pool)))


def test_a_decoder_that_sleeps_for_ever_costs_its_deadline(hostile, bench):
    with WorkerPool(1, deadline_s=100, paths=(hostile,)) as pool:
        pool.run([bench.task("Good")])
        (sleeper,) = mine(pool)
        pool.deadline_s = 0.3
        with pytest.raises(WorkerLost, match=r"no result within 0\.3") as caught:
            pool.run([bench.task("Sleeper")])
        assert caught.value.blame
        assert ended(sleeper)
        assert not Path(f"/proc/{sleeper}").exists()  # reaped, not a zombie
        pool.deadline_s = 100
        pool.run([bench.task("Good")])
        assert bench.values() == [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    ("kind", "why", "blame"),
    [("Segfault", "signal 11", True), ("Quits", "status 3", True), ("KilledOnce", "signal 9", False)],
)
def test_a_decoder_that_dies_costs_its_task(hostile, bench, kind, why, blame):
    with WorkerPool(1, deadline_s=100, paths=(hostile,)) as pool:
        with pytest.raises(WorkerLost, match=why) as caught:
            pool.run([bench.task(kind)])
        assert caught.value.blame is blame
        pool.run([bench.task("Good")])
        assert len(mine(pool)) == 1


def test_errors_travel_and_the_worker_stays(pool, bench):
    pool.run([bench.task("Good", [0]), bench.task("Good", [1])])
    before = set(mine(pool))
    with pytest.raises(VideoError) as caught:
        pool.run([bench.task("Refuses"), bench.task("Good")])
    assert caught.value.problems == (Problem("VRLT-V05", "no such frame", str(bench.index.path), "why", "fix"),)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        pool.run([bench.task("Bug")])
    pool.run([bench.task("Good")])
    assert set(mine(pool)) & before


def test_a_failed_task_cancels_the_others(hostile, bench, monkeypatch):
    """The other worker would take for ever, and doesn't hear."""
    monkeypatch.setattr(workers_module, "_GRACE_S", 0.2)
    with WorkerPool(2, deadline_s=600, paths=(hostile,)) as pool:
        with pytest.raises(VideoError):
            pool.run([bench.task("Sleeper"), bench.task("Refuses")])
        assert len(mine(pool)) == 1
        pool.run([bench.task("Good")])


def test_nothing_is_printed(pool, bench, capfd):
    pool.run([bench.task("Loud")])
    assert capfd.readouterr() == ("", "")


def test_an_idle_worker_that_was_killed_is_no_fault_of_the_file(hostile, bench):
    with WorkerPool(1, deadline_s=100, paths=(hostile,)) as pool:
        pool.run([bench.task("Good")])
        (worker,) = mine(pool)
        os.kill(worker, signal.SIGKILL)
        assert ended(worker)
        with pytest.raises(WorkerLost) as caught:
            pool.run([bench.task("Good")])
        assert not caught.value.blame
        pool.run([bench.task("Good")])


def test_the_helper_is_replaced(hostile, bench):
    with WorkerPool(1, deadline_s=100, paths=(hostile, "own")) as pool:
        pool.run([bench.task("Good")])
        old, (worker,) = helper(pool), mine(pool)
        os.kill(old, signal.SIGKILL)
        assert ended(worker)
        with pytest.raises(WorkerLost):
            pool.run([bench.task("Good")])
        pool.run([bench.task("Good")])
        assert helper(pool) != old


def test_close_leaves_no_process_and_no_descriptor(hostile, kinds):
    before = set(os.listdir("/proc/self/fd"))
    pool = WorkerPool(2, deadline_s=100, paths=(hostile, "another"))
    bench = Bench(kinds["h264"])
    pool.run([bench.task("Good", [0]), bench.task("Good", [1])])
    pids = [helper(pool), *mine(pool)]
    assert sorted(pids[1:]) == sorted(children_of(helper(pool)))
    os.close(bench.descriptor)
    pool.close()
    assert all(ended(pid) for pid in pids)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert set(os.listdir("/proc/self/fd")) <= before
    assert bench.values()[:2] == [[0], [1]]  # the patches live on


OWNER = """
import json, os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from tests.video.test_workers import Bench, children_of, helper
from vrlt_fast.video.workers.pool import WorkerPool
import threading
pool = WorkerPool(1, deadline_s=100, paths=({hostile!r},))
bench = Bench(Path({film!r}))
pool.run([bench.task("Good")])
print(json.dumps([helper(pool), *children_of(helper(pool))]), flush=True)
try:
    pool.run([bench.task("Sleeper")])
except KeyboardInterrupt:
    print("interrupted", flush=True)
    pool.close()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_owner(hostile, kinds, end):
    """Even ones stuck in native code, however the owner ends."""
    code = textwrap.dedent(OWNER).format(
        paths=[str(ROOT), str(ROOT / "kernels")], hostile=hostile, film=str(kinds["h264"])
    )
    # what a shell starts in the background ignores SIGINT, and so do its children
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True, preexec_fn=listen
    )
    assert process.stdout is not None
    with process.stdout:
        pids = json.loads(process.stdout.readline())
        assert len(pids) == 2
        if end == signal.SIGINT:
            os.killpg(process.pid, end)  # as the terminal does: helper and worker get it, too
            assert process.stdout.readline() == b"interrupted\n"
        else:
            process.kill()
    process.wait(30)
    assert all(ended(pid) for pid in pids)


def test_a_helper_that_does_not_start(monkeypatch):
    monkeypatch.setattr(workers_module, "_BOOT", "raise SystemExit(1)")
    pool = WorkerPool(1, deadline_s=100, paths=("never",))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="doesn't start"):
            pool._take(wait=True)
    assert pool._alive == 0
    with pytest.raises(ValueError, match="needs a worker"):
        WorkerPool(0)


def test_shared_memory_without_memfd(monkeypatch):
    def refused(*_):
        raise OSError(1, "not permitted")

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "memfd_create", refused)
    descriptor, memory = shared_bytes(5000)
    other = map_bytes(descriptor, 5000)
    os.close(descriptor)
    memory[7] = 9
    assert other[7] == 9
    assert int(memory.sum()) == 9
    assert set(os.listdir("/proc/self/fd")) == before


def test_messages(kinds):
    import socket

    index = probe(kinds["h264 b-frames"])
    plan = plan_decode(index, [3, 9])
    one, other = socket.socketpair()
    with one, other:
        descriptor = os.open(os.devnull, os.O_RDONLY)
        send(one, {"plan": plan, "none": None, "map": {1: (2.5, "ü")}, "set": frozenset({"a"})}, [descriptor])
        message, descriptors = receive(other)
        for number in (descriptor, *descriptors):
            os.close(number)
        assert len(descriptors) == 1
        assert (message["none"], message["map"], message["set"]) == (None, {1: (2.5, "ü")}, frozenset({"a"}))
        back = message["plan"]
        assert back.frames == plan.frames
        for name in vars(index):
            if name not in ("ticks", "times", "packets"):
                assert getattr(back.index, name) == getattr(index, name)
        for mine, theirs in ((index, back.index), (index.packets, back.index.packets)):
            for name, value in vars(mine).items():
                if hasattr(value, "dtype"):
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(theirs, name))), name
                    assert value.dtype == getattr(theirs, name).dtype
        assert [s.packets.tolist() for s in back.segments] == [s.packets.tolist() for s in plan.segments]
        with pytest.raises(TypeError, match="can't be sent"):
            send(one, {"x": object()})
        one.close()
        with pytest.raises(EOFError):
            receive(other)
