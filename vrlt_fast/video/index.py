"""What demuxing alone tells of a video file: presentation times, keyframes, rotation. Milliseconds, no decoding.

Frames are named by their number in presentation order, and matched by presentation time everywhere, never by counting.
Problems with a file are :class:`~vrlt_fast.errors.VideoError`; they cost a sample, not a run.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vrlt_fast.errors import Problem, VideoError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.container import InputContainer
    from av.video.stream import VideoStream

REENCODE = "re-encode it, for example: ffmpeg -i IN -c:v libx264 -pix_fmt yuv420p OUT.mp4, or remove its lines"
_INDIRECT = {"concat", "dash", "hls", "imf"}


@dataclass(frozen=True)
class Packets:
    """The video stream's packets in decode order, one entry each.

    ``ticks`` int64: presentation time in the file's time base; ``key`` bool: decoding can start here; ``droppable``
    bool: no other frame refers to it; ``shown`` bool: it gives a frame (not marked as discarded by the container).
    """

    ticks: np.ndarray
    key: np.ndarray
    droppable: np.ndarray
    shown: np.ndarray


@dataclass(frozen=True)
class VideoIndex:
    """A file's video stream.

    Presentation times in order: ``ticks`` int64 in units of ``time_base`` seconds, ``times`` float64 in seconds from
    the first. ``height`` and ``width`` are the coded picture's, before it is turned by ``rotation`` degrees
    (counter-clockwise: 0, 90, 180, 270). ``flags`` name what is awkward.
    """

    path: Path
    ticks: np.ndarray
    times: np.ndarray
    height: int
    width: int
    time_base: Fraction
    codec: str
    pixels: str
    rotation: int
    stream: int
    container: str
    packets: Packets
    flags: frozenset[str]

    @property
    def n_frames(self) -> int:
        return len(self.times)

    @property
    def fps(self) -> float:
        """Mean frame rate from the presentation times (the header's may be wrong); 1.0 for a single frame."""
        if self.n_frames < 2:
            return 1.0
        return float((self.n_frames - 1) / (self.times[-1] - self.times[0]))


def video_error(code: str, path: Path, what: str, why: str = "", fix: str = REENCODE) -> VideoError:
    return VideoError(Problem(code, what, where=str(path), why=why, fix=fix))


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The open file and its largest video stream, without decoder threads.

    Raises:
        VideoError: V01 missing, V02 empty, unreadable or a playlist, V03 no video stream, V04 unknown codec or size.
    """
    import av

    av.logging.set_level(av.logging.PANIC)
    if not path.is_file():
        raise video_error("VRLT-V01", path, "video file missing", fix="check data.root, or remove its lines")
    if path.stat().st_size == 0:
        raise video_error("VRLT-V02", path, "video file is empty")
    try:
        container = av.open(str(path), mode="r", metadata_errors="replace", options={"protocol_whitelist": "file"})
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise video_error("VRLT-V02", path, "not a readable video file", str(error)) from None
    try:
        if _INDIRECT & set(container.format.name.split(",")):
            raise video_error("VRLT-V02", path, "not a video file", "it is a playlist, which names other files")
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise video_error("VRLT-V03", path, "file has no video stream")
        stream = max(streams, key=lambda s: s.codec_context.width * s.codec_context.height)
        if stream.codec_context is None or stream.codec_context.width <= 0:
            raise video_error("VRLT-V04", path, "video has no decodable frames", "its codec or frame size is unknown")
        stream.thread_type = "NONE"
        yield container, stream
    finally:
        container.close()


def probe(path: Path) -> VideoIndex:
    """Index a file by demuxing, without decoding.

    Raises:
        VideoError: V01 missing, V02 unreadable, V03 no video stream, V04 no frames.
    """
    import av

    with open_video(path) as (container, stream):
        try:
            rows = [
                (p.pts, bool(p.is_keyframe), not p.is_discard)
                for p in container.demux(stream)
                if p.size and p.pts is not None
            ]
        except (av.error.FFmpegError, ValueError) as error:
            raise video_error("VRLT-V02", path, "file can't be read to its end", str(error)) from None
        packets = Packets(
            np.array([r[0] for r in rows], dtype=np.int64),
            np.array([r[1] for r in rows], dtype=bool),
            np.zeros(len(rows), dtype=bool),
            np.array([r[2] for r in rows], dtype=bool),
        )
        ticks = np.unique(packets.ticks[packets.shown])
        if not len(ticks):
            raise video_error("VRLT-V04", path, "video has no decodable frames", "no packet has a presentation time")
        base = stream.time_base or Fraction(0)
        times = (ticks - ticks[0]).astype(np.float64) * float(base)
        context = stream.codec_context
        return VideoIndex(
            path=path,
            ticks=ticks,
            times=times,
            height=context.height,
            width=context.width,
            time_base=base,
            codec=context.name,
            pixels=context.pix_fmt or "",
            rotation=0,
            stream=stream.index,
            container=container.format.name,
            packets=packets,
            flags=frozenset(),
        )
