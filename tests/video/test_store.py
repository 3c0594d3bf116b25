"""A cache folder: entries byte by byte, damage, hostile content, budgets."""

from __future__ import annotations

import os
import random
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.video.folder_bench import Bench, patches, put, run
from vrlt_fast.video.store.entry import BLOCK, MAGIC, SCHEMA, Damaged, Run, checksums, file_size, preamble, read_head
from vrlt_fast.video.store.eviction import Horizon, hint


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "cache")


def test_what_is_written_is_found(bench, seed):
    of, store = run(1), bench.open()
    content = patches(of, seed)
    assert store.find(of) is None
    assert put(store, of, content)
    for found in (store.find(of), bench.open().find(of)):
        assert torch.equal(found, content)
    (path,) = bench.entries()
    assert path.stat().st_size == file_size(of)
    assert path.read_bytes()[-of.nbytes :] == content.numpy().tobytes()
    assert not bench.asides()
    # other names, other patches
    assert store.find(run(2)) is None
    assert store.find(run(1, tubelets=2)) is None
    assert (bench.counts, bench.warnings) == ({}, [])


def test_a_reader_cannot_change_an_entry(bench, seed):
    of, store = run(1), bench.open()
    put(store, of, patches(of, seed))
    before = bench.entries()[0].read_bytes()
    store.find(of).fill_(7)
    assert bench.entries()[0].read_bytes() == before


def test_tubelets_of_other_runs(bench, seed):
    of, store = run(1, tubelets=5), bench.open()
    content = patches(of, seed)
    put(store, of, content)
    part = of.part([4, 2])
    assert store.find(part) is None
    found = store.tubelets(Run(of.base, (*part.ticks, (1000, 1001)), of.height, of.width, of.row))
    assert set(found) == set(part.ticks)
    cells = content.view(5, -1, of.row)
    assert all(torch.equal(found[of.ticks[i]], cells[i]) for i in (2, 4))
    assert store.tubelets(Run(of.base, part.ticks, of.width, of.height, of.row)) == {}


def flip(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_every_flipped_bit_is_found_and_costs_the_entry_only(bench, seed):
    of, rng = run(1), random.Random(seed)
    content = patches(of, seed)
    offset = file_size(of) - of.nbytes
    places = [0, BLOCK - 1, BLOCK, offset - 1, offset, file_size(of) - 1]
    places += [rng.randrange(size) for size in (BLOCK, offset) for _ in range(10)]
    places += [rng.randrange(offset, file_size(of)) for _ in range(30)]
    for number, at in enumerate(places, 1):
        assert put(bench.open(), of, content)
        flip(bench.entries()[0], at, rng.randrange(8))
        assert bench.open().find(of) is None, at
        assert bench.counts["damaged"] == number, at
        assert not bench.entries()
    assert put(bench.open(), of, content)
    assert torch.equal(bench.open().find(of), content)


def test_damage_behind_the_first_checksum(bench, seed):
    of = run(1, tubelets=60)  # four MiB
    assert put(bench.open(), of, patches(of, seed))
    for at in random.Random(seed).sample(range(of.nbytes), 8):
        flip(bench.entries()[0], file_size(of) - of.nbytes + at, 0)
        assert bench.open().find(of) is None
        assert put(bench.open(), of, patches(of, seed))


@pytest.mark.parametrize("change", ["short", "long", "empty", "schema", "magic", "renamed"])
def test_files_of_another_make(bench, seed, change):
    of = run(1)
    put(bench.open(), of, patches(of, seed))
    (path,) = bench.entries()
    content = path.read_bytes()
    wanted = of
    if change == "renamed":  # the entry of another run under this name
        wanted = run(2)
        (bench.folder / wanted.name[:2]).mkdir(exist_ok=True)
        path.rename(bench.folder / wanted.name[:2] / f"{wanted.name}-{hint('v')}.vrlt")
    elif change in ("schema", "magic"):
        head = bytearray(content[: BLOCK - 4])
        at, new = (8, struct.pack("<I", SCHEMA + 1)) if change == "schema" else (0, b"OTHER")
        head[at : at + len(new)] = new
        path.write_bytes(bytes(head) + struct.pack("<I", zlib.crc32(head)) + content[BLOCK:])
    else:
        path.write_bytes({"short": content[:-1], "long": content + b"\0", "empty": b""}[change])
    store = bench.open()
    assert store.find(wanted) is None
    assert bench.counts == {"damaged": 1}
    assert put(store, wanted, patches(wanted, seed))
    assert torch.equal(store.find(wanted), patches(wanted, seed))


def test_forged_headers_are_refused_without_reading_far(tmp_path, seed):
    rng = random.Random(seed)
    path = tmp_path / "entry"
    for number in range(200):
        count, height, width, row = (rng.choice([0, 1, 3, 1 << 16, (1 << 32) - 1]) for _ in range(4))
        nbytes = count * height * width * row % (1 << 63) if number % 2 else rng.randrange(1 << 62)
        head = struct.pack("<8sIIIIIQQ16sI", MAGIC, SCHEMA, count, height, width, row, BLOCK * 2, nbytes, bytes(16), 0)
        head = head.ljust(BLOCK - 4, b"\0")
        path.write_bytes(head + struct.pack("<I", zlib.crc32(head)))
        os.truncate(path, min(2 * BLOCK + nbytes, 1 << 40))  # sparse
        file = os.open(path, os.O_RDONLY)
        with pytest.raises(Damaged):
            read_head(file)
        os.close(file)


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "socket", "folder", "full folder"])
def test_what_is_no_file_is_moved_away(bench, tmp_path, seed, kind):
    of = run(1)
    content = patches(of, seed)
    good = tmp_path / "good"
    good.write_bytes(preamble(of, content) + content.numpy().tobytes())
    bench.open()
    path = bench.folder / of.name[:2] / f"{of.name}-{hint('v')}.vrlt"
    path.parent.mkdir()
    if kind in ("link", "dangling"):
        path.symlink_to(good if kind == "link" else tmp_path / "nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(tmp_path / "s"))  # the whole path is longer than a socket's may be
            (tmp_path / "s").rename(path)
    else:
        path.mkdir()
        if kind == "full folder":
            (path / "treasure").write_text("x")
    store = bench.open()
    assert store.find(of) is None
    assert bench.counts == {"damaged": 1}
    assert put(store, of, content)
    assert torch.equal(bench.open().find(of), content)
    assert good.exists()
    # the quarantine is emptied to make room, but never of folders
    tight = bench.open(budget=int(1.5 * file_size(of)))
    assert not put(tight, run(2), patches(of, seed))
    assert [p.name for p in bench.folder.glob("quarantine/*/*")] == (["treasure"] if kind == "full folder" else [])


def test_nothing_is_written_or_removed_outside(bench, tmp_path, seed):
    of = run(1)
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / f"{of.name}-{hint('v')}.vrlt"
    victim.write_text("x")
    bench.open()
    (bench.folder / of.name[:2]).symlink_to(outside)
    (bench.folder / "quarantine").symlink_to(outside)
    store = bench.open()
    assert store.find(of) is None
    assert not put(store, of, patches(of, seed))
    assert [p.name for p in outside.iterdir()] == [victim.name]
    assert len(bench.warnings) == 1


def test_a_link_in_place_of_the_file_being_written(bench, tmp_path, seed):
    of, store = run(1), bench.open()
    target = tmp_path / "target"
    target.write_text("precious")
    (bench.folder / of.name[:2]).mkdir()
    (bench.folder / of.name[:2] / f".{of.name}.tmp").symlink_to(target)
    assert not put(store, of, patches(of, seed))
    assert target.read_text() == "precious"


def test_foreign_files_are_left_alone(bench, seed):
    bench.folder.mkdir()
    names = ["notes.txt", "00/notes.txt", "zz/file", "00/.hidden", f"00/{'0' * 64}-{'0' * 16}.vrlt.bak"]
    for name in names:
        (bench.folder / name).parent.mkdir(exist_ok=True)
        (bench.folder / name).write_bytes(bytes(1000))
    size = file_size(run(1))
    store = bench.open(budget=size)
    assert put(store, run(1), patches(run(1), seed))
    assert store.nbytes == size
    assert all((bench.folder / name).stat().st_size == 1000 for name in names)


def test_the_budget_is_kept_at_every_step(bench, seed):
    size, rng = file_size(run(1)), random.Random(seed)
    horizon = Horizon()
    order = [f"{rng.randrange(12)}" for _ in range(60)]
    horizon.expect(order)
    stores = [bench.open(budget=4 * size + 100, horizon=horizon) for _ in range(2)]
    for path in order:
        horizon.used(hint(path), size)
        store = rng.choice(stores)
        if store.find(run(int(path))) is None:
            put(store, run(int(path)), patches(run(1), seed), path)
        assert sum(p.stat().st_size for p in bench.entries()) <= 4 * size + 100
    assert bench.counts["evicted"] > 0
    bench.open(budget=2 * size)
    assert len(bench.entries()) == 2


def test_a_mapping_outlives_its_entry(bench, seed):
    store = bench.open(budget=file_size(run(1)))
    put(store, run(1), patches(run(1), seed), "a")
    held = store.find(run(1))
    store._horizon.expect(["b"])
    assert put(store, run(2), patches(run(2), seed + 1), "b")
    assert store.find(run(2)) is not None
    assert len(bench.entries()) == 1
    assert torch.equal(held, patches(run(1), seed))


def test_disk_space_that_stays_free(bench, seed):
    space = os.statvfs(bench.folder.parent)
    store = bench.open(min_free=space.f_blocks * space.f_frsize)
    assert not store.worth(run(1), hint("v"))
    assert not put(store, run(1), patches(run(1), seed))
    assert not bench.entries()


def test_checksums_tell_order_zeros_and_lengths(seed):
    rng = np.random.default_rng(seed)
    content = torch.from_numpy(rng.integers(0, 256, 1_000_003, dtype=np.uint8))
    reference = checksums(content)
    for change in ("swap words", "swap pages", "zero page", "tail"):
        other = content.clone()
        if change == "swap words":
            other[:8], other[80:88] = content[80:88], content[:8]
        elif change == "swap pages":
            other[:4096], other[8192:12288] = content[8192:12288], content[:4096]
        elif change == "zero page":
            other[40960:45056] = 0
        else:
            other[-1] ^= 128
        assert not np.array_equal(checksums(other), reference), change
    assert len(checksums(torch.zeros((1 << 20) + 1, dtype=torch.uint8))) == 2
