"""What the processes of tests/parallel compute: one packed sequence of which each has a share."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tests.model.test_families import LINE, prompts_of
from vrlt_fast.config import ModelConfig
from vrlt_fast.data.readers import read_jsonl
from vrlt_fast.model.language import target_logprobs
from vrlt_fast.model.layout import GroupLayout, Row, build_layout, response_row
from vrlt_fast.model.load import VideoLM, enable_recompute, load_model
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.sequence import SharedLayout, Ulysses, shared_logprobs
from vrlt_fast.model.staged_sequence import SharedStagedPrompt
from vrlt_fast.model.tiny import build_tiny
from vrlt_fast.model.vision import StepVision, VisionEmbeds, encode_clips, shared_vision
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.video.preprocess import Clip
from vrlt_kernels import GroupSpans, group_attention

LENGTHS = ([5, 1, 9, 2, 2], [3], [])
"""Responses of the three prompts: a video, two images, an image and a video."""
Gradients = dict[str, torch.Tensor]


def make_model(folder: Path, family: str) -> Path:
    """A tiny model, beside a line of annotation that it can be asked about."""
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps(LINE) + "\n")
    return build_tiny(folder / "model", train_jsonl=folder / "train.jsonl", seed=2, family=family)


def untie(folder: Path) -> None:
    """Give a saved model a head of its own, as the large ones of the families have."""
    module = load_model(ModelConfig(name=str(folder), dtype="float32", device="cpu")).module
    module.config.tie_word_embeddings = module.config.text_config.tie_word_embeddings = False
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().flip(0).clone())
    module.save_pretrained(folder)


@lru_cache(maxsize=4)
def open_model(folder: Path, *, freeze: bool, recompute: bool) -> VideoLM:
    """In training mode."""
    lm = load_model(ModelConfig(name=str(folder), dtype="float32", device="cpu", freeze_vision=freeze))
    lm.module.train()
    if recompute:
        enable_recompute(lm)
    return lm


def make_batch(lm: VideoLM, folder: Path, seed: int) -> tuple[list[Prompt], list[list[Row]]]:
    """Prompts of random pictures, and rows of random tokens behind them."""
    generator = torch.Generator().manual_seed(seed)

    def make(kind: Any, grid: tuple[int, int, int], times: tuple[float, ...], key: str) -> Clip:
        (t, h, w), geometry = grid, lm.info.geometry
        patches = torch.randint(0, 256, (t * h * w, 6 * geometry.patch**2), generator=generator, dtype=torch.uint8)
        return Clip(patches, grid, times, 1.0 if kind == "video" else 0.0, key, geometry, kind)

    clips = {
        "video": make("video", (4, 4, 6), tuple(i / 2 for i in range(8)), "v"),
        "image": make("image", (1, 6, 4), (0.0, 0.0), "i"),
        "other": make("image", (1, 2, 8), (0.0, 0.0), "o"),
    }
    sample = read_jsonl(folder.parent / "train.jsonl", check_files=False)[0]
    prompts = prompts_of(lm, sample, clips)
    rows = [
        [response_row(p, torch.randint(9, 100, (n,), generator=generator).tolist()) for n in lengths]
        for p, lengths in zip(prompts, LENGTHS, strict=True)
    ]
    return prompts, rows


def backward(lm: VideoLM, loss: torch.Tensor) -> None:
    lm.module.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)


def gradients(lm: VideoLM) -> Gradients:
    found = {name: p.grad for name, p in lm.module.named_parameters() if p.grad is not None}
    lm.module.zero_grad(set_to_none=True)
    return found


def weights(count: int) -> torch.Tensor:
    """Of the log-probs in what is differentiated."""
    return torch.linspace(-1.0, 1.0, count)


def alone(folder: Path, seed: int, *, freeze: bool, told: bool) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """Log-probs, entropies and gradients of one process."""
    lm = open_model(folder, freeze=freeze, recompute=False)
    prompts, rows = make_batch(lm, folder, seed)
    layout, also = build_layout(prompts, rows), ALSO if told else None
    logp, entropy = target_logprobs(lm, layout, shared_vision(lm, prompts), 0.7, also=also)
    backward(lm, (logp * weights(len(logp))).sum())
    return logp.detach(), entropy, gradients(lm)


ALSO = torch.arange(3, 40, 3)
"""Places in the first prompt that are scored too, as captions are."""
Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Gradients, dict[str, int]]


def packed(peers: Peers, folder: Path, seed: int, method: Any, *flags: bool) -> Part:
    """The numbers of own targets, their log-probs and entropies, this process's gradients, bytes received.

    ``flags``: whether the tower is frozen, layers are computed again, and places of the prompt are scored too.
    """
    freeze, recompute, told = flags
    lm = open_model(folder, freeze=freeze, recompute=recompute)
    prompts, rows = make_batch(lm, folder, seed)
    layout, also = build_layout(prompts, rows), ALSO if told else None
    peers.received.clear()
    shared = SharedLayout(layout, peers, also)
    vision = encode_clips(lm, [clip for p in prompts for clip in p.media], peers)
    logp, entropy = shared_logprobs(lm, shared, vision, 0.7, method=method)
    count = len(layout.targets) + (len(ALSO) if told else 0)
    backward(lm, (logp * weights(count)[shared.targets]).sum())
    return shared.targets, logp.detach(), entropy, gradients(lm), dict(peers.received)


def staged(peers: Peers, folder: Path, seed: int, recompute: bool, piece: int) -> Part:
    """As :func:`packed`, group by group in pieces of so many rows, with the embeddings of a step."""
    lm = open_model(folder, freeze=False, recompute=recompute)
    prompts, rows = make_batch(lm, folder, seed)
    layout = build_layout(prompts, rows)
    held, first, found = StepVision(lm, peers), 0, []
    lm.module.zero_grad(set_to_none=True)
    for prompt, group in zip(prompts, rows, strict=True):
        stage = SharedStagedPrompt(lm, prompt, shared_vision(lm, [prompt], held, peers), peers)
        for start in range(0, len(group), piece):
            logp, entropy, shared = stage.shared_logprobs(group[start : start + piece], 0.7)
            targets = shared.targets + first
            torch.autograd.backward((logp * weights(len(layout.targets))[targets]).sum())
            found.append((targets, logp.detach(), entropy))
            first += len(shared.layout.targets)
        stage.backward()
    held.backward()
    targets, logps, entropies = (torch.cat(parts) for parts in zip(*found, strict=True))
    return targets, logps, entropies, gradients(lm), {}


def saved_bytes(peers: Peers, folder: Path, seed: int, prompt: int, row: int) -> int:
    """Bytes that a pass over a long prompt of text and four rows keeps for its backward pass, parameters left out."""
    lm = open_model(folder, freeze=True, recompute=False)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(9, 100, (prompt + 4 * row,), generator=generator)
    spans = GroupSpans.of([prompt], [[row] * 4])
    positions = torch.cat([torch.arange(prompt), *[torch.arange(row) + prompt] * 4]).expand(3, -1)
    lasts = torch.tensor([prompt + row * (i + 1) - 1 for i in range(4)])
    layout = GroupLayout(ids, positions, spans, lasts[:0], ids[lasts], lasts, torch.arange(5))
    nothing = VisionEmbeds(torch.zeros(0, lm.info.config.text_config.hidden_size))
    own = {p.untyped_storage().data_ptr() for p in lm.module.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if peers.size == 1:
            logp, _ = target_logprobs(lm, layout, nothing)
        else:
            logp, _ = shared_logprobs(lm, SharedLayout(layout, peers), nothing)
    backward(lm, logp.sum())
    return sum(kept.values())


def heads_differ(peers: Peers, seed: int) -> float:
    """Largest difference of attention and its gradients by exchanged heads from those of one process."""
    generator = torch.Generator().manual_seed(seed)
    spans = GroupSpans.of([13, 5], [[4, 1], [6]])
    every = [torch.randn(spans.tokens, heads, 8, generator=generator, requires_grad=True) for heads in (8, 2, 2)]
    weight = torch.randn(spans.tokens, 8, 8, generator=generator)
    right = group_attention(*every, spans)
    gradients = torch.autograd.grad((right * weight).sum(), every)
    none = torch.zeros(0, dtype=torch.int64)
    ids = torch.zeros(spans.tokens, dtype=torch.int64)
    layout = GroupLayout(ids, ids.expand(3, -1), spans, none, none, none, torch.zeros(4, dtype=torch.int64))
    shared = SharedLayout(layout, peers)
    own = [x.detach()[shared.places].requires_grad_() for x in every]
    out = Ulysses(shared).attend(0, *own, 8**-0.5)
    found = torch.autograd.grad((out * weight[shared.places]).sum(), own)
    pairs = [(out, right[shared.places]), *((f, g[shared.places]) for f, g in zip(found, gradients, strict=True))]
    return max(float((a - b).abs().max()) for a, b in pairs)
