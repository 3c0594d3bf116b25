"""A cache folder with several users, users that are killed, and disks that fail."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch

from tests.video.folder_bench import Bench, in_child, patches, put, run
from vrlt_fast.video.store.eviction import hint

NEWNS, NEWUSER, READ_ONLY, REMOUNT = 0x20000, 0x10000000, 1, 32


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "cache")


def killed_while_writing(bench: Bench, seed: int) -> None:
    of = run(1, tubelets=2000)
    content = patches(of, seed)
    process = multiprocessing.get_context("fork").Process(target=lambda: put(bench.open(), of, content))
    process.start()
    while process.is_alive() and not any(p.stat().st_size for p in bench.asides()):
        pass  # it has begun to write
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_kill_while_writing_leaves_nothing(bench, seed):
    killed_while_writing(bench, seed)
    assert len(bench.asides()) == 1
    assert not bench.entries()
    store = bench.open()
    assert store.find(run(1, tubelets=2000)) is None
    assert not bench.asides()
    assert store.nbytes == 0


def test_a_writer_takes_over_what_a_killed_one_left(bench, seed):
    store = bench.open()
    killed_while_writing(bench, seed)
    of = run(1, tubelets=2000)
    assert put(store, of, patches(of, seed))
    assert torch.equal(bench.open().find(of), patches(of, seed))
    assert not bench.asides()


def test_opening_a_folder_does_not_disturb_a_writer(bench, seed):
    store, of = bench.open(), run(1)
    with store.claim(of, 0.0) as claim:
        other = bench.open()
        with other.claim(of, 0.0) as second:
            assert second is None
        assert store.publish(claim, of, hint("v"), patches(of, seed))
    assert torch.equal(other.find(of), patches(of, seed))


def test_a_claim_waits_for_the_other_one(bench, seed):
    store, of = bench.open(), run(1)
    seen = []

    def second():
        with bench.open().claim(of, 30.0) as claim:
            seen.append((claim is not None, bench.open().find(of) is not None))

    thread = threading.Thread(target=second)
    with store.claim(of, 0.0) as claim:
        thread.start()
        assert store.publish(claim, of, hint("v"), patches(of, seed))
    thread.join(30)
    assert seen == [(True, True)]
    assert not bench.asides()


def test_the_last_to_leave_empties_the_folder(bench, seed):
    first, second = bench.open(keep=False), bench.open(keep=False)
    put(first, run(1), patches(run(1), seed))
    held = second.find(run(1))
    first.close()
    assert len(bench.entries()) == 1
    assert in_child(second.close) == 0  # a fork isn't a user
    assert len(bench.entries()) == 1
    second.close()
    assert not bench.entries()
    assert torch.equal(held, patches(run(1), seed))
    kept = bench.open(keep=True)
    put(kept, run(1), patches(run(1), seed))
    kept.close()
    assert len(bench.entries()) == 1


def full(bench: Bench, seed: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    store = bench.open()
    for number in range(3):
        assert store.worth(run(number), hint("v")) == (number == 0)
        assert not put(store, run(number), patches(run(number), seed))
    assert len(bench.warnings) == 1
    assert bench.counts == {"unwritten": 1}


def test_a_write_that_fails_leaves_nothing_and_warns_once(bench, seed):
    assert in_child(full, bench, seed) == 0
    assert not bench.entries()
    assert not bench.asides()


def small_disk(bench: Bench, seed: int, skipped: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    folder = os.fsencode(bench.folder)
    bench.folder.mkdir()
    if (libc.unshare(NEWNS) and libc.unshare(NEWNS | NEWUSER)) or libc.mount(
        b"none", folder, b"tmpfs", 0, b"size=400k,mode=777"
    ):
        skipped.touch()
        return
    store = bench.open()
    found = [put(store, run(number), patches(run(number), seed)) for number in range(8)]
    assert 0 < sum(found) < 8
    assert len(bench.entries()) == sum(found)
    assert not bench.asides()
    assert len(bench.warnings) <= 1
    held = [number for number, written in enumerate(found) if written]
    store.close()
    assert libc.mount(b"none", folder, None, REMOUNT | READ_ONLY, None) == 0
    bench.warnings.clear()
    store = bench.open()
    assert all(torch.equal(store.find(run(n)), patches(run(n), seed)) for n in held)
    assert not put(store, run(9), patches(run(9), seed))
    assert len(bench.warnings) == 1


def test_a_small_and_a_read_only_disk(bench, tmp_path, seed):
    skipped = tmp_path / "skipped"
    assert in_child(small_disk, bench, seed, skipped) == 0
    if skipped.exists():
        pytest.skip("needs a mount namespace of its own")


def short_of_files(bench: Bench, seed: int) -> None:
    store = bench.open()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    assert store.find(run(1)) is None


def test_a_process_short_of_resources_spoils_nothing(bench, seed):
    put(bench.open(), run(1), patches(run(1), seed))
    assert in_child(short_of_files, bench, seed) == 0
    assert torch.equal(bench.open().find(run(1)), patches(run(1), seed))


def denied(bench: Bench, seed: int) -> None:
    if os.geteuid() == 0:
        os.setresuid(65534, 65534, 65534)
    store = bench.open()
    assert store.find(run(1)) is None
    assert not put(store, run(1), patches(run(1), seed))
    assert len(bench.warnings) == 1


def test_permission_denied(bench, seed):
    bench.folder.mkdir(mode=0o500)
    assert in_child(denied, bench, seed) == 0
    bench.folder.chmod(0o700)


def test_a_folder_that_cannot_be(bench, seed):
    bench.folder.write_text("a file")
    store = bench.open()
    assert store.find(run(1)) is None
    assert not put(store, run(1), patches(run(1), seed))
    assert store.nbytes == 0
    store.close()
    assert len(bench.warnings) == 1
