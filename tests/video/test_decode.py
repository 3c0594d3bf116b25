"""Index and decode against a plain sequential PyAV decode, and what broken files give."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from vrlt_fast.errors import VideoError
from vrlt_fast.video.decode import decode_frames
from vrlt_fast.video.index import probe

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
    assert 0 < found < late.n_frames


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
