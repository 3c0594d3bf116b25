"""A folder of embeddings with several users, and users that are killed."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import signal
import time
from collections import Counter

import torch

from tests.model.embed_bench import disk, entry, key, same
from tests.video.folder_bench import in_child


def test_several_processes(tmp_path, seed):
    budget, folder = 20000, tmp_path / "embeds"

    def only_evicted(what: str) -> None:
        assert what == "evicted_disk"

    def user(number: int) -> None:
        draw, tier = random.Random(seed + number), disk(folder, budget, count=only_evicted)
        for _ in range(250):
            at = draw.randrange(12)
            found = tier.get(key(at))
            assert found is None or same(found, entry(at))
            if found is None:
                tier.put(key(at), entry(at))

    disk(folder, budget).close()
    users = [multiprocessing.get_context("fork").Process(target=in_child_or_die, args=(user, n)) for n in range(3)]
    for process in users:
        process.start()
    while any(process.is_alive() for process in users):
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert sum(p.stat().st_size for p in folder.iterdir() if p.name != ".lock") <= budget
        time.sleep(0.01)
    assert [process.exitcode for process in users] == [0, 0, 0]
    assert {p.name for p in folder.glob(".*")} == {".lock"}
    last = disk(folder, budget)
    assert 0 < last.nbytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def in_child_or_die(body, *args) -> None:
    os._exit(in_child(body, *args))


def test_killed_while_writing(tmp_path, seed):
    draw, folder, counts = random.Random(seed), tmp_path / "embeds", Counter()

    def write():
        torch.set_num_threads(1)
        tier = disk(folder)
        for number in range(10**6):
            tier.put(key(number % 50), entry(number % 50, 2000))
            (folder / f"{key(number % 50)}.safetensors").unlink()

    seen = 0
    for _ in range(8):
        process = multiprocessing.get_context("fork").Process(target=write)
        process.start()
        while process.is_alive() and not list(folder.glob(".*.tmp")):
            pass
        time.sleep(draw.random() * 0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        seen += bool(list(folder.glob(".*.tmp")))
        tier = disk(folder, count=lambda what: counts.update([what]))
        assert not list(folder.glob(".*.tmp"))
        for number in range(50):
            found = tier.get(key(number))
            assert found is None or same(found, entry(number, 2000))
        assert tier.nbytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        tier.close()
    assert seen
    assert not counts
