"""Which packets a decoder must see to give the frames asked for: GOP segments, targets, packets left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vrlt_fast.video.index import VideoIndex


@dataclass(frozen=True)
class Segment:
    """A run of packets that decodes on its own.

    ``packets`` int64: rows of ``index.packets`` in decode order that the decoder sees; ``targets``: the frame numbers
    to take from it, ascending; ``dropped``: packets of the run that are left out; ``cost``: pixels to decode.
    """

    packets: np.ndarray
    targets: tuple[int, ...]
    dropped: int
    cost: int


@dataclass(frozen=True)
class DecodePlan:
    """Segments in order of their targets; every frame asked for is the target of exactly one."""

    index: VideoIndex
    frames: tuple[int, ...]
    segments: tuple[Segment, ...]
