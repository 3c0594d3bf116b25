"""Rollouts of processes that have the same prompts: whole groups to each of them, or every group to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from vrlt_fast.config import RolloutConfig
from vrlt_fast.model.embed_cache import EmbeddingCache
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.vision import Embeddings, Encoded, StepVision, encode_media
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.rollout.engine import GroupEngine
from vrlt_fast.rollout.group import Group, RolloutRequest, RolloutStats
from vrlt_fast.rollout.joint import JointEngine


class PeerEngine:
    """As :class:`GroupEngine`, for ``peers`` that call it together with the same requests, on clips that they share.

    Requests with the same prompt go to the same process. Where prompts are fewer than processes, or too long for the
    keys and values of one of them, all roll out every group together.
    """

    def __init__(
        self, lm: VideoLM, config: RolloutConfig | None = None, cache: EmbeddingCache | None = None, *, peers: Peers
    ):
        self._lm, self._cache, self._peers = lm, cache, peers
        self._alone = GroupEngine(lm.whole, config)
        self._joint = JointEngine(lm.whole, config, peers=peers)

    def sync(self, lm: VideoLM) -> None:
        """As :meth:`GroupEngine.sync`."""
        self._lm = lm
        for engine in (self._alone, self._joint):
            engine.sync(lm.whole)

    def close(self) -> None:
        """Give the buffers back."""
        for engine in (self._alone, self._joint):
            engine.close()

    def own(
        self,
        requests: Sequence[RolloutRequest],
        on_group: Callable[[Group], None] | None = None,
        vision: StepVision | None = None,
    ) -> tuple[dict[int, Group], RolloutStats]:
        """The groups, by the places of their requests, that are this process's to go on with; each is some process's.

        Args:
            on_group: called with each of these groups.
        """
        held, stats = self._encode(requests, vision)
        order = {id(p): i for i, p in enumerate({id(r.prompt): r.prompt for r in requests}.values())}
        places = [i for i, r in enumerate(requests) if order[id(r.prompt)] % self._peers.size == self._peers.rank]
        mine = [requests[i] for i in places]
        alone = len(order) >= self._peers.size and self._alone.fits(mine)
        if self._peers.agree(alone):
            self._joint.close()
            groups, rolled = self._alone.generate(mine, on_group, held)
            stats.add(rolled)
            return dict(zip(places, groups, strict=True)), stats
        self._alone.close()
        first = self._peers.rank == 0  # of what all do one counts
        groups, rolled = self._joint.generate(requests, on_group if first else None, held)
        if first:
            stats.add(rolled)
        return dict(enumerate(groups)) if first else {}, stats

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        on_group: Callable[[Group], None] | None = None,
        vision: StepVision | None = None,
    ) -> tuple[list[Group], RolloutStats]:
        """All groups, in order, in each process; ``on_group`` as in :meth:`own`."""
        own, stats = self.own(requests, on_group, vision)
        told = self._peers.objects({place: group.completions for place, group in own.items()})
        found = {place: completions for part in told for place, completions in part.items()}
        return [Group(request, found[place]) for place, request in enumerate(requests)], stats

    @torch.no_grad()
    def _encode(self, requests: Sequence[RolloutRequest], vision: StepVision | None) -> tuple[Encoded, RolloutStats]:
        """All clips: each process takes its part of the tower's work."""
        stats, begin = RolloutStats(), perf_counter()
        held: Embeddings | None = vision or self._cache
        found, encoded = encode_media(self._lm, [c for r in requests for c in r.prompt.media], held, self._peers)
        stats.spend("encode", begin)
        stats.count(self._peers.share(encoded))
        return Encoded(found), stats
