"""The embedded decoder: PyAV on the CPU, one thread, every codec that its FFmpeg knows.

Exactness: decoding starts at a packet that was recognised by its presentation time, frames are matched by presentation
time, and frames that depend on a damaged one are taken for missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from time import thread_time
from typing import TYPE_CHECKING

import numpy as np

from vrlt_fast.video.backends.base import Availability, DecodeStats, OnError, Sink, decode_all
from vrlt_fast.video.ffmpeg_log import reason_of
from vrlt_fast.video.index import NO_TICK, VideoIndex, open_video
from vrlt_fast.video.plan import DecodePlan, Segment, frame_rows, is_counted

if TYPE_CHECKING:
    import torch
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter
    from av.video.stream import VideoStream

    VideoPacket = Packet[VideoStream]

_READ_ON = 64
"""Packets that are read and thrown away rather than jumped over by a seek."""
_BACK_OFFS = 4


class Cancelled(Exception):
    """The caller doesn't want the result any more."""


def upright(frame: VideoFrame, reformatter: VideoReformatter) -> torch.Tensor:
    """A frame as uint8 [H, W, 3] RGB, turned as the file says. A view of the converted frame where it isn't turned."""
    import torch

    picture = reformatter.reformat(frame, format="rgb24", threads=1)
    plane = picture.planes[0]
    shape, strides = (picture.height, picture.width, 3), (plane.line_size, 3, 1)
    array: np.ndarray = np.ndarray(shape, np.uint8, buffer=memoryview(plane), strides=strides)
    turns = round(frame.rotation / 90) % 4
    return torch.from_numpy(np.ascontiguousarray(np.rot90(array, k=turns)) if turns else array)


def tick_of(packet: VideoPacket) -> int:
    return NO_TICK if packet.pts is None else packet.pts


class _Reader:
    """Packets of one open file by their row in the index."""

    def __init__(self, container: InputContainer, stream: VideoStream, index: VideoIndex):
        self.container, self.stream, self.index = container, stream, index
        self.row: int | None = 0
        self.why = ""
        self._packets = container.demux(stream)

    def next(self) -> VideoPacket | None:
        """The next packet with data; None at the end, or where the file can't be read on."""
        import av

        try:
            for packet in self._packets:
                if packet.size:
                    return packet
        except (av.error.FFmpegError, ValueError) as error:
            self.why = reason_of(error)
        return None

    def start(self, row: int) -> VideoPacket | None:
        """The packet of this row; None where the file can't be positioned there."""
        if self.row is not None and self.row <= row <= self.row + _READ_ON:
            packet = self.next()
            if packet is not None and tick_of(packet) == self.index.packets.ticks[self.row]:
                return self._read_to(packet, self.row, row)
        keys = np.flatnonzero(self.index.packets.key[: row + 1])
        for key in keys[::-1][:_BACK_OFFS].tolist():
            packet = self._seek(int(self.index.packets.ticks[key]))
            found = -1 if packet is None else self._row(packet)
            if packet is not None and 0 <= found <= row:
                return self._read_to(packet, found, row)
        self.row = None
        return None

    def follow(self, row: int) -> VideoPacket | None:
        """The packet of ``row``, which comes next; None where the file doesn't agree with its index."""
        packet = self.next()
        if packet is None or tick_of(packet) != self.index.packets.ticks[row]:
            self.row = None
            return None
        self.row = row + 1
        return packet

    def _read_to(self, packet: VideoPacket, at: int, row: int) -> VideoPacket | None:
        found: VideoPacket | None = packet
        self.row = at + 1
        for later in range(at + 1, row + 1):
            found = self.follow(later)
            if found is None:
                return None
        return found

    def _seek(self, tick: int) -> VideoPacket | None:
        import av

        try:
            self.container.seek(tick, stream=self.stream)
        except (av.error.FFmpegError, ValueError):
            return None
        self._packets = self.container.demux(self.stream)
        return self.next()

    def _row(self, packet: VideoPacket) -> int:
        """Its row where its time occurs once in the file, else -1."""
        if packet.pts is None:
            return -1
        rows = np.flatnonzero(self.index.packets.ticks == packet.pts)
        return int(rows[0]) if len(rows) == 1 else -1


class _Attempt:
    """One pass over a plan with one open file."""

    def __init__(
        self,
        plan: DecodePlan,
        stands_for: Mapping[int, Sequence[int]],
        sink: Sink,
        cancelled: Callable[[], bool] | None,
    ):
        from av.video.reformatter import VideoReformatter

        self.index, self.plan, self.stands_for, self.sink = plan.index, plan, stands_for, sink
        self.cancelled = cancelled
        self.seconds = {"demux": 0.0, "decode": 0.0, "convert": 0.0, "patchify": 0.0}
        self.stats = DecodeStats(seconds=self.seconds)
        self.given: set[int] = set()
        self.seen: set[int] = set()
        self._reformatter = VideoReformatter()
        self._counted = is_counted(self.index)
        self._bad = np.zeros(len(self.index.packets.ticks) + 1, dtype=bool)
        self._clock = thread_time()
        self._count = 0

    def _spent(self, stage: str) -> None:
        now = thread_time()
        self.seconds[stage] += now - self._clock
        self._clock = now

    def run(self) -> DecodeStats:
        with open_video(self.index.path) as (container, stream):
            reader = _Reader(container, stream, self.index)
            self._spent("demux")
            for number, segment in enumerate(self.plan.segments):
                if number:
                    stream.codec_context.flush_buffers()
                targets = frozenset(segment.targets)
                for frame in self._frames(reader, segment, targets):
                    self._take(frame, targets)
            self._fault(reader.why)
        tainted = self._tainted()
        self.stats.missing = tuple(sorted(set(self.plan.frames) - (self.given - tainted)))
        self.stats.intact = tuple(sorted(self.seen - tainted)) if self.plan.whole else ()
        return self.stats

    def _fault(self, why: str) -> None:
        self.stats.why = self.stats.why or why

    def _frames(self, reader: _Reader, segment: Segment, targets: Set[int]) -> Iterator[VideoFrame]:
        context = reader.stream.codec_context
        start, stop = int(segment.packets[0]), int(segment.packets[-1]) + 1
        if start == 0 and len(self.plan.segments) == 1:
            packets = self._from_start(reader, segment, stop)
        else:
            packets = self._from_key(reader, segment, start, stop)
        for row, packet in packets:
            self._spent("demux")
            if self.cancelled is not None and self.cancelled():
                raise Cancelled
            yield from self._decoded(context.decode, packet, row)
            if not self.plan.whole and self.given >= targets:
                return
        yield from self._decoded(context.decode, None, stop - 1)

    def _from_key(self, reader: _Reader, segment: Segment, start: int, stop: int) -> Iterator[tuple[int, VideoPacket]]:
        fed = np.zeros(stop - start, dtype=bool)
        fed[segment.packets - start] = True
        packet = reader.start(start)
        for row, feed in enumerate(fed.tolist(), start):
            if row > start:
                packet = reader.follow(row)
            if packet is None:
                return
            if feed:
                yield row, packet
            else:
                self.stats.dropped += 1

    def _from_start(self, reader: _Reader, segment: Segment, stop: int) -> Iterator[tuple[int, VideoPacket]]:
        """Every packet of the file, also those that the index doesn't have, but for those left out."""
        ticks, fed, row = self.index.packets.ticks, set(segment.packets.tolist()), 0
        total = len(ticks)
        while (row < stop or self._counted) and (packet := reader.next()) is not None:
            known = row < total and (self._counted or tick_of(packet) == ticks[row])
            if known and row not in fed and row < stop:
                self.stats.dropped += 1
            else:
                yield min(row, total - 1), packet
            row += known
        reader.row = None

    def _decoded(
        self,
        decode: Callable[[VideoPacket | None], list[VideoFrame]],
        packet: VideoPacket | None,
        row: int,
    ) -> Iterator[VideoFrame]:
        import av

        try:
            frames = decode(packet)
        except av.error.EOFError:
            return
        except (av.error.FFmpegError, ValueError) as error:
            self._fault(reason_of(error))
            self._damage(row)
            return
        finally:
            self._spent("decode")
        self.stats.decoded += len(frames)
        yield from frames

    def _damage(self, row: int) -> None:
        """From this packet on to the next keyframe, pictures may refer to one that is damaged."""
        packets = self.index.packets
        if self._counted:  # which frame it would have been isn't known, nor the numbers of those after it
            self._bad[self._count :] = True
            return
        if packets.droppable[row]:
            self._bad[row] = True
            return
        later = np.flatnonzero(packets.key[row + 1 :])
        stop = row + 1 + int(later[0]) if len(later) else len(packets.ticks)
        self._bad[row:stop] = True
        if len(later):  # pictures shown before that keyframe but stored behind it
            end = row + 1 + int(later[1]) if len(later) > 1 else len(packets.ticks)
            self._bad[stop:end] |= packets.ticks[stop:end] < packets.ticks[stop]

    def _tainted(self) -> set[int]:
        """Frames given or seen whose packet is among the damaged."""
        if not self._bad.any():
            return set()
        rows = np.arange(self.index.n_frames) if self._counted else frame_rows(self.index)
        numbers = np.flatnonzero(self._bad[rows] & (rows >= 0))
        return set(numbers.tolist()) & (self.given | self.seen)

    def _take(self, frame: VideoFrame, targets: Set[int]) -> None:
        number = self._number(frame)
        if number is None:
            return
        if frame.is_corrupt:
            self._fault("the decoder concealed damaged parts of a picture")
            self._damage(0 if self._counted else max(int(frame_rows(self.index)[number]), 0))
            return
        self.seen.add(number)
        if number not in targets:
            return
        picture = upright(frame, self._reformatter)
        self._spent("convert")
        for name in self.stands_for[number]:
            self.sink(name, picture)
        self.given.add(number)
        self._spent("patchify")

    def _number(self, frame: VideoFrame) -> int | None:
        """The frame's number; None where the index doesn't have it."""
        if not self._counted:
            if frame.pts is None:
                return None
            number = int(np.searchsorted(self.index.ticks, frame.pts))
            return number if number < self.index.n_frames and self.index.ticks[number] == frame.pts else None
        if frame.is_corrupt and not self._count and "open_start" in self.index.flags:
            return None  # the index doesn't have what comes before the first keyframe
        self._count += 1
        return self._count - 1 if self._count <= self.index.n_frames else None


class PyAVBackend:
    """PyAV. In ``tolerant`` mode the nearest frame that decodes stands in for one that doesn't."""

    name = "pyav"
    device = "cpu"
    isolate = False

    def __init__(self, on_error: OnError = "strict"):
        self.on_error = on_error

    def availability(self) -> Availability:
        """See :class:`~vrlt_fast.video.backends.base.Backend`."""
        try:
            import av  # noqa: F401
        except ImportError as error:
            return Availability(False, str(error), 'pip install "vrlt-fast[train]"')
        return Availability(True)

    def supports(self, index: VideoIndex) -> str:
        """See :class:`~vrlt_fast.video.backends.base.Backend`; every file that can be indexed is worth a try."""
        return ""

    def decode(self, plan: DecodePlan, sink: Sink) -> DecodeStats:
        """See :class:`~vrlt_fast.video.backends.base.Backend`."""
        return decode_all(plan, lambda part, names: self.attempt(part, names, sink), self.on_error)

    def attempt(
        self,
        plan: DecodePlan,
        stands_for: Mapping[int, Sequence[int]],
        sink: Sink,
        cancelled: Callable[[], bool] | None = None,
    ) -> DecodeStats:
        """One pass over the plan: what can't be decoded is listed in the result's ``missing``.

        Args:
            stands_for: the numbers under which each frame of the plan goes to ``sink``.
            cancelled: asked before each packet.

        Raises:
            VideoError: the file can't be opened (V01 to V04); whatever ``sink`` raises.
            Cancelled: ``cancelled`` said so.
        """
        return _Attempt(plan, stands_for, sink, cancelled).run()
