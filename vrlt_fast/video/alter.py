"""Altered copies of clips: frames in another order, with noise, hidden, or fewer.

Each has a key of its own, which names what was done and all that it depends on: what is made of equal clips with equal
arguments has equal keys and equal patches, and other arguments give other keys.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from vrlt_fast.data.sample import Span
from vrlt_fast.video.preprocess import Clip, patchify
from vrlt_fast.video.sampling import TUBELET

GREY = 128
"""Level of the pixels of what is hidden."""


def with_frames(clip: Clip, frames: torch.Tensor, key: str) -> Clip:
    """The clip with other pictures uint8 [2 t, 3, H, W] at the same times; the inverse of :meth:`Clip.frames`."""
    return replace(clip, patches=patchify(frames, clip.geometry)[0], key=key)


def all_frames(clip: Clip) -> torch.Tensor:
    """The clip's pictures uint8 [2 t, 3, H, W], a copy that may be written to.

    Raises:
        ValueError: processes share the clip, so that this one holds a part of it.
    """
    _check_whole(clip)
    return clip.frames().clone()


def shuffled_frames(clip: Clip, seed: int) -> Clip:
    """The decoded frames (not the frame pairs) in a random order, at the times of the unshuffled ones: T-GRPO
    (arXiv 2503.21776).

    Raises:
        ValueError: processes share the clip.
    """
    frames = all_frames(clip)
    order = list(range(len(frames)))
    random.Random(f"frames {seed}").shuffle(order)
    return with_frames(clip, frames[order], f"{clip.key} shuffled {seed}")


def noisy_frames(clip: Clip, sigma: float, seed: int) -> Clip:
    """With Gaussian noise of deviation ``sigma``, in levels of 255, on each value of each frame, rounded and clipped to
    0..255: DeepVideo-R1's easy samples (arXiv 2506.07464). ``sigma`` 0 gives the clip itself.

    Raises:
        ValueError: processes share the clip, or ``sigma`` is negative or not finite.
    """
    _check_whole(clip)
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma is {sigma}; needs 0 or more levels")
    if sigma == 0:
        return clip
    generator = torch.Generator().manual_seed(seed % 2**63)
    patches = clip.patches.clone()
    for pair in patches.view(clip.grid[0], -1):  # one by one: floats of a whole clip are four times its size
        pair.copy_((pair + sigma * torch.randn(pair.shape, generator=generator)).round_().clamp_(0, 255))
    return replace(clip, patches=patches, key=f"{clip.key} noise {float(sigma)!r} {seed}")


def masked_outside(clip: Clip, spans: Sequence[Span], share: float, seed: int) -> Clip:
    """With ``share`` (0..1, rounded to a whole number) of the frame pairs outside of all spans grey: VideoTG-R1's hard
    samples (arXiv 2510.23397, which doesn't say which part; here it is random).

    A pair stands for the seconds from its first frame to the next pair's first, the first one also for what is before
    and the last one for what is after; it is outside where no span touches these. With the same seed, a smaller share
    hides some of what a larger one hides. Nothing to hide gives the clip itself.

    Raises:
        ValueError: processes share the clip, or ``share`` isn't in 0..1.
    """
    _check_whole(clip)
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; needs 0 to 1")
    borders = [-math.inf, *clip.times[2::2], math.inf]
    pairs = range(clip.grid[0])
    outside = [i for i in pairs if not any(start < borders[i + 1] and end >= borders[i] for start, end in spans)]
    random.Random(f"pairs {seed}").shuffle(outside)
    hidden = sorted(outside[: round(share * len(outside))])
    if not hidden:
        return clip
    patches = clip.patches.clone()
    patches.view(clip.grid[0], -1)[hidden] = GREY
    return replace(clip, patches=patches, key=f"{clip.key} masked {digest(hidden)}")


def thinned(clip: Clip, frames: int) -> Clip:
    """At most so many frames (an odd number counts as the even one below): whole frame pairs, each the middle one of
    as many parts of the clip, whose lengths differ by one pair at most. A clip that has no more is returned itself.

    The pairs keep their times; ``seconds_per_grid`` grows as their number falls.

    Raises:
        ValueError: processes share the clip, or ``frames`` is below 2.
    """
    _check_whole(clip)
    if frames < TUBELET:
        raise ValueError(f"frames is {frames}; needs {TUBELET} or more")
    pairs, (n, h, w) = frames // TUBELET, clip.grid
    if n <= pairs:
        return clip
    chosen = [(2 * i + 1) * n // (2 * pairs) for i in range(pairs)]
    return replace(
        clip,
        patches=clip.patches.view(n, h * w, -1)[chosen].flatten(0, 1),
        grid=(pairs, h, w),
        times=tuple(time for i in chosen for time in clip.times[TUBELET * i : TUBELET * (i + 1)]),
        seconds_per_grid=clip.seconds_per_grid * n / pairs,
        key=f"{clip.key} thinned {pairs}",
    )


def grey(clip: Clip) -> Clip:
    """All pixels grey; of a clip that processes share, those of this one's part."""
    return replace(clip, patches=torch.full_like(clip.patches, GREY), key=f"{clip.key} grey")


def digest(told: object) -> str:
    """Short name of plain values, for keys."""
    return hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()


def _check_whole(clip: Clip) -> None:
    if clip.cuts:
        raise ValueError(f"processes share the clip {clip.key}: this one holds a part of its frames")
