"""``train.probe``: the largest update that a run can meet, before its first GRPO step, so that memory that isn't enough
is known then and not hours later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from vrlt_fast.config import Config
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.sharded import ShardedPolicy
from vrlt_fast.model.vision import StepVision, is_frozen
from vrlt_fast.parallel.mesh import Mesh
from vrlt_fast.rewards.base import Response
from vrlt_fast.rollout.group import Completion, Group, RolloutRequest
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.train.checkpoint import load_rng_tensors, rng_tensors
from vrlt_fast.train.memory import prompts_of, rollout_bytes
from vrlt_fast.train.optim import MasterAdamW
from vrlt_fast.train.passes import How, of_groups
from vrlt_fast.train.plan import fitting
from vrlt_fast.train.process import peak_gb
from vrlt_fast.train.scored import ScoredGroup
from vrlt_fast.train.step import UpdateStats, grpo_backward


def wanted(config: Config, device: torch.device) -> bool:
    """Whether the run is to be probed; ``auto``: on a GPU."""
    return config.train.probe == "on" or (config.train.probe == "auto" and device.type == "cuda")


def probe_step(
    lm: VideoLM,
    reference: VideoLM | None,
    prompt: Prompt,
    config: Config,
    optimizer: MasterAdamW,
    say: Callable[[str], None],
    *,
    mesh: Mesh,
) -> int:
    """Forward and backward of the largest pass behind ``prompt``, with random tokens; nothing is trained, gradients are
    dropped and random states are as before. On a GPU memory is held back for the optimizer's moments and for rollouts,
    where they have none yet.

    Returns:
        ``train.micro_tokens``, or less where memory ran out.

    Raises:
        SetupError: E05 one response and the prompt don't fit.
    """
    scored = [_group(prompt, config, place) for place in range(prompts_of(config))]
    before, begin, rows = rng_tensors(), perf_counter(), config.train.micro_rows
    trained, peers = not is_frozen(lm), mesh.peers

    def run(tokens: int) -> UpdateStats:
        # held until the pass is through
        reserve = _reserve(lm, config, len(prompt), optimizer) if lm.device.type == "cuda" else []
        vision = StepVision(lm, peers) if trained else None
        if vision is not None:  # it holds the clips of the whole step
            vision.take(clip for s in scored for clip in s.group.request.prompt.media)
        how = How.of(config, mesh, tokens)
        (first, *_) = how.units(scored)
        stats = grpo_backward(lm, reference, scored[: len(first[0])], config.grpo, how, held=vision)
        if isinstance(lm, ShardedPolicy):
            lm.finish()
        del reserve
        return stats

    try:
        together: dict[str, Any] = {"sp": peers.size, "together": mesh.in_passes, "whole": of_groups(config.grpo)}
        _, tokens, failed = fitting(run, scored, rows, config.train.micro_tokens, undo=optimizer.clear, **together)
    finally:
        optimizer.clear()
        load_rng_tensors(before)
    if lm.device.type == "cuda":
        torch.cuda.empty_cache()
    rollout = config.rollout
    shape = f"{rollout.group_size} responses of {rollout.max_new_tokens} tokens behind a prompt of {len(prompt)}"
    fits = "" if not failed else f"; memory ran out {failed} times, so train.micro_tokens is {tokens} from here on"
    say(f"probe: {shape}: {perf_counter() - begin:.1f} s, peak memory {peak_gb():.2f} GB{fits}")
    return tokens


def _group(prompt: Prompt, config: Config, place: int) -> ScoredGroup:
    """Responses that are as long as they may be, with advantages; its clips are others than those of other places."""
    rollout = config.rollout
    media = tuple(replace(clip, key=f"{clip.key} probe {place}") for clip in prompt.media)
    own = replace(prompt, media=media)
    generator = torch.Generator().manual_seed(config.train.seed)
    size = (rollout.group_size, rollout.max_new_tokens)
    ids = torch.randint(int(prompt.ids.max()) + 1, size, generator=generator).tolist()
    response = Response("", rollout.max_new_tokens, "length")
    completions = tuple(Completion(response, tuple(row), torch.zeros(len(row))) for row in ids)
    request = RolloutRequest(own, rollout.group_size, Sampling(rollout.max_new_tokens), 0)
    rows = range(rollout.group_size)
    advantages = tuple(1.0 - 2.0 * (i % 2) for i in rows)
    return ScoredGroup(
        Group(request, completions), tuple({} for _ in rows), tuple(0.0 for _ in rows), advantages, tuple(rows)
    )


def _reserve(lm: VideoLM, config: Config, tokens: int, optimizer: MasterAdamW) -> list[torch.Tensor]:
    """Memory that steps will have beside the update and this one hasn't."""
    moment = torch.bfloat16 if config.optim.states == "bfloat16" else torch.float32
    new = [master for master in optimizer.masters.values() if not optimizer.state.get(master)]
    held = [torch.empty(m.shape, dtype=moment, device=m.device) for m in new for _ in range(2)]
    if config.rollout.engine == "group":
        unused = torch.cuda.memory_reserved(lm.device) - torch.cuda.memory_allocated(lm.device)
        free = torch.cuda.mem_get_info(lm.device)[0] + unused
        size = rollout_bytes(lm.info, config, tokens, lm.device.type, free)
        held.append(torch.empty(size, dtype=torch.uint8, device=lm.device))
    return held
