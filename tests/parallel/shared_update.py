"""What the processes of tests/parallel/test_update.py do: steps on recorded groups."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.parallel import shared_run
from vrlt_fast.config import ModelConfig, OptimConfig
from vrlt_fast.config_rl import GrpoConfig
from vrlt_fast.model.load import VideoLM, enable_recompute, load_model
from vrlt_fast.model.sharded import ShardedLM, ShardedPolicy
from vrlt_fast.model.vision import StepVision
from vrlt_fast.parallel.mesh import Mesh, mesh_of
from vrlt_fast.parallel.replicas import Replicas
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.rewards.base import Response
from vrlt_fast.rollout.group import Completion, Group, RolloutRequest
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.train.optim import make_optimizer, take_step
from vrlt_fast.train.passes import How
from vrlt_fast.train.scored import ScoredGroup, StepSize
from vrlt_fast.train.step import UpdateStats, grpo_backward, score_old

STEPS = 10
LR = 1e-4


@dataclass
class Trained:
    """Gradients of the first step, weights before and after, and what the last step counted."""

    gradients: dict[str, torch.Tensor]
    start: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    stats: UpdateStats


@dataclass(frozen=True)
class Ways:
    """How processes share an update: by ``sp`` and ``shard`` as the configuration has them."""

    sp: int = 1
    shard: int = 1
    method: Any = "gather_kv"
    micro_tokens: int = 0
    recompute: bool = False
    freeze: bool = False
    states: Any = "float32"


def steps(peers: Peers, folder: Path, seed: int, ways: Ways) -> Trained:
    """So many optimizer steps, two on each batch of groups with random advantages."""
    mesh = mesh_of(Replicas(peers.rank, peers.size), "cpu", ways.sp, ways.shard) if peers.size > 1 else Mesh()
    config = ModelConfig(name=str(folder), dtype="float32", device="cpu", freeze_vision=ways.freeze)
    lm, reference = load_model(config), load_model(config)
    reference.module.requires_grad_(False)
    lm.module.train()
    if mesh.weights is not None:
        lm, reference = ShardedPolicy(lm, mesh.weights), ShardedLM(reference, mesh.weights)
    if ways.recompute:
        enable_recompute(lm)
    optimizer = make_optimizer(lm, OptimConfig(states=ways.states), LR)
    start = {name: p.detach().clone() for name, p in lm.whole.module.named_parameters()}
    first: dict[str, torch.Tensor] = {}
    how = How(0.9, 64, ways.micro_tokens, "shared", mesh.peers, ways.method, mesh.in_step)
    for step in range(STEPS // 2):
        every, old = _groups(lm, folder, seed + step), None
        scored = mesh.replicas.share(every)
        for _ in range(2):
            held = None if ways.freeze else StepVision(lm, mesh.peers)
            old = score_old(lm, scored, how, held) if old is None else old
            more: dict[str, Any] = {"size": StepSize.of(every), "old": old, "held": held}
            stats = grpo_backward(lm, reference, scored, GrpoConfig(beta=0.1), how, **more)
            first = first or _gradients(lm, mesh)
            take_step(lm, optimizer, mesh, stats.loss, LR, 1.0)
    return Trained(first, start, {name: p.detach().clone() for name, p in lm.whole.module.named_parameters()}, stats)


def _gradients(lm: VideoLM, mesh: Mesh) -> dict[str, torch.Tensor]:
    """Those of all processes together."""
    if isinstance(lm, ShardedPolicy):
        lm.finish()
        return {name: p.grad.full_tensor() for name, p in lm.named_parameters() if p.grad is not None}
    found = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    for gradient in found.values() if mesh.everyone.world > 1 else ():
        torch.distributed.all_reduce(gradient)
    return found


def _groups(lm: Any, folder: Path, seed: int) -> list[ScoredGroup]:
    prompts, rows = shared_run.make_batch(lm, folder, seed)
    rng, scored = random.Random(seed), []
    for prompt, group in zip(prompts, rows, strict=True):
        completions = tuple(
            Completion(Response("", len(row.tokens), "stop"), tuple(row.tokens), torch.full((len(row.tokens),), -6.0))
            for row in group
        )
        if completions:
            advantages = tuple(rng.gauss(0.0, 1.0) for _ in completions)
            request = RolloutRequest(prompt, len(completions), Sampling(16), 0)
            places = tuple(range(len(completions)))
            scored.append(ScoredGroup(Group(request, completions), (), (), advantages, places))
    return scored
