"""Models of random weights, prompts of random pictures, and the ways to roll out that are compared."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vrlt_fast.config import ModelConfig, PromptConfig, RolloutConfig, VllmConfig
from vrlt_fast.data.sample import Sample
from vrlt_fast.model.attention import PASS, SEGMENTS
from vrlt_fast.model.layers import set_layers
from vrlt_fast.model.load import MODELS, VideoLM, load_model
from vrlt_fast.model.patch_embed import linear_patches_, released_patch_embed
from vrlt_fast.model.prompt import Prompt, encode_prompt
from vrlt_fast.model.tiny import build_tiny
from vrlt_fast.model.vision import normalise
from vrlt_fast.rollout import engine
from vrlt_fast.rollout.decode import Decoder, Live, Numbers
from vrlt_fast.rollout.group import Group, RolloutRequest, RolloutStats
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.video.preprocess import Clip

SAMPLE = {"id": "a", "video": "a.mp4", "duration": 60.0, "task": "videoqa", "question": "Which colour comes first?"}
SAMPLE |= {"options": ["red", "green"], "answer": "A"}
PAIR = (1, 16, 16)
"""Grid of a frame pair in patches: 64 tokens."""
SHAPES = {
    "toy": {"text": (512, 1536, 6, 8, 2, 768), "vision": (128, 256, 2, 4), "rope": [8, 12, 12]},
    "3b": {"text": (2048, 11008, 36, 16, 2, 151936), "vision": (1280, 3420, 32, 16), "rope": [16, 24, 24]},
    "7b": {"text": (3584, 18944, 28, 28, 4, 152064), "vision": (1280, 3420, 32, 16), "rope": [16, 24, 24]},
}
"""Hidden, MLP, layers, heads, KV heads, vocabulary; the tower's hidden, MLP, depth, heads; sections of the rotation. 3b
and 7b are Qwen2.5-VL's, toy has 20 million parameters.
"""


def make_model(
    size: str, device: torch.device, context: int, folder: Path | None = None, data: Path | None = None
) -> VideoLM:
    """A Qwen2.5-VL of random weights: the demo's ("demo"), or of one of ``SHAPES``; bf16 on CUDA, else fp32. No token
    ends a response, so that all arms draw as many. ``folder`` keeps its configuration and tokenizer, for vLLM; ``data``
    holds the annotations that the tokenizer is made from.
    """
    with tempfile.TemporaryDirectory() as temporary:
        home = folder or Path(temporary)
        if data is None:
            data = home / "train.jsonl"
            data.write_text(json.dumps(SAMPLE) + "\n", encoding="utf-8")
        name = str(build_tiny(home / "model", train_jsonl=data, seed=0))
        lm = load_model(ModelConfig(name=name, dtype="float32", device="cpu", freeze_vision=False))
        made = _shaped(lm, size, device, context)
        made.info.config.save_pretrained(home / "model")
    return made


def _shaped(lm: VideoLM, size: str, device: torch.device, context: int) -> VideoLM:
    lm.info.config.text_config.max_position_embeddings = context
    info = dataclasses.replace(lm.info, stop_tokens=(), context=context)
    if size == "demo":
        lm.module.eval()
        return VideoLM(info, lm.module.to(device))
    config, shape = copy.deepcopy(info.config), SHAPES[size]
    text, vision = config.text_config, config.vision_config
    (text.hidden_size, text.intermediate_size, text.num_hidden_layers) = shape["text"][:3]
    (text.num_attention_heads, text.num_key_value_heads, text.vocab_size) = shape["text"][3:]
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": shape["rope"]}
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.max_position_embeddings, text.tie_word_embeddings = context, False
    (vision.hidden_size, vision.intermediate_size, vision.depth, vision.num_heads) = shape["vision"]
    vision.out_hidden_size = text.hidden_size
    vision.fullatt_block_indexes = [7, 15, 23, 31] if vision.depth == 32 else [vision.depth - 1]
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with torch.device(device):
            module = MODELS[info.family](config)
    finally:
        torch.set_default_dtype(torch.float32)
    module.eval()
    linear_patches_(module.model.visual)
    set_layers(module, "auto")
    module.model.visual.config._attn_implementation = SEGMENTS
    module.model.language_model.config._attn_implementation = PASS
    return VideoLM(dataclasses.replace(info, config=config), module)


def make_prompt(lm: VideoLM, tokens: int, seed: int) -> Prompt:
    """A prompt of about so many tokens: frame pairs of random pictures between their timestamps, and a question."""
    one, two = len(pairs_prompt(lm, 1, seed)), len(pairs_prompt(lm, 2, seed))
    return pairs_prompt(lm, max(1, round((tokens - one) / (two - one)) + 1), seed)


def pairs_prompt(lm: VideoLM, pairs: int, seed: int, grid: tuple[int, int] = PAIR[1:]) -> Prompt:
    """A prompt of so many frame pairs of random pictures, each of ``grid`` patches."""
    sample = Sample(**{**SAMPLE, "options": tuple(SAMPLE["options"])})  # type: ignore[arg-type]
    layout = PromptConfig(video_layout="interleaved", think=False)
    size = (pairs * grid[0] * grid[1], 6 * lm.info.geometry.patch**2)
    patches = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    times = tuple(i / 2 for i in range(2 * pairs))
    clip = Clip(patches, (pairs, *grid), times, 1.0, f"{seed}-{pairs}", lm.info.geometry)
    return encode_prompt(lm.info, sample, clip, layout)


class PerRow(Decoder):
    """The same steps with the prefix read once a row: every row is a group of its own."""

    def numbers(self, live: Live, rows: int, prompts: int) -> Numbers:
        self.max_group = 1
        shared = super().numbers(live, rows, prompts)
        row = torch.arange(rows + 1)
        group = torch.searchsorted(shared.offsets[1:], row[:-1], right=True).clamp(max=prompts - 1)
        prefix = sum(len(resident.prompt) for resident, _ in live)
        return Numbers(shared.rows, shared.prompts[:, group], row.clamp(max=len(live)), prefix)


@dataclass
class Arm:
    """A way to roll out: ``run(temperature)`` returns the tokens of all rows, by prompt; ``prepare`` isn't timed."""

    name: str
    run: Callable[[float], list[list[tuple[int, ...]]]]
    prepare: Callable[[], None] = lambda: None
    stats: RolloutStats = field(default_factory=RolloutStats)
    groups: list[Group] = field(default_factory=list)


def our_arm(name: str, lm: VideoLM, prompts: Sequence[Prompt], rows: int, length: int, **how: Any) -> Arm:
    """The group engine; ``decoder=PerRow`` reads prefixes once a row."""
    decoder = how.pop("decoder", Decoder)
    made = engine.GroupEngine(lm, RolloutConfig(**how))
    made.decoder_type = decoder

    def run(temperature: float) -> list[list[tuple[int, ...]]]:
        sampling = Sampling(length, temperature)
        arm.groups, arm.stats = made.generate([RolloutRequest(p, rows, sampling, i) for i, p in enumerate(prompts)])
        return [[c.tokens for c in g.completions] for g in arm.groups]

    arm = Arm(name, run)
    return arm


@contextmanager
def as_released(lm: VideoLM) -> Iterator[None]:
    """Inside, the text model's attention is sdpa and the patch embedding the released one."""
    text, tower = lm.module.model.language_model.config, lm.module.model.visual
    attention, embed = text._attn_implementation, tower.patch_embed
    text._attn_implementation, tower.patch_embed = "sdpa", released_patch_embed(tower)
    try:
        yield
    finally:
        text._attn_implementation, tower.patch_embed = attention, embed


def hf_arm(lm: VideoLM, prompts: Sequence[Prompt], rows: int, length: int, cache: str) -> Arm:
    """transformers' generate with num_return_sequences, prompt by prompt; ``cache`` dynamic or static."""

    def run(temperature: float) -> list[list[tuple[int, ...]]]:
        count = rows if temperature > 0 else 1
        return [g for p in prompts for g in hf_generate(lm, [p], count, length, temperature, cache=cache)]

    return Arm(f"HF generate, {cache} cache", run)


def hf_generate(
    lm: VideoLM,
    prompts: Sequence[Prompt],
    rows: int,
    length: int,
    temperature: float,
    *,
    cache: str = "dynamic",
    watch: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> list[list[tuple[int, ...]]]:
    """Tokens of ``rows`` responses to each prompt from one call of generate; prompts of several lengths are padded.

    Args:
        temperature: 0: greedy, one row.
        watch: called with ids and scores before each token; returns the scores.
    """
    longest, device = max(map(len, prompts)), lm.device
    ids = torch.stack([F.pad(p.ids, (longest - len(p), 0), value=lm.info.pad_token) for p in prompts]).to(device)
    mask = torch.stack([(torch.arange(longest) >= longest - len(p)).long() for p in prompts]).to(device)
    how: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        how |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    with as_released(lm):
        out = lm.module.generate(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=2 * (ids == lm.info.video_token).int(),
            pixel_values_videos=torch.cat([normalise(lm, p.clip.patches.to(device)) for p in prompts]),
            video_grid_thw=torch.cat([_pairs(p) for p in prompts]).to(device),
            second_per_grid_ts=torch.cat([torch.full((p.clip.grid[0],), p.clip.seconds_per_grid) for p in prompts]),
            num_return_sequences=rows,
            max_new_tokens=length,
            min_new_tokens=length,
            suppress_tokens=list(lm.info.visual_tokens),
            cache_implementation=cache if cache == "static" else None,
            logits_processor=[watch] if watch else None,
            disable_compile=True,
            eos_token_id=None,
            pad_token_id=lm.info.pad_token,
            **how,
        )
    tokens = [tuple(row) for row in out[:, longest:].tolist()]
    return [tokens[i * rows : (i + 1) * rows] for i in range(len(prompts))]


def _pairs(prompt: Prompt) -> torch.Tensor:
    """Grids int64 [t, 3] of a video whose frame pairs stand between timestamps."""
    t, h, w = prompt.clip.grid
    return torch.tensor([[1, h, w]] * t)


def vllm_arm(lm: VideoLM, prompts: Sequence[Prompt], rows: int, length: int) -> Arm:
    """vLLM with n = rows and our embeddings; its weights and empty caches from a sync before each run."""
    from vrlt_fast.rollout.vllm import VllmEngine

    how: dict[str, Any] = {"block_size": 32} if lm.device.type == "cpu" else {}
    options = VllmConfig(max_model_len=lm.info.context, max_batched_tokens=lm.info.context, enforce_eager=True)
    made = VllmEngine(lm, options, **how)

    def run(temperature: float) -> list[list[tuple[int, ...]]]:
        sampling = Sampling(length, temperature)
        groups, _ = made.generate([RolloutRequest(p, rows, sampling, i) for i, p in enumerate(prompts)])
        return [[c.tokens for c in g.completions] for g in groups]

    return Arm("vLLM", run, lambda: made.sync(lm))


def full_forward(lm: VideoLM, prompt: Prompt, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [L + n, V] by transformers' forward over a prompt and a response, tower included, at our positions."""
    ids = torch.cat([prompt.ids, torch.tensor(tokens)])[None].to(lm.device)
    after = torch.arange(len(tokens)).expand(3, -1) + prompt.next_position
    logits: torch.Tensor = lm.module(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.cat([prompt.positions, after], dim=1)[:, None].to(lm.device),
        pixel_values_videos=normalise(lm, prompt.clip.patches.to(lm.device)),
        video_grid_thw=_pairs(prompt).to(lm.device),
        use_cache=False,
    ).logits[0]
    return logits


@torch.no_grad()
def full_forward_logprobs(lm: VideoLM, prompt: Prompt, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probs [n] of a response by :func:`full_forward`."""
    scores = full_forward(lm, prompt, tokens)[len(prompt) - 1 : -1].float().log_softmax(-1)
    logprobs: torch.Tensor = scores.gather(1, torch.tensor(tokens, device=lm.device)[:, None])[:, 0].cpu()
    return logprobs
