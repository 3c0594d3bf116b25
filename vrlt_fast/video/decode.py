"""Video files to RGB frames, matched by presentation time.

PyAV, one sequential pass: every frame up to the last one asked for is decoded, so the frames returned are those that a
plain sequential decode gives. Problems with a file are :class:`~vrlt_fast.errors.VideoError`; they cost a sample, not
a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
class VideoIndex:
    """What demuxing alone tells.

    Presentation times in order: ``ticks`` int64 in the file's time base, ``times`` float64 in seconds from the first.
    """

    path: Path
    ticks: np.ndarray
    times: np.ndarray
    height: int
    width: int

    @property
    def n_frames(self) -> int:
        return len(self.times)

    @property
    def fps(self) -> float:
        """Mean frame rate from the presentation times (the header's may be wrong); 1.0 for a single frame."""
        if self.n_frames < 2:
            return 1.0
        return float((self.n_frames - 1) / (self.times[-1] - self.times[0]))


def _fail(code: str, path: Path, what: str, why: str = "") -> VideoError:
    return VideoError(Problem(code, what, where=str(path), why=why, fix=REENCODE))


@contextmanager
def _open(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    import av

    av.logging.set_level(av.logging.PANIC)
    if not path.is_file():
        raise VideoError(
            Problem("VRLT-V01", "video file missing", where=str(path), fix="check data.root, or remove its lines")
        )
    if path.stat().st_size == 0:
        raise _fail("VRLT-V02", path, "video file is empty")
    try:
        container = av.open(str(path), mode="r", metadata_errors="replace", options={"protocol_whitelist": "file"})
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise _fail("VRLT-V02", path, "not a readable video file", str(error)) from None
    try:
        if _INDIRECT & set(container.format.name.split(",")):
            raise _fail("VRLT-V02", path, "not a video file", "it is a playlist, which names other files")
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise _fail("VRLT-V03", path, "file has no video stream")
        stream = max(streams, key=lambda s: s.codec_context.width * s.codec_context.height)
        if stream.codec_context is None or stream.codec_context.width <= 0:
            raise _fail("VRLT-V04", path, "video has no decodable frames", "its codec or frame size is unknown")
        stream.thread_type = "NONE"
        yield container, stream
    finally:
        container.close()


def _ticks(stream: VideoStream, container: InputContainer) -> list[int]:
    pts = [p.pts for p in container.demux(stream) if p.size and not p.is_discard and p.pts is not None]
    return sorted(set(pts))


def probe(path: Path) -> VideoIndex:
    """Index a file by demuxing, without decoding.

    Raises:
        VideoError: V01 missing, V02 unreadable, V03 no video stream, V04 no frames.
    """
    import av

    with _open(path) as (container, stream):
        try:
            ticks = _ticks(stream, container)
        except (av.error.FFmpegError, ValueError) as error:
            raise _fail("VRLT-V02", path, "file can't be read to its end", str(error)) from None
        if not ticks:
            raise _fail("VRLT-V04", path, "video has no decodable frames", "no packet has a presentation time")
        times = (np.asarray(ticks, dtype=np.float64) - ticks[0]) * float(stream.time_base or 0)
        height, width = stream.codec_context.height, stream.codec_context.width
    return VideoIndex(path, np.asarray(ticks, dtype=np.int64), times, height, width)


def decode_frames(index: VideoIndex, frames: Sequence[int]) -> np.ndarray:
    """RGB frames, uint8 [len(frames), H, W, 3], turned upright where the file says so.

    Args:
        index: from :func:`probe`.
        frames: presentation-order frame numbers, any order, repeats allowed.

    Raises:
        VideoError: V02, V04 or V05 when a frame can't be decoded, never another frame in its place; V06 when the frames
            differ in size.
    """
    import av

    if not len(frames):
        raise ValueError("no frames asked for")
    wanted = set(frames)
    if min(wanted) < 0 or max(wanted) >= index.n_frames:
        raise _fail("VRLT-V05", index.path, f"frame {max(wanted)} asked for, the file has {index.n_frames}")
    last, pictures, decoded = max(wanted), {}, False
    with _open(index.path) as (container, stream):
        try:
            for frame in container.decode(stream):
                if frame.pts is None or frame.is_corrupt:
                    continue
                decoded = True
                # By absolute time: a stream cut in the middle of a GOP starts with packets that give no frame.
                number = int(np.searchsorted(index.ticks, frame.pts))
                if number in wanted and index.ticks[number] == frame.pts:
                    picture = frame.to_ndarray(format="rgb24")
                    pictures[number] = np.rot90(picture, k=(frame.rotation // 90) % 4) if frame.rotation else picture
                if number >= last:
                    break
        except (av.error.FFmpegError, ValueError) as error:
            raise _fail("VRLT-V02", index.path, "decoding failed", str(error)) from None
    if not decoded:
        raise _fail("VRLT-V04", index.path, "video has no decodable frames")
    missing = sorted(wanted - pictures.keys())
    if missing:
        raise _fail(
            "VRLT-V05",
            index.path,
            f"{len(missing)} of {len(wanted)} frames can't be decoded, the first is {missing[0]}",
        )
    sizes = {picture.shape for picture in pictures.values()}
    if len(sizes) > 1:
        why = " and ".join(f"{width} x {height}" for height, width, _ in sorted(sizes))
        raise _fail("VRLT-V06", index.path, "the frame size changes within the video", why)
    return np.stack([pictures[i] for i in frames])
