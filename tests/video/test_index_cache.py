"""The on-disk cache of indices and hashes: hits, changed files, damage, races, folders that can't be used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from vrlt_fast.errors import VideoError
from vrlt_fast.video.index import VideoIndex, probe
from vrlt_fast.video.index_cache import IndexCache, content_hash


def cache(folder: Path | None) -> IndexCache:
    """The films of a test are younger than the age at which they would be trusted."""
    return IndexCache(folder, settle_s=0)


def assert_same(a: VideoIndex, b: VideoIndex) -> None:
    for field in dataclasses.fields(VideoIndex):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name == "packets":
            for part in dataclasses.fields(left):
                np.testing.assert_array_equal(getattr(left, part.name), getattr(right, part.name))
                assert getattr(left, part.name).dtype == getattr(right, part.name).dtype
        elif isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left, right)
            assert left.dtype == right.dtype
        else:
            assert left == right
            assert type(left) is type(right)


def test_the_cached_index_is_the_index(kinds, good_kind, tmp_path):
    path = kinds[good_kind]
    first = cache(tmp_path)
    fresh = first.probe(path)
    second = cache(tmp_path)
    assert_same(second.probe(path), fresh)
    assert_same(fresh, probe(path))
    assert (first.probed, first.hits, first.hashed) == (1, 0, 1)
    assert (second.probed, second.hits, second.hashed, second.replaced) == (0, 1, 0, 0)


def test_a_copy_is_a_hit_under_its_own_path(studio, tmp_path):
    path = studio.film("a.mp4", options={"bf": "2"})
    copy = studio.text("copy.mp4", path.read_bytes())
    indices = cache(tmp_path / "new" / "folder")
    indices.probe(path)
    assert indices.probe(copy).path == copy
    assert (indices.probed, indices.hits, indices.hashed) == (1, 1, 2)


def test_changed_bytes_are_seen_though_size_and_mtime_are_the_old_ones(studio, tmp_path):
    path = studio.film("a.mp4", count=6)
    content = path.read_bytes()
    os.utime(path, ns=(10**18, 10**18))
    indices = cache(tmp_path)
    old = indices.content_hash(path)
    assert old == content_hash(path) == hashlib.sha256(content).hexdigest()
    changed = bytearray(content)
    changed[-1] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(10**18, 10**18))
    assert path.stat().st_size == len(content)
    # the change time is the only one that tells, unless the clock of the file system has not moved meanwhile
    careful = IndexCache(tmp_path, settle_s=60)
    for _ in range(2):
        assert careful.content_hash(path) == content_hash(path) == hashlib.sha256(changed).hexdigest() != old
    assert careful.hashed == 2  # and a file that young isn't remembered at all


def test_damaged_and_foreign_entries_are_made_again(studio, tmp_path, seed):
    path, rng = studio.film("a.mp4", options={"bf": "2"}), random.Random(seed)
    fresh = cache(tmp_path / "c").probe(path)
    entries = sorted((tmp_path / "c").iterdir())
    assert len(entries) == 2
    for entry in entries:
        sound = entry.read_bytes()
        flipped = bytearray(sound)
        flipped[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        index = entry.suffix == ".index"
        for content in (b"", b"\xff" * 64, sound[: len(sound) // 2], sound[:-1], b"{}", bytes(flipped)):
            entry.write_bytes(content)
            again = cache(tmp_path / "c")
            assert_same(again.probe(path), fresh)
            assert again.replaced == 1
            assert (again.probed, again.hashed) == ((1, 0) if index else (0, 1))
            assert cache(tmp_path / "c").probe(path).n_frames == fresh.n_frames
            entry.write_bytes(sound)


def test_an_entry_of_another_schema_is_not_used(studio, tmp_path):
    from safetensors.numpy import load, save

    from vrlt_fast.video.index_cache import _digest

    path = studio.film("a.mp4")
    cache(tmp_path / "c").probe(path)
    (entry,) = (tmp_path / "c").glob("*.index")
    content = entry.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    about = json.dumps({**json.loads(metadata["index"]), "schema": 999})
    arrays = load(content)
    entry.write_bytes(save(arrays, metadata={"index": about, "digest": _digest(about, arrays)}))
    again = cache(tmp_path / "c")
    assert again.probe(path).n_frames == 24
    assert (again.probed, again.replaced) == (1, 1)


def test_what_stands_in_place_of_entries_is_neither_read_nor_followed(studio, tmp_path, caplog):
    path = studio.film("a.mp4")
    folder = tmp_path / "c"
    cache(folder).probe(path)
    for entry in sorted(folder.iterdir()):
        content = entry.read_bytes()
        for kind in ("folder", "pipe", "link", "endless"):
            entry.unlink()
            elsewhere = tmp_path / "elsewhere"
            elsewhere.write_bytes(content)
            if kind == "folder":
                entry.mkdir()
            elif kind == "pipe":
                os.mkfifo(entry)
            else:
                entry.symlink_to("/dev/zero" if kind == "endless" else elsewhere)
            assert cache(folder).probe(path).n_frames == 24
            assert elsewhere.read_bytes() == content
            if kind == "folder":
                entry.rmdir()
                entry.write_bytes(content)


@pytest.mark.parametrize("place", ["a file", "below a file", "read only"])
def test_a_folder_that_cannot_be_used_costs_one_warning(studio, tmp_path, caplog, place):
    path = studio.film("a.mp4")
    (tmp_path / "file").write_bytes(b"")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "read only": Path("/proc/none")}[
        place
    ]
    indices = cache(folder)
    for _ in range(3):
        assert indices.probe(path).n_frames == 24
    assert indices.probed == 3
    assert indices.hashed == 1  # remembered in memory
    assert sum("can't be kept" in record.message for record in caplog.records) == 1


def test_failures_are_not_kept(studio, tmp_path):
    path = studio.text("a.mp4", b"no video")
    indices = cache(tmp_path / "c")
    for _ in range(2):
        with pytest.raises(VideoError, match=r"a\.mp4"):
            indices.probe(path)
    studio.film("a.mp4")
    assert indices.probe(path).n_frames == 24
    for code, gone in (("VRLT-V01", tmp_path / "none.mp4"), ("VRLT-V02", tmp_path)):
        for ask in (indices.probe, indices.content_hash, content_hash, cache(None).probe):
            with pytest.raises(VideoError) as caught:
                ask(gone)
            assert caught.value.code == code


def _probe_all(folder: Path, paths: list[Path], start: object, results: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    counts = [IndexCache(folder, settle_s=0).probe(path).n_frames for path in paths for _ in range(4)]
    results.put(counts)  # type: ignore[attr-defined]


def test_processes_and_threads_that_race_all_get_the_index(studio, tmp_path):
    paths = [studio.film(f"{i}.mp4", count=4 + i) for i in range(4)]
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    others = [context.Process(target=_probe_all, args=(tmp_path / "c", paths, start, results)) for _ in range(3)]
    for other in others:
        other.start()
    start.set()
    mine, found = cache(tmp_path / "c"), list[int]()
    threads = [
        threading.Thread(target=lambda: found.extend(mine.probe(path).n_frames for path in paths)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    expected = [4 + i for i in range(4) for _ in range(4)]
    assert [results.get(timeout=60) for _ in others] == [expected] * 3
    for worker in (*threads, *others):
        worker.join()
    assert [other.exitcode for other in others] == [0, 0, 0]
    assert sorted(found) == expected
    assert sorted(path.suffix for path in (tmp_path / "c").iterdir()) == [".hash"] * 4 + [".index"] * 4
