"""What the processes of tests/parallel/test_rollout.py do: one prompt's responses, together or alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tests.parallel import shared_run
from vrlt_fast.config import RolloutConfig
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.rollout.engine import GroupEngine
from vrlt_fast.rollout.group import RolloutRequest
from vrlt_fast.rollout.joint import JointEngine, room
from vrlt_fast.rollout.peers import PeerEngine
from vrlt_fast.rollout.sampler import Sampling


@dataclass
class Rolled:
    """Tokens and log-probs of all responses, bytes of keys and values, tokens of prefixes that steps read."""

    tokens: list[tuple[int, ...]]
    logprobs: list[torch.Tensor]
    nbytes: int
    read: int
    prefills: int


def together(
    peers: Peers, folder: Path, seed: int, n: int, length: int, whole: bool
) -> tuple[list[tuple[int, ...]], bool]:
    """Tokens of ``n`` responses to each of three prompts on two processes, and whether they rolled out every group
    together: with a budget that is a byte less than the longest prompt and a row need in one, unless ``whole``.
    """
    lm = shared_run.open_model(folder, freeze=False, recompute=False)
    prompts, _ = shared_run.make_batch(lm, folder, seed)
    requests = [RolloutRequest(p, n, Sampling(length, 1.0), seed + i) for i, p in enumerate(prompts)]
    shape = GroupEngine(lm)._needed(requests)[0]
    least = shape.token_bytes * (max(map(len, prompts)) + 2 * length)
    engine = PeerEngine(lm, RolloutConfig(kv_gb=(least if whole else least - 1) / 1e9), peers=peers)
    groups, _ = engine.generate(requests)
    used = (engine._alone._decoder is None, engine._joint._decoder is not None)
    assert used[0] == used[1]
    return [c.tokens for g in groups for c in g.completions], used[0]


def roll(peers: Peers, folder: Path, seed: int, config: RolloutConfig, n: int, length: int) -> Rolled:
    """``n`` responses to each of three prompts."""
    lm = shared_run.open_model(folder, freeze=False, recompute=False)
    prompts, _ = shared_run.make_batch(lm, folder, seed)
    requests = [RolloutRequest(p, n, Sampling(length, 1.0), seed + i) for i, p in enumerate(prompts)]
    engine = GroupEngine(lm, config) if peers.size == 1 else JointEngine(lm, config, peers=peers)
    groups, stats = engine.generate(requests)
    completions = [c for g in groups for c in g.completions]
    store = engine._decoder.store
    held = store.plan.nbytes(store.shape)
    assert room(max(map(len, prompts)), peers.size) <= store.plan.tokens
    tokens, logps = [c.tokens for c in completions], [c.logprobs for c in completions]
    return Rolled(tokens, logps, held, stats.prefix_tokens_read, stats.prefills)
