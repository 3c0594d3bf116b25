"""The two stages of a run, one step at a time: what is computed, timed and logged."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Protocol

from vrlt_fast.config import Config
from vrlt_fast.data.sample import Sample
from vrlt_fast.data.stream import BatchStream
from vrlt_fast.model.embed_cache import EmbeddingCache
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.prompt import Prompt, encode_narration
from vrlt_fast.model.vision import StepVision, is_frozen
from vrlt_fast.parallel.mesh import Mesh
from vrlt_fast.rewards.dual import dual_reward, unshaped
from vrlt_fast.rollout.engines import open_engine
from vrlt_fast.rollout.group import Group, RolloutRequest, RolloutStats
from vrlt_fast.rollout.peers import PeerEngine
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.train.feed import Feed
from vrlt_fast.train.guard import Guard, describe_prompts
from vrlt_fast.train.optim import SCHEDULES, MasterAdamW, cosine_lr, take_step
from vrlt_fast.train.passes import How
from vrlt_fast.train.plan import fitting
from vrlt_fast.train.probe import probe_step
from vrlt_fast.train.records import Clock, Record, StepView, completion_records, describe, summary
from vrlt_fast.train.scored import ScoredGroup, StepSize, exchanged, score_groups, with_gradient, with_rewards
from vrlt_fast.train.sft import Narration, SftSize, answer_tokens, sft_backward
from vrlt_fast.train.step import UpdateStats, grpo_backward, score_old
from vrlt_fast.train.verify import check_prefix


class Stage(Protocol):
    """What the trainer asks of a stage."""

    stream: BatchStream
    optimizer: MasterAdamW

    def step(self, step: int) -> Record:
        """One optimizer step (from 1): the train record."""
        ...

    def close(self) -> None:
        """Give back what the stage holds beside the model."""
        ...


class SftStage:
    """Cross-entropy on the training set's own answers."""

    def __init__(
        self,
        config: Config,
        lm: VideoLM,
        feed: Feed,
        stream: BatchStream,
        optimizer: MasterAdamW,
        *,
        guard: Guard,
        cache: EmbeddingCache | None = None,
        mesh: Mesh | None = None,
    ):
        self.config, self.lm, self.feed, self.stream, self.optimizer = config, lm, feed, stream, optimizer
        self._guard, self._cache, self._mesh = guard, cache, mesh or Mesh()

    def step(self, step: int) -> Record:
        config, clock = self.config, Clock()
        sft = config.sft
        with clock.phase("decode"):
            prompts = self.feed.next_videos(self.stream, lambda s: bool(s.reasoning) and self._thinks(s, step))
        lr = cosine_lr(step, sft.steps, sft.lr, config.optim.warmup)
        record: Record = {"stage": "sft", "step": step, "steps": sft.steps, "lr": lr}
        answers = [answer_tokens(self.lm.info, p.sample, p.asked) for p in prompts]
        told = self._narrations(prompts) if sft.narration else []
        own = SftSize.of(answers, told)
        size = SftSize(*map(int, self._mesh.replicas.sum([own.answers, own.captions])))
        if size.answers:
            with clock.phase("update"):
                how = replace(How.of(config, self._mesh, 0), temperature=1.0)
                part = sft_backward(self.lm, prompts, answers, how, told, sft.narration, self._cache, size=size)
                loss, captions, tokens = self._mesh.everyone.sum([part.answers, part.captions, part.tokens])
                norm = take_step(self.lm, self.optimizer, self._mesh, loss, lr, config.optim.grad_clip)
            told_answers = [[{"tokens": a}] for a in answers]
            fine = self._guard.look("sft", step, loss, norm, lambda: describe_prompts(prompts, told_answers))
            record |= {} if fine else {"skipped": True}
            record |= {"narration": captions} if size.captions else {}
            record |= {"loss": loss, "grad_norm": norm, "tokens_s": tokens / clock.seconds}
        return record | clock.record()

    def _thinks(self, sample: Sample, step: int) -> bool:
        """Whether the answer of this step is to be thought about first."""
        return (
            random.Random(f"think-{self.config.train.seed}-{step}-{sample.id}").random() < self.config.sft.think_share
        )

    def _narrations(self, prompts: Sequence[Prompt]) -> list[Narration]:
        """The captions of the step's videos, once each; nothing where no sample has a timeline."""
        videos = {p.clip.key: p for p in prompts if p.sample.timeline}
        return [encode_narration(self.lm.info, p.sample, p.clip, p.asked) for p in videos.values()]

    def close(self) -> None:
        """It holds nothing."""


class GrpoStage:
    """Group rollouts, the dual reward, and the clipped update against a frozen reference.

    ``keep`` takes the lines of completions.jsonl of each group as soon as its last response has ended; ``say`` a line
    for the console.
    """

    def __init__(
        self,
        config: Config,
        lm: VideoLM,
        reference: VideoLM | None,
        feed: Feed,
        stream: BatchStream,
        optimizer: MasterAdamW,
        *,
        guard: Guard,
        keep: Callable[[list[Record]], None],
        say: Callable[[str], None],
        cache: EmbeddingCache | None = None,
        mesh: Mesh | None = None,
    ):
        self._mesh = mesh or Mesh()
        self._later: list[Record] = []  # what the first process is to write
        self.config, self.lm, self.reference, self.feed = config, lm, reference, feed
        self.stream, self.optimizer, self._keep, self._cache = stream, optimizer, keep, cache
        self._guard, self._micro_tokens, self._out_of_memory = guard, config.train.micro_tokens, 0
        self._say, self._unverified = say, config.train.verify_shared_prefix == "first_step"
        self._engine = open_engine(config, lm, cache, self._mesh.peers)
        self._reward = dual_reward(config.prompt.think)
        self._weights = config.reward.model_dump(include={"semantic", "temporal", "format"})

    def probe(self, sample: int) -> None:
        """Take the largest update, behind the prompt of this sample, and go on with pieces that fit.

        Raises:
            SetupError: E05 none fits.
        """
        prompt = self.feed.prompt(sample)
        if not self._mesh.everyone.any(prompt is None) and prompt is not None:
            self._micro_tokens = probe_step(
                self.lm, self.reference, prompt, self.config, self.optimizer, self._say, mesh=self._mesh
            )

    def step(self, step: int) -> Record:
        config, clock = self.config, Clock()
        with clock.phase("decode"):
            prompts = self.feed.next(self.stream)
        lr = SCHEDULES[config.grpo.schedule](step, config.grpo.steps, config.grpo.lr, config.optim.warmup)
        record: Record = {"stage": "grpo", "step": step, "steps": config.grpo.steps, "lr": lr}
        if not self._mesh.everyone.any(bool(prompts)):
            return record | clock.record()
        vision = self._step_vision()
        seen, rolled = self._rollouts(prompts, step, clock, vision)
        if self._unverified:
            tokens, self._unverified = self._micro_tokens, False
            check_prefix(self.lm, seen, config, self._mesh.everyone, self._say, micro_tokens=tokens)
        scored = self._chosen(seen)
        stats, loss, norm = self._update(scored, lr, clock, vision)
        fine = norm is None or self._guard.look("grpo", step, loss, norm, lambda: describe(scored))
        own = self._mesh.peers.share(seen)
        record |= summary(self._mesh.everyone.gather(StepView.of(own, stats, rolled)), clock)
        record |= {"loss": None if norm is None else loss, "grad_norm": norm}
        record |= {} if fine else {"skipped": True}
        self._hand_over()
        if self._out_of_memory:
            record |= {"out_of_memory": self._out_of_memory, "micro_tokens": self._micro_tokens}
        return record | ({"embed_cache": self._cache.stats()} if self._cache else {})

    def _step_vision(self) -> StepVision | None:
        """For the weights as they are now; None where the tower is frozen."""
        return None if is_frozen(self.lm) else StepVision(self.lm, self._mesh.peers)

    def _rollouts(
        self, prompts: Sequence[Prompt], step: int, clock: Clock, vision: StepVision | None
    ) -> tuple[list[ScoredGroup], RolloutStats]:
        """The groups of these prompts, and with ``grpo.refill`` of the prompts after them, until enough have signal."""
        self._engine.sync(self.lm)
        seen, rolled = self._rollout(self._requests(prompts, step), step, clock, vision)
        for _ in range(self.config.grpo.refill):
            if not self._mesh.everyone.any(sum(s.has_signal for s in seen) < self._wanted):
                break
            with clock.phase("decode"):
                prompts = self.feed.next(self.stream)
            if prompts:
                found, stats = self._rollout(self._requests(prompts, step, len(seen)), step, clock, vision)
                seen += found
                rolled.add(stats)
        clock.phases |= rolled.seconds
        clock.phases["generate"] = clock.phases.get("generate", 0.0) - clock.phases.get("reward", 0.0)
        return seen, rolled

    @property
    def _wanted(self) -> int:
        """Groups that this process's share of a step has."""
        return len(self._mesh.replicas.share(range(self.config.rollout.prompts)))

    def _chosen(self, seen: list[ScoredGroup]) -> list[ScoredGroup]:
        """What is trained on: with ``grpo.refill`` the first ``rollout.prompts`` groups with signal, else all."""
        return [s for s in seen if s.has_signal][: self._wanted] if self.config.grpo.refill else seen

    def _rollout(
        self, requests: Sequence[RolloutRequest], step: int, clock: Clock, vision: StepVision | None
    ) -> tuple[list[ScoredGroup], RolloutStats]:
        """Scored groups in the order of the requests; each is scored and written down as soon as it is complete. Of
        peers, each rolls out its share of the groups, or all of them every group.
        """
        scored: dict[int, ScoredGroup] = {}
        places = {id(request): place for place, request in enumerate(requests)}

        def finish(group: Group) -> None:
            with clock.phase("reward"):
                (one,) = score_groups([group], self._reward, unshaped, self._weights, self.config.grpo)
                one = self._shuffled(one, step) if self.config.reward.shuffle else one
                scored[places[id(group.request)]] = one
                lines = completion_records([one], step)
                if self._mesh.first:
                    self._keep(lines)
                else:
                    self._later += lines

        if not requests:
            return [], RolloutStats()
        peers = self._mesh.peers
        if isinstance(self._engine, PeerEngine):
            _, rolled = self._engine.own(requests, finish, vision)
        else:
            _, rolled = self._engine.generate(requests, finish, vision)
        return exchanged(scored, requests, peers), rolled

    def _hand_over(self) -> None:
        """Other processes' completions to the first one."""
        for lines in self._mesh.everyone.gather(self._later)[1:]:
            if self._mesh.first:
                self._keep(lines)
        self._later = []

    def close(self) -> None:
        """Close the rollout engine."""
        self._engine.close()

    def _requests(self, prompts: Sequence[Prompt], step: int, first: int = 0) -> list[RolloutRequest]:
        rollout = self.config.rollout
        sampling = Sampling(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p, rollout.stop
        )
        base, place = (self.config.train.seed * 1_000_003 + step) * 10_007, self._mesh.replicas.place
        return [RolloutRequest(p, rollout.group_size, sampling, base + place(first + i)) for i, p in enumerate(prompts)]

    def _shuffled(self, scored: ScoredGroup, step: int) -> ScoredGroup:
        """The control of ``reward.shuffle``: the group's rewards in a random order, which keeps their distribution."""
        rng = random.Random(f"shuffle-{self.config.train.seed}-{step}-{scored.group.request.seed}")
        rewards = rng.sample(scored.rewards, len(scored.rewards))
        (shuffled,) = with_rewards([scored.group], [scored.parts], [rewards], self.config.grpo)
        return shuffled

    def _update(
        self, scored: Sequence[ScoredGroup], lr: float, clock: Clock, vision: StepVision | None
    ) -> tuple[UpdateStats, float, float | None]:
        """All optimizer steps on one rollout; returns the counters of the last one, and loss and norm of the
        gradient of all processes. Where memory runs out a step is done again in smaller pieces, and so are later ones.
        """
        config, begin, everyone, peers = self.config, perf_counter(), self._mesh.everyone, self._mesh.peers
        active, own = with_gradient(scored, kl=self.reference is not None), StepSize.of(scored)
        if not everyone.any(bool(active)):  # nothing to learn from: the weights and the optimizer stay as they are
            return UpdateStats(), 0.0, None
        size = StepSize(*map(int, self._mesh.replicas.sum([own.tokens, own.rows])))
        rows, old, mismatch = config.train.micro_rows, None, None

        def run(tokens: int) -> UpdateStats:
            nonlocal old
            how = How.of(config, self._mesh, tokens)
            held = vision or self._cache
            if config.grpo.updates > 1 and old is None:
                old = score_old(self.lm, active, how, held)
            return grpo_backward(self.lm, self.reference, active, config.grpo, how, size=size, old=old, held=held)

        def undo() -> None:
            nonlocal vision
            self.optimizer.clear()
            if vision is not None:
                vision.drop()  # it holds gradients of what was done
            vision = self._step_vision()

        reference_seconds = 0.0
        for _ in range(config.grpo.updates):
            together = {"sp": peers.size, "together": self._mesh.in_passes}
            stats, self._micro_tokens, failed = fitting(run, active, rows, self._micro_tokens, undo=undo, **together)
            self._out_of_memory += failed
            (loss,) = everyone.sum([stats.loss])
            norm = take_step(self.lm, self.optimizer, self._mesh, loss, lr, config.optim.grad_clip)
            reference_seconds += stats.reference_seconds
            mismatch = mismatch or stats.mismatch  # of the weights that rolled out
            stats.mismatch = mismatch
            if not (math.isfinite(loss) and math.isfinite(norm)):
                break
            vision = self._step_vision()  # the weights are others now
        clock.phases["reference"] = reference_seconds
        clock.phases["update"] = perf_counter() - begin - reference_seconds
        return stats, loss, norm
