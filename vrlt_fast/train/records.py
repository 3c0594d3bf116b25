"""What is logged of a step: times, means and counts, the responses, and what went into a step that went wrong."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

from vrlt_fast.config_rl import GrpoConfig
from vrlt_fast.rewards.base import Parts
from vrlt_fast.rollout.group import RolloutStats
from vrlt_fast.train.guard import Batch, describe_prompts
from vrlt_fast.train.scored import OF_BATCH, ScoredGroup
from vrlt_fast.train.step import UpdateStats

Record = dict[str, Any]


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


@dataclass(frozen=True)
class StepView:
    """What a process tells of its share of a GRPO step; ``groups``: rewards of each, ``responses``: their tokens and
    whether they were cut off.
    """

    groups: list[tuple[float, ...]]
    parts: list[Parts]
    responses: list[tuple[int, bool]]
    zero_signal: int
    dropped: int
    stats: UpdateStats
    rolled: RolloutStats

    @staticmethod
    def of(scored: Sequence[ScoredGroup], stats: UpdateStats, rolled: RolloutStats) -> StepView:
        responses = [c.response for s in scored for c in s.group.completions]
        return StepView(
            [s.rewards for s in scored],
            [p for s in scored for p in s.parts],
            [(r.n_tokens, r.finish_reason == "length") for r in responses],
            sum(not s.has_signal for s in scored),
            sum(len(s.advantages) - len(s.trained) for s in scored),
            stats,
            rolled,
        )


def summary(views: Sequence[StepView], clock: Clock) -> Record:
    """The fields of a GRPO train record that are means and counts of the step."""
    groups, parts, responses = ([x for v in views for x in getattr(v, n)] for n in ("groups", "parts", "responses"))
    stats, rolled = UpdateStats(), RolloutStats()
    for view in views:
        stats.add(view.stats)
        rolled.add(view.rolled)
    rewards = [r for group in groups for r in group]
    sums = {"kl": stats.kl, "clip_share": stats.clipped, "entropy": stats.entropy}
    names = dict.fromkeys(name for p in parts for name in p)
    return {
        "reward": statistics.fmean(rewards),
        "reward_std": statistics.fmean(map(statistics.pstdev, groups)),
        "parts": {n: statistics.fmean(p[n] for p in parts if n in p) for n in names},
        **{name: value / stats.tokens if stats.tokens else None for name, value in sums.items()},
        "length": statistics.fmean(n for n, _ in responses),
        "truncated": statistics.fmean(cut for _, cut in responses),
        "tokens_s": stats.tokens_trained / clock.seconds,
        **clock.record(),
        "zero_signal_groups": sum(v.zero_signal for v in views),
        "response_tokens_passed": stats.tokens,
        "responses_dropped": sum(v.dropped for v in views),
        "frames_encoded": rolled.frames_encoded,
        "prefix_tokens_prefilled": rolled.prefix_tokens_prefilled,
        "clips_encoded": rolled.clips_encoded,
        "prefills": rolled.prefills,
        "most_resident": rolled.most_resident,
        "most_rows": rolled.most_rows,
        "responses": len(responses),
        "prefix_tokens_read": rolled.prefix_tokens_read,
        "tokens_generated": rolled.tokens_generated,
        "mismatch": stats.mismatch.record() if stats.mismatch.tokens else None,
        "tokens_trained": stats.tokens_trained,
        "tokens_logical": stats.tokens_logical,
    }


def describe(scored: Sequence[ScoredGroup]) -> Batch:
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


def completion_records(scored: Sequence[ScoredGroup], step: int, grpo: GrpoConfig) -> list[Record]:
    """Lines of completions.jsonl; without an advantage where other groups of the step decide it."""
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
            "advantage": None if grpo.scale in OF_BATCH else advantage,
        }
        for s in scored
        for completion, parts, reward, advantage in zip(
            s.group.completions, s.parts, s.rewards, s.advantages, strict=True
        )
    ]
