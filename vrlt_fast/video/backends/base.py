"""The interface of a decoder, and what is done about frames that it couldn't give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from vrlt_fast.errors import VideoError
from vrlt_fast.video.index import VideoIndex, video_error
from vrlt_fast.video.plan import DecodePlan, plan_sequential

if TYPE_CHECKING:
    import torch

Sink = Callable[[int, "torch.Tensor"], None]
"""Takes a frame number and its upright picture, uint8 [H, W, 3] RGB, on the decoder's device. Frames come in any order;
one that comes again replaces the first. The picture is the sink's only during the call."""

OnError = Literal["strict", "tolerant"]


@dataclass(frozen=True)
class Availability:
    """Whether a decoder can run here; ``reason`` what is missing, ``fix`` the command that mends it."""

    ok: bool
    reason: str = ""
    fix: str = ""


@dataclass
class DecodeStats:
    """What a decode did: ``decoded`` frames that the decoder gave, ``dropped`` packets left out, CPU ``seconds`` by
    stage.

    Of decoders that can go on after a fault: ``missing`` frames asked for and not given intact, ``why`` the first
    fault, ``intact`` every frame given intact (only where the whole file was decoded), ``substituted`` the frames that
    stand in for missing ones.
    """

    decoded: int = 0
    dropped: int = 0
    seconds: dict[str, float] | None = None
    missing: tuple[int, ...] = ()
    why: str = ""
    intact: tuple[int, ...] = ()
    substituted: dict[int, int] = field(default_factory=dict)

    def add(self, other: DecodeStats) -> None:
        """Add the work of ``other``; the rest stays."""
        self.decoded += other.decoded
        self.dropped += other.dropped
        seconds = dict(self.seconds or {})
        for stage, value in (other.seconds or {}).items():
            seconds[stage] = seconds.get(stage, 0.0) + value
        self.seconds = seconds


class Backend(Protocol):
    """A decoder. ``isolate``: its native code may hang, so that it must run in a worker process."""

    name: str
    device: str
    isolate: bool

    def availability(self) -> Availability:
        """Never raises, imports nothing heavy twice."""

    def supports(self, index: VideoIndex) -> str:
        """Why the file can't be decoded here, for example a codec; empty where it can."""

    def decode(self, plan: DecodePlan, sink: Sink) -> DecodeStats:
        """Give every frame of the plan to ``sink``, exactly.

        Raises:
            VideoError: V02, V04, V05 or V06; what the sink got before stays given.
        """


Attempt = Callable[[DecodePlan, Mapping[int, Sequence[int]]], DecodeStats]
"""Decodes a plan as far as it can. The mapping says for which of the frames asked for each frame of the plan stands."""


def _some(frames: Sequence[int]) -> str:
    head = ", ".join(map(str, frames[:4]))
    return f"{head} and {len(frames) - 4} more" if len(frames) > 4 else head


def lost_frames(index: VideoIndex, stats: DecodeStats) -> VideoError:
    """The error that names the missing frames: V02 with the decoder's complaint, V05 where the file just ends."""
    if not stats.missing:
        raise ValueError("no frame is missing")
    what = f"can't be decoded: frame{'s' if len(stats.missing) > 1 else ''} {_some(stats.missing)}"
    return video_error("VRLT-V02" if stats.why else "VRLT-V05", index.path, what, stats.why)


def decode_all(plan: DecodePlan, attempt: Attempt, on_error: OnError) -> DecodeStats:
    """Decode a plan; try what is missing again by one sequential pass without leaving packets out. What is missing then
    is an error (strict), or gets the nearest frame that decodes, counted in ``substituted`` (tolerant).

    Raises:
        VideoError: V02, V04 or V05; anything that ``attempt`` raises.
    """
    index = plan.index
    stats = attempt(plan, {frame: (frame,) for frame in plan.frames})
    if not stats.missing:
        return stats
    tolerant = on_error == "tolerant"
    again = attempt(plan_sequential(index, stats.missing, whole=tolerant), {frame: (frame,) for frame in stats.missing})
    stats.add(again)
    stats.missing, stats.why = again.missing, again.why or stats.why
    if not stats.missing:
        return stats
    if not stats.decoded:
        raise video_error("VRLT-V04", index.path, "video has no decodable frames", stats.why)
    if not tolerant or not again.intact:
        raise lost_frames(index, stats)
    stats.substituted = {frame: min(again.intact, key=lambda n: (abs(n - frame), n)) for frame in stats.missing}
    stands_for: dict[int, list[int]] = {}
    for frame, other in stats.substituted.items():
        stands_for.setdefault(other, []).append(frame)
    # again from the start and without leaving packets out: exactly how the substitutes were seen to be intact
    last = attempt(plan_sequential(index, stands_for), stands_for)
    stats.add(last)
    if last.missing:
        raise lost_frames(index, last)
    stats.missing = ()
    return stats
