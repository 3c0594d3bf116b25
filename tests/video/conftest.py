"""Real video files, made with PyAV: noise on slow gradients, so that every frame differs from every other one.

``kinds[name]`` is the file of a kind in :data:`KINDS`, made once a session (copy it before you change it). A test that
takes ``good_kind`` runs once for each kind that decodes in full, one that takes ``faulty_kind`` (name, code) once for
each of :data:`FAULTS`.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest


def pictures(seed: int, count: int, height: int, width: int) -> np.ndarray:
    """uint8 [count, height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]


class Studio:
    """Writes video files into one folder."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed

    def film(
        self,
        name: str,
        *,
        count: int = 24,
        size: tuple[int, int] = (64, 96),
        rate: int = 8,
        codec: str = "libx264",
        pixels: str = "yuv420p",
        ticks: list[int] | None = None,
        options: dict[str, str] | None = None,
        container_options: dict[str, str] | None = None,
        rotation: int = 0,
    ) -> Path:
        """``size`` is (height, width); ``ticks`` are presentation times in 1/1000 s, default ``count`` even ones;
        ``rotation`` is counter-clockwise, in degrees.
        """
        path = self.folder / name
        options = {"g": "12", **(options or {})}
        with av.open(str(path), "w", options=container_options or {}) as container:
            stream = container.add_stream(codec, rate=rate, options=options)
            stream.height, stream.width, stream.pix_fmt = *size, pixels
            if rotation:
                stream.set_display_rotation(rotation)
            if ticks is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            for number, picture in enumerate(pictures(self.seed, count if ticks is None else len(ticks), *size)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                if ticks is not None:
                    frame.pts, frame.time_base = ticks[number], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    def sound(self, name: str) -> Path:
        """A file with an audio stream only."""
        path = self.folder / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000, layout="mono")
            wave = np.sin(np.arange(1024 * 8, dtype=np.float32) / 20)[None]
            for start in range(0, wave.shape[1], 1024):
                frame = av.AudioFrame.from_ndarray(wave[:, start : start + 1024], format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, start
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    def text(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def part(self, name: str, source: Path, share: float, until: float = 1.0) -> Path:
        """The bytes of ``source`` from one share of its length to another, cut at packets of a transport stream."""
        content = source.read_bytes()
        start, stop = (int(len(content) * x) // 188 * 188 for x in (share, until))
        return self.text(name, content[start:stop] if until < 1 else content[start:])

    def copy(
        self,
        name: str,
        *sources: Path,
        shift: int = 0,
        cut: int = 0,
        container_options: dict[str, str] | None = None,
    ) -> Path:
        """The streams of ``sources`` by stream copy. Times are moved by ``shift`` seconds; with ``cut``, frames before
        that number are cut off, as ``ffmpeg -ss ... -c copy`` does: from the keyframe before, with negative times.
        """
        path = self.folder / name
        with av.open(str(path), "w", options=container_options or {}) as container, contextlib.ExitStack() as stack:
            olds = [stack.enter_context(av.open(str(source))).streams[0] for source in sources]
            news = [container.add_stream_from_template(old) for old in olds]
            for old, new in zip(olds, news, strict=True):
                packets = [packet for packet in old.container.demux(old) if packet.size]
                first = sorted(p.pts for p in packets)[cut]
                start = max(i for i, p in enumerate(packets) if p.is_keyframe and p.pts <= first)
                for packet in packets[start:]:
                    move = round(shift / packet.time_base) - (first if cut else 0)
                    packet.pts, packet.dts, packet.stream = packet.pts + move, packet.dts + move, new
                    container.mux(packet)
        return path


def _cover(s: Studio, name: str, *, with_video: bool) -> Path:
    """A picture as cover art, beside a video or beside sound."""
    other = s.film("plain.mp4", options={"bf": "0"}) if with_video else s.sound("sound.mp4")
    art = s.film("art.jpg", count=1, size=(320, 320), codec="mjpeg", pixels="yuvj420p")
    path = s.folder / name
    with av.open(str(path), "w") as container, av.open(str(art)) as picture, av.open(str(other)) as old:
        stream = container.add_stream_from_template(picture.streams[0])
        stream.disposition = av.stream.Disposition.attached_pic
        new = container.add_stream_from_template(old.streams[0])
        packets = [*((p, new) for p in old.demux(old.streams[0])), *((p, stream) for p in picture.demux())]
        for packet, to in packets:
            if packet.size:
                packet.stream = to
                container.mux(packet)
    return path


def _overwritten(s: Studio, name: str, source: Path, count: int) -> Path:
    """``source`` with ``count`` zero bytes from the first packet after 60 % of its length on. (In the tail of a packet
    they can make a wrong picture that no decoder objects to: H.264 has no checksum.)
    """
    content = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        middle = min(p.pos for p in container.demux(video=0) if p.size and p.pos >= len(content) * 0.6)
    content[middle : middle + count] = bytes(count)
    return s.text(name, bytes(content))


def _irregular(s: Studio) -> list[int]:
    return sorted(random.Random(s.seed).sample(range(0, 4000, 20), 24))


def _sizes(s: Studio) -> Path:
    """A transport stream whose second half is of another size and has the times of the first again."""
    halves = s.film("1.ts", options={"bf": "0"}), s.film("2.ts", size=(48, 64), options={"bf": "0"})
    return s.text("sizes.ts", b"".join(half.read_bytes() for half in halves))


BF = {"bf": "2", "b_strategy": "0"}
PYRAMID = {"x264-params": "bframes=3:b-adapt=0:b-pyramid=normal:ref=4:open-gop=1:keyint=8:min-keyint=8:scenecut=0"}
X265 = {"x265-params": "log-level=none:pools=none:frame-threads=1:keyint=8:min-keyint=8:bframes=3:b-adapt=0"}
FASTSTART = {"movflags": "faststart"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}

KINDS: dict[str, Callable[[Studio], Path]] = {
    "h264": lambda s: s.film("a.mp4", options={"bf": "0"}),
    "h264 b-frames": lambda s: s.film("a.mp4", options={"bf": "3", "b_strategy": "0"}),
    "h264 open gop": lambda s: s.film("a.mp4", count=40, options=PYRAMID),
    "h264 interlaced": lambda s: s.film("a.mp4", options={**BF, "x264-params": "tff=1"}),
    "h264 mkv": lambda s: s.film("a.mkv", options=BF),
    "h264 flv": lambda s: s.film("a.flv", options=BF),
    "hevc": lambda s: s.film("a.mp4", count=40, codec="libx265", options=X265),
    "hevc ts": lambda s: s.film("a.ts", count=40, codec="libx265", options=X265),
    "hevc temporal layers": lambda s: s.film(
        "a.mkv", count=40, codec="libx265", options={"x265-params": X265["x265-params"] + ":temporal-layers=3"}
    ),
    "vp8": lambda s: s.film("a.webm", codec="libvpx", options={"deadline": "realtime", "cpu-used": "8"}),
    "vp9": lambda s: s.film(
        "a.webm", codec="libvpx-vp9", options={"cpu-used": "5", "lag-in-frames": "16", "auto-alt-ref": "1"}
    ),
    "av1": lambda s: s.film("a.mp4", codec="libsvtav1", options={"preset": "12", "svtav1-params": "lp=1"}),
    "mpeg4": lambda s: s.film("a.avi", codec="mpeg4", options={"bf": "2"}),
    "mjpeg": lambda s: s.film("a.avi", codec="mjpeg", pixels="yuvj420p"),
    "gif": lambda s: s.film("a.gif", codec="gif", pixels="rgb8"),
    "mpeg-ts": lambda s: s.film("a.ts", options=BF),
    "mpeg-ts open start": lambda s: s.part("b.ts", s.film("a.ts", options={**BF, "g": "9", "sc_threshold": "0"}), 0.2),
    "mpeg-ts truncated": lambda s: s.part("b.ts", s.film("a.ts", options=BF), 0.0, 0.6),
    "mpeg-ps": lambda s: s.film("a.mpg", codec="mpeg2video", options={"bf": "2"}),
    "mkv truncated": lambda s: s.part("b.mkv", s.film("a.mkv", options=BF), 0.0, 0.6),
    "raw h264": lambda s: s.film("a.h264", options=BF),
    "h264 avi": lambda s: s.film("a.avi", options=BF),
    "fragmented": lambda s: s.film("a.mp4", options=BF, container_options=FRAGMENTS),
    "edit list": lambda s: s.copy("b.mp4", s.film("a.mp4", options={**BF, "sc_threshold": "0"}), cut=17),
    "start offset": lambda s: s.copy("b.mkv", s.film("a.mp4", options=BF), shift=10),
    "negative start": lambda s: s.copy(
        "b.ts", s.film("a.mp4", options=BF), shift=-2, container_options={"avoid_negative_ts": "disabled"}
    ),
    "equal times": lambda s: s.film("a.mkv", rate=2600, options={"bf": "0"}),
    "times missing": lambda s: s.copy(
        "b.mkv", s.film("a.mp4", options={"bf": "0"}), shift=-2, container_options={"avoid_negative_ts": "disabled"}
    ),
    "vfr": lambda s: s.film("a.mp4", ticks=_irregular(s), options=BF),
    "vfr mkv": lambda s: s.film("a.mkv", ticks=_irregular(s), options=BF),
    "rotated 90": lambda s: s.film("a.mp4", rotation=90, options=BF),
    "rotated 180": lambda s: s.film("a.mp4", rotation=180, options=BF),
    "rotated 270 mkv": lambda s: s.film("a.mkv", rotation=-90, options=BF),
    "odd size": lambda s: s.film("a.mp4", size=(53, 97), pixels="yuv444p", options=BF),
    "10-bit h264": lambda s: s.film("a.mp4", pixels="yuv420p10le", options=BF),
    "10-bit hevc": lambda s: s.film("a.mp4", codec="libx265", pixels="yuv420p10le", options=X265),
    "tiny": lambda s: s.film("a.mp4", size=(16, 16), options=BF),
    "one frame": lambda s: s.film("a.mp4", count=1),
    "two streams": lambda s: s.copy("b.mkv", s.film("small.mp4", size=(32, 48), count=30), s.film("big.mp4")),
    "cover art": lambda s: _cover(s, "b.mp4", with_video=True),
    "empty": lambda s: s.text("a.mp4", b""),
    "text": lambda s: s.text("a.mp4", b"not a video\n" * 100),
    "random bytes": lambda s: s.text("a.mp4", random.Random(s.seed).randbytes(20_000)),
    "playlist": lambda s: s.text("a.mp4", b"ffconcat version 1.0\nfile part.ts\n"),
    "audio only": lambda s: s.sound("a.mp4"),
    "cover art only": lambda s: _cover(s, "b.mp4", with_video=False),
    "truncated": lambda s: s.part("b.mp4", s.film("a.mp4", options={"bf": "0"}), 0.0, 0.6),
    "truncated faststart": lambda s: s.part(
        "b.mp4", s.film("a.mp4", options={"bf": "0"}, container_options=FASTSTART), 0.0, 0.6
    ),
    "corrupt middle": lambda s: _overwritten(
        s, "b.mp4", s.film("a.mp4", options={"bf": "0"}, container_options=FASTSTART), 600
    ),
    "overlapping times": _sizes,
}
"""Kinds of files by name."""

FAULTS = {
    "empty": "VRLT-V02",
    "text": "VRLT-V02",
    "random bytes": "VRLT-V02",
    "playlist": "VRLT-V02",
    "audio only": "VRLT-V03",
    "cover art only": "VRLT-V03",
    "truncated": "VRLT-V02",
    "truncated faststart": "VRLT-V02",
    "corrupt middle": "VRLT-V02",
    "overlapping times": "VRLT-V07",
}
"""The kinds that can't be decoded in full, and the code that says so, from probing or from decoding all frames."""

PARTIAL = {"mpeg-ts truncated"}
"""Kinds whose last picture may be cut, and then is right, concealed or missing as chance has it."""


class Kinds(Mapping[str, Path]):
    """The files of :data:`KINDS`, each made when it is first asked for, in a folder of its own."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self._made = folder, seed, dict[str, Path]()

    def __getitem__(self, name: str) -> Path:
        if name not in self._made:
            home = self.folder / name.replace(" ", "-")
            home.mkdir()
            self._made[name] = KINDS[name](Studio(home, self.seed))
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(KINDS)

    def __len__(self) -> int:
        return len(KINDS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "good_kind" in metafunc.fixturenames:
        metafunc.parametrize("good_kind", [name for name in KINDS if name not in {*FAULTS, *PARTIAL}])
    if "faulty_kind" in metafunc.fixturenames:
        metafunc.parametrize("faulty_kind", list(FAULTS.items()), ids=list(FAULTS))


@pytest.fixture
def studio(tmp_path: Path, seed: int) -> Studio:
    return Studio(tmp_path, seed)


@pytest.fixture(scope="session")
def all_kinds(tmp_path_factory: pytest.TempPathFactory, session_seed: int) -> Kinds:
    return Kinds(tmp_path_factory.mktemp("kinds"), session_seed)


@pytest.fixture
def kinds(all_kinds: Kinds) -> Kinds:
    print(f"VRLT_TEST_SEED={all_kinds.seed} (of the films)")
    return all_kinds


@functools.lru_cache(maxsize=64)
def _plain_decode(path: Path, size: int, mtime_ns: int) -> tuple[np.ndarray, tuple[float, ...]]:
    av.logging.set_level(av.logging.PANIC)
    with av.open(str(path)) as container:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        stream = max(streams, key=lambda s: s.codec_context.width * s.codec_context.height)
        frames = [f for f in container.decode(stream) if not f.is_corrupt]
        base, rate = stream.time_base, stream.average_rate
        found = [np.rot90(f.to_ndarray(format="rgb24"), k=round(f.rotation / 90) % 4) for f in frames]
    ticks = [f.pts for f in frames]
    if None in ticks or sorted(ticks) != ticks:  # the container stores no presentation times
        times = tuple(i / float(rate) for i in range(len(frames)))
    else:
        times = tuple(float((tick - ticks[0]) * base) for tick in ticks)
    stack = np.stack(found)
    stack.flags.writeable = False
    return stack, times


def plain_decode(path: Path) -> tuple[np.ndarray, list[float]]:
    """All frames of one sequential decode of the largest video stream, upright, uint8 [n, H, W, 3] (read only), and
    their times in seconds from the first.
    """
    stat = path.stat()
    frames, times = _plain_decode(path, stat.st_size, stat.st_mtime_ns)
    return frames, list(times)


@pytest.fixture(scope="session")
def decoded():
    return plain_decode
