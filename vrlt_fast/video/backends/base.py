"""The interface of a decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vrlt_fast.video.index import VideoIndex
from vrlt_fast.video.plan import DecodePlan

if TYPE_CHECKING:
    import torch

Sink = Callable[[int, "torch.Tensor"], None]
"""Takes a frame number and its upright picture, uint8 [H, W, 3] RGB, on the decoder's device. Frames come in any order,
each once. The picture is the sink's only during the call."""


@dataclass(frozen=True)
class Availability:
    """Whether a decoder can run here; ``reason`` what is missing, ``fix`` the command that mends it."""

    ok: bool
    reason: str = ""
    fix: str = ""


@dataclass
class DecodeStats:
    """What a decode did: frames that the decoder gave, packets left out, CPU seconds by stage."""

    decoded: int = 0
    dropped: int = 0
    seconds: dict[str, float] | None = None


class Backend(Protocol):
    """A decoder."""

    name: str
    device: str

    def availability(self) -> Availability:
        """Never raises, imports nothing heavy twice."""

    def supports(self, index: VideoIndex) -> str:
        """Why the file can't be decoded here, for example a codec; empty where it can."""

    def decode(self, plan: DecodePlan, sink: Sink) -> DecodeStats:
        """Give every frame of the plan to ``sink``, exactly.

        Raises:
            VideoError: V02, V04, V05 or V06; what the sink got before stays given.
        """
