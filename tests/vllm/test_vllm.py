"""vLLM for real, on the CPU, in an environment of its own: ``make test-vllm``. Not part of ``make test``."""

from __future__ import annotations

import json

import pytest
import torch

from vrlt_fast.config import Config, ModelConfig, PromptConfig, VideoConfig, VllmConfig
from vrlt_fast.data.readers import read_jsonl, resolve_video
from vrlt_fast.errors import SetupError
from vrlt_fast.model.language import target_logprobs
from vrlt_fast.model.layout import build_layout, response_row
from vrlt_fast.model.load import load_model
from vrlt_fast.model.prompt import encode_prompt
from vrlt_fast.model.vision import shared_vision
from vrlt_fast.report.console import Console
from vrlt_fast.rollout.engine import generate
from vrlt_fast.rollout.group import RolloutRequest
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.rollout.vllm import VllmEngine
from vrlt_fast.train.trainer import train
from vrlt_fast.video.cache import ClipLoader

pytestmark = pytest.mark.timeout(600)
BLOCK = 32
"""Tokens that vLLM shares at a time; what it calls its CPU default is longer than most prompts here."""


def disturb(lm, scale: float, seed: int) -> None:
    """Other weights, of language model and tower, so that distributions are sharp and tokens change."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lm.module.parameters():
            p.mul_(1.5 if scale == 0 else 1).add_(torch.randn(p.shape, generator=generator) * scale)


@pytest.fixture(scope="module")
def lm(tiny_folder):
    lm = load_model(ModelConfig(name=str(tiny_folder), dtype="float32", device="cpu"))
    disturb(lm, 0, seed=0)
    return lm


@pytest.fixture(scope="module")
def engine(lm):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    engine = VllmEngine(lm, VllmConfig(max_model_len=1024, enforce_eager=True), block_size=BLOCK)
    assert torch.equal(state, torch.get_rng_state()), "vLLM reseeded the trainer's generator"
    assert torch.get_num_threads() == threads
    engine.sync(lm)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def clips(lm, demo):
    """Samples with clips of 2 and of 1.5 frames a second: whole and broken seconds between temporal grids."""
    found = []
    for fps, part in ((2, slice(0, 4)), (1.5, slice(4, 7))):
        loader = ClipLoader(VideoConfig(sampling="fps", fps=fps, min_pixels=784, max_pixels=4704), lm.info.geometry)
        found += [(s, loader.load(resolve_video(s, demo))) for s in read_jsonl(demo / "train.jsonl")[part]]
    return found


def prompts(lm, clips, layout):
    return [encode_prompt(lm.info, s, c, PromptConfig(video_layout=layout, think=False)) for s, c in clips]


def requests(prompts, n, sampling, seed=5):
    return [RolloutRequest(p, n, sampling, seed=seed + i) for i, p in enumerate(prompts)]


def tokens(groups):
    return [c.tokens for g in groups for c in g.completions]


def steps_of(engine, monkeypatch):
    """What vLLM's scheduler gives out from now on: tokens and encoder inputs of each step."""
    scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
    given, schedule = [], scheduler.schedule

    def counted(*args, **kwargs):
        out = schedule(*args, **kwargs)
        given.append((sum(out.num_scheduled_tokens.values()), sum(map(len, out.scheduled_encoder_inputs.values()))))
        return out

    monkeypatch.setattr(scheduler, "schedule", counted)
    return given


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("layout", ["native", "interleaved"])
def test_greedy_tokens_and_logprobs_are_ours(lm, engine, clips, layout, n):
    asked = requests(prompts(lm, clips, layout), n, Sampling(24, 0.0))
    theirs, stats = engine.generate(asked)
    ours, _ = generate(lm, asked)
    assert [g.request for g in theirs] == asked
    for group, expected in zip(theirs, ours, strict=True):
        for made, due in zip(group.completions, expected.completions, strict=True):
            assert made.tokens == due.tokens
            assert made.response == due.response
            torch.testing.assert_close(made.logprobs, due.logprobs, atol=1e-4, rtol=0)
    unique = {c.key: c for _, c in clips}
    assert stats.frames_encoded == sum(len(c.times) for c in unique.values())
    assert set(stats.seconds) == {"sync", "encode", "generate"}


def test_sampled_logprobs_are_what_training_scores(lm, engine, clips):
    for sampling in (Sampling(8, 1.0), Sampling(8, 0.7, top_k=5), Sampling(8, 1.3, top_p=0.8), Sampling(8, min_p=0.1)):
        found = prompts(lm, clips[:3], "native")
        groups, _ = engine.generate(requests(found, 4, sampling))
        rows = [[response_row(p, c.tokens) for c in g.completions] for p, g in zip(found, groups, strict=True)]
        layout = build_layout(found, rows)
        with torch.no_grad():
            expected, _ = target_logprobs(lm, layout, shared_vision(lm, found), sampling.temperature)
        made = torch.cat([c.logprobs for g in groups for c in g.completions])
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


def test_seeds_fix_the_tokens_and_rows_differ(lm, engine, clips):
    found = prompts(lm, clips, "native")
    sampling = Sampling(12, 1.0)
    together, _ = engine.generate(requests(found, 4, sampling))
    again, _ = engine.generate(requests(found, 4, sampling))
    alone, _ = engine.generate(requests(found, 4, sampling)[2:3])
    other, _ = engine.generate(requests(found, 4, sampling, seed=99))
    assert tokens(again) == tokens(together)
    assert tokens(alone) == tokens(together[2:3])
    assert tokens(other) != tokens(together)
    for group in together:
        assert len(set(tokens([group]))) == 4
    assert len({g.completions[1].tokens for g in together} & {g.completions[0].tokens for g in together}) == 0


def test_stop_tokens_strings_and_lengths(lm, engine, clips):
    groups, _ = engine.generate(requests(prompts(lm, clips, "native"), 16, Sampling(40, 1.5)))
    completions = [c for g in groups for c in g.completions]
    assert {c.response.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        stopped = completion.tokens[-1] in lm.info.stop_tokens
        assert completion.response.finish_reason == ("stop" if stopped else "length")
        assert not set(completion.tokens[:-1]) & set(lm.info.stop_tokens)
        assert len(completion.tokens) == completion.response.n_tokens == len(completion.logprobs) <= 40
    stopped, _ = engine.generate(requests(prompts(lm, clips[:2], "native"), 16, Sampling(40, 1.5, stop=("e",))))
    for completion in (c for g in stopped for c in g.completions):
        text, ended = completion.response.text, completion.tokens[-1] in lm.info.stop_tokens
        assert "e" not in lm.info.tokenizer.decode(completion.tokens[:-1])
        assert ("e" in text or ended) == (completion.response.finish_reason == "stop")


def test_visual_tokens_are_never_drawn(lm, engine, clips):
    """The first banned token gets by far the largest logit, whatever the hidden state."""
    head = lm.module.lm_head.weight
    before = head.detach().clone()
    found = prompts(lm, clips[:2], "native")
    try:
        with torch.no_grad():
            greedy, _ = engine.generate(requests(found, 1, Sampling(4, 0.0)))
            # a multiple of the likeliest token's row: where that one wins, this one wins by far
            for token in lm.info.visual_tokens:
                head[token] = 40 * before[greedy[0].completions[0].tokens[0]]
        engine.sync(lm)
        for sampling in (Sampling(8, 0.0), Sampling(8, 1.0), Sampling(8, 1.0, top_k=2), Sampling(8, 1.0, top_p=0.5)):
            groups, _ = engine.generate(requests(found, 4, sampling))
            drawn = {t for c in tokens(groups) for t in c}
            assert not drawn & set(lm.info.visual_tokens)
            # the share that the banned ones have counts in the log-probs, as it does in training
            assert groups[0].completions[0].logprobs[0] < -10
    finally:
        with torch.no_grad():
            head.copy_(before)
        engine.sync(lm)


def test_a_group_shares_its_video_and_its_prefill(lm, engine, clips, monkeypatch):
    engine.sync(lm)  # empties the caches
    (prompt,) = prompts(lm, clips[:1], "native")
    given = steps_of(engine, monkeypatch)
    _, stats = engine.generate(requests([prompt], 8, Sampling(4, 1.0)))
    left = len(prompt) - (len(prompt) - 1) // BLOCK * BLOCK  # no block of the cache holds these
    assert given[0] == (len(prompt) + 7 * left, 1)
    assert all(encoded == 0 for _, encoded in given[1:])
    assert max(scheduled for scheduled, _ in given[1:]) == 8
    assert stats.prefix_tokens_prefilled == len(prompt) + 7 * left
    _, again = engine.generate(requests([prompt], 8, Sampling(4, 1.0)))
    assert again.prefix_tokens_prefilled == 8 * left


@pytest.mark.parametrize("layout", ["native", "interleaved"])
def test_a_sync_brings_the_new_weights_and_forgets_the_old(lm, engine, clips, layout):
    asked = requests(prompts(lm, clips, layout), 1, Sampling(24, 0.0))
    old, _ = engine.generate(asked)
    for step in range(3):
        disturb(lm, 0.02, seed=1 + step)
        stale, _ = engine.generate(asked[:2])
        engine.sync(lm)
        new, stats = engine.generate(asked)
        ours, _ = generate(lm, asked)
        assert tokens(new) == tokens(ours)
        assert tokens(new) != tokens(old)
        assert tokens(stale) != tokens(new[:2])
        assert stats.seconds["sync"] > 0
        for made, due in zip(new, ours, strict=True):
            torch.testing.assert_close(
                made.completions[0].logprobs, due.completions[0].logprobs, atol=1e-4, rtol=0, msg=f"step {step}"
            )
        old = new


def test_one_call_may_hold_several_samplings(lm, engine, clips):
    found = prompts(lm, clips[:2], "native")
    kinds = [Sampling(4, 0.0), Sampling(6, 1.0), Sampling(6, 0.5), Sampling(8, 1.0, top_k=3)]
    asked = [request for kind in kinds for request in requests(found, 2, kind)]
    seen = []
    together, _ = engine.generate(asked, seen.append)
    assert seen == together
    assert [g.request for g in together] == asked
    for kind in kinds:
        alone, _ = engine.generate(requests(found, 2, kind))
        assert tokens(alone) == tokens([g for g in together if g.request.sampling == kind])


def test_refuses_what_it_cannot_do(lm, engine, clips, monkeypatch):
    asked = requests(prompts(lm, clips[:1], "native"), 1, Sampling(4))
    with pytest.raises(ValueError, match="at least one"):
        engine.generate([])
    monkeypatch.setattr(engine, "_sync_seconds", None)
    with pytest.raises(RuntimeError, match="sync"):
        engine.generate(asked)


def test_a_start_that_fails_is_a_coded_error(lm, engine):
    """Beside another vLLM, and with a length that the model hasn't. Closes the engine of the tests before."""
    for why in ("process group", "1000000"):
        with pytest.raises(SetupError, match=why) as failed:
            VllmEngine(lm, VllmConfig(max_model_len=1_000_000))
        assert (failed.value.code, failed.value.exit_code) == ("VRLT-E04", 4)
        engine.close()
        assert not torch.distributed.is_initialized()


def test_a_run_trains_with_it(demo, tiny_folder, tmp_path):
    """Comes last: another vLLM in the process, after the first one was closed."""
    tree = {
        "model": {"name": str(tiny_folder), "dtype": "float32", "device": "cpu"},
        "data": {"train": str(demo / "train.jsonl"), "eval": str(demo / "heldout.jsonl")},
        "video": {"sampling": "fps", "fps": 1.0, "min_frames": 2, "min_pixels": 784, "max_pixels": 1568},
        "prompt": {"video_layout": "interleaved", "think": False},
        "rollout": {"engine": "vllm", "group_size": 3, "prompts": 2, "max_new_tokens": 6, "temperature": 0.8},
        "vllm": {"max_model_len": 1024, "enforce_eager": True},
        "grpo": {"steps": 2, "lr": 1e-3},
        "optim": {"warmup": 1},
        "train": {"out": str(tmp_path / "run"), "stages": ["grpo"]},
        "eval": {"samples": 2, "responses": 1},
    }
    run = train(Config.model_validate(tree), console=Console())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [r for r in records if r["kind"] == "train"]
    assert len(steps) == 2
    assert all(r["phases"]["sync"] > 0 and r["phases"]["generate"] > 0 for r in steps)
    assert (run / "checkpoints" / "grpo-final").is_dir()
    assert not torch.distributed.is_initialized()
