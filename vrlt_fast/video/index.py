"""What demuxing alone tells of a video file: presentation times, keyframes, droppable packets. It takes milliseconds;
one frame is decoded where the file hints at a rotation.

Frames are named by their number in presentation order, and matched by presentation time everywhere. Only where a file
has no usable times (flag "no_pts") they are counted in a sequential decode.
Problems with a file are :class:`~vrlt_fast.errors.VideoError`; they cost a sample, not a run.
"""

from __future__ import annotations

import stat
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vrlt_fast.errors import Problem, VideoError
from vrlt_fast.video.ffmpeg_log import Line, ffmpeg_log, reason_of
from vrlt_fast.video.headers import exact, largest_hole, may_be_turned, promised_bytes
from vrlt_fast.video.nal import READERS, Picture, droppable, length_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.container import InputContainer
    from av.video.stream import VideoStream

REENCODE = "re-encode it, for example: ffmpeg -i IN -c:v libx264 -pix_fmt yuv420p OUT.mp4, or remove its lines"
NO_TICK = np.iinfo(np.int64).min
"""Stands in :class:`Packets` for a presentation time that isn't known."""
_INDIRECT = {"concat", "dash", "hls", "imf"}
_NO_SEEK = {"mpegts", "mpegtsraw", "mpeg", "h264", "hevc", "h263", "m4v", "mpegvideo", "vc1", "cavsvideo", "obu", "gif"}
_TIMED_BY_PES = {"mpegts", "mpegtsraw", "mpeg"}
_TIMEOUT_S = 10.0
_HOLE = 32 << 20
"""Bytes never written that are too many: reading on for the next packet would take seconds."""
_MATRICES = {0: "rgb", 1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}


@dataclass(frozen=True)
class Packets:
    """The video stream's packets that have content, in decode order, one entry each.

    ``ticks`` int64: presentation time in the file's time base, ``NO_TICK`` where unknown, made up with the flag
    "no_pts"; ``key`` bool: decoding can start here, and gives the exact frames that are shown at its time or later;
    ``droppable`` bool: no other frame refers to it; ``shown`` bool: it gives a frame (not marked as discarded by the
    container, and decodable, other than what leads the first keyframe).
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
    (counter-clockwise: 0, 90, 180, 270). ``matrix`` (bt601, bt709, bt2020, ..., unspecified) and ``full_range`` say how
    its colours are coded. ``duration``: seconds from the first frame to the end of the last.

    ``flags`` name what is awkward:
    no_pts: times are missing or equal; frames are counted in a sequential decode, ``ticks`` only order them;
    missing_pts, equal_pts: why, where only some are;
    no_seek: a seek in this container isn't exact;
    discontinuity: times leap, or decode times fall slightly;
    truncated: the file is shorter than it ought to be; demux_error: it can't be read to its end;
    damaged: some packets hold no picture, or the container calls them corrupt;
    vfr: uneven times; edit_list: some packets aren't shown; open_start: it begins with packets that can't be decoded;
    interlaced; size_change: its parameter sets change, so the frame size may.
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
    matrix: str = "unspecified"
    full_range: bool = False
    duration: float = 0.0

    @property
    def n_frames(self) -> int:
        return len(self.times)

    @property
    def fps(self) -> float:
        """Mean frame rate from the presentation times (the header's may be wrong); 1.0 where all are equal."""
        if self.n_frames < 2 or self.times[-1] <= self.times[0]:
            return 1.0
        return float((self.n_frames - 1) / (self.times[-1] - self.times[0]))


def video_error(code: str, path: Path, what: str, why: str = "", fix: str = REENCODE) -> VideoError:
    return VideoError(Problem(code, what, where=str(path), why=why, fix=fix))


def _why(error: Exception, lines: list[Line]) -> str:
    """FFmpeg's reason and the last line that it would have printed, without the path."""
    import av

    if isinstance(error, av.error.ExitError):
        return f"reading took longer than {_TIMEOUT_S:g} s"
    return reason_of(error, lines)


def _check_holes(path: Path) -> None:
    try:
        start, length = largest_hole(path)
    except OSError as error:
        raise video_error("VRLT-V02", path, "video file can't be read", error.strerror or str(error)) from None
    if length >= _HOLE:
        why = f"{length} bytes from byte {start} on were never written: a download or copy that was broken off"
        raise video_error("VRLT-V02", path, "video file has a hole", why)


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The open file and its largest video stream, without decoder threads.

    Raises:
        VideoError: V01 missing, V02 empty, unreadable or a playlist, V03 no video stream, V04 unknown codec or size.
    """
    import av

    try:
        status = path.stat()
    except OSError as error:
        raise video_error(
            "VRLT-V01", path, "video file missing", error.strerror or "", "check data.root, or remove its lines"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise video_error("VRLT-V02", path, "not a video file", "it is no regular file")
    if status.st_size == 0:
        raise video_error("VRLT-V02", path, "video file is empty")
    _check_holes(path)
    # PyAV 19 has no such argument
    more: Any = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
    with ffmpeg_log() as lines:
        try:
            container = av.open(
                f"file:{path}",
                mode="r",
                options={"protocol_whitelist": "file"},
                timeout=_TIMEOUT_S,
                **more,
            )
        except (av.error.FFmpegError, ValueError, OSError) as error:
            raise video_error("VRLT-V02", path, "not a readable video file", _why(error, lines)) from None
    try:
        if _INDIRECT & set(container.format.name.split(",")):
            raise video_error("VRLT-V02", path, "not a video file", "it is a playlist, which names other files")
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise video_error("VRLT-V03", path, "file has no video stream")
        known = [s for s in streams if s.codec_context is not None and s.codec_context.width > 0]
        if not known:
            raise video_error("VRLT-V04", path, "video has no decodable frames", "its codec or frame size is unknown")
        stream = max(known, key=lambda s: s.codec_context.width * s.codec_context.height)
        stream.thread_type = "NONE"
        yield container, stream
    finally:
        container.close()


@dataclass
class _Demuxed:
    """Columns of packets in decode order, and what was said along the way."""

    pts: list[int | None]
    dts: list[int | None]
    key: list[bool]
    discard: list[bool]
    pictures: list[Picture | None]
    flags: set[str]
    first: bytes = b""
    length: int = 0  # ticks of the last packet in presentation order
    error: str = ""


def _demux(container: InputContainer, stream: VideoStream, lines: list[Line]) -> _Demuxed:
    import av

    context = stream.codec_context
    read = READERS.get(context.name)
    size = length_size(context.name, context.extradata) if read else 0
    found, corrupt, last = _Demuxed([], [], [], [], [], set()), False, NO_TICK
    try:
        for packet in container.demux(stream):
            corrupt = packet.is_corrupt or (corrupt and not packet.size)
            if not packet.size:
                continue
            key, pts = bool(packet.is_keyframe), packet.pts
            if not found.pts:
                found.first = bytes(packet)
            found.pts.append(pts)
            found.dts.append(packet.dts)
            found.key.append(key)
            found.discard.append(bool(packet.is_discard))
            found.pictures.append(read(memoryview(packet), size, key=key) if read else None)
            if packet.is_corrupt or (size and found.pictures[-1] is None):
                found.flags.add("damaged")
            if pts is not None and pts > last:
                last, found.length = pts, packet.duration or 0
    except (av.error.FFmpegError, ValueError, IndexError) as error:  # IndexError: a stream that the header doesn't name
        found.flags.add("demux_error")
        found.error = _why(error, lines)
    # the sample table of a MP4 says how many packets there are
    if "mp4" in container.format.name.split(",") and (
        corrupt or len(getattr(stream, "index_entries", ())) > len(found.pts)
    ):
        found.flags.add("truncated")
        found.error = found.error or "it ends before its last frames: a broken download or copy"
        if corrupt:
            found.discard[-1] = True
    return found


def _first_key(found: _Demuxed) -> tuple[np.ndarray, int]:
    """Where decoding can start, and the first such packet."""
    said = np.array(found.key, dtype=bool)
    key = said & np.array([picture is None or picture.start for picture in found.pictures], dtype=bool)
    for candidate in (key, said):
        if candidate.any():
            return candidate, int(candidate.argmax())
    said[0] = True
    return said, 0


def _shown(found: _Demuxed, pts: np.ndarray, first: int, *, cut: bool) -> np.ndarray:
    """Which packets give a frame. ``cut``: the container is one that recordings begin in anywhere; in others, packets
    before the first keyframe are damage, and keep their place and time.
    """
    shown = ~np.array(found.discard, dtype=bool)
    if cut:
        shown[:first] = False
    picture = found.pictures[first]
    if pts[first] != NO_TICK and (picture is None or picture.leading):
        # shown before the first keyframe, so they may refer to pictures that the file doesn't hold
        shown &= (pts >= pts[first]) | (pts == NO_TICK)
    return shown


def _check_timeline(path: Path, dts: np.ndarray, flags: set[str]) -> None:
    """Decode times never fall in a sound file; a little is a careless muxer, more is a second timeline."""
    known = dts[dts != NO_TICK]
    steps = np.diff(known)
    if not (steps < 0).any():
        return
    if -steps.min() >= max(float(np.median(np.abs(steps))), 1.0):
        raise video_error("VRLT-V07", path, "its timeline starts again in the middle", "several recordings in one file")
    flags.add("discontinuity")


def _synthetic(count: int, dts: np.ndarray, stream: VideoStream) -> np.ndarray:
    """Ticks for frames that have none: the decode times where they serve, else even ones at the header's rate."""
    ordered = np.sort(dts)
    if len(ordered) and ordered[0] != NO_TICK and (np.diff(ordered) > 0).all():
        return ordered
    rate = exact(stream.average_rate or stream.guessed_rate or Fraction(25))
    step = 1 / (rate * exact(stream.time_base)) if stream.time_base else Fraction(1)
    return np.array([round(i * step) for i in range(count)], dtype=np.int64)


def _ticks(
    path: Path, container: InputContainer, stream: VideoStream, found: _Demuxed, first: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ticks in presentation order, ticks of packets, and which packets are shown. Adds to ``found.flags``.

    Raises:
        VideoError: V04 when no packet is shown, V07.
    """
    pts, dts = (
        np.array([NO_TICK if x is None else x for x in values], dtype=np.int64) for values in (found.pts, found.dts)
    )
    flags, names = found.flags, set(container.format.name.split(","))
    _check_timeline(path, dts, flags)
    shown = _shown(found, pts, first, cut=bool(names & _NO_SEEK))
    missing = pts == NO_TICK
    if missing.any() and not missing.all() and names & _TIMED_BY_PES:
        flags.add("missing_pts")  # the second field of a picture has no time of its own
        shown &= ~missing
    elif missing.any():
        flags |= {"no_pts"} if missing.all() else {"no_pts", "missing_pts"}
    elif stream.codec_context.has_b_frames and (
        "asf" in names or ("avi" in names and stream.codec_context.name in READERS)
    ):
        flags.add("no_pts")  # these store decode times only, what FFmpeg makes of them is wrong
    if not shown.any():
        raise video_error("VRLT-V04", path, "video has no decodable frames", "no packet is shown")
    if "no_pts" in flags:
        ticks = _synthetic(int(shown.sum()), dts[shown], stream)
        pts = np.full(len(pts), NO_TICK, dtype=np.int64)
        pts[shown] = ticks
        return ticks, pts, shown
    ticks = np.sort(pts[shown])
    if (np.diff(ticks) == 0).any():
        flags |= {"no_pts", "equal_pts"}
    return ticks, pts, shown


def _describe(path: Path, container: InputContainer, stream: VideoStream, found: _Demuxed, ticks: np.ndarray) -> None:
    """Flags that need no decision."""
    flags, names = found.flags, set(container.format.name.split(","))
    steps = np.diff(ticks)
    if names & _NO_SEEK:
        flags.add("no_seek")
    if any(found.discard):
        flags.add("edit_list")
    if stream.codec_context.field_order > 1:
        flags.add("interlaced")
    if len({unit for picture in found.pictures if picture for unit in picture.setup}) > 1:
        flags.add("size_change")
    if promised_bytes(path) > path.stat().st_size:
        flags.add("truncated")
    if len(steps):
        usual, most = float(np.median(steps)), float(steps.max())
        if most > 1.5 * usual or float(steps.min()) < 0.5 * usual:
            flags.add("vfr")
        if names & _TIMED_BY_PES and most > 10 * usual and most * float(stream.time_base or 0) > 1:
            flags.add("discontinuity")


def _rotation(path: Path) -> int:
    """Degrees by which the first decoded frame is to be turned, counter-clockwise."""
    import av

    with open_video(path) as (container, stream):
        try:
            for frame in container.decode(stream):
                return round(frame.rotation / 90) % 4 * 90
        except (av.error.FFmpegError, ValueError):
            pass
    return 0


def probe(path: Path, *, damaged: bool = False) -> VideoIndex:
    """Index a file by demuxing. With ``damaged``, also one that can be read only in part, as far as it can.

    Raises:
        VideoError: V01 missing, V02 unreadable or (unless ``damaged``) cut off, V03 no video stream, V04 no frames, V07
            several timelines.
    """
    with open_video(path) as (container, stream):
        with ffmpeg_log() as lines:
            found = _demux(container, stream, lines)
        if found.error and not (damaged and found.pts):
            raise video_error("VRLT-V02", path, "file can't be read to its end", found.error)
        if not found.pts:
            raise video_error("VRLT-V04", path, "video has no decodable frames", "it has no packets")
        key, first = _first_key(found)
        ticks, packet_ticks, shown = _ticks(path, container, stream, found, first)
        if not shown[:first].all() and first:
            found.flags.add("open_start")
        _describe(path, container, stream, found, ticks)
        base = exact(stream.time_base or Fraction(1))
        context, codec = stream.codec_context, stream.codec_context.codec.canonical_name
        drop = np.array(droppable(found.pictures), dtype=bool)
        if found.flags & {"missing_pts", "no_pts"}:
            drop[:] = False  # a picture may be spread over packets, or be counted
        turned = any(p.turned for p in found.pictures if p) or may_be_turned(
            path, container.format.name, codec, found.first
        )
        times = (ticks - ticks[0]).astype(np.float64) * float(base)
        length = found.length * float(base) or (times[-1] / (len(times) - 1) if len(times) > 1 else 0.0)
        return VideoIndex(
            path=path,
            ticks=ticks,
            times=times,
            height=context.height,
            width=context.width,
            time_base=base,
            codec=codec,
            pixels=context.pix_fmt or "",
            rotation=_rotation(path) if turned else 0,
            stream=stream.index,
            container=container.format.name,
            packets=Packets(packet_ticks, key, drop, shown),
            flags=frozenset(found.flags),
            matrix=_MATRICES.get(int(stream.colorspace), "unspecified"),
            full_range=int(stream.color_range) == 2 or (context.pix_fmt or "").startswith("yuvj"),
            duration=float(times[-1] + length),
        )
