"""Draws a planned demo clip and encodes it as H.264."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from vrlt_fast.data.clips import COLOURS, FPS, HEIGHT, TONES, WIDTH, Clip, Event, Shot, play
from vrlt_fast.data.footage import WORK_HEIGHT, Frames

ZOOM = 2.2
DARK = 0.25
# Without cpu-independent, x264 gives other bytes from one call to the next.
_X264 = {"preset": "veryfast", "crf": "23", "x264-params": "threads=1:cpu-independent=1"}
_OUTLINE = 1.5  # pixels, so that a shape is seen on a ground of its own colour
Floats = npt.NDArray[np.float32]
_LUMA: Floats = np.array([0.299, 0.587, 0.114], np.float32)


def draw_clip(clip: Clip, sources: dict[str, Frames]) -> Frames:
    """Frames of a clip, uint8 RGB (frames, 120, 160, 3). ``sources``: decoded footage by key."""
    zoom = np.ones(clip.frames)
    focus = (0.5, 0.5)
    for event in clip.events:
        if event.kind == "zoom":
            zoom[event.frames.start : event.frames.stop] = _zoom_curve(len(event.frames))
            focus = event.focus
    out = np.empty((clip.frames, HEIGHT, WIDTH, 3), np.uint8)
    for shot, pace in play(clip):
        _draw_shot(out, shot, pace, sources[shot.source], zoom, focus)
    for event in clip.events:
        part = out[event.frames.start : event.frames.stop]
        if event.kind == "dark":
            part[:] = (part * np.float32(DARK)).astype(np.uint8)
        elif event.kind == "tint":
            _tint(part, event)
        elif event.kind == "negative":
            np.subtract(255, part, out=part)
        elif event.kind == "grey":
            part[:] = (part.astype(np.float32) @ _LUMA)[..., None].astype(np.uint8)
        elif event.kind == "object":
            for k, image in zip(event.frames, part, strict=True):
                _paste(image, event, k)
    return out


def _zoom_curve(length: int) -> np.ndarray:
    """Magnification for each frame of a zoom: up to ZOOM within the first third, then held."""
    u = np.clip(np.arange(1, length + 1) / max(1.0, length / 3), 0, 1)
    return 1 + (ZOOM - 1) * u * u * (3 - 2 * u)


def _draw_shot(
    out: Frames, shot: Shot, positions: list[float], source: Frames, zoom: np.ndarray, focus: tuple[float, float]
) -> None:
    """Fills frames ``shot.start .. shot.stop - 1`` of ``out``; ``positions``: the source frame (fraction) of each."""
    scaler = VideoReformatter()
    x0, y0, tall0 = shot.crop
    colour = np.arange(256, dtype=np.float32)[:, None] - 128
    lut = np.clip(colour * np.array(shot.gain, np.float32) + 128 + shot.bias, 0, 255).astype(np.uint8)
    for k, position in zip(range(shot.start, shot.stop), positions, strict=True):
        past = position - shot.first
        tall = tall0 / zoom[k]
        wide, wide0 = tall * WIDTH / HEIGHT, tall0 * WIDTH / HEIGHT
        x = round(x0 + shot.drift[0] * past + (wide0 - wide) * focus[0])
        y = round(y0 + shot.drift[1] * past + (tall0 - tall) * focus[1])
        wide_px, tall_px = round(wide), round(tall)
        x, y = min(max(0, x), source.shape[2] - wide_px), min(max(0, y), WORK_HEIGHT - tall_px)
        crop = source[min(round(position), shot.last), y : y + tall_px, x : x + wide_px]
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(crop[:, ::-1] if shot.flip else crop), format="rgb24")
        image = (
            scaler.reformat(frame, WIDTH, HEIGHT, "rgb24", interpolation="BILINEAR")
            .to_ndarray()
            .astype(np.uint8, copy=False)
        )
        for channel in range(3):
            np.take(lut[:, channel], image[..., channel], out=out[k, ..., channel])


def _tint(part: Frames, event: Event) -> None:
    tone = np.array(TONES[event.tone], np.float32)
    luma = part.astype(np.float32) @ _LUMA
    toned = tone * (0.35 + 0.65 * luma[..., None] / 255)
    part[:] = np.clip((1 - event.blend) * part + event.blend * toned, 0, 255).astype(np.uint8)


def _paste(image: Frames, event: Event, frame: int) -> None:
    """Pastes the object at its place in ``frame``, with smooth edges."""
    cx, cy = event.centre(frame)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    depth = -_distance(event.shape, x + 0.5 - cx, y + 0.5 - cy, event.radius)
    cover = np.clip(depth + 0.5, 0, 1)[..., None]
    inner = np.clip(depth - _OUTLINE + 0.5, 0, 1)[..., None]
    ink = inner * np.array(COLOURS[event.colour], np.float32)
    image[:] = np.rint(image * (1 - cover) + ink * cover).astype(np.uint8)


def _distance(shape: str, x: Floats, y: Floats, r: float) -> Floats:
    """Signed distance (pixels, negative inside) from a shape whose bounding box is 2r x 2r around 0."""
    if shape == "circle":
        distance = np.hypot(x, y) - r
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - r
    elif shape == "cross":
        a, b, arm = np.abs(x), np.abs(y), 0.36 * r
        distance = np.minimum(np.maximum(a - r, b - arm), np.maximum(a - arm, b - r))
    else:  # the triangle (0, -r), (r, r), (-r, r)
        distance = np.maximum((2 * np.abs(x) - y - r) / np.sqrt(np.float32(5)), y - r)
    return distance.astype(np.float32)


def write_mp4(frames: Frames, path: Path) -> None:
    """Encodes uint8 RGB frames (n, height, width, 3) as H.264 (yuv420p, 8 fps, constant rate)."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=_X264)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for k, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_png(image: Frames, path: Path) -> None:
    """Writes one uint8 RGB image (height, width, 3) as PNG."""
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = (
        image.shape[1],
        image.shape[0],
        "rgb24",
        Fraction(1, FPS),
    )
    packets = codec.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")) + codec.encode(None)
    path.write_bytes(b"".join(bytes(packet) for packet in packets))
