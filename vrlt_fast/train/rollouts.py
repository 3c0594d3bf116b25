"""The groups of a step: asked of the engine, scored and written down as they end, with the groups that shapers need."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from vrlt_fast.config import Config
from vrlt_fast.model.embed_cache import EmbeddingCache
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.vision import StepVision
from vrlt_fast.parallel.mesh import Mesh
from vrlt_fast.rollout.engines import open_engine
from vrlt_fast.rollout.group import Group, RolloutRequest, RolloutStats
from vrlt_fast.rollout.peers import PeerEngine
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.train.earn import Earnings
from vrlt_fast.train.records import Clock, Record, completion_records
from vrlt_fast.train.scored import ScoredGroup, exchanged, over_batch, with_rewards
from vrlt_fast.video.alter import shuffled_frames


class Rollouts:
    """Rolls out the prompts of a step, and with ``grpo.refill`` of those after them.

    Args:
        tasks: what is asked.
        keep: takes the lines of completions.jsonl of each group as soon as it is scored.
        warn: takes a line about rewards that failed.
    """

    def __init__(
        self,
        config: Config,
        lm: VideoLM,
        *,
        keep: Callable[[list[Record]], None],
        warn: Callable[[str], None],
        cache: EmbeddingCache | None,
        mesh: Mesh,
        tasks: Collection[str],
    ):
        self._config, self._lm = config, lm
        self._keep, self._mesh = keep, mesh
        self._later: list[Record] = []  # what the first process is to write
        self._engine = open_engine(config, lm, cache, mesh.peers)
        self.earnings = Earnings(config, device=lm.device, warn=warn, tasks=tasks)

    def collect(
        self,
        prompts: Sequence[Prompt],
        step: int,
        clock: Clock,
        vision: StepVision | None,
        *,
        more: Callable[[], Sequence[Prompt]],
    ) -> tuple[list[ScoredGroup], RolloutStats]:
        """The groups of these prompts, and of ``more()``, the prompts after them, until enough have spread."""
        self._engine.sync(self._lm)
        seen, rolled = self._rollout(self._requests(prompts, step), step, clock, vision)
        for _ in range(self._config.grpo.refill):
            if not self._mesh.everyone.any(sum(s.has_spread for s in seen) < self.wanted):
                break
            with clock.phase("decode"):
                prompts = more()
            if prompts:
                found, stats = self._rollout(self._requests(prompts, step, len(seen)), step, clock, vision)
                seen += found
                rolled.add(stats)
        clock.phases |= rolled.seconds
        clock.phases["generate"] = clock.phases.get("generate", 0.0) - clock.phases.get("reward", 0.0)
        return seen, rolled

    @property
    def wanted(self) -> int:
        """Groups that this process's share of a step has."""
        return len(self._mesh.replicas.share(range(self._config.rollout.prompts)))

    def chosen(self, seen: list[ScoredGroup]) -> list[ScoredGroup]:
        """What is trained on: with ``grpo.refill`` the first ``rollout.prompts`` groups with spread, else all; with
        advantages of the whole step where they are such.
        """
        some = [s for s in seen if s.has_spread][: self.wanted] if self._config.grpo.refill else seen
        return over_batch(some, self._config.grpo, self._mesh.replicas)

    def hand_over(self) -> None:
        """Other processes' completions to the first one."""
        for lines in self._mesh.everyone.gather(self._later)[1:]:
            if self._mesh.first:
                self._keep(lines)
        self._later = []

    def close(self) -> None:
        """Close the engine and what scores."""
        self._engine.close()
        self.earnings.each.close()

    def _rollout(
        self, requests: Sequence[RolloutRequest], step: int, clock: Clock, vision: StepVision | None
    ) -> tuple[list[ScoredGroup], RolloutStats]:
        """Scored groups in the order of the requests; each is scored and written down as soon as it is complete. Of
        peers, each rolls out its share of the groups, or all of them every group.
        """
        scored: dict[int, ScoredGroup] = {}
        beside = self._auxiliary(requests)
        places = {id(request): place for place, request in enumerate((*requests, *beside))}
        ended: dict[int, Group] = {}

        def finish(group: Group) -> None:
            place = places[id(group.request)]
            ended[place] = group
            place %= len(requests)
            groups = [ended.get(place), ended.get(place + len(requests))]
            complete = [g for g in groups if g is not None]
            if len(complete) < (2 if beside else 1):
                return
            with clock.phase("reward"):
                scored[place] = self._scored(complete[0], complete[1:], step)
            for held in (place, place + len(requests)):
                ended.pop(held, None)

        if not requests:
            return [], RolloutStats()
        if isinstance(self._engine, PeerEngine):
            _, rolled = self._engine.own(requests, finish, vision)
        else:
            _, rolled = self._engine.generate([*requests, *beside], finish, vision)
        return exchanged(scored, requests, self._mesh.peers), rolled

    def _scored(self, group: Group, beside: Sequence[Group], step: int) -> ScoredGroup:
        one = self.earnings.of(group, beside)
        one = self._redistributed(one, step) if self._config.reward.shuffle else one
        lines = completion_records([one], step, self._config.grpo)
        if self._mesh.first:
            self._keep(lines)
        else:
            self._later += lines
        return one

    def _requests(self, prompts: Sequence[Prompt], step: int, first: int = 0) -> list[RolloutRequest]:
        rollout = self._config.rollout
        sampling = Sampling(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p, rollout.stop
        )
        base, place = (self._config.train.seed * 1_000_003 + step) * 10_007, self._mesh.replicas.place
        return [RolloutRequest(p, rollout.group_size, sampling, base + place(first + i)) for i, p in enumerate(prompts)]

    def _auxiliary(self, requests: Sequence[RolloutRequest]) -> list[RolloutRequest]:
        """T-GRPO's: half as many responses to the same prompt with the frames in random order, none of them trained."""
        if not self._config.reward.shuffled:
            return []
        return [
            replace(r, prompt=_shuffled(r.prompt, r.seed), n=max(r.n // 2, 1), seed=r.seed + 5_003, train=False)
            for r in requests
        ]

    def _redistributed(self, scored: ScoredGroup, step: int) -> ScoredGroup:
        """The control of ``reward.shuffle``: the group's rewards in a random order, which keeps their distribution."""
        rng = random.Random(f"shuffle-{self._config.train.seed}-{step}-{scored.group.request.seed}")
        rewards = rng.sample(scored.rewards, len(scored.rewards))
        (shuffled,) = with_rewards([scored.group], [scored.parts], [rewards], self._config.grpo)
        return shuffled


def _shuffled(prompt: Prompt, seed: int) -> Prompt:
    media = tuple(shuffled_frames(clip, seed) if clip.kind == "video" else clip for clip in prompt.media)
    return replace(prompt, media=media)
