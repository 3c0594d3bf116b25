"""Numbers of objects drawn on the frames of a clip, so that a model can name them (STVG-R1, XiaowZhang00/stvg-r1)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import torch

from vrlt_fast.data.sample import Box, Instance
from vrlt_fast.video.alter import all_frames, digest, with_frames
from vrlt_fast.video.preprocess import Clip

_TALL, _WIDE = 7, 5
_DIGITS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
"""Pictures of 0 to 9, row by row."""
_SHARE = 1 / 14
"""Height of a digit over that of the frame; digits are at least ``_TALL`` pixels high."""
_ROUNDING = 1e-6  # seconds


def with_ids(clip: Clip, instances: Sequence[Instance]) -> Clip:
    """The clip with each object's number, white on black, in the middle of its box, on every frame at whose time it
    has one; later ones lie over earlier ones, and what reaches over the border of the frame is cut off.

    The box at a time is the nearest one, at most half the spacing (the median) of the object's boxes away; an object
    with a single box has half the spacing of the frames. Numbers are drawn on the pictures as the tower takes them, so
    that no resizing blurs them. Nothing to draw gives the clip itself.

    Raises:
        ValueError: processes share the clip, and there is something to draw.
    """
    marks = [
        (k, one.id, ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
        for one in instances
        for k, box in enumerate(_boxes_at(one, clip.times))
        if box is not None
    ]
    if not marks:
        return clip
    frames = all_frames(clip)
    for k, number, centre in marks:
        _draw(frames[k], number, centre)
    return with_frames(clip, frames, f"{clip.key} ids {digest(marks)}")


def _boxes_at(one: Instance, times: Sequence[float]) -> list[Box | None]:
    """The object's box at each time."""
    boxes = sorted(one.boxes, key=lambda box: box.time)
    known = [box.time for box in boxes]
    reach = _spacing(known) or _spacing(sorted(times))
    found: list[Box | None] = []
    for time in times:
        place = bisect_left(known, time)
        nearest = min(boxes[max(place - 1, 0) : place + 1], key=lambda box: abs(box.time - time), default=None)
        near = nearest is not None and abs(nearest.time - time) <= reach / 2 + _ROUNDING
        found.append(nearest if near else None)
    return found


def _spacing(times: Sequence[float]) -> float:
    """Median seconds between ascending times; 0.0 where there is but one."""
    gaps = [b - a for a, b in pairwise(times) if b > a]
    return median(gaps) if gaps else 0.0


def _draw(frame: torch.Tensor, number: int, centre: tuple[float, float]) -> None:
    """Draws into a picture uint8 [3, H, W]; ``centre`` (x, y) in 0..1 of it."""
    height, width = frame.shape[1:]
    label = _label(number, max(1, round(height * _SHARE / _TALL)))
    tall, wide = label.shape
    top, left = round(centre[1] * height - tall / 2), round(centre[0] * width - wide / 2)
    y0, x0 = max(-top, 0), max(-left, 0)
    y1, x1 = max(min(tall, height - top), y0), max(min(wide, width - left), x0)
    frame[:, top + y0 : top + y1, left + x0 : left + x1] = label[y0:y1, x0:x1]


def _label(number: int, scale: int) -> torch.Tensor:
    """uint8 [9 scale, (6 digits + 1) scale]: a number with a border of ``scale`` pixels, whose digits are ``7 scale``
    high.
    """
    digits = [_DIGITS[int(digit)] for digit in str(number)]
    label = torch.zeros(_TALL + 2, (_WIDE + 1) * len(digits) + 1, dtype=torch.uint8)
    for place, rows in enumerate(digits):
        ink = torch.tensor([[255 * int(bit) for bit in row] for row in rows.split()], dtype=torch.uint8)
        left = 1 + place * (_WIDE + 1)
        label[1 : 1 + _TALL, left : left + _WIDE] = ink
    return label.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
