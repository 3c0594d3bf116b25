"""The two signatures of every reward.

A reward scores one response: ``reward(response, sample) -> {part: value}``. A shaper sees the whole group, and what
the responses of auxiliary groups of the same prompt earned, where a recipe asks for such groups:
``shape(parts, group, auxiliary) -> parts``. Both are pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vrlt_fast.data.sample import Sample

Parts = dict[str, float]


@dataclass(frozen=True)
class Response:
    """What a policy said: ``text`` without special tokens, its length in tokens (the stop token counts), and why it
    ended (``"stop"`` or ``"length"``)."""

    text: str
    n_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class ResponseGroup:
    """The responses to one prompt, and its sample."""

    sample: Sample
    responses: tuple[Response, ...]


Reward = Callable[[Response, Sample], Parts]
Shaper = Callable[[Sequence[Parts], ResponseGroup, Sequence[Sequence[Parts]]], list[Parts]]


def total(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Weighted sum of named parts; a part without a weight is an error, so that none is dropped unseen."""
    return sum(weights[name] * value for name, value in parts.items())
