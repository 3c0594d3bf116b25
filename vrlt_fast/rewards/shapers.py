"""What a response earns because of its group: bonuses and penalties, each a part of its own.

A shaper gets the parts of the group's responses and those of auxiliary groups, and returns the parts with its own added
to every response, so that all of a group have the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from vrlt_fast.config_rl import RewardConfig
from vrlt_fast.rewards.base import Parts, ResponseGroup, Shaper

MAIN_PARTS = ("semantic", "temporal", "spatial", "instance", "progress")
"""Which part says how right a response is: the first of these that it has."""


def rightness(parts: Mapping[str, float]) -> float:
    """The main part of what a response earned; 0.0 where it has none."""
    return next((parts[name] for name in MAIN_PARTS if name in parts), 0.0)


def length_bonus(
    parts: Sequence[Parts],
    group: ResponseGroup,
    auxiliary: Sequence[Sequence[Parts]],
    *,
    earned: float,
    length_range: tuple[int, int],
) -> list[Parts]:
    """Part ``length``: 1.0 for each response that is right (:func:`rightness` above ``earned``) and of a length in
    ``length_range`` (tokens, both ends and the stop token included), where more than one of the group is right; else
    0.0 (tulerfeng/Video-R1).
    """
    right = [rightness(p) > earned for p in parts]
    paid = sum(right) > 1
    low, high = length_range
    return [
        p | {"length": float(paid and good and low <= response.n_tokens <= high)}
        for p, good, response in zip(parts, right, group.responses, strict=True)
    ]


def overlong_penalty(
    parts: Sequence[Parts],
    group: ResponseGroup,
    auxiliary: Sequence[Sequence[Parts]],
    *,
    max_new_tokens: int,
    buffer: int,
) -> list[Parts]:
    """Part ``overlong``, in -1..0: 0.0 up to ``max_new_tokens - buffer`` tokens, from there linear to -1.0 at
    ``max_new_tokens``, and -1.0 for responses that were cut off (DAPO, arXiv 2503.14476, equation 13).
    """
    out = []
    for p, response in zip(parts, group.responses, strict=True):
        over = (response.n_tokens - (max_new_tokens - buffer)) / buffer
        share = 1.0 if response.finish_reason == "length" else min(1.0, max(0.0, over))
        out.append(p | {"overlong": -share if share else 0.0})
    return out


def shuffled_bonus(
    parts: Sequence[Parts],
    group: ResponseGroup,
    auxiliary: Sequence[Sequence[Parts]],
    *,
    earned: float,
    ratio: float,
) -> list[Parts]:
    """Part ``shuffled``: 1.0 for each right response where the group's mean :func:`rightness` is at least ``ratio``
    times that of the auxiliary responses, which saw the frames in random order; else 0.0 (T-GRPO, tulerfeng/Video-R1).

    Without auxiliary responses nobody is paid; nor where all earn nothing, as none is right then.
    """
    ordered, other = [rightness(p) for p in parts], [rightness(p) for one in auxiliary for p in one]
    paid = bool(ordered and other) and sum(ordered) / len(ordered) >= ratio * (sum(other) / len(other))
    return [p | {"shuffled": float(paid and value > earned)} for p, value in zip(parts, ordered, strict=True)]


def make_shaper(reward: RewardConfig, max_new_tokens: int) -> Shaper:
    """The shaper of a recipe: those whose weight isn't 0, one after the other. Whether a response is right is asked of
    what it earned itself, so that their order doesn't matter.
    """
    chain: list[Shaper] = []
    if reward.length:
        chain.append(partial(length_bonus, earned=reward.earned, length_range=reward.length_range))
    if reward.overlong:
        chain.append(partial(overlong_penalty, max_new_tokens=max_new_tokens, buffer=reward.overlong_buffer))
    if reward.shuffled:
        chain.append(partial(shuffled_bonus, earned=reward.earned, ratio=reward.shuffled_ratio))

    def shape(parts: Sequence[Parts], group: ResponseGroup, auxiliary: Sequence[Sequence[Parts]]) -> list[Parts]:
        shaped = list(parts)
        for one in chain:
            shaped = one(shaped, group, auxiliary)
        return shaped

    return shape
