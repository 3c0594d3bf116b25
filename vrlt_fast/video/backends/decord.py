"""decord, for those who must have its pictures. It can hang for good, so it belongs in a worker that can be killed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch

from vrlt_fast.video.backends import nvdec
from vrlt_fast.video.backends.base import Availability, DecodeStats, Sink
from vrlt_fast.video.backends.foreign import pictures_of, upright
from vrlt_fast.video.index import VideoIndex, video_error
from vrlt_fast.video.plan import DecodePlan
from vrlt_fast.video.remux import Remuxed, obstacle, remux

_REFUSED = {"edit_list": "has an edit list", "vfr": "has a variable frame rate"}
_SMALLEST = 32  # pixels; its converter pads the rows of narrower pictures and then can't copy them


@cache
def _imported() -> str:
    try:
        import_module("decord")
    except (ImportError, OSError, RuntimeError) as error:
        return " ".join(f"{error}".split())
    return ""


class DecordBackend:
    """CPU only. ``surface_bytes``: of RGB pictures held at once."""

    name = "decord"
    device = "cpu"
    isolate = True

    def __init__(self, *, surface_bytes: int = 2**28) -> None:
        self._surface_bytes = surface_bytes

    def availability(self) -> Availability:
        missing = _imported()
        if missing:
            return Availability(False, f"decord can't be imported: {missing}", "pip install 'vrlt-fast[decord]'")
        return Availability(True)

    def supports(self, index: VideoIndex) -> str:
        if index.codec in ("av1", "vp8"):
            return f"decord doesn't decode {index.codec} in a MP4"
        if "mpegts" in index.container:
            return "decord gives wrong frames of MPEG-TS"
        for flag, what in _REFUSED.items():
            if flag in index.flags:
                return f"decord gives wrong frames where a file {what}"
        kind = nvdec.layout(index.pixels)
        if kind is None or kind[1] != 8:
            return f"decord rounds {index.pixels} otherwise"
        if min(index.width, index.height) < _SMALLEST:
            return f"decord fails on pictures under {_SMALLEST} pixels"
        return obstacle(index)

    def decode(self, plan: DecodePlan, sink: Sink) -> DecodeStats:
        """As `Backend.decode`."""
        decord = import_module("decord")
        index, stats = plan.index, DecodeStats(dropped=sum(segment.dropped for segment in plan.segments))
        room = max(1, self._surface_bytes // max(1, 3 * index.height * index.width))
        for part in remux(plan, container="mp4"):  # of one picture in Matroska it doesn't see the duration
            for frame, picture in pictures_of(index, _pictures(decord, index, part, room)):
                sink(frame, picture)
            stats.decoded += max(part.places) + 1
        return stats


def _pictures(decord: Any, index: VideoIndex, part: Remuxed, room: int) -> Iterator[tuple[int, torch.Tensor]]:
    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(io.BytesIO(part.data), num_threads=1)
    if len(reader) != part.pictures:
        why = f"decord counts {len(reader)} pictures of {part.pictures}"
        raise video_error("VRLT-V05", index.path, "the decoder doesn't see every picture", why)
    for start in range(0, len(part.targets), room):
        pictures = torch.from_numpy(reader.get_batch(list(part.places[start : start + room])).asnumpy())
        for frame, picture in zip(part.targets[start : start + room], pictures, strict=True):
            yield frame, upright(index, picture)
