"""The two stages of a run, one step at a time: what is computed, timed and logged."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, Protocol

from vrlt_fast.config import Config
from vrlt_fast.data.sample import Sample
from vrlt_fast.data.stream import Stream
from vrlt_fast.model.embed_cache import EmbeddingCache
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.prompt import Prompt, encode_narration
from vrlt_fast.model.vision import StepVision, is_frozen
from vrlt_fast.parallel.mesh import Mesh
from vrlt_fast.train.feed import Feed
from vrlt_fast.train.guard import Guard, describe_prompts
from vrlt_fast.train.optim import SCHEDULES, MasterAdamW, cosine_lr, take_step
from vrlt_fast.train.passes import How, of_groups
from vrlt_fast.train.plan import fitting
from vrlt_fast.train.probe import probe_step
from vrlt_fast.train.records import Clock, Record, StepView, describe, summary
from vrlt_fast.train.rollouts import Rollouts
from vrlt_fast.train.scored import ScoredGroup, StepSize, with_gradient
from vrlt_fast.train.sft import Narration, SftSize, answer_tokens, sft_backward
from vrlt_fast.train.step import UpdateStats, grpo_backward, logprobs_of, score_old
from vrlt_fast.train.teach import Teaching
from vrlt_fast.train.verify import check_prefix


class Stage(Protocol):
    """What the trainer asks of a stage."""

    stream: Stream
    optimizer: MasterAdamW

    def step(self, step: int) -> Record:
        """One optimizer step (from 1): the train record."""
        ...

    def state(self) -> Record:
        """What it knows beside the order of the samples, for the checkpoint, as JSON."""
        ...

    def load(self, state: Record) -> None:
        """Inverse of :meth:`state`."""
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
        stream: Stream,
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

    def state(self) -> Record:
        """It knows nothing."""
        return {}

    def load(self, state: Record) -> None:
        """Nothing to know."""

    def close(self) -> None:
        """It holds nothing."""


class GrpoStage:
    """Group rollouts, the dual reward, and the clipped update against a frozen reference.

    ``keep`` takes the lines of completions.jsonl of each group as soon as its last response has ended; ``say`` and
    ``warn`` a line for the console.
    """

    def __init__(
        self,
        config: Config,
        lm: VideoLM,
        reference: VideoLM | None,
        feed: Feed,
        optimizer: MasterAdamW,
        *,
        seed: int,
        guard: Guard,
        keep: Callable[[list[Record]], None],
        say: Callable[[str], None],
        warn: Callable[[str], None],
        cache: EmbeddingCache | None = None,
        mesh: Mesh | None = None,
    ):
        self._mesh = mesh or Mesh()
        self.config, self.lm, self.reference, self.feed = config, lm, reference, feed
        self.optimizer, self._cache = optimizer, cache
        self._teaching = Teaching(config, feed, self._mesh.replicas)
        self.stream = self._teaching.stream(config.rollout.prompts, seed)
        self._guard, self._micro_tokens, self._out_of_memory = guard, config.train.micro_tokens, 0
        self._say, self._unverified = say, config.train.verify_shared_prefix == "first_step"
        tasks = {sample.task for sample in feed.samples}
        self._rollouts = Rollouts(config, lm, keep=keep, warn=warn, cache=cache, mesh=self._mesh, tasks=tasks)

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
            prompts = self._next(step)
        lr = SCHEDULES[config.grpo.schedule](step, config.grpo.steps, config.grpo.lr, config.optim.warmup)
        record: Record = {"stage": "grpo", "step": step, "steps": config.grpo.steps, "lr": lr}
        if not self._mesh.everyone.any(bool(prompts)):
            return record | clock.record()
        vision = self._step_vision()
        seen, rolled = self._rollouts.collect(prompts, step, clock, vision, more=partial(self._next, step))
        if self._unverified:
            tokens, self._unverified = self._micro_tokens, False
            check_prefix(self.lm, seen, config, self._mesh.everyone, self._say, micro_tokens=tokens)
        chosen = self._rollouts.chosen(seen)
        scored, replayed = self._teaching.filled(chosen, step)
        self._teaching.learn(seen, chosen, step)
        stats, loss, norm = self._update(scored, lr, clock, vision, replayed=bool(replayed))
        fine = norm is None or self._guard.look("grpo", step, loss, norm, lambda: describe(scored))
        own = self._mesh.peers.share(seen)
        record |= summary(self._mesh.everyone.gather(StepView.of(own, stats, rolled)), clock)
        record |= {"loss": None if norm is None else loss, "grad_norm": norm}
        record |= {} if fine else {"skipped": True}
        record |= self._failed_rewards()
        self._rollouts.hand_over()
        record |= {"replayed_groups": len(replayed)} if replayed else {}
        if self._out_of_memory:
            record |= {"out_of_memory": self._out_of_memory, "micro_tokens": self._micro_tokens}
        return record | ({"embed_cache": self._cache.stats()} if self._cache else {})

    def _failed_rewards(self) -> Record:
        """How often a reward of one's own, or a judge, gave nothing so far, by what happened."""
        told = self._mesh.everyone.gather(self._rollouts.earnings.each.counts)
        total = sum((Counter(counts) for counts in told), Counter[str]())
        return {"reward_failures": dict(total)} if total else {}

    def _next(self, step: int) -> list[Prompt]:
        return self.feed.next(self.stream, self._teaching.change(step))

    def state(self) -> Record:
        """What it knows of its samples."""
        return self._teaching.state()

    def load(self, state: Record) -> None:
        """Inverse of :meth:`state`."""
        self._teaching.load(state)

    def _step_vision(self) -> StepVision | None:
        """For the weights as they are now; None where the tower is frozen."""
        return None if is_frozen(self.lm) else StepVision(self.lm, self._mesh.peers)

    def close(self) -> None:
        """Close the rollout engine and what scores."""
        self._rollouts.close()

    def _update(
        self,
        scored: Sequence[ScoredGroup],
        lr: float,
        clock: Clock,
        vision: StepVision | None,
        *,
        replayed: bool = False,
    ) -> tuple[UpdateStats, float, float | None]:
        """All optimizer steps on one rollout; returns the counters of the last one, and loss and norm of the
        gradient of all processes. Where memory runs out a step is done again in smaller pieces, and so are later ones.
        """
        config, begin, everyone, peers = self.config, perf_counter(), self._mesh.everyone, self._mesh.peers
        flat = self.reference is not None or config.grpo.policy == "reg"
        active, own = with_gradient(scored, flat=flat), StepSize.of(scored)
        if not everyone.any(bool(active)):  # nothing to learn from: the weights and the optimizer stay as they are
            return UpdateStats(), 0.0, None
        tokens, rows = map(int, self._mesh.replicas.sum([own.tokens, own.rows]))
        size = StepSize(tokens, rows, config.rollout.max_new_tokens)
        rows, old, mismatch = config.train.micro_rows, logprobs_of(active) if replayed else None, None

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
            together: dict[str, Any] = {
                "sp": peers.size,
                "together": self._mesh.in_passes,
                "whole": of_groups(config.grpo),
            }
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
