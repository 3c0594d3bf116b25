"""The files of the embedding cache: damaged, stale and foreign ones, several writers, writers that die, full disks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import signal
import stat
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.model.embed_bench import VISION, cache, disk, key, same
from tests.video.folder_bench import in_child
from vrlt_fast.model import embed_store
from vrlt_fast.model.embed_store import FORMAT, DiskTier

TWO = (torch.arange(24.0).view(4, 6), torch.arange(20.0).to(torch.bfloat16).view(4, 5))


class Bench:
    """A folder, what tiers on it count, and the file of one entry."""

    def __init__(self, folder: Path):
        self.folder, self.counts, self.warnings = folder, Counter(), []
        self.tier = self.open()
        assert self.tier.put(key(0), TWO)
        self.file = folder / f"{key(0)}.safetensors"
        self.whole = self.file.read_bytes()

    def open(self, budget: int = 1 << 30, vision: str = VISION) -> DiskTier:
        def count(what: str) -> None:
            self.counts[what] += 1

        return disk(self.folder, budget, vision, warn=self.warnings.append, count=count)

    def dropped(self) -> int:
        return self.counts["damaged"] + self.counts["stale"]

    def is_dropped(self, content: bytes) -> None:
        """This content is found out, removed, and can be written anew."""
        before = self.dropped()
        self.file.write_bytes(content)
        assert self.tier.get(key(0)) is None
        assert self.dropped() == before + 1
        assert not self.file.exists()
        assert self.tier.nbytes == 0
        assert self.tier.put(key(0), TWO)
        assert self.file.read_bytes() == self.whole


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "embeds")


def test_the_file_is_safetensors(bench):
    with safe_open(bench.file, "pt") as file:
        assert same(tuple(file.get_tensor(str(n)) for n in range(2)), TWO)
        told = file.metadata()
    assert (told["format"], told["key"], told["vision"]) == (FORMAT, key(0), VISION)
    assert (len(bench.whole) - TWO[0].nbytes - TWO[1].nbytes) % 8 == 0
    assert same(bench.open().get(key(0)), TWO)


def test_cut_short_or_longer(bench):
    head = 8 + int.from_bytes(bench.whole[:8], "little")
    at = {0, 1, 7, 8, 9, head - 1, head, head + 1, head + 95, head + 96, head + 97, len(bench.whole) - 1}
    for length in at:
        bench.is_dropped(bench.whole[:length])
    bench.is_dropped(bench.whole + b"\0")
    bench.is_dropped(bench.whole[:head] + b"\0" * (len(bench.whole) - head))


def test_every_flipped_byte_is_found(bench, seed):
    draw = random.Random(seed)
    for at in range(len(bench.whole)):
        flipped = bytearray(bench.whole)
        flipped[at] ^= 1 << draw.randrange(8)
        bench.file.write_bytes(flipped)
        assert bench.tier.get(key(0)) is None
        assert not bench.file.exists()
    assert bench.dropped() == len(bench.whole)


def test_random_damage_is_found(bench, seed):
    draw = random.Random(seed)
    for _ in range(200):
        content = bytearray(bench.whole)
        start = draw.randrange(len(content))
        length = draw.randrange(1, 64)
        how = draw.choice(("random", "zeros", "moved", "lost"))
        if how == "random":
            content[start : start + length] = draw.randbytes(min(length, len(content) - start))
        elif how == "zeros":
            content[start : start + length] = bytes(min(length, len(content) - start))
        elif how == "moved":
            content = content[start:] + content[:start]
        else:
            del content[start : start + length]
        if content != bench.whole:
            bench.file.write_bytes(content)
            assert bench.tier.get(key(0)) is None


def with_header(change, bench: Bench) -> bytes:
    end = 8 + int.from_bytes(bench.whole[:8], "little")
    content = json.loads(bench.whole[8:end])
    text = change(content) or json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bench.whole[end:]


def setter(*path_and_value):
    *path, last, value = path_and_value

    def change(content):
        for step in path:
            content = content[step]
        content[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        setter("0", "shape", [6, 4]),
        setter("0", "shape", [24]),
        setter("0", "shape", [-4, -6]),
        setter("0", "shape", [4.0, 6]),
        setter("0", "shape", [True, 24]),
        setter("0", "shape", [1 << 40, 1 << 40]),
        setter("0", "shape", "46"),
        setter("0", "shape", 24),
        setter("0", "shape", None),
        setter("0", "shape", []),
        setter("0", "dtype", "I32"),
        setter("0", "dtype", ["F32"]),
        setter("1", "dtype", "F16"),
        setter("0", "data_offsets", [0, 95]),
        setter("0", "more", 1),
        setter("2", {"dtype": "F32", "shape": [1], "data_offsets": [136, 140]}),
        setter("1", {}),
        setter("__metadata__", []),
        setter("__metadata__", "vision", 3),
        setter("__metadata__", "vision", "another tower"),
        setter("__metadata__", "format", "vrlt-embeds-0"),
        setter("__metadata__", "digest", "0" * 32),
        setter("__metadata__", "digest", "\ud800"),
        setter("__metadata__", "key", key(1)),
        lambda content: content.pop("__metadata__") and None,
        lambda content: content.pop("1") and None,
        lambda content: b"[" * 60000,
        lambda content: b'{"__metadata__":' * 3000,
        lambda content: b"9" * 5000,
        lambda content: b"[]",
        lambda content: b"null",
        lambda content: b"\xff\xfe",
        lambda content: b" " + json.dumps(content).encode(),
        lambda content: b" " * 70000,
    ],
)
def test_hostile_headers(bench, change):
    bench.is_dropped(with_header(change, bench))


@pytest.mark.parametrize("length", [0, 1 << 31, (1 << 64) - 1])
def test_header_lengths_that_are_not(bench, length):
    bench.is_dropped(length.to_bytes(8, "little") + bench.whole[8:])


def test_swapped_files(bench):
    other = (torch.ones(4, 6), torch.ones(4, 5, dtype=torch.bfloat16))
    bench.tier.put(key(1), other)
    second = bench.folder / f"{key(1)}.safetensors"
    second.rename(bench.folder / "aside")
    bench.file.rename(second)
    (bench.folder / "aside").rename(bench.file)
    assert bench.tier.get(key(0)) is None
    assert bench.tier.get(key(1)) is None
    assert bench.counts["damaged"] == 2


def foreign(path: Path, what: str) -> None:
    if what == "directory":
        path.mkdir()
        (path / "file").write_text("x")
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "link":
        (path.parent.parent / "target").write_bytes(b"precious")
        path.symlink_to(path.parent.parent / "target")
    elif what == "dangling":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("what", ["directory", "fifo", "link", "dangling", "empty"])
def test_something_else_under_the_name(bench, what):
    bench.file.unlink()
    foreign(bench.file, what)
    assert bench.tier.get(key(0)) is None
    assert bench.counts["damaged"] == 1
    written = bench.tier.put(key(0), TWO)
    assert written == (what != "directory")
    assert written == (bench.tier.get(key(0)) is not None)
    assert bench.tier.put(key(1), TWO)
    assert not bench.warnings
    assert not list(bench.folder.glob(".*.tmp"))
    assert what != "link" or (bench.folder.parent / "target").read_bytes() == b"precious"


def test_a_file_that_cannot_be_opened_is_a_miss(bench, monkeypatch):
    opened = os.open

    def refuse(path, *args, **options):
        if str(path).endswith("safetensors"):
            raise PermissionError(errno.EACCES, "denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert bench.tier.get(key(0)) is None
    monkeypatch.undo()
    assert same(bench.tier.get(key(0)), TWO)
    assert not bench.dropped()


def test_bad_sectors(bench, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr(os, "preadv", fail)
    assert bench.tier.get(key(0)) is None
    monkeypatch.undo()
    assert bench.counts["damaged"] == 1
    assert not bench.file.exists()


def test_another_tower_or_format_is_stale(bench, monkeypatch):
    assert bench.open(vision="other").get(key(0)) is None
    assert bench.counts["stale"] == 1
    bench.tier.put(key(0), TWO)
    monkeypatch.setattr(embed_store, "FORMAT", "vrlt-embeds-2")
    assert bench.tier.get(key(0)) is None
    assert bench.counts["stale"] == 2
    assert bench.counts["damaged"] == 0


def test_evicted_or_removed_by_others(bench):
    other = bench.open()
    bench.file.unlink()
    assert bench.tier.get(key(0)) is None
    assert bench.tier.put(key(0), TWO)
    assert same(other.get(key(0)), TWO)
    for file in bench.folder.iterdir():
        file.unlink()
    bench.folder.rmdir()
    assert bench.tier.get(key(0)) is None
    assert not bench.tier.put(key(0), TWO)
    assert not bench.tier.put(key(1), TWO)
    assert len(bench.warnings) == 1


def test_what_another_process_uses_is_not_evicted(bench):
    size = len(bench.whole)
    first, second = bench.open(3 * size), bench.open(3 * size)
    for number in (1, 2):
        first.put(key(number), TWO)
    second.get(key(0))
    first.put(key(3), TWO)
    assert [n for n in range(4) if first.get(key(n)) is not None] == [0, 2, 3]


def test_a_smaller_budget_trims(bench):
    for number in (1, 2, 3):
        bench.tier.put(key(number), TWO)
    bench.tier.get(key(0))
    (bench.folder / "README").write_text("not ours")
    smaller = bench.open(2 * len(bench.whole) + 1)
    assert [n for n in range(4) if smaller.get(key(n)) is not None] == [0, 3]
    assert (bench.folder / "README").exists()


def test_a_nearly_full_disk_is_left_alone(bench):
    tier = bench.open()
    tier.min_free = 1 << 62
    assert not tier.put(key(1), TWO)
    assert tier.writable
    assert not bench.warnings


@pytest.mark.parametrize("after", [0, 100, 400])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_full_disk(bench, monkeypatch, code, after):
    write, left = os.write, [after]

    def limited(file, content):
        size = min(left[0], len(content))
        if size == 0:
            raise OSError(code, os.strerror(code))
        left[0] -= size
        return write(file, content[:size])

    monkeypatch.setattr(os, "write", limited)
    for number in (1, 2):
        assert not bench.tier.put(key(number), TWO)
    monkeypatch.undo()
    assert len(bench.warnings) == 1
    assert bench.counts["unwritten"] == 1
    assert same(bench.tier.get(key(0)), TWO)
    assert sorted(p.name for p in bench.folder.iterdir()) == [".lock", bench.file.name]


def test_a_real_limit(bench):
    def body():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        assert not bench.tier.put(key(1), (torch.ones(100, 100),))
        assert len(bench.warnings) == 1
        assert same(bench.tier.get(key(0)), TWO)

    assert in_child(body) == 0
    assert len(list(bench.folder.iterdir())) == 2


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_no_folder(tmp_path, place):
    (tmp_path / "file").write_text("x")
    warnings = []
    with cache(host=1 << 20, files=1 << 20, folder=tmp_path / place, warn=warnings.append) as made:
        made.put(key(0), TWO)
        assert same(made.get(key(0)), TWO)
        assert made.get(key(1)) is None
    assert len(warnings) == 1


def test_a_folder_that_another_process_keeps_locked(bench, monkeypatch):
    monkeypatch.setattr(embed_store, "LOCK_S", 0.01)
    with (bench.folder / ".lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not bench.tier.put(key(1), TWO)
        assert same(bench.tier.get(key(0)), TWO)
    assert bench.tier.put(key(1), TWO)
    assert not bench.warnings
    assert bench.counts["unwritten"] == 1


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"garbage of some length"])
def test_any_content_of_the_lock(bench, content):
    (bench.folder / ".lock").write_bytes(content)
    assert bench.tier.put(key(1), TWO)
    assert same(bench.open().get(key(1)), TWO)


def test_files_are_plain(bench):
    assert stat.S_ISREG(bench.file.stat().st_mode)
    assert not bench.file.stat().st_mode & 0o111
