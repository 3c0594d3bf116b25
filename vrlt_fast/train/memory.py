"""How much memory a run needs, from the configurations of the model and of the run alone.

Bytes, with e the size of a number of ``model.dtype`` and N tokens in the largest GRPO pass (:class:`PassSize`):

    weights      every parameter e, counted exactly on the meta device; a reference has those of the model once more
    gradients    e a trained parameter
    optimizer    two moments of 4 (``optim.states`` bfloat16: 2), 4 for the fp32 copy of a bf16 parameter, 4 a tensor
    at the step  gradients of the copies, 4 a parameter; with moments in bf16 a piece of one parameter in fp32 instead
    layer        e (4 h + 2 Hq d + 2 Hk d + 3 i) + 4 Hq a token: inputs and outputs of norms, of attention, of SwiGLU
    activations  N layers layer;  with train.recompute: N layers e h, and N layer for the one that runs again
                 and for what the backward pass of a layer makes, N e (4 h + 3 i)
    head         logits e V a target, at most ``LOGITS`` of them, and a gradient of the head's weight
    tower block  e (10 hv + 3 iv) a patch: as a layer, with q, k and v together besides
    vision       trained: all clips of a step, blocks as layers above; frozen: one piece without a graph, the embeddings
    KV           as the rollout engine plans it

With ``parallel.sp`` a process has its share of the tokens of a pass and of the patches of the tower, and while a layer
runs the gathered keys and values of that layer, several times. With ``parallel.shard`` = n:

    weights      whole ones for rollouts, and 4 / n a trained parameter
    reference    e / n a parameter of the language model; its tower is whole
    gradients    4 / n a trained parameter
    optimizer    its moments over n
    gathered     while the update runs: e + 4 a parameter of embedding, head, a trained tower, and two layers

Not counted: the CUDA context, an allocator's holes, decoded frames, SFT's passes, what torch keeps for itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vrlt_fast.config import Config
from vrlt_fast.errors import ConfigError
from vrlt_fast.model.language import LOGITS
from vrlt_fast.model.load import MODELS, ModelInfo, VideoLM
from vrlt_fast.model.lora import add_lora
from vrlt_fast.model.vision import PIECE
from vrlt_fast.rollout.joint import room
from vrlt_fast.rollout.kv import AUTO_GB_CPU, AUTO_SHARE_CUDA, KvShape, plan_kv
from vrlt_fast.train.optim import PIECE as STEP_PIECE

When = Literal["always", "update", "optimizer step"]


COPIES = 5
"""Of one layer's gathered keys and values, with their gradients, while its backward pass runs."""


@dataclass(frozen=True)
class Part:
    """``nbytes`` of ``name`` while ``when``; ``lower``: what makes it less, for the reader."""

    name: str
    nbytes: int
    when: When = "always"
    lower: str = ""


@dataclass(frozen=True)
class Estimate:
    """Memory of one process of a run, by part."""

    parts: tuple[Part, ...]

    def during(self, when: When) -> int:
        """Bytes of the parts of one time alone."""
        return sum(part.nbytes for part in self.parts if part.when == when)

    @property
    def total(self) -> int:
        """Bytes at the time when they are most."""
        return self.during("always") + max(self.during("update"), self.during("optimizer step"))


@dataclass(frozen=True)
class Counts:
    """Bytes of a model's parameters; ``plain`` without adapters, ``tower`` those of the tower among them, ``ends`` of
    embedding and head. ``trained``: size and bytes a number of each.
    """

    weights: int
    plain: int
    tower: int
    ends: int
    trained: tuple[tuple[int, int], ...]
    head_trained: bool


def count(info: ModelInfo, config: Config) -> Counts:
    """Exact counts, from a model without data."""
    with torch.device("meta"):
        module = MODELS[info.family](info.config)
    module.to(getattr(torch, config.model.dtype))
    if config.model.freeze_vision:
        module.model.visual.requires_grad_(False)
    plain = _nbytes(module.parameters())
    if config.lora.rank:
        add_lora(VideoLM(info, module), config.lora)
    trained = tuple((p.numel(), p.dtype.itemsize) for p in module.parameters() if p.requires_grad)
    ends = {id(p): p for p in (module.get_input_embeddings().weight, module.lm_head.weight)}  # one where they are tied
    tower = _nbytes(module.model.visual.parameters())
    head = module.lm_head.weight.requires_grad
    return Counts(_nbytes(module.parameters()), plain, tower, _nbytes(ends.values()), trained, head)


def _nbytes(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() * p.dtype.itemsize for p in parameters)


@dataclass(frozen=True)
class Longest:
    """The longest prompt of a training set: ``sample`` is its place there; ``tokens``, and ``patches`` of its media."""

    sample: int
    tokens: int
    patches: int


@dataclass(frozen=True)
class PassSize:
    """The largest GRPO pass, in tokens: ``tokens`` with activations, ``behind`` of a prompt that went before (in
    stages), ``targets`` of the loss.
    """

    tokens: int
    targets: int
    behind: int = 0


def pass_size(config: Config, prompt: int) -> PassSize:
    """Of groups with prompts of ``prompt`` tokens whose responses are as long as they may be."""
    rollout, train = config.rollout, config.train
    rows, length = rollout.group_size, rollout.max_new_tokens
    groups = min(max(train.micro_rows // rows, 1), prompts_of(config))
    most = train.micro_tokens * config.parallel.sp
    if most:
        groups = min(groups, max(most // (prompt + rows * length), 1))
        if prompt + rows * length > most:
            rows = max(min((most - prompt) // length, rows), 1)
    if train.prefix == "replicated":
        return PassSize(groups * rows * (prompt + length), groups * rows * length)
    behind, sp = prompt if rows < rollout.group_size else 0, config.parallel.sp
    held = math.ceil(groups * prompt / sp) + math.ceil(groups * rows / sp) * length
    return PassSize(held, math.ceil(groups * rows / sp) * length, math.ceil(behind / sp))


def prompts_of(config: Config) -> int:
    """Prompts of a step that one process has."""
    return math.ceil(config.rollout.prompts / config.parallel.replicas)


def _fused(config: Config, device: str) -> bool:
    """Whether norms and SwiGLU keep their inputs alone."""
    return config.kernels.layers == "liger" or (config.kernels.layers == "auto" and device == "cpu")


@dataclass(frozen=True)
class Text:
    """The language model's sizes. ``normed_heads``: norms of queries and keys."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int
    normed_heads: bool
    fused: bool

    @staticmethod
    def of(info: ModelInfo, config: Config, device: str) -> Text:
        text = info.config.text_config
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return Text(
            text.num_hidden_layers,
            text.hidden_size,
            text.intermediate_size,
            text.num_attention_heads,
            text.num_key_value_heads,
            dim,
            text.vocab_size,
            info.family == "qwen3_vl",
            _fused(config, device),
        )

    def norm(self, width: int, e: int) -> int:
        """Bytes a token that a norm keeps: its input; transformers' own: in fp32, and what the weight scales."""
        return width * e if self.fused else width * (4 + e)

    def layer(self, e: int) -> int:
        """Bytes a token of a layer's activations."""
        q, kv = self.heads * self.dim, self.kv_heads * self.dim
        norms = 2 * (self.norm(self.hidden, e) + self.hidden * e)
        norms += self.norm(q + kv, e) if self.normed_heads else 0
        swiglu = (3 if self.fused else 4) * self.inner * e
        return norms + (2 * q + 2 * kv) * e + 4 * self.heads + swiglu

    def key_values(self, e: int) -> int:
        """Bytes a token of the keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.dim * e

    def activations(self, size: PassSize, e: int, *, recompute: bool) -> int:
        """Bytes that a forward pass keeps for the backward pass, and those of a layer's backward pass."""
        once = size.tokens * self.layer(e)
        kept = self.layers * size.tokens * self.hidden * e + once if recompute else self.layers * once
        kept += size.tokens * self.norm(self.hidden, e)  # the last one
        # a prompt that went before: gradients of its keys and values, and their copy in front of those of each piece
        kept += size.behind * self.key_values(e) * 2
        return kept + size.tokens * (4 * self.hidden + 3 * self.inner) * e

    def head(self, size: PassSize, e: int, *, trained: bool) -> int:
        """Bytes of logits, of the hidden states before them, and of a gradient of the head."""
        logits = min(size.targets * self.vocabulary, LOGITS) * e
        return logits + size.targets * self.hidden * e + (self.vocabulary * self.hidden * e if trained else 0)


@dataclass(frozen=True)
class Tower:
    """The vision tower's sizes; ``inner_kept``: how many times its inner width a block's MLP keeps."""

    blocks: int
    width: int
    inner: int
    inner_kept: int
    pixels: int
    mergers: int
    norm: int
    out: int
    merged: int

    @staticmethod
    def of(info: ModelInfo, config: Config, device: str) -> Tower:
        vision, e = info.config.vision_config, getattr(torch, config.model.dtype).itemsize
        width = vision.embed_dim if info.family == "qwen2_vl" else vision.hidden_size
        inner = int(width * vision.mlp_ratio) if info.family == "qwen2_vl" else vision.intermediate_size
        own = info.family == "qwen2_5_vl" and not _fused(config, device)
        return Tower(
            vision.depth,
            width,
            inner,
            {"qwen2_vl": 3, "qwen2_5_vl": 4 if own else 3, "qwen3_vl": 2}[info.family],
            3 * vision.temporal_patch_size * vision.patch_size**2,
            1 + len(getattr(vision, "deepstack_visual_indexes", ())),
            width * (4 + e) if own else width * e,
            info.config.text_config.hidden_size,
            vision.spatial_merge_size**2,
        )

    def block(self, e: int) -> int:
        """Bytes a patch of a block's activations."""
        # queries and keys are rotated copies; values keep the storage of all three
        return 2 * (self.norm + self.width * e) + (6 * self.width + self.inner_kept * self.inner) * e

    def embeds(self, patches: int, e: int) -> int:
        """Bytes of the tokens that the language model gets."""
        return patches // self.merged * self.out * self.mergers * e

    def activations(self, patches: int, e: int, *, recompute: bool) -> int:
        """Bytes that a pass of a trained tower keeps for the backward pass."""
        blocks = self.blocks * self.width * e + self.block(e) if recompute else self.blocks * self.block(e)
        ends = self.pixels * e + self.mergers * (self.norm + 3 * self.width * e)
        return patches * (blocks + ends)


def estimate(
    info: ModelInfo,
    config: Config,
    *,
    tokens: int,
    patches: int,
    device: str,
    capacity: int,
    videos: int = 1,
    counts: Counts | None = None,
) -> Estimate:
    """What one process of a run needs.

    Args:
        tokens: of the longest prompt, and ``patches`` of its media.
        device: "cpu" or "cuda"; ``capacity`` in bytes, of which ``rollout.kv_gb = 0`` takes a share on a GPU.
        videos: of the training set, for the embedding cache.
        counts: of the model, where they are known.
    """
    counts = counts or count(info, config)
    e = getattr(torch, config.model.dtype).itemsize
    text, tower = Text.of(info, config, device), Tower.of(info, config, device)
    away = config.optim.offload and device == "cuda"
    parts = _states(config, counts, away) if config.parallel.shard == 1 else _shards(config, counts, text.layers, away)
    if config.model.freeze_vision:
        key = "gpu_gb" if device == "cuda" else "host_gb"
        most = int(getattr(config.embed_cache, key) * 1e9)
        parts.append(Part("embedding cache", min(tower.embeds(patches, e) * videos, most), lower=f"embed_cache.{key}"))
    if config.rollout.engine == "vllm":
        share = int(config.vllm.gpu_memory_utilization * capacity)
        parts.append(Part("vLLM", share, lower="vllm.gpu_memory_utilization"))
    else:
        left = capacity - sum(part.nbytes for part in parts if part.when == "always")
        buffers = rollout_bytes(info, config, tokens, device, left)
        parts.append(Part("keys and values", buffers, lower="rollout.kv_gb"))
    if "grpo" in config.train.stages:
        size = pass_size(config, tokens)
        kept = text.activations(size, e, recompute=config.train.recompute)
        fewer = "train.recompute, train.micro_tokens, video.max_frames"
        parts.append(Part(f"activations of {size.tokens} tokens", kept, "update", fewer))
        head = text.head(size, e, trained=counts.head_trained)
        parts.append(Part("logits and head", head, "update", "train.micro_tokens"))
        if config.parallel.sp > 1 and config.parallel.sequence == "gather_kv":
            one = text.key_values(e) // text.layers * size.tokens * config.parallel.sp
            parts.append(Part("gathered keys and values", COPIES * one, "update", "train.micro_tokens"))
    return Estimate((*parts, _vision(tower, config, patches, e, device)))


def _states(config: Config, counts: Counts, away: bool) -> list[Part]:
    """Weights, and what the optimizer has for each, unless it is in host memory."""
    numbers = sum(n for n, _ in counts.trained)
    copied = sum(n for n, each in counts.trained if each < 4)
    narrow = config.optim.states == "bfloat16"
    shared = config.lora.rank and config.model.freeze_vision
    reference = 0 if shared or config.grpo.beta == 0 or "grpo" not in config.train.stages else counts.plain
    states = 0 if away else numbers * (4 if narrow else 8) + 4 * copied + 4 * len(counts.trained)
    copied = 0 if away else copied
    piece = 6 * 4 * min(max((n for n, _ in counts.trained), default=0), STEP_PIECE)
    gradients, fewer = sum(n * each for n, each in counts.trained), "lora.rank, model.freeze_vision, optim.offload"
    return [
        Part("weights", counts.weights, lower='model.dtype = "bfloat16"'),
        Part("reference", reference, lower="grpo.beta = 0, or lora.rank with a frozen tower"),
        Part("optimizer", states, lower=f'{fewer}, optim.states = "bfloat16"'),
        Part("gradients", gradients, lower=fewer),
        Part("gradients in fp32", piece if narrow else 4 * copied, "optimizer step", 'optim.states = "bfloat16"'),
    ]


def _shards(config: Config, counts: Counts, layers: int, away: bool) -> list[Part]:
    """As :func:`_states`, where processes share the weights."""
    e, shard = getattr(torch, config.model.dtype).itemsize, config.parallel.shard
    numbers = sum(n for n, _ in counts.trained)
    each = 0 if away else 4 if config.optim.states == "bfloat16" else 8
    referred = config.grpo.beta != 0 and "grpo" in config.train.stages
    reference = (counts.plain - counts.tower) // shard + counts.tower if referred else 0
    tower = 0 if config.model.freeze_vision else counts.tower
    layer = (counts.plain - counts.tower - counts.ends) // layers
    gathered = (counts.ends + tower + 2 * layer) // e * (e + 4)
    return [
        Part("weights", counts.weights + 4 * numbers // shard, lower='model.dtype = "bfloat16"'),
        Part("reference", reference, lower="grpo.beta = 0"),
        Part("optimizer", each * numbers // shard + 4 * len(counts.trained), lower="a larger parallel.shard"),
        Part("gradients", 4 * numbers // shard, lower="a larger parallel.shard"),
        Part("gathered weights", gathered, "update", "model.freeze_vision"),
    ]


def _vision(tower: Tower, config: Config, patches: int, e: int, device: str) -> Part:
    prompts = prompts_of(config)
    if config.model.freeze_vision:
        piece = min(math.ceil(prompts * patches / config.parallel.sp), PIECE.get(device, 65536))
        held = piece * tower.block(e) + tower.embeds(prompts * patches, e)
        return Part("vision", held, "update", "video.max_frames, video.max_pixels")
    seen = prompts * (1 + config.grpo.refill) * patches
    own = math.ceil(seen / config.parallel.sp)
    held = tower.activations(own, e, recompute=config.train.recompute) + tower.embeds(seen, e)
    return Part("vision, trained", held, "update", "model.freeze_vision, train.recompute, rollout.prompts")


def least(config: Config) -> Config:
    """The same run with passes and buffers as small as they become where memory is short, without caches."""
    train = config.train.model_copy(update={"micro_tokens": 1, "micro_rows": 1})
    cache = config.embed_cache.model_copy(update={"gpu_gb": 0.0, "host_gb": 0.0})
    rollout = config.rollout.model_copy(update={"kv_gb": 1e-6})  # less than anything: the engine's least
    return config.model_copy(update={"train": train, "embed_cache": cache, "rollout": rollout})


def rollout_bytes(info: ModelInfo, config: Config, tokens: int, device: str, left: int) -> int:
    """Bytes of the group engine's buffers for prompts of so many tokens, where ``left`` bytes of a GPU are free."""
    rollout, text = config.rollout, Text.of(info, config, device)
    sp, prompts = config.parallel.sp, prompts_of(config)
    if prompts < sp:  # each group is everybody's
        prefixes, rows = [room(tokens, sp)] * prompts, [math.ceil(rollout.group_size / sp)] * prompts
    else:
        prompts = math.ceil(prompts / sp)
        prefixes, rows = [tokens] * prompts, [rollout.group_size] * prompts
    dtype = getattr(torch, config.model.dtype)
    shape = KvShape(text.layers, text.kv_heads, text.dim, dtype, torch.device(device))
    automatic = int(AUTO_GB_CPU * 1e9) if device == "cpu" else int(AUTO_SHARE_CUDA * max(left, 0))
    budget = int(rollout.kv_gb * 1e9) or automatic
    how: dict[str, Any] = {"budget": budget, "max_rows": rollout.max_rows}
    try:
        return plan_kv(shape, prefixes, rows, rollout.max_new_tokens, **how).nbytes(shape)
    except ConfigError:  # the least that the engine takes, for which there is no room
        return shape.token_bytes * (tokens + 2 * rollout.max_new_tokens)
