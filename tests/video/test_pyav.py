"""PyAV through plans: every kind of file against a plain sequential decode, damage, memory."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from vrlt_fast.errors import VideoError
from vrlt_fast.video.backends.base import decode_all, lost_frames
from vrlt_fast.video.backends.pyav import Cancelled, PyAVBackend
from vrlt_fast.video.index import probe
from vrlt_fast.video.plan import DecodePlan, plan_decode


def collected(plan: DecodePlan, on_error: str = "strict"):
    """The pictures by frame number and the statistics."""
    found: dict[int, np.ndarray] = {}

    def sink(number, picture):
        found[number] = picture.numpy().copy()

    return found, PyAVBackend(on_error).decode(plan, sink)


def choices(count: int, seed: int) -> list[list[int]]:
    """All frames, few of them in any order, one alone, the last one."""
    rng = random.Random(seed)
    return [
        list(range(count)),
        rng.sample(range(count), min(5, count)),
        [rng.randrange(count)],
        sorted(rng.sample(range(count), (count + 1) // 2)),
        [count - 1],
    ]


def test_every_kind_equals_a_sequential_decode_with_and_without_elision(kinds, good_kind, decoded, seed):
    pictures, _ = decoded(kinds[good_kind])
    index = probe(kinds[good_kind])
    assert index.n_frames == len(pictures)
    for frames in choices(index.n_frames, seed):
        for elide in (True, False):
            plan = plan_decode(index, frames, elide=elide)
            found, stats = collected(plan)
            assert sorted(found) == sorted(set(frames))
            for number, picture in found.items():
                np.testing.assert_array_equal(picture, pictures[number], err_msg=f"frame {number}, elide {elide}")
            assert not stats.missing
            assert not stats.substituted
            assert len(found) <= stats.decoded
            if not elide:
                assert stats.dropped == 0


def everything(path: Path) -> None:
    index = probe(path)
    collected(plan_decode(index, range(index.n_frames)))


def test_every_faulty_kind_gives_its_code_fast_and_silently(kinds, faulty_kind, capfd):
    name, code = faulty_kind
    path = kinds[name]
    capfd.readouterr()
    start = time.process_time()
    with pytest.raises(VideoError) as caught:
        everything(path)
    assert time.process_time() - start < 2.5
    assert caught.value.code == code
    assert str(path) in caught.value.problems[0].where
    assert capfd.readouterr() == ("", "")


def test_elision_leaves_work_out(kinds):
    for name in ("h264 b-frames", "hevc", "h264 open gop"):
        index = probe(kinds[name])
        assert index.packets.droppable.any(), name
        frame = max(range(index.n_frames), key=lambda n: plan_decode(index, [n]).segments[0].dropped)
        _, less = collected(plan_decode(index, [frame]))
        _, more = collected(plan_decode(index, [frame], elide=False))
        assert less.dropped > 0
        assert 0 < less.decoded < more.decoded <= index.n_frames, name


def test_a_late_frame_costs_its_gop_only(studio, decoded):
    path = studio.film("a.mp4", count=96, options={"g": "12", "bf": "2", "sc_threshold": "0"})
    index, (pictures, _) = probe(path), decoded(path)
    found, stats = collected(plan_decode(index, [90, 40]))
    assert stats.decoded <= 24
    for number, picture in found.items():
        np.testing.assert_array_equal(picture, pictures[number])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "flv", "asf"])
def test_seeks_land_right_whatever_the_gop(studio, decoded, seed, suffix):
    """GOPs of one to three frames: decode and presentation times of neighbouring keyframes interleave."""
    for gop in (1, 2, 3):
        path = studio.film(f"{gop}.{suffix}", count=200, size=(32, 32), options={"g": str(gop), "bf": "2"})
        index, (pictures, _) = probe(path), decoded(path)
        frames = random.Random(seed).sample(range(200), 6)
        for number, picture in collected(plan_decode(index, frames))[0].items():
            np.testing.assert_array_equal(picture, pictures[number])


def damaged(kinds, tmp_path: Path) -> tuple[Path, Path]:
    """A sound film and the same with a hole in a packet in the middle of its second GOP, which others refer to."""
    sound, path = kinds["h264"], tmp_path / "hole.mp4"
    shutil.copy(sound, path)
    import av

    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(container.streams.video[0]) if p.size]
    content = bytearray(path.read_bytes())
    start, size = packets[15]
    content[start : start + size] = bytes(size)
    path.write_bytes(content)
    return sound, path


def test_a_hole_costs_the_frames_that_refer_to_it(kinds, tmp_path, decoded):
    sound, path = damaged(kinds, tmp_path)
    pictures, _ = decoded(sound)
    index = probe(path)
    after = np.flatnonzero(index.packets.key)
    lost = set(range(15, next((int(row) for row in after if row > 15), 24)))
    stats = PyAVBackend().attempt(plan_decode(index, range(24)), {i: (i,) for i in range(24)}, lambda *_: None)
    assert set(stats.missing) == lost
    assert stats.why
    with pytest.raises(VideoError) as caught:
        collected(plan_decode(index, range(24)))
    assert caught.value.code == "VRLT-V02"
    assert "frame 15" in str(caught.value) or "frames 15, " in str(caught.value)
    found, _ = collected(plan_decode(index, [14, 3, 0]))
    for number, picture in found.items():
        np.testing.assert_array_equal(picture, pictures[number])

    found, stats = collected(plan_decode(index, range(24)), "tolerant")
    assert set(stats.substituted) == lost
    for number in range(24):
        stand_in = stats.substituted.get(number, number)
        assert stand_in not in lost
        assert abs(stand_in - number) == (min(abs(i - number) for i in set(range(24)) - lost))
        np.testing.assert_array_equal(found[number], pictures[stand_in])


def test_nothing_decodes(studio):
    path = studio.film("a.mp4", count=6, options={"bf": "0", "g": "6"})
    import av

    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(container.streams.video[0]) if p.size]
    content = bytearray(path.read_bytes())
    for start, size in packets:
        content[start : start + size] = bytes(size)
    path.write_bytes(content)
    index = probe(path)
    for on_error in ("strict", "tolerant"):
        with pytest.raises(VideoError) as caught:
            collected(plan_decode(index, [1, 2]), on_error)
        assert caught.value.code in ("VRLT-V02", "VRLT-V04")


def test_an_index_that_lies_is_found_out(kinds, decoded):
    """Another file's index: never a picture in the place of another one."""
    other, index = probe(kinds["h264 mkv"]), probe(kinds["vfr mkv"])
    pictures, _ = decoded(kinds["h264 mkv"])
    crossed = type(index)(**{**index.__dict__, "path": other.path})
    codes, right = set(), 0
    for number in range(index.n_frames):
        try:
            found, _ = collected(plan_decode(crossed, [number]))
        except VideoError as error:
            codes.add(error.code)
        else:
            place = other.ticks.tolist().index(int(index.ticks[number]))
            np.testing.assert_array_equal(found[number], pictures[place])
            right += 1
    assert codes == {"VRLT-V05"}
    assert right < index.n_frames


def test_cancelling(kinds):
    index = probe(kinds["h264"])
    plan, asked = plan_decode(index, range(24)), []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 3

    got: list[int] = []
    with pytest.raises(Cancelled):
        PyAVBackend().attempt(plan, {i: (i,) for i in range(24)}, lambda number, _: got.append(number), cancelled)
    assert len(asked) == 4
    assert len(got) < 4


def test_errors_of_the_sink_come_through(kinds):
    def sink(number, picture):
        raise ValueError("full")

    with pytest.raises(ValueError, match="full"):
        PyAVBackend().decode(plan_decode(probe(kinds["h264"]), [3]), sink)


def test_the_retry_asks_for_what_is_missing_only(kinds):
    index = probe(kinds["h264"])
    backend, plans, taken = PyAVBackend(), [], []

    def attempt(plan, names):
        plans.append(plan)
        stats = backend.attempt(plan, names, lambda number, _: taken.append(number))
        if len(plans) == 1:
            stats.missing = (5, 20)
        return stats

    stats = decode_all(plan_decode(index, range(0, 24, 5)), attempt, "strict")
    assert [plan.frames for plan in plans] == [(0, 5, 10, 15, 20), (5, 20)]
    assert (plans[1].segments[0].packets == np.arange(len(plans[1].segments[0].packets))).all()
    assert stats.missing == ()
    assert sorted(taken) == [0, 5, 5, 10, 15, 20, 20]
    with pytest.raises(ValueError, match="no frame"):
        lost_frames(index, stats)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_two_thousand_opens_leak_nothing(studio):
    path = studio.film("a.mp4", count=2, size=(32, 32))
    index = probe(path)
    plan = plan_decode(index, [1])
    backend = PyAVBackend()
    for _ in range(200):
        backend.decode(plan, lambda *_: None)
    memory, files = resident(), len(os.listdir("/proc/self/fd"))
    for _ in range(2000):
        backend.decode(plan, lambda *_: None)
    assert resident() - memory < 5e6
    assert len(os.listdir("/proc/self/fd")) <= files
