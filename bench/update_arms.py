"""Ways to compute the gradient of one GRPO step on the same teacher-forced responses."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench.rollout_arms import make_model, make_prompt
from vrlt_fast.config import PromptConfig
from vrlt_fast.config_rl import GrpoConfig
from vrlt_fast.data.sample import Sample
from vrlt_fast.model.load import VideoLM, enable_recompute
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.vision import StepVision
from vrlt_fast.rewards.base import Response
from vrlt_fast.rollout.group import Completion, Group, RolloutRequest
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.train.passes import How
from vrlt_fast.train.scored import ScoredGroup, StepSize
from vrlt_fast.train.step import UpdateStats, grpo_backward

GRPO = GrpoConfig(beta=0.0)
EVERYTHING = 10**9  # rows, of one micro-batch
PACKED, STAGED, REPLICATED, STRONG = "packed", "staged", "replicated", "strong"


@dataclass(frozen=True)
class Shape:
    """Model of ``bench.rollout_arms.SHAPES``, prompt tokens, mean response tokens, groups and responses of each;
    ``text``: prompts of random tokens instead of videos.
    """

    size: str
    prompt: int
    response: int
    groups: int
    group: int
    text: bool = False

    def __str__(self) -> str:
        what = ", text only" if self.text else ""
        return f"{self.size}, P={self.prompt}, R={self.response}, {self.groups} x {self.group}{what}"

    def label(self, recompute: bool) -> str:
        """Names the cell in records."""
        return f"{self}, recompute" if recompute else str(self)


def make_step(shape: Shape, device: torch.device, seed: int, *, recompute: bool) -> tuple[VideoLM, list[ScoredGroup]]:
    """A model that is trained throughout, and groups for it."""
    lm = make_model(shape.size, device, shape.prompt + 2 * shape.response + 512)
    lm.module.train()
    if recompute:
        enable_recompute(lm)
    return lm, make_groups(lm, shape, seed)


def make_groups(lm: VideoLM, shape: Shape, seed: int) -> list[ScoredGroup]:
    """Groups with ragged responses of random tokens and advantages."""
    rng, scored = random.Random(seed), []
    for g in range(shape.groups):
        prompt = _text_prompt(shape.prompt, rng) if shape.text else make_prompt(lm, shape.prompt, seed + g)
        scored.append(forced_group(prompt, shape.group, shape.response, rng, g))
    return scored


def forced_group(prompt: Prompt, rows: int, response: int, rng: random.Random, seed: int) -> ScoredGroup:
    """Responses of random tokens, ``response`` on average, and random advantages."""
    lengths = [max(1, round(response * (0.5 + i / max(rows - 1, 1)))) for i in range(rows)]
    completions = tuple(
        Completion(Response("", n, "stop"), tuple(rng.randrange(9, 100) for _ in range(n)), torch.full((n,), -6.0))
        for n in lengths
    )
    request = RolloutRequest(prompt, rows, Sampling(max(lengths), 1.0), seed)
    advantages = tuple(rng.gauss(0.0, 1.0) for _ in lengths)
    return ScoredGroup(Group(request, completions), (), (), advantages, tuple(range(rows)))


def _text_prompt(tokens: int, rng: random.Random) -> Prompt:
    sample = Sample(id="a", video="", duration=0.0, task="videoqa", question="")
    ids = torch.tensor([rng.randrange(9, 100) for _ in range(tokens)])
    places = torch.arange(tokens).expand(3, -1)
    return Prompt(sample, (), PromptConfig(), "", ids, places, torch.zeros(0, dtype=torch.int64), tokens)


def arm(name: str, lm: VideoLM, scored: Sequence[ScoredGroup], rows: int = 1) -> Callable[[], UpdateStats]:
    """A call that adds the step's gradient to the parameters; the normaliser is the step's in all of them.

    ``packed``: prompts once, all groups in one pass. ``staged``: prompts once, a response at a time. ``replicated``: a
    copy of the prompt a response, one by one, each through the tower, as EasyR1 and verl train. ``strong``: the same
    rows without padding, ``rows`` in a pass, and the tower once a clip.
    """
    size = StepSize.of(scored)
    alone = [replace(s, trained=(i,)) for s in scored for i in s.trained]

    def run() -> UpdateStats:
        backward = partial(grpo_backward, lm, None, grpo=GRPO, size=size)
        if name == REPLICATED:
            total = UpdateStats()
            for row in alone:
                total.add(backward([row], how=How(1.0, 1, prefix="replicated")))
            return total
        held = StepVision(lm)
        if name == STRONG:
            return backward(alone, how=How(1.0, rows), held=held)
        return backward(scored, how=How(1.0, EVERYTHING, 1 if name == STAGED else 0), held=held)

    return run


def gradients(lm: VideoLM, run: Callable[[], UpdateStats]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one call; the parameters keep none."""
    lm.module.zero_grad(set_to_none=True)
    loss = run().loss
    found = {name: p.grad for name, p in lm.module.named_parameters() if p.grad is not None}
    lm.module.zero_grad(set_to_none=True)
    return loss, found
