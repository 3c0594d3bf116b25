"""Frames and patches against a plain sequential PyAV decode, the choice of a decoder, and what broken files give."""

from __future__ import annotations

import os
import random
import shutil
import struct
import sys
import threading

import numpy as np
import pytest
import torch

from vrlt_fast.errors import SetupError, VideoError
from vrlt_fast.video.decode import BACKENDS, Decoder, decode_frames
from vrlt_fast.video.index import probe
from vrlt_fast.video.poison import PoisonList
from vrlt_fast.video.preprocess import Geometry, patchify, resize

FILMS = {
    "h264": {"name": "a.mp4", "options": {"bf": "0"}},
    "b-frames": {"name": "a.mp4", "options": {"bf": "3", "b_strategy": "0"}},
    "mpeg4 avi": {"name": "a.avi", "codec": "mpeg4"},
    "mpeg4 avi b-frames": {"name": "a.avi", "codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg-ts": {"name": "a.ts", "options": {"bf": "2"}},
    "matroska": {"name": "a.mkv", "options": {"bf": "2"}},
    "odd size": {"name": "a.mp4", "size": (53, 97), "pixels": "yuv444p"},
    "one frame": {"name": "a.mp4", "count": 1},
}


@pytest.mark.parametrize("film", FILMS.values(), ids=FILMS.keys())
def test_random_frames_equal_a_sequential_decode(studio, decoded, seed, film):
    path = studio.film(**film)
    pictures, times = decoded(path)
    index = probe(path)
    assert index.n_frames == len(pictures) == film.get("count", 24)
    assert (index.height, index.width) == pictures.shape[1:3]
    np.testing.assert_allclose(index.times, times, atol=1e-9)
    assert index.fps == pytest.approx(8.0 if index.n_frames > 1 else 1.0)
    rng = random.Random(seed)
    for count in (1, 5, 40):
        wanted = [rng.randrange(index.n_frames) for _ in range(count)]
        np.testing.assert_array_equal(decode_frames(index, wanted), pictures[wanted])


def test_irregular_times(studio, decoded, seed):
    rng = random.Random(seed)
    ticks = sorted(rng.sample(range(0, 4000, 20), 20))
    path = studio.film("vfr.mp4", ticks=ticks, options={"bf": "2"})
    pictures, times = decoded(path)
    index = probe(path)
    np.testing.assert_allclose(index.times, [(t - ticks[0]) / 1000 for t in ticks], atol=1e-3)
    np.testing.assert_allclose(index.times, times, atol=1e-9)
    assert index.fps == pytest.approx(19 / ((ticks[-1] - ticks[0]) / 1000), rel=1e-3)
    wanted = rng.sample(range(20), 7)
    np.testing.assert_array_equal(decode_frames(index, wanted), pictures[wanted])


@pytest.mark.parametrize(
    ("matrix", "turns"), [((0, 1, -1, 0), 1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 3)], ids=["90", "180", "270"]
)
def test_rotation_of_the_track_header(studio, decoded, matrix, turns):
    path = studio.film("a.mp4", count=3)
    plain, _ = decoded(path)
    content = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    # ISO 14496-12: version 0 of tkhd has 40 bytes before the matrix a b u c d v x y w
    struct.pack_into(">9i", content, content.index(b"tkhd") + 4 + 40, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    clockwise = np.rot90(plain, k=-turns, axes=(1, 2))
    np.testing.assert_array_equal(decode_frames(probe(path), range(3)), clockwise)


def test_a_stream_cut_inside_a_gop_gives_the_right_frame_or_none(studio, decoded, seed):
    """Its first packets give no frame; counting decoded frames would hand out later ones in their place."""
    path = studio.film("a.ts", count=36, options={"bf": "2", "g": "9", "sc_threshold": "0"})
    index = probe(path)
    pictures, _ = decoded(path)
    content = path.read_bytes()
    # the cut falls on a packet of the transport stream, 188 bytes each, behind the first key frame
    path.write_bytes(content[len(content) // 188 * random.Random(seed).randint(8, 20) // 100 * 188 :])
    late = probe(path)
    found = 0
    for number in range(late.n_frames):
        code, picture = "", None
        try:
            picture = decode_frames(late, [number])[0]
        except VideoError as error:
            code = error.code
        assert code in ("", "VRLT-V05")
        if picture is None:
            continue
        found += 1
        same_time = index.ticks.tolist().index(int(late.ticks[number]))
        np.testing.assert_array_equal(picture, pictures[same_time])
    assert 0 < found <= late.n_frames < index.n_frames


def test_truncated_transport_stream_keeps_its_first_frames(studio, decoded):
    path = studio.film("a.ts")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    pictures, _ = decoded(path)
    index = probe(path)
    assert 5 < index.n_frames < 24
    np.testing.assert_array_equal(decode_frames(index, range(5)), pictures[:5])


def everything(path):
    index = probe(path)
    return decode_frames(index, range(index.n_frames))


def broken(studio, kind):
    film = {"options": {"bf": "0"}}
    if kind in ("truncated faststart", "corrupt middle"):
        path = studio.film("broken.mp4", container_options={"movflags": "faststart"}, **film)
        content = bytearray(path.read_bytes())
        middle = len(content) * 6 // 10
        if kind == "corrupt middle":
            content[middle : middle + 600] = bytes(600)
        else:
            del content[middle:]
        return studio.text("broken.mp4", bytes(content))
    if kind == "truncated":
        content = studio.film("broken.mp4", **film).read_bytes()
        return studio.text("broken.mp4", content[: len(content) * 6 // 10])
    if kind in ("playlist", "concat script"):
        part = studio.film("part.ts")
        head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:3,\n"
        if kind == "playlist":
            return studio.text("broken.m3u8", f"{head}{part.resolve()}\n#EXT-X-ENDLIST\n".encode())
        return studio.text("broken.mp4", b"ffconcat version 1.0\nfile part.ts\n")
    texts = {
        "empty": b"",
        "text": b"not a video\n" * 100,
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    }
    return studio.sound("broken.mp4") if kind == "audio only" else studio.text("broken.mp4", texts[kind])


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("empty", "VRLT-V02"),
        ("text", "VRLT-V02"),
        ("html", "VRLT-V02"),
        ("truncated", "VRLT-V02"),
        ("truncated faststart", "VRLT-V02"),
        ("corrupt middle", "VRLT-V02"),
        ("playlist", "VRLT-V02"),
        ("concat script", "VRLT-V02"),
        ("audio only", "VRLT-V03"),
    ],
)
def test_broken_files_give_a_coded_error_and_no_native_noise(studio, capfd, kind, code):
    path = broken(studio, kind)
    capfd.readouterr()
    with pytest.raises(VideoError) as caught:
        everything(path)
    assert (caught.value.code, caught.value.exit_code) == (code, 3)
    assert str(path) in caught.value.problems[0].where
    assert capfd.readouterr() == ("", "")


def test_missing_file_and_frames_outside(studio, tmp_path):
    with pytest.raises(VideoError) as missing:
        probe(tmp_path / "none.mp4")
    assert missing.value.code == "VRLT-V01"
    index = probe(studio.film("a.mp4", count=4))
    for wanted in ([4], [-1], [0, 99]):
        with pytest.raises(VideoError) as outside:
            decode_frames(index, wanted)
        assert outside.value.code == "VRLT-V05"
    with pytest.raises(ValueError, match="no frames"):
        decode_frames(index, [])


def test_frame_size_that_changes(studio):
    first = studio.film("a.ts", ticks=list(range(0, 1000, 125)))
    second = studio.film("b.ts", size=(48, 64), ticks=list(range(2000, 3000, 125)))
    path = studio.text("both.ts", first.read_bytes() + second.read_bytes())
    index = probe(path)
    with pytest.raises(VideoError) as caught:
        decode_frames(index, [0, index.n_frames - 2])
    assert caught.value.code == "VRLT-V06"
    assert str(path) in str(caught.value)


SIZE, GEOMETRY = (56, 84), Geometry(14, 2)


def expected(pictures, frames):
    """Patches by torch's resize and the plain rearrangement."""
    return patchify(resize(pictures[list(frames)], *SIZE), GEOMETRY)[0]


@pytest.fixture(scope="module")
def decoders():
    """With one, two and four processes, in parts as small as can be."""
    found = [Decoder("pyav", workers=n, deadline_s=100, part_pixels=1) for n in (1, 2, 4)]
    yield found
    for decoder in found:
        decoder.close()


def test_patches_of_every_kind_in_this_process(kinds, good_kind, decoded, seed):
    index, (pictures, _) = probe(kinds[good_kind]), decoded(kinds[good_kind])
    frames = [random.Random(seed).randrange(index.n_frames) for _ in range(10)]
    for elide in (True, False):
        out, grid, report = Decoder("pyav", elide=elide).patches(index, frames, SIZE, GEOMETRY)
        assert grid == (5, 4, 6)
        assert torch.equal(out, expected(pictures, frames))
        assert (report.backend, report.substituted, report.passed_over) == ("pyav", {}, ())
        assert set(report.seconds) == {"demux", "decode", "convert", "patchify"}


@pytest.mark.parametrize("kind", ["h264 open gop", "hevc", "av1", "mpeg-ts", "raw h264", "edit list", "rotated 90"])
def test_any_number_of_workers_and_shards_give_the_same_bits(kinds, decoded, decoders, seed, kind):
    index, (pictures, _) = probe(kinds[kind]), decoded(kinds[kind])
    frames = [random.Random(seed).randrange(index.n_frames) for _ in range(16)]
    whole = expected(pictures, frames)
    for decoder in decoders:
        assert torch.equal(decoder.patches(index, frames, SIZE, GEOMETRY)[0], whole)
    shards = [decoders[1].patches(index, frames[i : i + 4], SIZE, GEOMETRY)[0] for i in range(0, 16, 4)]
    assert torch.equal(torch.cat(shards), whole)
    again = from_three_threads(decoders[2], index, frames)
    assert torch.equal(again, whole)


def from_three_threads(decoder, index, frames):
    """From several threads at once."""
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(decoder.patches(index, frames, SIZE, GEOMETRY)[0]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert len(found) == 3
    assert torch.equal(found[0], found[1])
    return found[2]


def test_a_fault_gives_the_same_error_from_workers(kinds, decoders):
    index = probe(kinds["corrupt middle"])
    errors = []
    for decoder in (Decoder("pyav"), *decoders):
        with pytest.raises(VideoError) as caught:
            decoder.patches(index, range(24), SIZE, GEOMETRY)
        errors.append(str(caught.value))
    assert len(set(errors)) == 1
    assert "VRLT-V02" in errors[0]


def test_tolerant_mode_counts_what_it_substitutes(kinds, decoded, decoders):
    index = probe(kinds["corrupt middle"])
    sound, _ = decoded(kinds["h264"])
    found = []
    for workers in (0, 2):
        with Decoder("pyav", workers=workers, deadline_s=100, on_error="tolerant") as decoder:
            out, _, report = decoder.patches(index, range(24), SIZE, GEOMETRY)
            assert 0 < len(report.substituted) < 24
            assert decoder.counts["frames substituted"] == len(report.substituted)
            frames = [report.substituted.get(i, i) for i in range(24)]
            assert torch.equal(out, expected(sound, frames))
            found.append(report.substituted)
    assert found[0] == found[1]


STAND_INS = '''
"""Decoders of every temper."""
import ctypes
from vrlt_fast.errors import Problem, VideoError
from vrlt_fast.video.backends.base import Availability
from vrlt_fast.video.backends.pyav import PyAVBackend

class Absent(PyAVBackend):
    def availability(self): return Availability(False, "no such chip", "buy one")

class Picky(PyAVBackend):
    name = "picky"
    def supports(self, index): return "codec " + index.codec

class Fails(PyAVBackend):
    name = "fails"
    def decode(self, plan, sink): raise VideoError(Problem("VRLT-V05", "lost count", str(plan.index.path)))

class Apart(PyAVBackend):
    name, isolate = "apart", True

class Crash(Apart):
    def attempt(self, *args): ctypes.string_at(0)
'''
NAMES = {"absent": "Absent", "missing": "", "picky": "Picky", "fails": "Fails", "apart": "Apart", "crash": "Crash"}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_ins")
    (folder / "stand_ins.py").write_text(STAND_INS)

    def specs(*names):
        made = {n: f"stand_ins:{NAMES[n]}" if NAMES[n] else "not_there_at_all:X" for n in names}
        return {"specs": {**made, "pyav": BACKENDS["pyav"]}, "paths": [str(folder)], "deadline_s": 100}

    sys.path.insert(0, str(folder))
    yield specs
    sys.path.remove(str(folder))
    del sys.modules["stand_ins"]


def test_auto_takes_the_first_that_can_and_counts_why_not(kinds, decoded, stand_ins):
    index, (pictures, _) = probe(kinds["vp9"]), decoded(kinds["vp9"])
    with Decoder(**stand_ins("absent", "missing", "picky", "fails", "apart")) as decoder:
        for _ in range(2):
            out, _, report = decoder.patches(index, [3, 1], SIZE, GEOMETRY)
            assert torch.equal(out, expected(pictures, [3, 1]))
        assert report.backend == "pyav"
        assert report.passed_over == (
            "absent: no such chip",
            "missing: No module named 'not_there_at_all'",
            "picky: codec vp9",
            "fails: lost count",
        )
        assert [decoder.counts[reason] for reason in report.passed_over] == [2] * 4
        assert decoder.counts["decoded by pyav"] == 2
    with Decoder(**stand_ins("absent", "apart", "fails")) as decoder:
        out, _, report = decoder.patches(index, [3, 1], SIZE, GEOMETRY)
        assert (report.backend, len(report.passed_over)) == ("apart", 1)
        assert torch.equal(out, expected(pictures, [3, 1]))


def test_a_named_decoder(kinds, stand_ins):
    with pytest.raises(SetupError, match="no such chip") as caught:
        Decoder("absent", **stand_ins("absent"))
    assert caught.value.code == "VRLT-E01"
    with pytest.raises(ValueError, match="unknown decoder"):
        Decoder("nothing")
    _, _, report = Decoder("picky", **stand_ins("picky")).patches(probe(kinds["vp9"]), [0, 0], SIZE, GEOMETRY)
    assert (report.backend, report.passed_over) == ("pyav", ("picky: codec vp9",))


def test_a_crash_costs_the_sample_and_is_remembered(kinds, stand_ins, tmp_path):
    path = tmp_path / "a.mp4"
    shutil.copy(kinds["h264"], path)
    listed = tmp_path / "lists" / "poisoned.jsonl"
    with Decoder("crash", poison=listed, **stand_ins("crash")) as decoder:
        with pytest.raises(VideoError, match="signal 11") as caught:
            decoder.patches(probe(path), [0, 1], SIZE, GEOMETRY)
        assert (caught.value.code, decoder.counts["decoders lost"]) == ("VRLT-V08", 1)
    with Decoder("pyav", poison=listed) as decoder:
        with pytest.raises(VideoError, match=f"sed -i 1d {listed}") as caught:
            decoder.patches(probe(path), [0, 1], SIZE, GEOMETRY)
        assert caught.value.code == "VRLT-V09"
        decoder.patches(probe(kinds["h264"]), [0, 1], SIZE, GEOMETRY)
        os.utime(path, (1, 1))  # mended
        decoder.patches(probe(path), [0, 1], SIZE, GEOMETRY)


def test_the_poisoned_list(tmp_path):
    film, listed = tmp_path / "a'b.mp4", tmp_path / "list.jsonl"
    film.write_bytes(b"x")
    one, other = PoisonList(listed), PoisonList(listed)
    for poison in (one, other):
        poison.check(film)
    listed.write_bytes(b"{broken\n[]\n")
    one.add(film, "hung")
    one.add(film, "hung")
    assert len(listed.read_text().splitlines()) == 3
    for poison in (one, other, PoisonList(listed)):
        with pytest.raises(VideoError, match="sed -i 3d"):
            poison.check(film)
    lines = listed.read_text().splitlines(keepends=True)
    listed.write_text("".join(lines[:2]))
    PoisonList(listed).check(film)
    other.check(film)
    PoisonList(listed).add(tmp_path / "gone.mp4", "hung")
    (tmp_path / "file").write_bytes(b"")
    unwritable = PoisonList(tmp_path / "file" / "list.jsonl")
    with pytest.warns(UserWarning, match="can't be written"):
        unwritable.add(film, "hung")
    with pytest.raises(VideoError) as caught:
        unwritable.check(film)
    assert caught.value.code == "VRLT-V09"


def test_wrong_arguments(kinds):
    index = probe(kinds["h264"])
    for frames, size in (([0], SIZE), ([0, 1], (56, 85)), ([], SIZE), ([0, 1], (0, 28))):
        with pytest.raises(ValueError, match=r"needs pairs|no frames"):
            Decoder("pyav").patches(index, frames, size, GEOMETRY)
    with pytest.raises(ValueError, match="workers"):
        Decoder("pyav", workers=-1)
