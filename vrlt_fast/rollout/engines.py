"""The choice of a rollout engine: one interface, and the one place that knows all that have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vrlt_fast.config import Config
from vrlt_fast.model.embed_cache import EmbeddingCache
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.vision import StepVision
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.rollout.engine import GroupEngine
from vrlt_fast.rollout.group import Group, RolloutRequest, RolloutStats
from vrlt_fast.rollout.peers import PeerEngine
from vrlt_fast.rollout.vllm import VllmEngine


class RolloutEngine(Protocol):
    """What samples responses."""

    def sync(self, lm: VideoLM) -> None:
        """Take ``lm``'s weights as they are now; before each rollout."""
        ...

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        on_group: Callable[[Group], None] | None = None,
        vision: StepVision | None = None,
    ) -> tuple[list[Group], RolloutStats]:
        """All requests; ``on_group`` is called with each complete group; ``vision`` as in :class:`GroupEngine`."""
        ...

    def close(self) -> None:
        """Give back what the engine holds beside the model."""
        ...


def open_engine(
    config: Config, lm: VideoLM, cache: EmbeddingCache | None = None, peers: Peers | None = None
) -> RolloutEngine:
    """The engine of ``rollout.engine``; ``cache`` holds embeddings of a frozen tower; ``peers`` have the same prompts.

    Raises:
        SetupError: as :class:`VllmEngine`.
    """
    if config.rollout.engine == "vllm":
        return VllmEngine(lm, config.vllm, cache)
    if peers is not None and peers.size > 1:
        return PeerEngine(lm, config.rollout, cache, peers=peers)
    return GroupEngine(lm.whole, config.rollout, cache)
