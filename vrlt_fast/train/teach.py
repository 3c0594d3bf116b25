"""What a run knows of its samples while it trains, and what it makes of that: which come next, how they are shown, and
groups of earlier steps in the place of groups without signal.

All processes know the same: what each rolled out is told to the others in the order of the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch

from vrlt_fast.config import Config
from vrlt_fast.data.sample import LETTER_TASKS, SPAN_TASKS, TEXT_TASKS, Sample
from vrlt_fast.data.stream import Stream
from vrlt_fast.parallel.replicas import Replicas
from vrlt_fast.rewards.base import Response
from vrlt_fast.rewards.dual import weights
from vrlt_fast.rewards.shapers import rightness
from vrlt_fast.rollout.group import Completion, Group, RolloutRequest
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.select.augment import Window, best_trace, hint_for, hint_share, noise_sigma
from vrlt_fast.select.curriculum import frames_at, masked_share
from vrlt_fast.select.replay import Replay, priority
from vrlt_fast.select.running import RunningStats, SelectedStream
from vrlt_fast.train.feed import Change, Feed
from vrlt_fast.train.scored import ScoredGroup
from vrlt_fast.video.alter import masked_outside, noisy_frames, thinned
from vrlt_fast.video.preprocess import Clip

_SEED = 1_000_003
_RIGHT = 0.5  # a response's main part, above which its thoughts may become a hint


class Teaching:
    """State of one GRPO stage about its samples, those of ``feed``."""

    def __init__(self, config: Config, feed: Feed, replicas: Replicas):
        samples = feed.samples
        self._config, self._feed, self._samples, self._replicas = config, feed, samples, replicas
        self._places = {sample.id: index for index, sample in enumerate(samples)}
        self._highest = [highest_reward(config, sample) for sample in samples]
        select = config.select
        self.stats, self._window = RunningStats([s.task for s in samples]), Window(select.window)
        self._replay: Replay[ScoredGroup] = Replay(select.replay, config.train.seed)
        self._traces: dict[int, str] = {}

    def stream(self, batch: int, seed: int) -> Stream:
        """The order of the samples: shuffled epochs, or as ``select.weighted`` and ``select.solved`` have it."""
        select = self._config.select
        if not select.weighted and not select.solved:
            return self._feed.questions(batch, seed)
        more: dict[str, Any] = {"weighted": select.weighted, "solved": select.solved, "highest": self._highest}
        return SelectedStream(self.stats, batch, seed, **more)

    def change(self, step: int) -> Change | None:
        """How the samples of this step are shown; None: as they are."""
        select = self._config.select
        if not (select.frames_first or select.mask_outside or select.hint or select.noise):
            return None
        return lambda index, sample, clip: self._changed(step, index, sample, clip)

    def _changed(self, step: int, index: int, sample: Sample, clip: Clip) -> tuple[Sample, Clip]:
        select, seed = self._config.select, (self._config.train.seed * _SEED + step) * _SEED + index
        if select.frames_first:
            first, last = select.frames_first, self._config.video.max_frames
            clip = thinned(
                clip, frames_at(step, first=first, last=last, steps=select.frames_steps, by=select.frames_by)
            )
        if select.mask_outside and sample.wants_spans:
            start, steps = select.mask_outside, select.mask_steps
            share = masked_share(step, difficulty=sample.difficulty, start=start, steps=steps)
            clip = masked_outside(clip, sample.spans, share, seed)
        mean = self.stats.mean(index)
        if mean is None or not self._highest[index]:
            return sample, clip
        delta = self._window.delta(mean / self._highest[index])
        clip = noisy_frames(clip, noise_sigma(delta, noise=select.noise), seed)
        return hint_for(sample, hint_share(delta, hint=select.hint), self._traces.get(index)), clip

    def learn(self, seen: Sequence[ScoredGroup], trained: Sequence[ScoredGroup], step: int) -> None:
        """Count what the groups of a step earned, and keep some of those it trains; all processes together."""
        told = self._replicas.gather([self._told(scored) for scored in seen])
        for one in (one for place in zip_longest(*told) for one in place if one is not None):  # as the prompts stood
            index, rewards, trace = one
            self.stats.update(index, rewards)
            if self._highest[index]:
                self._window.add(sum(rewards) / len(rewards) / self._highest[index])
            if trace is not None:
                self._traces[index] = trace
        for scored in trained:
            if scored.has_signal:
                self._replay.add(scored, priority([scored.advantages[i] for i in scored.trained]), step)

    def filled(self, scored: Sequence[ScoredGroup], step: int) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
        """The groups of a step with earlier ones in the place of those without signal, and which those are."""
        flat = sum(not s.has_signal for s in scored)
        drawn = self._replay.take(flat, step) if self._config.select.replay and flat else []
        taken = [replace(s, stale=True) for s in drawn]
        kept = [s for s in scored if s.has_signal] if taken else list(scored)
        return [*kept, *taken], taken

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as JSON."""
        return {
            "stats": self.stats.state(),
            "window": self._window.state(),
            "traces": sorted(self._traces.items()),
            "replay": self._replay.state(),
            "groups": {str(n): self._written(scored) for n, scored in self._replay.entries().items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`. Kept groups whose video can't be read any more are left out."""
        self.stats.load(state["stats"])
        self._window.load(state["window"])
        self._traces = {int(index): trace for index, trace in state["traces"]}
        groups = {int(n): self._read(told) for n, told in state["groups"].items()}
        entries = {n: scored for n, scored in groups.items() if scored is not None}
        held = [one for one in state["replay"]["held"] if int(one[0]) in entries]
        self._replay.load({**state["replay"], "held": held}, entries)

    def _index(self, scored: ScoredGroup) -> int:
        return self._places[scored.group.request.prompt.sample.id]

    def _told(self, scored: ScoredGroup) -> tuple[int, tuple[float, ...], str | None]:
        index, trace = self._index(scored), None
        if self._config.select.hint and self._config.prompt.think:
            said, right = [c.response.text for c in scored.group.completions], list(map(rightness, scored.parts))
            plain = replace(self._samples[index], reasoning="")  # which stands in where there is no trace
            trace = best_trace(said, right, plain, above=_RIGHT)
        return index, scored.rewards, trace

    def _written(self, scored: ScoredGroup) -> dict[str, Any]:
        request = scored.group.request
        return {
            "index": self._index(scored),
            "seed": request.seed,
            "parts": scored.parts,
            "rewards": scored.rewards,
            "advantages": scored.advantages,
            "trained": scored.trained,
            "completions": [
                {
                    "text": c.response.text,
                    "n_tokens": c.response.n_tokens,
                    "finish_reason": c.response.finish_reason,
                    "tokens": c.tokens,
                    "logprobs": c.logprobs.tolist(),
                }
                for c in scored.group.completions
            ],
        }

    def _read(self, told: Mapping[str, Any]) -> ScoredGroup | None:
        prompt = self._feed.prompt(int(told["index"]))
        if prompt is None:
            return None
        rollout = self._config.rollout
        sampling = Sampling(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p, rollout.stop
        )
        completions = tuple(
            Completion(
                Response(c["text"], c["n_tokens"], c["finish_reason"]), tuple(c["tokens"]), torch.tensor(c["logprobs"])
            )
            for c in told["completions"]
        )
        request = RolloutRequest(prompt, len(completions), sampling, int(told["seed"]))
        parts, rewards, advantages, trained = (tuple(told[n]) for n in ("parts", "rewards", "advantages", "trained"))
        return ScoredGroup(Group(request, completions), parts, rewards, advantages, trained)


def highest_reward(config: Config, sample: Sample) -> float:
    """The most that a response to a sample earns for itself; bonuses of the group and own rewards aside."""
    weight = weights(config.reward)
    names = ["format"]
    names += ["semantic"] if sample.task in (*LETTER_TASKS, *TEXT_TASKS) else []
    names += ["temporal"] if sample.task in SPAN_TASKS else []
    names += {"boxes": ["spatial"], "instance": ["instance"], "progress": ["progress"]}.get(sample.task, [])
    return sum(weight[name] for name in names)
