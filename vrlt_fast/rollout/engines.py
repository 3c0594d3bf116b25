"""The choice of a rollout engine: one interface, and the one place that knows all that have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vrlt_fast.config import Config
from vrlt_fast.model.load import VideoLM
from vrlt_fast.rollout.engine import generate
from vrlt_fast.rollout.group import Group, RolloutRequest, RolloutStats
from vrlt_fast.rollout.vllm import VllmEngine


class RolloutEngine(Protocol):
    """What samples responses."""

    def sync(self, lm: VideoLM) -> None:
        """Take ``lm``'s weights as they are now; before each rollout."""
        ...

    def generate(
        self, requests: Sequence[RolloutRequest], on_group: Callable[[Group], None] | None = None
    ) -> tuple[list[Group], RolloutStats]:
        """All requests; ``on_group`` is called with each group that is complete."""
        ...

    def close(self) -> None:
        """Give back what the engine holds beside the model."""
        ...


class InProcess:
    """The model itself: whole groups, at most ``rows`` responses at a time."""

    def __init__(self, lm: VideoLM, rows: int):
        self._lm, self._rows = lm, rows

    def sync(self, lm: VideoLM) -> None:
        """Nothing to copy: it samples from the weights that are trained."""
        self._lm = lm

    def generate(
        self, requests: Sequence[RolloutRequest], on_group: Callable[[Group], None] | None = None
    ) -> tuple[list[Group], RolloutStats]:
        at_once = max(1, self._rows // requests[0].n)
        groups: list[Group] = []
        stats = RolloutStats()
        for start in range(0, len(requests), at_once):
            some, rolled = generate(self._lm, requests[start : start + at_once])
            groups += some
            stats.add(rolled)
            for group in some if on_group else ():
                on_group(group)  # type: ignore[misc]
        return groups, stats

    def close(self) -> None:
        """It holds nothing of its own."""


def open_engine(config: Config, lm: VideoLM) -> RolloutEngine:
    """The engine of ``rollout.engine``.

    Raises:
        SetupError: as :class:`VllmEngine`.
    """
    if config.rollout.engine == "vllm":
        return VllmEngine(lm, config.vllm)
    return InProcess(lm, config.train.micro_rows)
