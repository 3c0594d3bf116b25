"""A plan's segments as files in memory: a decoder that counts pictures gives exactly those of the source."""

from __future__ import annotations

import dataclasses
import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest

from vrlt_fast.errors import VideoError
from vrlt_fast.video import remux as remux_module
from vrlt_fast.video.index import VideoIndex, probe
from vrlt_fast.video.plan import plan_decode
from vrlt_fast.video.remux import RATE, Remuxed, obstacle, remux

X265 = {"x265-params": "log-level=none:keyint=12"}
FILMS = {
    "bframes.mp4": {"options": {"bf": "3"}},
    "plain.mp4": {"options": {"bf": "0"}},
    "stream.ts": {"options": {"bf": "2"}},
    "annexb.mkv": {"options": {"bf": "2"}},
    "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "opengop.mp4": {"codec": "libx265", "options": X265},
    "hevc.ts": {"codec": "libx265", "pixels": "yuv420p10le", "options": X265},
    "odd.mp4": {"pixels": "yuv444p", "size": (35, 51)},
    "vfr.mp4": {"ticks": [0, 40, 200, 230, 900, 1000, 1001, 1400, 5000, 5100, 5150, 5300, 5400, 5500, 5502, 9000]},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "0"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "motion.mp4": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "one.mp4": {"count": 1},
}


def counted(part: Remuxed) -> list[np.ndarray]:
    """The targets' pictures, taken by their place among all pictures of the file."""
    with av.open(io.BytesIO(part.data)) as file:
        frames = list(file.decode(video=0))
        assert not any(frame.rotation for frame in frames)
        assert [frame.time * RATE for frame in frames] == pytest.approx(range(part.pictures))
        return [frames[place].to_ndarray(format="rgb24") for place in part.places]


def by_number(index: VideoIndex, path: Path) -> dict[int, np.ndarray]:
    """All pictures of a plain decode under their frame numbers, not turned."""
    with av.open(str(path)) as file:
        return {
            int(np.searchsorted(index.ticks, frame.pts)): frame.to_ndarray(format="rgb24")
            for frame in file.decode(video=0)
        }


@pytest.mark.parametrize("name", FILMS)
def test_pictures_are_those_of_the_source(studio, name: str, seed: int) -> None:
    path = studio.film(name, **{"count": 26, **FILMS[name]})
    index = probe(path)
    assert obstacle(index) == ""
    truth = by_number(index, path)
    rng = np.random.default_rng(seed)
    container = "mp4" if name != "vp8.webm" and rng.integers(2) else "matroska"
    choices = [range(index.n_frames), rng.choice(index.n_frames, size=min(5, index.n_frames), replace=False), [0]]
    for frames in choices:
        for elide in (True, False):
            seen = []
            for part in remux(plan_decode(index, map(int, frames), elide=elide), container=container):
                seen += part.targets
                for number, picture in zip(part.targets, counted(part), strict=True):
                    assert np.array_equal(picture, truth[number]), (number, elide, container)
            assert sorted(seen) == sorted(frames)


def test_packets_left_out_make_the_files_smaller(studio) -> None:
    index = probe(
        studio.film("b.mp4", count=40, options={"bf": "3", "g": "60", "b_strategy": "0", "sc_threshold": "0"})
    )
    assert index.packets.droppable.any()
    ends = [0, index.n_frames - 1]
    whole, cut = (list(remux(plan_decode(index, ends, elide=elide))) for elide in (False, True))
    assert sum(p.pictures + p.dropped for p in cut) == sum(p.pictures + p.dropped for p in whole)
    assert sum(p.dropped for p in cut) > sum(p.dropped for p in whole)
    assert sum(len(p.data) for p in cut) < sum(len(p.data) for p in whole)


def test_a_rotation_is_not_passed_on(studio) -> None:
    path = studio.film("turned.mp4", count=6)
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 44
    assert struct.unpack(">9i", data[matrix : matrix + 36])[0] == 0x10000
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    path.write_bytes(data)
    with av.open(str(path)) as file:
        assert next(file.decode(video=0)).rotation
    index = probe(path)
    assert index.rotation == 270
    for container in ("matroska", "mp4"):
        (part,) = remux(plan_decode(index, [3]), container=container)
        assert counted(part)[0].shape == (64, 96, 3)


def test_far_segments_are_sought_and_equal_those_read_from_the_start(studio, monkeypatch: pytest.MonkeyPatch) -> None:
    path = studio.film("long.mp4", count=400, size=(16, 16))
    index = probe(path)
    plan = plan_decode(index, [2, 200, 399])
    read = list(remux(plan))
    monkeypatch.setattr(remux_module, "_JUMP", 20)
    handed = []
    numbered = remux_module._numbered
    monkeypatch.setattr(
        remux_module, "_numbered", lambda *of: (handed.append(packet) or packet for packet in numbered(*of))
    )
    assert list(remux(plan)) == read
    assert len(handed) < 100


def test_a_source_that_changed_is_an_error(studio) -> None:
    index = probe(studio.film("a.mp4", count=24))
    studio.film("a.mp4", ticks=[13 * n * n for n in range(24)])
    with pytest.raises(VideoError) as caught:
        list(remux(plan_decode(index, [20])))
    assert caught.value.code == "VRLT-V02"
    studio.film("a.mp4", count=9)
    with pytest.raises(VideoError) as caught:
        list(remux(plan_decode(index, [20])))
    assert caught.value.code == "VRLT-V02"


def test_what_cannot_be_handed_over_says_why(studio) -> None:
    index = probe(studio.film("a.mp4"))
    packets = index.packets
    assert "presentation times" in obstacle(dataclasses.replace(index, flags=frozenset({"no_pts"})))
    assert "prores" in obstacle(dataclasses.replace(index, codec="prores"))
    hidden = dataclasses.replace(packets, shown=np.arange(len(packets.shown)) > 0)
    assert "aren't shown" in obstacle(dataclasses.replace(index, codec="vp8", packets=hidden))
    assert obstacle(dataclasses.replace(index, packets=hidden)) == ""  # an edit list; decoded, not shown
    twice = dataclasses.replace(packets, ticks=packets.ticks // 2)
    assert obstacle(dataclasses.replace(index, packets=dataclasses.replace(twice, ticks=twice.ticks * 0))) != ""
