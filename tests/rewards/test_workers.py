"""Calls that hang, crash, print and fork: each costs itself alone, and nothing outlives its pool or its parent."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vrlt_fast.rewards import workers
from vrlt_fast.rewards.workers import KillablePool

ROOT = Path(__file__).resolve().parents[2]
HANDLERS = """
import ctypes, os, subprocess, sys, time

def plain(setup):
    def call(item):
        what, value = item
        if what == "hang":
            if value:
                with open(value, "a") as file:
                    file.write("x")
            time.sleep(60)
        if what == "hold":  # hangs with the interpreter's lock in its hands
            ctypes.PyDLL(None).sleep(60)
        if what == "segv":
            os.kill(os.getpid(), 11)
        if what == "exit":
            os._exit(3)
        if what == "kill":
            os.kill(os.getpid(), 9)
        if what == "quit":
            sys.exit(4)
        if what == "raise":
            raise ValueError("no\\nway")
        if what == "object":
            return object()
        if what == "print":
            print("from the worker", flush=True)
            os.system("echo from its child")
        if what == "child":
            return [os.getpid(), subprocess.Popen(["sleep", "60"]).pid]
        if what == "garbage":
            for number in range(3, 5000):
                try:
                    os.write(number, bytes(8) + b"x")
                except OSError:
                    pass
        return [setup, value]
    return call

def unfit(setup):
    raise RuntimeError("can't be made")

def dead(setup):
    os._exit(7)

def stuck(setup):
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "handlers_of_a_test.py").write_text(HANDLERS, encoding="utf-8")
    return str(tmp_path)


@pytest.fixture
def pool_of(folder):
    pools = []

    def make(name="plain", **options):
        options = {"deadline_s": 20.0, "paths": [folder], **options}
        pools.append(KillablePool(f"handlers_of_a_test:{name}", "set up", **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def gone(pid: int) -> bool:
    """Whether a process has ended, or does so within a few seconds."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.005)
    return False


def test_values_come_back_in_order(pool_of):
    values = [*range(40), "text \ud800 \u0663", [1.5, None, {"a": True}], -math.inf, "x" * 3_000_000]
    found = pool_of(workers=2).run([["", value] for value in values])
    assert [one.kind for one in found] == [""] * len(values)
    assert [one.value for one in found] == [["set up", value] for value in values]
    assert pool_of().run([]) == []


def test_only_the_culprit_is_lost(pool_of):
    whats = ["", "exit", "segv", "", "raise", "kill", "quit", "object", "garbage", ""]
    found = pool_of().run([[what, i] for i, what in enumerate(whats)])
    assert [one.kind for one in found] == [
        "", "crash", "crash", "", "exception", "crash", "exception", "exception", "crash", "",
    ]  # fmt: skip
    assert [one.value for one in found if not one.kind] == [["set up", 0], ["set up", 3], ["set up", 9]]
    assert "status 3" in found[1].detail
    assert "signal 11" in found[2].detail
    assert found[4].detail.startswith("ValueError: no way (")
    assert "handlers_of_a_test.py:" in found[4].detail
    assert "memory" in found[5].detail
    assert "SystemExit: 4" in found[6].detail


@pytest.mark.parametrize("what", ["hang", "hold"])
def test_what_hangs_is_killed(pool_of, what):
    pool = pool_of(deadline_s=0.2)
    begin = time.monotonic()
    found = pool.run([["", 1], [what, 0], ["", 3]])
    assert time.monotonic() - begin < 20
    assert [one.kind for one in found] == ["", "timeout", ""]
    assert "0.2 s" in found[1].detail


def test_what_hangs_always_is_not_waited_for_each_time(pool_of, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 3)
    pool = pool_of(deadline_s=0.1)
    found = pool.run([["hang", str(tmp_path / "tried")]] * 300)
    assert [one.kind for one in found] == ["timeout"] * 300
    assert (tmp_path / "tried").read_text() == "xxx"
    assert [one.kind for one in pool.run([["hang", str(tmp_path / "tried")]] * 5)] == ["timeout"] * 5
    assert (tmp_path / "tried").read_text() == "xxxx"
    pool.deadline_s = 20.0
    assert pool.run([["", 1]])[0].value == ["set up", 1]


def test_the_deadline_is_an_items_own(pool_of, monkeypatch):
    """Late ones that aren't in a row don't end the batch."""
    monkeypatch.setattr(workers, "PATIENCE", 2)
    found = pool_of(deadline_s=0.2).run([["hang", 0], ["", 1], ["hang", 0], ["", 3]])
    assert [one.kind for one in found] == ["timeout", "", "timeout", ""]


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("unfit", "crash", "RuntimeError: can't be made"),
        ("dead", "crash", "status 7"),
        ("stuck", "timeout", "start within 0.2 s"),
        ("missing", "crash", "AttributeError"),
    ],
)
def test_a_handler_that_is_never_there(pool_of, name, kind, text):
    pool = pool_of(name, start_s=0.2 if name == "stuck" else 60.0)
    found = pool.run([["", i] for i in range(100)])
    assert {one.kind for one in found} == {kind}
    assert text in found[0].detail
    assert text in found[99].detail
    started = pool.start()
    assert started.kind == kind
    assert text in started.detail


def test_start_says_whether_it_works(pool_of):
    pool = pool_of()
    assert pool.start().kind == pool.start().kind == ""
    assert pool.run([["", 1]])[0].value == ["set up", 1]


def test_an_idle_process_that_died_costs_nothing(pool_of):
    pool = pool_of()
    pid, child = pool.run([["child", 0]])[0].value
    os.kill(pid, signal.SIGKILL)
    assert gone(child)
    assert pool.run([["", 1]])[0].value == ["set up", 1]


def test_nothing_outlives_the_pool(pool_of):
    pool = pool_of()
    pids = pool.run([["child", 0]])[0].value
    pool.close()
    assert [gone(pid) for pid in pids] == [True, True]
    assert pool.run([["", 1]])[0].value == ["set up", 1]


PARENT = """
import json, sys, time
from vrlt_fast.rewards.workers import KillablePool
pool = KillablePool("handlers_of_a_test:plain", None, deadline_s=60.0, paths=[sys.argv[1]])
pool.run([["print", 0]])
print(json.dumps(pool.run([["child", 0]])[0].value), flush=True)
if sys.argv[2] == "busy":
    pool.run([["hold", 0]])
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_nothing_outlives_the_parent(folder, state):
    """Even where the worker holds the interpreter's lock. What it prints doesn't come out of the parent's stdout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARENT, folder, state]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        pids = json.loads(parent.stdout.readline())
        parent.kill()
        assert [gone(pid) for pid in pids] == [True, True]
        assert parent.stderr.read().splitlines()[:2] == ["from the worker", "from its child"]


def test_forks_of_the_parent_keep_their_hands_off(pool_of):
    pool = pool_of()
    pids = pool.run([["child", 0]])[0].value
    fork = os.fork()
    if fork == 0:
        try:
            pool.close()
            pool.run([["", 1]])
        except RuntimeError:
            os._exit(5)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 5
    assert pool.run([["", 2]])[0].value == ["set up", 2]
    assert Path(f"/proc/{pids[0]}").exists()


def test_a_pool_needs_a_worker():
    with pytest.raises(ValueError, match="needs a worker"):
        KillablePool("a:b", deadline_s=1.0, workers=0)
