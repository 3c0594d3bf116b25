"""The two stages of a run, one step at a time: what is computed, timed and logged."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter, process_time
from typing import Any, Protocol

from vrlt_fast.config import Config
from vrlt_fast.data.stream import BatchStream
from vrlt_fast.model.embed_cache import EmbeddingCache
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.prompt import Prompt, encode_narration
from vrlt_fast.model.vision import StepVision, is_frozen
from vrlt_fast.rewards.dual import dual_reward, unshaped
from vrlt_fast.rollout.engines import open_engine
from vrlt_fast.rollout.group import Group, RolloutRequest, RolloutStats
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.train.feed import Feed
from vrlt_fast.train.guard import Batch, Guard, describe_prompts
from vrlt_fast.train.optim import SCHEDULES, MasterAdamW, apply_step, cosine_lr
from vrlt_fast.train.plan import fitting
from vrlt_fast.train.scored import ScoredGroup, StepSize, score_groups, with_gradient, with_rewards
from vrlt_fast.train.sft import Narration, answer_tokens, sft_backward
from vrlt_fast.train.step import UpdateStats, grpo_backward, score_old

Record = dict[str, Any]


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


class Clock:
    """Wall seconds by phase of one step."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._start, self._start_cpu = perf_counter(), process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + perf_counter() - begin

    @property
    def seconds(self) -> float:
        return perf_counter() - self._start

    def record(self) -> Record:
        """The fields of a train record that are times."""
        return {"seconds": self.seconds, "cpu_seconds": process_time() - self._start_cpu, "phases": self.phases}


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
    ):
        self.config, self.lm, self.feed, self.stream, self.optimizer = config, lm, feed, stream, optimizer
        self._guard, self._cache = guard, cache

    def step(self, step: int) -> Record:
        config, clock = self.config, Clock()
        sft = config.sft
        with clock.phase("decode"):
            rng = random.Random(f"think-{config.train.seed}-{step}")
            prompts = self.feed.next_videos(self.stream, lambda s: bool(s.reasoning) and rng.random() < sft.think_share)
        lr = cosine_lr(step, sft.steps, sft.lr, config.optim.warmup)
        record: Record = {"stage": "sft", "step": step, "steps": sft.steps, "lr": lr}
        if prompts:
            with clock.phase("update"):
                answers = [answer_tokens(self.lm.info, p.sample, p.asked) for p in prompts]
                told = self._narrations(prompts) if sft.narration else []
                rows = config.train.micro_rows
                loss = sft_backward(self.lm, prompts, answers, rows, told, sft.narration, self._cache)
                norm = apply_step(self.lm, self.optimizer, loss.answers, lr, config.optim.grad_clip)
            told_answers = [[{"tokens": a}] for a in answers]
            fine = self._guard.look("sft", step, loss.answers, norm, lambda: describe_prompts(prompts, told_answers))
            record |= {} if fine else {"skipped": True}
            record |= {"narration": loss.captions} if told else {}
            record |= {"loss": loss.answers, "grad_norm": norm, "tokens_s": loss.tokens / clock.seconds}
        return record | clock.record()

    def _narrations(self, prompts: Sequence[Prompt]) -> list[Narration]:
        """The captions of the step's videos, once each; nothing where no sample has a timeline."""
        videos = {p.clip.key: p for p in prompts if p.sample.timeline}
        return [encode_narration(self.lm.info, p.sample, p.clip, p.asked) for p in videos.values()]

    def close(self) -> None:
        """It holds nothing."""


class GrpoStage:
    """Group rollouts, the dual reward, and the clipped update against a frozen reference.

    ``keep`` takes the lines of completions.jsonl of each group as soon as its last response has ended.
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
        cache: EmbeddingCache | None = None,
    ):
        self.config, self.lm, self.reference, self.feed = config, lm, reference, feed
        self.stream, self.optimizer, self._keep, self._cache = stream, optimizer, keep, cache
        self._guard, self._micro_tokens, self._out_of_memory = guard, config.train.micro_tokens, 0
        self._engine = open_engine(config, lm, cache)
        self._reward = dual_reward(config.prompt.think)
        self._weights = config.reward.model_dump(include={"semantic", "temporal", "format"})

    def step(self, step: int) -> Record:
        config, clock = self.config, Clock()
        with clock.phase("decode"):
            prompts = self.feed.next(self.stream)
        lr = SCHEDULES[config.grpo.schedule](step, config.grpo.steps, config.grpo.lr, config.optim.warmup)
        record: Record = {"stage": "grpo", "step": step, "steps": config.grpo.steps, "lr": lr}
        if not prompts:
            return record | clock.record()
        vision = self._step_vision()
        seen, rolled = self._rollouts(prompts, step, clock, vision)
        scored = self._chosen(seen)
        stats, norm = self._update(scored, lr, clock, vision)
        passed = stats.tokens > 0
        fine = not passed or self._guard.look("grpo", step, stats.loss, norm, lambda: _describe(scored))
        record |= summary(seen, stats, rolled, clock) | {"grad_norm": norm if passed else None}
        record |= {} if fine else {"skipped": True}
        if self._out_of_memory:
            record |= {"out_of_memory": self._out_of_memory, "micro_tokens": self._micro_tokens}
        return record | ({"embed_cache": self._cache.stats()} if self._cache else {})

    def _step_vision(self) -> StepVision | None:
        """For the weights as they are now; None where the tower is frozen."""
        return None if is_frozen(self.lm) else StepVision(self.lm)

    def _rollouts(
        self, prompts: Sequence[Prompt], step: int, clock: Clock, vision: StepVision | None
    ) -> tuple[list[ScoredGroup], RolloutStats]:
        """The groups of these prompts, and with ``grpo.refill`` of the prompts after them, until enough have signal."""
        self._engine.sync(self.lm)
        seen, rolled = self._rollout(self._requests(prompts, step), step, clock, vision)
        for _ in range(self.config.grpo.refill):
            if sum(s.has_signal for s in seen) >= self.config.rollout.prompts:
                break
            with clock.phase("decode"):
                prompts = self.feed.next(self.stream)
            if prompts:
                found, stats = self._rollout(self._requests(prompts, step, len(seen)), step, clock, vision)
                seen += found
                rolled.add(stats)
        clock.phases |= rolled.seconds
        clock.phases["generate"] -= clock.phases["reward"]
        return seen, rolled

    def _chosen(self, seen: list[ScoredGroup]) -> list[ScoredGroup]:
        """What is trained on: with ``grpo.refill`` the first ``rollout.prompts`` groups with signal, else all."""
        return [s for s in seen if s.has_signal][: self.config.rollout.prompts] if self.config.grpo.refill else seen

    def _rollout(
        self, requests: Sequence[RolloutRequest], step: int, clock: Clock, vision: StepVision | None
    ) -> tuple[list[ScoredGroup], RolloutStats]:
        """Scored groups in the order of the requests; each is scored and written down as soon as it is complete."""
        scored: dict[int, ScoredGroup] = {}

        def finish(group: Group) -> None:
            with clock.phase("reward"):
                (one,) = score_groups([group], self._reward, unshaped, self._weights, self.config.grpo)
                one = self._shuffled(one, step) if self.config.reward.shuffle else one
                scored[id(group.request)] = one
                self._keep(completion_records([one], step))

        _, rolled = self._engine.generate(requests, finish, vision)
        return [scored[id(request)] for request in requests], rolled

    def close(self) -> None:
        """Close the rollout engine."""
        self._engine.close()

    def _requests(self, prompts: Sequence[Prompt], step: int, first: int = 0) -> list[RolloutRequest]:
        rollout = self.config.rollout
        sampling = Sampling(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p, rollout.stop
        )
        base = (self.config.train.seed * 1_000_003 + step) * 10_007 + first
        return [RolloutRequest(p, rollout.group_size, sampling, base + i) for i, p in enumerate(prompts)]

    def _shuffled(self, scored: ScoredGroup, step: int) -> ScoredGroup:
        """The control of ``reward.shuffle``: the group's rewards in a random order, which keeps their distribution."""
        rng = random.Random(f"shuffle-{self.config.train.seed}-{step}-{scored.group.request.seed}")
        rewards = rng.sample(scored.rewards, len(scored.rewards))
        (shuffled,) = with_rewards([scored.group], [scored.parts], [rewards], self.config.grpo)
        return shuffled

    def _update(
        self, scored: Sequence[ScoredGroup], lr: float, clock: Clock, vision: StepVision | None
    ) -> tuple[UpdateStats, float]:
        """All optimizer steps on one rollout; returns the counters of the last one. Where memory runs out a step is
        done again in smaller pieces, and so are those after it.
        """
        config, begin = self.config, perf_counter()
        active, size = with_gradient(scored, kl=self.reference is not None), StepSize.of(scored)
        if not active:  # nothing to learn from: the weights and the optimizer stay as they are
            return UpdateStats(), 0.0
        rows, old, mismatch = config.train.micro_rows, None, None
        how: dict[str, Any] = {"temperature": config.rollout.temperature, "micro_rows": rows}
        how["prefix"] = config.train.prefix

        def run(tokens: int) -> UpdateStats:
            nonlocal old
            now = {**how, "micro_tokens": tokens, "held": vision or self._cache}
            if config.grpo.updates > 1 and old is None:
                old = score_old(self.lm, active, **now)
            return grpo_backward(self.lm, self.reference, active, config.grpo, size=size, old=old, **now)

        def undo() -> None:
            nonlocal vision
            self.optimizer.clear()
            if vision is not None:
                vision.drop()  # it holds gradients of what was done
            vision = self._step_vision()

        reference_seconds = 0.0
        for _ in range(config.grpo.updates):
            stats, self._micro_tokens, failed = fitting(run, active, rows, self._micro_tokens, undo=undo)
            self._out_of_memory += failed
            norm = apply_step(self.lm, self.optimizer, stats.loss, lr, config.optim.grad_clip)
            reference_seconds += stats.reference_seconds
            mismatch = mismatch or stats.mismatch  # of the weights that rolled out
            stats.mismatch = mismatch
            if not (math.isfinite(stats.loss) and math.isfinite(norm)):
                break
            vision = self._step_vision()  # the weights are others now
        clock.phases["reference"] = reference_seconds
        clock.phases["update"] = perf_counter() - begin - reference_seconds
        return stats, norm


def summary(scored: Sequence[ScoredGroup], stats: UpdateStats, rolled: RolloutStats, clock: Clock) -> Record:
    """The fields of a GRPO train record that are means and counts of the step."""
    rewards = [r for s in scored for r in s.rewards]
    parts = [p for s in scored for p in s.parts]
    responses = [c.response for s in scored for c in s.group.completions]
    sums = {"kl": stats.kl, "clip_share": stats.clipped, "entropy": stats.entropy}
    names = [n for n in ("semantic", "temporal", "format") if any(n in p for p in parts)]
    return {
        "reward": statistics.fmean(rewards),
        "reward_std": statistics.fmean(statistics.pstdev(s.rewards) for s in scored),
        "parts": {n: statistics.fmean(p[n] for p in parts if n in p) for n in names},
        **{name: value / stats.tokens if stats.tokens else None for name, value in sums.items()},
        "length": statistics.fmean(r.n_tokens for r in responses),
        "truncated": statistics.fmean(r.finish_reason == "length" for r in responses),
        "loss": stats.loss if stats.tokens else None,
        "tokens_s": stats.tokens_trained / clock.seconds,
        **clock.record(),
        "zero_signal_groups": sum(not s.has_signal for s in scored),
        "response_tokens_passed": stats.tokens,
        "responses_dropped": sum(len(s.advantages) - len(s.trained) for s in scored),
        "frames_encoded": rolled.frames_encoded,
        "prefix_tokens_prefilled": rolled.prefix_tokens_prefilled,
        "clips_encoded": rolled.clips_encoded,
        "prefills": rolled.prefills,
        "most_resident": rolled.most_resident,
        "most_rows": rolled.most_rows,
        "responses": len(responses),
        "prefix_tokens_read": rolled.prefix_tokens_read,
        "tokens_generated": rolled.tokens_generated,
        "mismatch": stats.mismatch.record() if stats.tokens else None,
        "tokens_trained": stats.tokens_trained,
        "tokens_logical": stats.tokens_logical,
    }


def _describe(scored: Sequence[ScoredGroup]) -> Batch:
    """For the record of a step that went wrong."""
    responses = [
        [
            {
                "tokens": c.tokens,
                "logprobs": c.logprobs,
                "text": c.response.text,
                "reward": r,
                "advantage": a,
                "parts": p,
            }
            for c, r, a, p in zip(s.group.completions, s.rewards, s.advantages, s.parts, strict=True)
        ]
        for s in scored
    ]
    return describe_prompts([s.group.request.prompt for s in scored], responses)


def completion_records(scored: Sequence[ScoredGroup], step: int) -> list[Record]:
    """Lines of completions.jsonl."""
    return [
        {
            "stage": "grpo",
            "step": step,
            "id": s.group.request.prompt.sample.id,
            "task": s.group.request.prompt.sample.task,
            "prompt": s.group.request.prompt.sample.question,
            "response": completion.response.text,
            "n_tokens": completion.response.n_tokens,
            "finish_reason": completion.response.finish_reason,
            "parts": parts,
            "reward": reward,
            "advantage": advantage,
        }
        for s in scored
        for completion, parts, reward, advantage in zip(
            s.group.completions, s.parts, s.rewards, s.advantages, strict=True
        )
    ]
