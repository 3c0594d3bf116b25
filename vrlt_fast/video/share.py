"""Which frame pairs of a clip each of several processes decodes and encodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vrlt_fast.video.index import VideoIndex
from vrlt_fast.video.plan import frame_rows
from vrlt_fast.video.sampling import TUBELET

Cuts = tuple[int, ...]
"""The first frame pair of each process, ascending, and the end; some may have none."""


def even_cuts(pairs: int, size: int) -> Cuts:
    """As many for each, but for one."""
    return tuple(pairs * rank // size for rank in range(size + 1))


def decoding_cuts(index: VideoIndex, frames: Sequence[int], size: int) -> Cuts:
    """Even ones, but that no cut makes decoders give more than half a GOP twice: one that would moves on, at most to
    the next GOP that has frames of one side alone.

    Args:
        frames: of the clip, two a pair.
    """
    pairs = len(frames) // TUBELET
    cuts, rows = list(even_cuts(pairs, size)), frame_rows(index)
    inner = np.flatnonzero((rows >= 0) & index.packets.key[rows])
    keys = np.unique([0, *inner, index.n_frames])  # where GOPs begin, and the end
    for rank in range(1, size):
        cut = cuts[rank]
        while 0 < cut < pairs and _costs_much(frames[TUBELET * cut - 1], frames[TUBELET * cut], keys):
            cut += 1
        cuts[rank] = max(cut, cuts[rank - 1])
    return tuple(cuts)


def _costs_much(last: int, first: int, keys: np.ndarray) -> bool:
    """Whether more than half of the GOP of ``first`` is decoded up to ``last``, and again for ``first``."""
    place = int(np.searchsorted(keys, first, side="right"))
    begin, end = int(keys[place - 1]), int(keys[place])
    return 2 * (last + 1 - begin) > end - begin
