"""The dual reward of Temporal-R1: discrete for what a video means, continuous tIoU for when it happens, and format.

VideoQA earns semantic + format, temporal grounding temporal + format, grounded VideoQA all three. The weights are the
recipe's; the paper does not state those of grounded VideoQA, ours are the sum of the two others'.
"""

from __future__ import annotations

from collections.abc import Sequence

from vrlt_fast.data.sample import Sample
from vrlt_fast.rewards.base import Parts, Response, ResponseGroup, Reward
from vrlt_fast.rewards.spans import tiou
from vrlt_fast.rewards.text import parse


def dual_reward(think: bool) -> Reward:
    """The reward function for prompts with or without reasoning."""

    def reward(response: Response, sample: Sample) -> Parts:
        """Parts in 0..1: ``semantic`` and ``temporal`` where the task has them, ``format`` always."""
        parsed = parse(response.text, sample, think=think)
        parts: Parts = {}
        if sample.wants_answer:
            parts["semantic"] = float(parsed.answer == sample.answer)
        if sample.wants_spans:
            parts["temporal"] = tiou(parsed.spans or (), sample.spans)
        parts["format"] = float(parsed.well_formed and response.finish_reason == "stop")
        return parts

    return reward


def unshaped(parts: Sequence[Parts], group: ResponseGroup, auxiliary: Sequence[ResponseGroup]) -> list[Parts]:
    """The shaper of the dual reward: every response keeps what it earned."""
    return list(parts)
