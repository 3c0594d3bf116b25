"""Whether what is asked of rewards and loss goes together, before a run starts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from vrlt_fast.config import Config
from vrlt_fast.data.grammars.named import grammar
from vrlt_fast.data.sample import TASKS, Sample
from vrlt_fast.errors import ConfigError, DataError, Problem
from vrlt_fast.rewards.earned import Earned
from vrlt_fast.train.passes import of_groups
from vrlt_fast.train.step import loss_of
from vrlt_kernels import KernelInputError


def check_rewards(config: Config) -> None:
    """Raises ConfigError C04 for what doesn't go together."""
    for task in config.data.tasks:
        if task not in TASKS:
            what = f'"{task}" in data.tasks isn\'t a task'
            raise ConfigError(Problem("VRLT-C04", what, "data.tasks", fix="tasks: " + ", ".join(TASKS)))
    if "grpo" not in config.train.stages:
        return
    try:
        loss_of(config.grpo, has_reference=config.grpo.beta > 0)
    except KernelInputError as error:
        raise ConfigError(Problem("VRLT-C04", f"no such loss: {error}", "grpo")) from None
    groups = of_groups(config.grpo)
    why = f'grpo.policy = "{config.grpo.policy}"' if config.grpo.policy == "reg" else "grpo.token_weight"
    _excluded(groups and config.parallel.sp > 1, why, "parallel.sp = 1", "its loss is of whole groups")
    _excluded(groups and bool(config.train.micro_tokens), why, "train.micro_tokens = 0", "its loss is of whole groups")
    weighted = config.grpo.token_weight > 1
    _excluded(weighted and config.train.prefix != "shared", why, 'train.prefix = "shared"', "weights are of a group")
    for key, asked in (("reward.shuffled", config.reward.shuffled > 0), ("prompt.draw_ids", config.prompt.draw_ids)):
        _excluded(asked and config.parallel.sp > 1, key, "parallel.sp = 1", "a process has a part of the frames alone")
    refilled = config.grpo.refill > 0 and config.select.replay > 0
    _excluded(refilled, "select.replay", "grpo.refill = 0", "both fill the place of groups without signal")
    several = config.parallel.sp * config.parallel.replicas > 1
    _excluded(config.select.replay > 0 and several, "select.replay", "parallel.replicas = 1", "a process keeps its own")
    _check_shown(config)
    _excluded(config.reward.shuffled > 0 and config.rollout.group_size < 2, "reward.shuffled", "rollout.group_size > 1")


def _check_shown(config: Config) -> None:
    """Of the keys that change how samples are shown."""
    select, most = config.select, config.video.max_frames
    drawn = select.mask_outside > 0 or select.noise > 0 or select.frames_first > 0
    why = "a process has a part of the frames alone"
    _excluded(drawn and config.parallel.sp > 1, "select.mask_outside, noise or frames_first", "parallel.sp = 1", why)
    _excluded(select.mask_outside > 0 and not select.mask_steps, "select.mask_outside", "select.mask_steps > 0")
    _excluded(select.frames_first > 0 and not select.frames_steps, "select.frames_first", "select.frames_steps > 0")
    if select.frames_first and not 2 <= select.frames_first <= most:
        what = f"select.frames_first is {select.frames_first}"
        fix = f"0 (off), or 2 to {most}, which is video.max_frames"
        raise ConfigError(Problem("VRLT-C04", what, "select.frames_first", fix=fix))
    altered, why = drawn or select.hint > 0, "samples that are shown in other ways can't be kept"
    keys = "select.mask_outside, hint, noise or frames_first"
    _excluded(altered and select.replay > 0, keys, "select.replay = 0", why)


def _excluded(both: bool, asked: str, needed: str, why: str = "") -> None:
    if both:
        key = needed.partition(" ")[0]
        raise ConfigError(Problem("VRLT-C04", f"{asked} goes with {needed} only", key, why, f"set {needed}"))


def check_tasks(config: Config, samples: Sequence[Sample]) -> None:
    """Raises DataError D14 where the grammar has no form for what a sample asks."""
    check, problems = grammar(config.prompt.grammar).check, list[Problem]()
    for sample in samples:
        try:
            check(sample)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)


def check_services(config: Config, tasks: Collection[str], warn: Callable[[str], None]) -> None:
    """Import the user's rewards, ask a judge, open a scorer. Raises VrltError: what isn't there."""
    if "grpo" not in config.train.stages:
        return
    with Earned(config, device=torch.device("cpu"), warn=warn, tasks=tasks) as earned:
        earned.check()
