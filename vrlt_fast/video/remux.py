"""A decode plan's segments as small files in memory, for decoders that read files themselves. Nothing is re-encoded.

Each file holds the packets of one segment and is shown at a constant rate from time 0, one picture every
``1 / RATE`` seconds. So what such decoders get wrong (start offsets, edit lists, variable rates, transport streams, a
rotation that only some apply) isn't in the files, and the place of a picture in one is also its time there.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from vrlt_fast.video.ffmpeg_log import reason_of
from vrlt_fast.video.index import VideoIndex, open_video, video_error
from vrlt_fast.video.plan import DecodePlan, Segment

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

RATE = 25
"""Pictures a second of the files; 1000 is a multiple, because Matroska counts milliseconds."""
CODECS = ("av1", "h264", "hevc", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9")
_BLOCKING = {
    "no_pts": "has no presentation times",
    "missing_pts": "lacks some presentation times",
    "discontinuity": "has presentation times that leap",
    "size_change": "changes its frame size",
    "demux_error": "can't be read to its end",
    "damaged": "is damaged",  # which these decoders may hide
    "truncated": "is cut off",
}
_JUMP = 512  # packets that are rather read than jumped over
_TICK = Fraction(1, 1000)
_OPTIONS = {"avoid_negative_ts": "disabled", "fflags": "+bitexact"}  # times as given, no random identifiers
_STEP = 1000 // RATE


@dataclass(frozen=True)
class Remuxed:
    """One file in memory.

    ``targets`` are frame numbers of the index, ascending; ``places`` where each stands in the file in presentation
    order, so that its time there is ``place / RATE`` seconds. ``pictures`` in all; ``dropped``: packets of the run that
    are left out.
    """

    data: bytes
    targets: tuple[int, ...]
    places: tuple[int, ...]
    pictures: int
    dropped: int


def obstacle(index: VideoIndex) -> str:
    """Why the file can't be handed over in parts; empty where it can."""
    packets = index.packets
    if index.codec not in CODECS:
        return f"its codec is {index.codec}"
    reasons = [reason for flag, reason in _BLOCKING.items() if flag in index.flags]
    if reasons:
        return f"the file {reasons[0]}"
    if len(np.unique(packets.ticks)) != len(packets.ticks):
        return "packets share a presentation time"
    if index.codec in ("vp8", "vp9", "av1") and not packets.shown.all():
        return "it has pictures that aren't shown"
    return ""


def remux(plan: DecodePlan, *, container: str = "matroska") -> Iterator[Remuxed]:
    """The plan's segments, one file each, in order of their rows. One pass over the source.

    Args:
        container: "matroska" (all of `CODECS`) or "mp4" (not VP8).

    Raises:
        VideoError: as :func:`~vrlt_fast.video.index.open_video`; V02 where the file can't be read, has changed since it
            was indexed, or can't be written in this container; V05 where a target has no packet.
    """
    import av

    index = plan.index
    wanted = sorted(((_kept(index, segment), segment) for segment in plan.segments), key=lambda pair: pair[0][-1])
    rows = np.unique(np.concatenate([kept for kept, _ in wanted]))
    with open_video(index.path) as (_, template):
        held: dict[int, bytes] = {}
        try:
            for row, packet in _walk(index, rows):
                held[row] = bytes(packet)
                while wanted and wanted[0][0][-1] <= row:
                    kept, segment = wanted.pop(0)
                    yield _file(index, segment, kept, [held[int(r)] for r in kept], template, container)
                    first = min((int(rest[0]) for rest, _ in wanted), default=row + 1)
                    held = {r: data for r, data in held.items() if r >= first}
        except (av.error.FFmpegError, ValueError) as error:
            raise video_error("VRLT-V02", index.path, "its packets can't be copied", reason_of(error)) from None
    if wanted:
        raise video_error("VRLT-V02", index.path, "video file ends before its index does", "it has changed")


def _kept(index: VideoIndex, segment: Segment) -> np.ndarray:
    """Rows of the segment that a decoder which starts with it gives a picture for.

    Packets before its first keyframe, and those after it that are shown before it, refer to pictures that aren't there:
    some decoders skip them and others count them.
    """
    rows = np.asarray(segment.packets, dtype=np.int64)
    keys = np.flatnonzero(index.packets.key[rows])
    if not len(keys):
        return rows
    ticks = index.packets.ticks[rows]
    starts = np.arange(len(rows)) >= keys[0]
    targets = np.isin(ticks, index.ticks[list(segment.targets)])
    kept: np.ndarray = rows[targets | (starts & (ticks >= ticks[keys[0]]))]
    return kept


def _walk(index: VideoIndex, rows: np.ndarray, *, jump: bool = True) -> Iterator[tuple[int, Packet[VideoStream]]]:
    """The packets of these rows, ascending. Where the next one is far, a keyframe before it is sought; if the file
    doesn't lead where the index says, it is read from its start.
    """
    jump = jump and not index.flags & {"no_seek", "no_pts"}
    ticks, keys = index.packets.ticks, np.flatnonzero(index.packets.key)
    done = 0
    with open_video(index.path) as (container, stream):
        position, packets = 0, _numbered(stream, container)
        while done < len(rows):
            row = int(rows[done])
            before = keys[keys <= row]
            if jump and len(before) and int(before[-1]) - position > _JUMP:
                container.seek(int(ticks[before[-1]]), stream=stream)
                packets = _numbered(stream, container)
                head = next(packets, None)
                landed = [] if head is None else np.flatnonzero(ticks == head.pts).tolist()
                if len(landed) != 1 or landed[0] > row:
                    break
                position = landed[0]
            else:
                head = next(packets, None)
            while head is not None and position < row:
                head, position = next(packets, None), position + 1
            if head is None or head.pts != ticks[row]:
                break
            yield row, head
            done, position = done + 1, row + 1
    if done < len(rows):
        if not jump:
            raise video_error("VRLT-V02", index.path, "video file doesn't match its index", "it has changed")
        yield from _walk(index, rows[done:], jump=False)


def _numbered(stream: VideoStream, container: InputContainer) -> Iterator[Packet[VideoStream]]:
    """What the index counts as packets, from the reader's position on."""
    for packet in container.demux(stream):
        if packet.size:
            yield packet


def _file(
    index: VideoIndex,
    segment: Segment,
    rows: np.ndarray,
    packets: list[bytes],
    template: VideoStream,
    container: str,
) -> Remuxed:
    import av

    ticks = index.packets.ticks[rows]
    place = np.empty(len(rows), dtype=np.int64)
    place[np.argsort(ticks, kind="stable")] = np.arange(len(rows))
    found = dict(zip(ticks.tolist(), place.tolist(), strict=True))
    targets = [int(index.ticks[frame]) for frame in segment.targets]
    if not found.keys() >= set(targets):
        raise video_error("VRLT-V05", index.path, "a frame asked for has no packet of its own")
    late = max(0, int((np.arange(len(rows)) - place).max()))
    out = io.BytesIO()
    with av.open(out, "w", format=container, options=_OPTIONS) as file:
        # opaque: a codec with a decoder but no encoder of the same name will do
        stream = file.add_stream_from_template(template, opaque=True)
        stream.time_base = _TICK
        if index.rotation:
            stream.set_display_rotation(0)
        for turn, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, _TICK
            packet.pts, packet.dts, packet.duration = int(place[turn]) * _STEP, (turn - late) * _STEP, _STEP
            packet.is_keyframe = turn == 0  # nobody shall seek within: what is counted behind an open GOP is wrong
            file.mux(packet)
    dropped = segment.dropped + len(segment.packets) - len(rows)
    return Remuxed(out.getvalue(), tuple(segment.targets), tuple(found[tick] for tick in targets), len(rows), dropped)
