"""Real video files, made with PyAV: noise on slow gradients, so that every frame differs from every other one."""

from __future__ import annotations

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
    ) -> Path:
        """``size`` is (height, width); ``ticks`` are presentation times in 1/1000 s, default ``count`` even ones."""
        path = self.folder / name
        options = {"g": "12", **(options or {})}
        with av.open(str(path), "w", options=container_options or {}) as container:
            stream = container.add_stream(codec, rate=rate, options=options)
            stream.height, stream.width, stream.pix_fmt = *size, pixels
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


@pytest.fixture
def studio(tmp_path: Path, seed: int) -> Studio:
    return Studio(tmp_path, seed)


def plain_decode(path: Path) -> tuple[np.ndarray, list[float]]:
    """All frames of one sequential decode, uint8 [n, H, W, 3], and their times in seconds from the first."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [(f.pts, f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
        base = stream.time_base
    return np.stack([picture for _, picture in frames]), [float((pts - frames[0][0]) * base) for pts, _ in frames]


@pytest.fixture(scope="session")
def decoded():
    return plain_decode
