"""What is asked of a rollout engine and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from time import perf_counter

import torch

from vrlt_fast.model.prompt import Prompt
from vrlt_fast.rewards.base import Response
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.video.preprocess import Clip


@dataclass(frozen=True, eq=False)
class RolloutRequest:
    """``n`` responses to a prompt. ``seed`` fixes them whatever else is in the batch; groups with ``train=False`` are
    auxiliary: shapers see them, the update does not."""

    prompt: Prompt
    n: int
    sampling: Sampling
    seed: int
    train: bool = True


@dataclass(frozen=True, eq=False)
class Completion:
    """One response: its text for rewards, its tokens (stop token included) and their log-probs fp32 [n]."""

    response: Response
    tokens: tuple[int, ...]
    logprobs: torch.Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """One prompt and its responses."""

    request: RolloutRequest
    completions: tuple[Completion, ...]


@dataclass
class RolloutStats:
    """Counters and wall seconds of one call. ``prefix_tokens_read``: prefix tokens whose keys and values decode steps
    read, one read a prompt and step; ``most_resident``: most prompts at a time; ``most_rows``: most responses.
    """

    clips_encoded: int = 0
    frames_encoded: int = 0
    prefills: int = 0
    prefix_tokens_prefilled: int = 0
    prefix_tokens_read: int = 0
    decode_steps: int = 0
    tokens_generated: int = 0
    most_resident: int = 0
    most_rows: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, other: RolloutStats) -> None:
        """Take another call's counts and seconds in."""
        for f in fields(self):
            if f.name.startswith("most_"):
                setattr(self, f.name, max(getattr(self, f.name), getattr(other, f.name)))
            elif f.name != "seconds":
                setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        for phase, spent in other.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    def count(self, clips: Sequence[Clip]) -> None:
        """Count clips that went through the tower."""
        self.clips_encoded += len(clips)
        self.frames_encoded += sum(len(clip.times) for clip in clips)

    def spend(self, phase: str, since: float) -> None:
        """Count the wall time since ``perf_counter()`` was ``since``."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - since
