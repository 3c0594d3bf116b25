"""torchcodec, on the CPU or through NVDEC.

From 0.17 on its decoder gives pictures one by one with their times, on the GPU as NV12 planes; before, a list of them
by number, as RGB. Both get a plan's segments remuxed (`vrlt_fast.video.remux`), and every picture's time is checked.
A damaged packet whose picture the decoder patches up isn't told from a sound one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import chain
from typing import Any

import torch

from vrlt_fast.video.backends import nvdec
from vrlt_fast.video.backends.base import Availability, DecodeStats, Sink
from vrlt_fast.video.backends.foreign import pictures_of, upright
from vrlt_fast.video.index import VideoIndex, video_error
from vrlt_fast.video.plan import DecodePlan
from vrlt_fast.video.remux import RATE, Remuxed, obstacle, remux

_MATRICES = {"bt709": "bt709", "bt2020nc": "bt2020", "bt2020_ncl": "bt2020"}  # all others: bt601, as swscale does it


@cache
def _imported() -> str:
    try:
        import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (lines or [type(error).__name__])[0][:300]
    return ""


class TorchcodecBackend:
    """
    Args:
        device: "cpu", "cuda" or "cuda:N".
        planes: give `vrlt_kernels.patchify.NV12` of one frame to the sink where the decoder has it (0.17 on CUDA, 8-bit
            4:2:0, not turned), so that nothing is ever RGB at full size; otherwise and elsewhere RGB pictures.
        surface_bytes: of RGB pictures held at once by versions before 0.17.
    """

    name = "torchcodec"
    isolate = False

    def __init__(self, device: str = "cuda", *, planes: bool = True, surface_bytes: int = 2**28) -> None:
        self.device = device
        self._where = torch.device(device)
        self._planes, self._surface_bytes = planes, surface_bytes

    def availability(self) -> Availability:
        missing = _imported()
        if missing:
            fix = (
                "pip install 'vrlt-fast[torchcodec]' and FFmpeg 4 to 8 as shared libraries (apt install ffmpeg); "
                "beside a torch without CUDA: torchcodec==0.13.0"
            )
            return Availability(False, f"torchcodec can't be imported: {missing}", fix)
        return Availability(True) if self._where.type == "cpu" else nvdec.availability(self._where.index or 0)

    def supports(self, index: VideoIndex) -> str:
        if self._where.type == "cuda":
            return obstacle(index) or nvdec.refusal(index, self._where.index or 0)
        kind = nvdec.layout(index.pixels)
        if kind is None or kind[1] != 8:
            return f"torchcodec rounds {index.pixels} otherwise"
        return obstacle(index)

    def decode(self, plan: DecodePlan, sink: Sink) -> DecodeStats:
        """As `Backend.decode`. On CUDA the sink runs on the current stream."""
        decoders = import_module("torchcodec.decoders")
        give = self._one_by_one if hasattr(decoders, "VideoPacketDecoder") else self._listed
        stats = DecodeStats(dropped=sum(segment.dropped for segment in plan.segments))
        for part in remux(plan):
            for frame, picture in pictures_of(plan.index, give(decoders, plan.index, part)):
                sink(frame, picture)
            stats.decoded += max(part.places) + 1
        return stats

    def _listed(self, decoders: Any, index: VideoIndex, part: Remuxed) -> Iterator[tuple[int, Any]]:
        decoder = decoders.VideoDecoder(part.data, dimension_order="NHWC", num_ffmpeg_threads=1, device=self.device)
        if self._where.type == "cuda" and decoder.cpu_fallback:
            raise video_error("VRLT-V02", index.path, "NVDEC doesn't decode the file", str(decoder.cpu_fallback))
        room = max(1, self._surface_bytes // max(1, 3 * index.height * index.width))
        for start in range(0, len(part.targets), room):
            places = part.places[start : start + room]
            batch = decoder.get_frames_at(list(places))
            found = [round(float(seconds) * RATE) for seconds in batch.pts_seconds]
            if found != list(places):
                raise video_error(
                    "VRLT-V05", index.path, "the decoder gave other frames", f"{found} for {list(places)}"
                )
            for frame, picture in zip(part.targets[start : start + room], batch.data, strict=True):
                yield frame, upright(index, picture)

    def _one_by_one(self, decoders: Any, index: VideoIndex, part: Remuxed) -> Iterator[tuple[int, Any]]:
        """One picture is held at a time. Its planes are views of the decoder's memory, valid as long as it is."""
        demuxer = decoders.Demuxer(part.data)
        decoder = demuxer.streams[0].make_decoder(device=self.device)
        converter = decoders.ColorConverter(device=self.device)
        wanted = dict(zip(part.places, part.targets, strict=True))
        for packet in chain(demuxer, (None,)):
            for raw in decoder.drain() if packet is None else decoder.decode(packet):
                frame = wanted.pop(round(raw.pts_seconds * RATE), None)
                if frame is None:
                    continue
                planes = _nv12(raw, index) if self._planes else None
                if planes is None:
                    planes = upright(index, converter.convert(raw).data.permute(1, 2, 0).contiguous())
                yield frame, planes
            if not wanted:
                return
        why = f"{len(wanted)} of {len(part.targets)} frames are missing"
        raise video_error("VRLT-V05", index.path, "the decoder didn't give every frame", why)


def _nv12(raw: Any, index: VideoIndex) -> Any:
    """The planes as `vrlt_kernels.patchify.NV12` of one frame; None for other formats. Luma isn't copied; of chroma
    each plane is a tensor of its own, whose storage ends with it.
    """
    if raw.pixel_format != "nv12" or index.rotation:
        return None
    from vrlt_kernels import NV12

    y, u, v = raw.planes
    uv = torch.stack([u, v], dim=-1)
    return NV12(y[None], uv[None], _MATRICES.get(raw.color_space, "bt601"), raw.color_range == "pc")
