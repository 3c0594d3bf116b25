"""The index of every kind of file against a plain sequential decode; what NAL headers promise; hostile files."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import av
import numpy as np
import pytest

from vrlt_fast.errors import VideoError
from vrlt_fast.video.index import NO_TICK, open_video, probe
from vrlt_fast.video.nal import droppable, h264_picture, hevc_picture, length_size
from vrlt_fast.video.remux import obstacle

FLAGS = {
    "h264 interlaced": {"interlaced"},
    "hevc ts": {"no_seek"},
    "gif": {"no_seek"},
    "mpeg-ts": {"no_seek"},
    "mpeg-ts open start": {"no_seek", "open_start"},
    "mpeg-ps": {"no_seek"},
    "mkv truncated": {"truncated"},
    "raw h264": {"no_seek", "no_pts"},
    "h264 avi": {"no_pts"},
    "edit list": {"edit_list"},
    "negative start": {"no_seek"},
    "equal times": {"no_pts", "equal_pts"},
    "times missing": {"no_pts", "missing_pts"},
    "vfr": {"vfr"},
    "vfr mkv": {"vfr"},
}
ROTATED = {"rotated 90": 90, "rotated 180": 180, "rotated 270 mkv": 270}


def test_index_equals_a_sequential_decode(kinds, decoded, good_kind):
    pictures, times = decoded(kinds[good_kind])
    index = probe(kinds[good_kind])
    assert index.n_frames == len(pictures)
    if good_kind != "raw h264":  # which has no rate either
        np.testing.assert_allclose(index.times, times, atol=1e-9)
    assert index.duration > times[-1]
    assert index.rotation == ROTATED.get(good_kind, 0)
    sides = (index.height, index.width) if index.rotation % 180 == 0 else (index.width, index.height)
    assert sides == pictures.shape[1:3]
    irregular = (
        {"vfr"} if good_kind not in ("vfr", "vfr mkv") else set()
    )  # missing B-frames or equal times show as such
    assert index.flags - irregular == FLAGS.get(good_kind, set())
    rows = index.packets
    assert len(rows.ticks) == len(rows.key) == len(rows.droppable) == len(rows.shown)
    assert rows.shown.sum() == index.n_frames
    np.testing.assert_array_equal(np.sort(rows.ticks[rows.shown]), index.ticks)
    assert (rows.ticks[rows.shown] != NO_TICK).all()
    assert index.codec in ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "gif", "mpeg2video")


def decode_packets(path: Path, rows: list[int]) -> dict[int, np.ndarray]:
    """Frames by tick that a fresh decoder gives for these packets."""
    with open_video(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size]
        frames = [frame for row in rows for frame in stream.codec_context.decode(packets[row])]
        frames += stream.codec_context.decode(None)
        return {frame.pts: frame.to_ndarray(format="rgb24") for frame in frames if not frame.is_corrupt}


NAL_KINDS = [
    "h264 b-frames",
    "h264 open gop",
    "h264 interlaced",
    "h264 mkv",
    "h264 flv",
    "mpeg-ts",
    "hevc",
    "hevc ts",
    "hevc temporal layers",
    "10-bit h264",
    "10-bit hevc",
    "fragmented",
    "edit list",
]


@pytest.mark.parametrize("kind", NAL_KINDS)
def test_without_droppable_packets_the_other_frames_stay_bit_identical(kinds, kind, seed):
    path, rng = kinds[kind], random.Random(seed)
    index = probe(path)
    packets = index.packets
    candidates = np.flatnonzero(packets.droppable)
    assert len(candidates) >= 2
    whole = decode_packets(path, list(range(len(packets.ticks))))
    for share in (1.0, 0.5):
        gone = {int(row) for row in candidates if rng.random() < share}
        kept = [row for row in range(len(packets.ticks)) if row not in gone]
        part = decode_packets(path, kept)
        assert set(part) == set(whole) - {int(packets.ticks[row]) for row in gone}
        for tick, picture in part.items():
            np.testing.assert_array_equal(picture, whole[tick])


@pytest.mark.parametrize("kind", ["h264 open gop", "hevc", "hevc temporal layers", "mpeg-ts", "vp9", "av1", "mpeg4"])
def test_decoding_can_start_at_every_key(kinds, kind):
    path = kinds[kind]
    packets = probe(path).packets
    whole = decode_packets(path, list(range(len(packets.ticks))))
    starts = np.flatnonzero(packets.key)
    assert len(starts) >= 2
    for start in starts.tolist():
        part = decode_packets(path, list(range(start, len(packets.ticks))))
        for tick in (tick for tick in whole if tick >= packets.ticks[start]):
            np.testing.assert_array_equal(part[tick], whole[tick])


def test_pictures_that_refresh_step_by_step_are_no_start(studio):
    """Their container may call them keyframes, but decoding from them gives damaged pictures first."""
    path = studio.film("a.mkv", count=40, options={"x264-params": "intra-refresh=1:keyint=8:bframes=0:scenecut=0"})
    with av.open(str(path)) as container:
        said = sum(packet.is_keyframe for packet in container.demux(video=0))
    key = probe(path).packets.key
    assert said > 1
    assert key.tolist() == [True] + [False] * 39


def test_leading_pictures_of_a_cut_open_gop_are_not_in_the_index(kinds, studio):
    """Cut at a keyframe that isn't the first, its leading pictures lack what they refer to."""
    whole = probe(kinds["hevc"])
    path = studio.folder / "cut.mkv"
    with av.open(str(kinds["hevc"])) as old, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(old.streams[0])
        packets = [packet for packet in old.demux(old.streams[0]) if packet.size]
        start = int(np.flatnonzero(whole.packets.key)[1])
        base = packets[start].dts
        for packet in packets[start:]:
            packet.pts, packet.dts, packet.stream = packet.pts - base, packet.dts - base, stream
            container.mux(packet)
    index = probe(path)
    with av.open(str(path)) as container:
        ticks = [frame.pts for frame in container.decode(video=0) if not frame.is_corrupt]
    assert index.n_frames < len(packets) - start
    assert index.ticks.tolist() == ticks


def test_nal_rules_by_hand():
    def packet(*units: bytes, size: int = 4) -> memoryview:
        heads = (b"\0\0\1" if not size else len(unit).to_bytes(size, "big") for unit in units)
        return memoryview(b"".join(head + unit for head, unit in zip(heads, units, strict=True)))

    for size in (0, 1, 2, 4):
        free = h264_picture(packet(b"\x09\xf0", b"\x01\x9a", b"\x01\x22", size=size), size, key=False)
        assert free is not None
        assert not free.reference
        mixed = h264_picture(packet(b"\x01\x9a", b"\x21\x22", size=size), size, key=False)
        assert mixed is not None
        assert mixed.reference  # one slice of several that others refer to
    assert h264_picture(packet(b"\x67\x42\x00"), 4, key=True) is None
    assert h264_picture(memoryview(b"\xff\xff\xff\xff\x01"), 4, key=False) is None  # a length that leaves the packet
    recovery = b"\x06\x06\x01%c\x80"
    starts = {0b11000000: True, 0b10000000: False, 0b11100000: False, 0b01011000: False}
    for bits, start in starts.items():
        found = h264_picture(packet(recovery % bits, b"\x21\x88"), 4, key=True)
        assert found is not None
        assert found.start is start, f"{bits:08b}"

    def hevc(kind: int, layer: int) -> memoryview:
        return packet(bytes([kind << 1, layer + 1, 0xAF]))

    # a picture that its own layer doesn't refer to may serve a higher one
    pictures = [hevc_picture(hevc(kind, layer), 4, key=False) for kind, layer in [(0, 0), (0, 1), (1, 1), (21, 0)]]
    assert droppable(pictures) == [False, True, False, False]
    assert droppable(pictures[:1]) == [True]
    assert length_size("h264", b"\x01\x64\x00\x1f\xfd\xe1") == 2
    assert length_size("h264", b"\0\0\0\1\x67") == length_size("hevc", None) == 0


def test_colours_of_the_header(studio):
    path = studio.film("a.mp4", options={"x264-params": "colormatrix=bt709:fullrange=on"})
    index = probe(path)
    assert (index.matrix, index.full_range) == ("bt709", True)
    plain = probe(studio.film("b.mp4"))
    assert (plain.matrix, plain.full_range) == ("unspecified", False)


def holes(folder: Path, kinds, kind: str) -> Path:
    path = folder / kinds[kind].name
    content = kinds[kind].read_bytes()
    path.write_bytes(content[: len(content) // 2])
    os.truncate(path, 1 << 34)
    return path


HOSTILE = {
    "missing": ("VRLT-V01", lambda folder, kinds: folder / "none.mp4"),
    "name too long": ("VRLT-V01", lambda folder, kinds: folder / ("x" * 300)),
    "folder": ("VRLT-V02", lambda folder, kinds: folder),
    "device": ("VRLT-V02", lambda folder, kinds: Path("/dev/zero")),
    "all zero": ("VRLT-V02", lambda folder, kinds: _sparse(folder / "a.h264")),
    "mkv with a hole": ("VRLT-V02", lambda folder, kinds: holes(folder, kinds, "h264 mkv")),
    "avi with a hole": ("VRLT-V02", lambda folder, kinds: holes(folder, kinds, "h264 avi")),
    "raw with a hole": ("VRLT-V02", lambda folder, kinds: holes(folder, kinds, "raw h264")),
    "pipe": ("VRLT-V02", lambda folder, kinds: _pipe(folder / "a.mp4")),
    "links in a circle": ("VRLT-V01", lambda folder, kinds: _circle(folder / "a.mp4")),
}


def _sparse(path: Path) -> Path:
    path.touch()
    os.truncate(path, 1 << 36)
    return path


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _circle(path: Path) -> Path:
    path.symlink_to(path)
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_give_an_error_at_once(kinds, tmp_path, capfd, name):
    code, make = HOSTILE[name]
    path = make(tmp_path, kinds)
    check_error(path, code, capfd)


def check_error(path: Path, code: str, capfd) -> None:
    capfd.readouterr()
    started = time.process_time()
    with pytest.raises(VideoError) as caught:
        probe(path)
    assert time.process_time() - started < 2.5  # 0.5 s, times 5 for slow machines
    assert (caught.value.code, caught.value.exit_code) == (code, 3)
    problem = caught.value.problems[0]
    assert problem.where == str(path)
    assert problem.what
    assert problem.fix
    assert capfd.readouterr() == ("", "")


def test_faulty_files_give_an_error_or_decode_says_so(kinds, faulty_kind, capfd):
    kind, code = faulty_kind
    if kind == "corrupt middle":  # which demuxing can't see
        assert probe(kinds[kind]).n_frames == 24
        return
    path = kinds[kind]
    check_error(path, code, capfd)


def test_names_are_names(studio, decoded):
    """Nothing in a path is taken for a protocol or a pattern."""
    for name in ("pipe:0.mp4", "a%03d.mp4", "concat:a|b.mp4", "ü \n?.mp4", "http:a.mp4"):
        source = studio.film("a.mp4", count=2)
        path = source.rename(studio.folder / name)
        assert probe(path).n_frames == 2


def test_a_damaged_file_is_indexed_as_far_as_it_goes(kinds, decoded):
    path = kinds["truncated faststart"]
    with pytest.raises(VideoError, match="before its last frames"):
        probe(path)
    index = probe(path, damaged=True)
    assert "truncated" in index.flags
    assert 10 < index.n_frames < 24
    assert decode_packets(path, list(range(index.n_frames))).keys() == set(index.ticks.tolist())
    with pytest.raises(VideoError):
        probe(kinds["truncated"], damaged=True)


def test_timelines_one_after_the_other_stay_one(studio):
    """Joined transport streams whose times go on are one film, with a leap; those that go back aren't."""
    first, second = (studio.film(f"{i}.ts", ticks=list(range(i, i + 1000, 125))) for i in (0, 5000))
    index = probe(studio.text("both.ts", first.read_bytes() + second.read_bytes()))
    assert index.n_frames == 16
    assert "discontinuity" in index.flags
    with pytest.raises(VideoError) as caught:
        probe(studio.text("back.ts", second.read_bytes() + first.read_bytes()))
    assert caught.value.code == "VRLT-V07"


def test_mutated_files_give_an_index_or_an_error(kinds, seed, tmp_path, capfd):
    rng = random.Random(seed)
    outcomes = set()
    for kind in ("h264", "fragmented", "h264 mkv", "mpeg-ts", "h264 avi", "vp9", "edit list", "rotated 90", "gif"):
        content = kinds[kind].read_bytes()
        for _ in range(12):
            changed = bytearray(content)
            for _ in range(rng.choice((1, 4, 40))):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            path = tmp_path / f"a{kinds[kind].suffix}"
            path.write_bytes(changed[: rng.randrange(len(changed)) if rng.random() < 0.3 else None])
            try:
                index = probe(path)
                assert index.n_frames >= 1
                assert (np.diff(index.ticks) >= 0).all()
                outcomes.add("index")
            except VideoError as error:
                outcomes.add(error.code)
    assert "index" in outcomes
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_damage_keeps_frames_in_their_places_and_is_flagged(studio, share):
    whole = probe(studio.film("whole.mp4", count=30))
    content = bytearray(whole.path.read_bytes())
    start = content.index(b"mdat") + 4
    start += int(share * (len(content) - start))
    content[start : start + 3000] = bytes(3000)
    index = probe(studio.text("damaged.mp4", bytes(content)))
    assert "damaged" in index.flags
    np.testing.assert_array_equal(index.times, whole.times)
    assert "damaged" in obstacle(index)  # other decoders may hide it
    assert obstacle(whole) == ""
