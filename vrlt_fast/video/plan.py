"""Which packets a decoder must see to give the frames asked for: GOP segments, targets, packets left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vrlt_fast.video.index import VideoIndex, video_error

_SEEKABLE = {"mp4", "matroska", "avi", "flv"}
"""Containers in which seeks were seen to be exact."""
_SEEK = 3
"""Packets that may as well be decoded as be jumped over: what a seek and a drained decoder cost."""
_RUN = 64
"""Runs are merged up to this many packets, so that a few packets decoded twice don't matter and work still divides."""


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
    """Segments in order of their targets; every frame asked for is the target of exactly one. With ``whole`` all
    packets are decoded, to learn which frames are intact.
    """

    index: VideoIndex
    frames: tuple[int, ...]
    segments: tuple[Segment, ...]
    whole: bool = False

    @property
    def cost(self) -> int:
        """Pixels to decode."""
        return sum(segment.cost for segment in self.segments)


@dataclass
class _Run:
    start: int
    stop: int  # row behind the last one needed
    targets: list[int]


def _checked(index: VideoIndex, frames: Iterable[int]) -> list[int]:
    wanted = sorted(set(frames))
    if not wanted:
        raise ValueError("no frames asked for")
    if wanted[0] < 0 or wanted[-1] >= index.n_frames:
        outside = wanted[0] if wanted[0] < 0 else wanted[-1]
        raise video_error("VRLT-V05", index.path, f"frame {outside} asked for, the file has {index.n_frames}")
    return wanted


def is_counted(index: VideoIndex) -> bool:
    """Whether frames are told by counting them, as their times are missing or guessed."""
    return "no_pts" in index.flags


def _is_sequential(index: VideoIndex) -> bool:
    return is_counted(index) or "no_seek" in index.flags or not _SEEKABLE & set(index.container.split(","))


def frame_rows(index: VideoIndex) -> np.ndarray:
    """The row of ``index.packets`` that gives each frame, int64 [n_frames]; -1 where no packet has its time."""
    packets = index.packets
    shown = np.flatnonzero(packets.shown)
    order = shown[np.argsort(packets.ticks[shown], kind="stable")]
    if not len(order):
        return np.full(index.n_frames, -1, dtype=np.int64)
    place = np.minimum(np.searchsorted(packets.ticks[order], index.ticks), len(order) - 1)
    return np.where(packets.ticks[order[place]] == index.ticks, order[place], -1).astype(np.int64)


def _segment(index: VideoIndex, run: _Run, rows: np.ndarray, *, elide: bool) -> Segment:
    packets = np.arange(run.start, run.stop, dtype=np.int64)
    if elide:
        keep = ~index.packets.droppable[run.start : run.stop]
        keep[rows[run.targets] - run.start] = True
        packets = packets[keep]
    cost = len(packets) * index.height * index.width
    return Segment(packets, tuple(run.targets), run.stop - run.start - len(packets), cost)


def _runs(index: VideoIndex, wanted: Sequence[int], rows: np.ndarray) -> list[_Run]:
    """One run for each GOP that has targets. A picture that comes after a keyframe in the file but is shown before it
    may refer to the GOP before, so it belongs to that one's run.
    """
    packets, keys = index.packets, np.flatnonzero(index.packets.key)
    runs: dict[int, _Run] = {}
    for frame in wanted:
        row = int(rows[frame])
        place = int(np.searchsorted(keys, row, side="right")) - 1
        while place > 0 and packets.ticks[row] < packets.ticks[keys[place]]:
            place -= 1
        start = int(keys[place]) if place >= 0 else 0
        run = runs.setdefault(start, _Run(start, row + 1, []))
        run.stop = max(run.stop, row + 1)
        run.targets.append(frame)
    return [runs[start] for start in sorted(runs)]


def _merged(index: VideoIndex, runs: list[_Run]) -> list[_Run]:
    """Neighbours become one run where the packets between them cost no more than a seek."""
    droppable = index.packets.droppable
    merged: list[_Run] = []
    for run in runs:
        last = merged[-1] if merged else None
        between = int(np.count_nonzero(~droppable[last.stop : run.start])) if last else 0
        if last and between <= _SEEK and max(last.stop, run.stop) - last.start <= _RUN:
            last.stop = max(last.stop, run.stop)
            last.targets = sorted([*last.targets, *run.targets])
        else:
            merged.append(run)
    return merged


def plan_decode(index: VideoIndex, frames: Iterable[int], *, elide: bool = True) -> DecodePlan:
    """What to decode for the frames with these numbers (any order, repeats allowed).

    Each segment starts at a keyframe and ends with the last packet that a target needs. With ``elide``, packets that no
    other picture refers to and that aren't targets are left out, which doesn't change a bit of the targets. Files in
    which seeks aren't known to be exact give one segment from their first packet on.

    Raises:
        ValueError: no frames.
        VideoError: V05 when the file has no such frame.
    """
    wanted = _checked(index, frames)
    if _is_sequential(index):
        return plan_sequential(index, wanted, elide=elide)
    rows = frame_rows(index)
    if (rows[wanted] < 0).any():
        return plan_sequential(index, wanted, elide=False)
    runs = _merged(index, _runs(index, wanted, rows))
    segments = [_segment(index, run, rows, elide=elide) for run in runs]
    return DecodePlan(index, tuple(wanted), tuple(sorted(segments, key=lambda segment: segment.targets[0])))


def plan_sequential(
    index: VideoIndex, frames: Iterable[int], *, elide: bool = False, whole: bool = False
) -> DecodePlan:
    """One segment from the first packet to the last one needed; with ``whole``, to the end of the file.

    Raises:
        ValueError, VideoError: as :func:`plan_decode`.
    """
    wanted = _checked(index, frames)
    rows, total = frame_rows(index), len(index.packets.ticks)
    # without presentation times nothing says which packet gives which frame, but how many were decoded
    counted = is_counted(index) or bool((rows[wanted] < 0).any())
    stop = total if whole or counted else int(rows[wanted].max()) + 1
    segment = _segment(index, _Run(0, stop, wanted), rows, elide=elide and not counted)
    return DecodePlan(index, tuple(wanted), (segment,), whole)


def split_plan(plan: DecodePlan, parts: int) -> list[DecodePlan]:
    """At most ``parts`` plans of about equal cost with whole, neighbouring segments, together the same work."""
    if parts < 2 or len(plan.segments) < 2:
        return [plan]
    goal = max(plan.cost, 1) / parts
    groups: list[list[Segment]] = []
    spent = 0.0
    for segment in plan.segments:
        # a group ends where its share ends, by the middle of the segment that crosses the line
        if not groups or (int((spent + segment.cost / 2) / goal) >= len(groups) and len(groups) < parts):
            groups.append([])
        groups[-1].append(segment)
        spent += segment.cost
    return [
        DecodePlan(plan.index, tuple(sorted(t for s in group for t in s.targets)), tuple(group)) for group in groups
    ]
