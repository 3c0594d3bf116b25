"""Still pictures as clips of one frame pair, as the towers take them: the picture stands for both frames."""

from __future__ import annotations

import struct
import tempfile
import threading
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np

from vrlt_fast.config import VideoConfig
from vrlt_fast.errors import Problem, VideoError
from vrlt_fast.video.cache import plain_pixels, upright
from vrlt_fast.video.decode import decode_frames
from vrlt_fast.video.index import VideoIndex
from vrlt_fast.video.index_cache import IndexCache
from vrlt_fast.video.preprocess import Clip, Geometry, patchify, resize, smart_resize
from vrlt_fast.video.sampling import TUBELET

_KEPT = 1 << 28
_EXIF_WITHIN = 1 << 16
_ORIENTATION = 0x0112
_FLIPS: dict[int, tuple[int, ...]] = {2: (1,), 4: (1,), 5: (2,), 7: (2,)}
"""EXIF orientations that mirror; FFmpeg tells their rotation only, so that a flip of this axis is left to do."""
_WHAT = {"VRLT-V01": "image file missing", "VRLT-V02": "image file empty or unreadable"}
_FIX = "save it again as PNG or JPEG, or remove its lines"
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MOST_SENT = 1 << 25
"""Pixels of an image whose bytes were sent: a small file can claim to be a picture that fills the memory."""


class ImageLoader:
    """Loads images by the families' rule: sides are multiples of patch times merge, pixels lie within
    ``video.image_min_pixels`` and ``video.image_max_pixels``. Transparency is dropped, not blended.

    Decodes in this process. Safe to use from several threads.

    Args:
        kept_bytes: host memory for the patches of images used last.
    """

    def __init__(self, video: VideoConfig, geometry: Geometry, *, kept_bytes: int = _KEPT):
        self.video, self.geometry, self.kept_bytes = video, geometry, kept_bytes
        self._index = IndexCache()
        self._kept: OrderedDict[str, Clip] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, path: Path) -> Clip:
        """The image as a clip with grid (1, h, w) and ``kind`` "image"; its key names content and preprocessing.

        Raises:
            VideoError: V01-V04 missing or undecodable, V06 can't be resized, V10 holds several pictures.
        """
        try:
            index = self._probe(path)
            content = self._index.content_hash(path)
            bounds = f"{self.video.image_min_pixels}-{self.video.image_max_pixels}"
            key = f"image-{content}-{bounds}-{self.geometry.patch}x{self.geometry.merge}-{plain_pixels(index)}"
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
            pictures = np.flip(decode_frames(index, [0]), _mirrored_axes(path))
            height, width = self._size(path, *pictures.shape[1:3])
            if self._index.content_hash(path) != content:
                raise _error("VRLT-V02", path, "the image file changes while it is read")
        except VideoError as error:
            raise _reworded(error, path) from None
        patches, grid = patchify(resize(pictures, height, width).repeat(TUBELET, 1, 1, 1), self.geometry)
        clip = Clip(patches, grid, (0.0,) * TUBELET, 0.0, key, self.geometry, "image")
        self._keep(clip)
        return clip

    def load_bytes(self, data: bytes, name: str) -> Clip:
        """The image that the bytes of a PNG or JPEG file are, as :meth:`load`. Meant for bytes from anywhere: nothing
        but these two is opened, and nothing is decoded that claims more than 2^25 pixels.

        Args:
            name: what it is called in errors.

        Raises:
            VideoError: V02 or V04 undecodable, V06 too large or can't be resized, V10 holds several pictures.
        """
        size = _claimed_size(data)
        fix = "send one PNG or JPEG picture"
        if size is None:
            raise VideoError(Problem("VRLT-V02", "neither a PNG nor a JPEG image", name, fix=fix))
        if size[0] * size[1] > _MOST_SENT:
            what, fix = f"an image of {size[1]} x {size[0]} pixels", f"send at most {_MOST_SENT} pixels"
            raise VideoError(Problem("VRLT-V06", what, name, fix=fix))
        with tempfile.NamedTemporaryFile(prefix="vrlt-", suffix=".png" if data.startswith(_PNG) else ".jpg") as file:
            file.write(data)
            file.flush()
            try:
                return self.load(Path(file.name))
            except VideoError as error:
                problem = error.problems[0]
                why = problem.why.replace(file.name, name)
                raise VideoError(replace(problem, where=name, why=why, fix=fix)) from None

    def n_tokens(self, path: Path) -> int:
        """Tokens that the image takes in a prompt, known without decoding it. Raises as :meth:`load`."""
        try:
            height, width = self._size(path, *upright(self._probe(path)))
        except VideoError as error:
            raise _reworded(error, path) from None
        return height * width // self.geometry.factor**2

    def _probe(self, path: Path) -> VideoIndex:
        index = self._index.probe(path)
        if index.n_frames > 1:
            raise _error("VRLT-V10", path, f"an image file with {index.n_frames} pictures", "it is a film or animation")
        return index

    def _size(self, path: Path, height: int, width: int) -> tuple[int, int]:
        """Height and width that a picture is resized to."""
        least, most = self.video.image_min_pixels, self.video.image_max_pixels
        try:
            return smart_resize(height, width, self.geometry.factor, least, most)
        except ValueError as error:
            raise _error("VRLT-V06", path, "the image can't be resized", str(error)) from None

    def _keep(self, clip: Clip) -> None:
        with self._lock:
            self._kept[clip.key] = clip
            total = sum(kept.nbytes for kept in self._kept.values())
            while total > self.kept_bytes:
                total -= self._kept.popitem(last=False)[1].nbytes


def _claimed_size(data: bytes) -> tuple[int, int] | None:
    """Height and width by the header of a PNG or JPEG file; None where it is neither."""
    try:
        if data.startswith(_PNG):
            kind, width, height = struct.unpack_from(">4sII", data, 12)
            return (height, width) if kind == b"IHDR" else None
        at = 2 if data.startswith(_JPEG) else len(data)
        while True:
            mark, marker, length = struct.unpack_from(">BBH", data, at)
            if mark != 0xFF:
                return None
            if marker in _JPEG_SIZES:
                height, width = struct.unpack_from(">HH", data, at + 5)
                return height, width
            at += 1 if marker == 0xFF else 2 + length  # any number of 0xFF may stand before a marker
    except struct.error:
        return None


def _error(code: str, path: Path, what: str, why: str = "") -> VideoError:
    return VideoError(Problem(code, what, str(path), why, _FIX))


def _reworded(error: VideoError, path: Path) -> VideoError:
    """An error of the video reader in the words of an image."""
    problem = error.problems[0]
    if problem.fix == _FIX:
        return error
    return _error(problem.code, path, _WHAT.get(problem.code, "image can't be decoded"), problem.why)


def _mirrored_axes(path: Path) -> tuple[int, ...]:
    """The axis of [1, H, W, 3] to flip where the EXIF orientation mirrors the picture, which is turned already."""
    with path.open("rb") as file:
        head = file.read(_EXIF_WITHIN)
    starts = [at + len(mark) for mark in (b"Exif\0\0", b"eXIf", b"EXIF") if (at := head.find(mark)) >= 0]
    tiff = head[starts[0] :] if starts else b""
    tiff = tiff if tiff[:2] in (b"II", b"MM") else tiff[4:]  # a WebP chunk has its length in between
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        entries = [struct.unpack_from(f"{order}HHIH", tiff, at + 2 + 12 * i) for i in range(count)]
    except struct.error:
        return ()
    wanted = [value for tag, _, _, value in entries if tag == _ORIENTATION]
    return _FLIPS.get(wanted[0], ()) if wanted else ()
