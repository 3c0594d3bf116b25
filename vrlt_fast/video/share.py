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
    """Even ones, but that no cut makes a decoder give more than half a GOP twice: one that lies in the second half of a
    GOP moves to its end.

    Args:
        frames: of the clip, two a pair.
    """
    cuts, firsts = list(even_cuts(len(frames) // TUBELET, size)), np.asarray(frames[::TUBELET])
    rows = frame_rows(index)
    keys = np.flatnonzero((rows >= 0) & index.packets.key[rows])
    for rank in range(1, size):
        cut = cuts[rank]
        if 0 < cut < len(firsts) and len(keys):
            place = int(np.searchsorted(keys, firsts[cut], side="right"))
            begin = int(keys[place - 1]) if place else 0
            end = int(keys[place]) if place < len(keys) else index.n_frames
            if 2 * (frames[TUBELET * cut - 1] + 1 - begin) > end - begin:
                cut = int(np.searchsorted(firsts, end))
        cuts[rank] = max(cut, cuts[rank - 1])
    return tuple(cuts)
