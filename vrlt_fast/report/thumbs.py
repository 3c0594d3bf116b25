"""Thumbnails for the report: frames of a video at given times as small JPEGs, decoded and encoded by PyAV."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

HEIGHT = 80
MAX_WIDTH = 160
_SEEK_SECONDS = 12.0


class NoThumbnails(Exception):
    """Why there are no pictures of a video; the text is shown in their place."""


def thumbnails(root: Path, video: str, times: Sequence[float]) -> list[str]:
    """JPEG data URIs of the pictures shown at ``times`` (seconds from the video's start, ascending).

    ``video`` is relative to ``root`` and may not leave it. Raises :class:`NoThumbnails` for others.
    """
    try:
        path = (root / video).resolve()
        if not path.is_relative_to(root.resolve()):
            raise NoThumbnails("its path leads out of the data root")
        if not path.is_file():
            raise NoThumbnails("the file is not there any more")
    except (OSError, ValueError) as error:
        raise NoThumbnails("its path is not a usable file name") from error
    try:
        import av
    except ImportError as error:
        raise NoThumbnails("PyAV is not installed: pip install av") from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise NoThumbnails("the file has no video stream")
            pictures = [_jpeg(frame) for frame in _frames_at(container, times)]
    except (av.error.FFmpegError, OSError, TypeError, ValueError) as error:  # TypeError: frames without a time
        raise NoThumbnails("the file can't be decoded") from error
    if not pictures:
        raise NoThumbnails("the file has no decodable frames")
    return [f"data:image/jpeg;base64,{base64.b64encode(picture).decode('ascii')}" for picture in pictures]


def _frames_at(container: Any, times: Sequence[float]) -> Iterator[Any]:
    """For each time the last frame that starts at or before it (the first frame for times before it)."""
    stream = container.streams.video[0]
    start = float((stream.start_time or 0) * stream.time_base)
    frames = container.decode(stream)
    current, following = next(frames, None), next(frames, None)
    for at in times:
        if following is not None and at + start - following.time > _SEEK_SECONDS:
            container.seek(int((at + start) / stream.time_base), stream=stream)
            frames = container.decode(stream)
            current, following = next(frames, None) or current, next(frames, None)
        while following is not None and following.time - start <= at + 1e-6:
            current, following = following, next(frames, None)
        if current is not None:
            yield current


def _jpeg(frame: Any) -> bytes:
    import av

    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    wide, high = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
    width = min(MAX_WIDTH, max(2, round(HEIGHT * wide / high)))
    height = max(2, round(width * high / wide))
    if turns % 2:
        width, height = height, width
    small = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(small, turns)), format="rgb24")
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = picture.width, picture.height, "yuvj420p"
    encoder.time_base = Fraction(1, 25)
    encoder.options = {"qmin": "3", "qmax": "4"}
    picture = picture.reformat(format="yuvj420p")
    picture.pts = 0
    return b"".join(bytes(packet) for packet in [*encoder.encode(picture), *encoder.encode(None)])
