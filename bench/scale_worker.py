"""One of the processes of a cell of ``bench/cases/scale.py``: a rollout and an update of one long group, measured."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bench.measure import cuda_peak, resident_peak
from bench.providers import Arm
from bench.rollout_arms import make_model, pairs_prompt
from bench.update_arms import GRPO, forced_group
from vrlt_fast.config import ParallelConfig, RolloutConfig
from vrlt_fast.model.load import VideoLM, enable_recompute
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.sharded import ShardedPolicy
from vrlt_fast.parallel.mesh import Mesh, join, leave
from vrlt_fast.rollout.engine import GroupEngine
from vrlt_fast.rollout.group import RolloutRequest
from vrlt_fast.rollout.joint import JointEngine
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.train.passes import How
from vrlt_fast.train.step import grpo_backward

SEED = 23


def main(words: list[str]) -> None:
    """``words``: the cell and the folder for results, as JSON."""
    cell = json.loads(words[0])
    device, world = torch.device(cell["device"]), int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cpu":
        torch.set_num_threads(1)
    pairs, rows, length = cell["frames"] // 2, cell["rows"], cell["length"]
    # before the processes join: transformers saves in the first of several alone
    lm = make_model(cell["size"], device, 40 * pairs + 2 * length + 512)
    mesh = join(device, ParallelConfig(sp=world, shard=world if cell["shard"] else 1))
    lm.module.model.visual.requires_grad_(False)
    lm.module.train()
    if mesh.weights is not None:
        lm = ShardedPolicy(lm, mesh.weights)
    enable_recompute(lm)
    prompt = _whole(lm, cell)
    found: dict[str, Any] = {"tokens": len(prompt), "rows": rows, "length": length}
    found |= _update(lm, prompt, cell, mesh)  # first: what a rollout leaves with the allocator would hide its memory
    found |= _rollout(lm, prompt, cell, mesh)
    if world == 1 and device.type == "cuda":
        found["attention"] = _attention(lm, found, cell, mesh)
    text = lm.info.config.text_config
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    found |= {"layers": text.num_hidden_layers, "kv_bytes": 2 * text.num_key_value_heads * dim * lm.dtype.itemsize}
    found["row_bytes"] = 4 * text.num_attention_heads * (dim + 1)  # outputs and log-sum-exps in fp32
    (Path(words[1]) / f"{mesh.everyone.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    leave()


def _rollout(lm: VideoLM, prompt: Prompt, cell: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    config = RolloutConfig(kv_gb=8.0)
    engine = JointEngine(lm.whole, config, peers=mesh.peers) if mesh.peers.size > 1 else GroupEngine(lm.whole, config)
    request = RolloutRequest(prompt, cell["rows"], Sampling(cell["length"], 1.0), SEED)
    _sync(lm, mesh)
    begin = perf_counter()
    _, stats = engine.generate([request])
    spent = perf_counter() - begin
    store = engine._decoder.store if engine._decoder else None
    nbytes = store.plan.nbytes(store.shape) if store else 0
    return {"rollout": spent, "phases": stats.seconds, "kv": nbytes}


def _attention(lm: VideoLM, found: dict[str, Any], cell: dict[str, Any], mesh: Mesh) -> float:
    """The prefix's share of a decode step: steps behind the whole prompt, and behind a quarter of its frames."""
    fewer = pairs_prompt(lm, max(cell["frames"] // 8, 1), SEED, (4, 4))
    _rollout(lm, fewer, cell, mesh)  # the first one pays for what later ones don't
    times = [_rollout(lm, prompt, cell, mesh)["phases"]["generate"] for prompt in (fewer, _whole(lm, cell))]
    slope = (times[1] - times[0]) / (found["tokens"] - len(fewer))
    return float(min(max(slope * found["tokens"] / times[1], 0.0), 1.0))


def _whole(lm: VideoLM, cell: dict[str, Any]) -> Prompt:
    return pairs_prompt(lm, cell["frames"] // 2, SEED, (4, 4))


def _update(lm: VideoLM, prompt: Prompt, cell: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    scored = [forced_group(prompt, cell["rows"], cell["length"], random.Random(SEED), 0)]
    how = How(1.0, 10**9, peers=mesh.peers, in_step=mesh.in_step)

    def run() -> None:
        grpo_backward(lm, None, scored, GRPO, how)

    peak, times = (cuda_peak if lm.device.type == "cuda" else resident_peak)(Arm(run)), []
    lm.module.zero_grad(set_to_none=True)
    for _ in range(cell["rounds"]):
        _sync(lm, mesh)
        mesh.peers.received.clear()
        begin = perf_counter()
        run()
        _sync(lm, mesh)
        times.append(perf_counter() - begin)
        lm.module.zero_grad(set_to_none=True)
    return {"update": times, "received": dict(mesh.peers.received), "peak": peak}


def _sync(lm: VideoLM, mesh: Mesh) -> None:
    if lm.device.type == "cuda":
        torch.cuda.synchronize()
    mesh.everyone.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
