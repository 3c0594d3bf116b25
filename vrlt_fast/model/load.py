"""A model folder, checked and opened: weights, tokenizer, and what the rest of the code needs to know of the family."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from vrlt_fast.config import ModelConfig
from vrlt_fast.errors import Problem, SetupError
from vrlt_fast.model.attention import PASS, SEGMENTS
from vrlt_fast.model.layers import Layers, set_layers
from vrlt_fast.model.patch_embed import fold_normalize_, linear_patches_
from vrlt_fast.video.preprocess import Geometry

T = TypeVar("T")
MODELS = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
VISUAL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>", "<|vision_pad|>")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_NORMALISATION = {"qwen3_vl": (_HALF, _HALF)}
"""Mean and standard deviation of a family's pixels where the folder doesn't say; the others have CLIP's."""


@dataclass(frozen=True)
class ModelInfo:
    """What a model folder says without its weights.

    ``image_token`` and ``video_token`` stand for one merged patch each; ``visual_tokens`` may not be sampled.
    ``frame_blocks``: the family was trained with a timestamp before each frame pair of a video, not with one block.
    ``context`` in tokens; ``mean`` and ``std`` of pixels in 0..1.
    """

    path: str
    family: str
    config: Any
    tokenizer: Any
    geometry: Geometry
    video_token: int
    image_token: int
    frame_blocks: bool
    visual_tokens: tuple[int, ...]
    stop_tokens: tuple[int, ...]
    pad_token: int
    context: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass
class VideoLM:
    """An opened model: :class:`ModelInfo` and the HF module with its weights."""

    info: ModelInfo
    module: Any

    @property
    def device(self) -> torch.device:
        return self.module.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype  # type: ignore[no-any-return]

    @property
    def in_shards(self) -> bool:
        """Whether processes share its weights, and so make every pass together."""
        return False

    @property
    def whole(self) -> VideoLM:
        """The model with all of its weights, for rollouts: itself, where processes don't share them."""
        return self

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """As the module's: what is trained, and what has gradients."""
        return list(self.module.named_parameters())

    def run(self, function: Callable[..., T], *args: Any, **more: Any) -> T:
        """``function(*args, **more)``: a forward pass of the language model, for which weights may have to be gathered.
        What it returns must be tensors, or a tuple of them.
        """
        return function(*args, **more)

    def opened(self) -> AbstractContextManager[VideoLM]:
        """The model, inside a block: one that shares its module with another is itself there only."""
        return nullcontext(self)


def _problem(code: str, what: str, where: str, why: str = "", fix: str = "") -> SetupError:
    return SetupError(Problem(code, what, where, why, fix))


def quiet_transformers() -> None:
    """No progress bars for loading and saving: a run has its own."""
    transformers_logging.disable_progress_bar()


def pick_device(name: str) -> torch.device:
    """The device of ``model.device``. Raises SetupError E02 when it isn't there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise _problem(
            "VRLT-E02",
            "no CUDA device",
            "model.device",
            "torch sees none",
            'set model.device = "cpu", or run: vrlt doctor',
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def inspect_model(name: str) -> ModelInfo:
    """Read config and tokenizer of a model folder (or of a hub name in the local cache) and check them; no weights.

    Raises:
        SetupError: M01 folder or weights missing, M02 family not supported, M03 tokenizer lacks a token or template.
    """
    folder = _local_folder(name)
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", "safetensors weights")):
        if not list(folder.glob(pattern)):
            fix = "point model.name at a complete HF folder"
            raise _problem("VRLT-M01", f"model folder has no {what}", str(folder), fix=fix)
    name = str(folder)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _problem(
            "VRLT-M01",
            "no such model",
            name,
            str(error).splitlines()[0],
            "check model.name, or download the model first",
        ) from None
    if config.model_type not in MODELS:
        raise _problem(
            "VRLT-M02",
            f"model type {config.model_type!r} is not supported",
            name,
            fix=f"use one of: {', '.join(MODELS)}",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _problem("VRLT-M03", "tokenizer can't be read", name, str(error).splitlines()[0]) from None
    return _describe(name, config, tokenizer)


def _local_folder(name: str) -> Path:
    """The folder of a path or of a hub name in the local cache; nothing is downloaded. Raises SetupError M01."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        what, why = "no such model folder, nor in the local hub cache", str(error).splitlines()[0]
        fix = f"check model.name, or download it first: hf download {name}"
        raise _problem("VRLT-M01", what, name, why, fix) from None


def _describe(name: str, config: Any, tokenizer: Any) -> ModelInfo:
    known = tokenizer.get_vocab()
    missing = [t for t in ("<|im_end|>", *VISUAL_TOKENS[:4]) if t not in known]
    if missing or tokenizer.chat_template is None:
        lack = f"token {missing[0]}" if missing else "chat template"
        raise _problem(
            "VRLT-M03", f"tokenizer lacks the {lack}", name, fix="copy the tokenizer files of the original model"
        )
    vision, end = config.vision_config, known["<|im_end|>"]
    mean, std = _normalisation(Path(name), config.model_type)
    return ModelInfo(
        path=name,
        family=config.model_type,
        config=config,
        tokenizer=tokenizer,
        geometry=Geometry(patch=vision.patch_size, merge=vision.spatial_merge_size),
        video_token=config.video_token_id,
        image_token=config.image_token_id,
        frame_blocks=config.model_type == "qwen3_vl",
        visual_tokens=tuple(known[t] for t in VISUAL_TOKENS if t in known),
        stop_tokens=tuple({end, known.get("<|endoftext|>", end)}),
        pad_token=known.get("<|endoftext|>", end),
        context=config.text_config.max_position_embeddings,
        mean=mean,
        std=std,
    )


def _normalisation(folder: Path, family: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    mean, std = _NORMALISATION.get(family, (CLIP_MEAN, CLIP_STD))
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return mean, std
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _problem("VRLT-M03", "preprocessor_config.json is not JSON", str(file), str(error)) from None
    return tuple(values.get("image_mean", mean)), tuple(values.get("image_std", std))


def enable_recompute(lm: VideoLM) -> None:
    """Activation checkpointing of the layers of the language model and of a trained tower, in training mode."""
    newer = getattr(lm.module, "activation_checkpointing_enable", None)  # transformers 5.24
    (newer or lm.module.gradient_checkpointing_enable)({"use_reentrant": False})


def load_model(model: ModelConfig, info: ModelInfo | None = None, layers: Layers = "auto") -> VideoLM:
    """Open a model for training or evaluation on ``model.device`` in ``model.dtype``.

    Raises:
        SetupError: as :func:`inspect_model` and :func:`~vrlt_fast.model.layers.set_layers`, and M04 when weights are
            missing, left over or of the wrong shape.
    """
    quiet_transformers()
    info = info or inspect_model(model.name)
    device = pick_device(model.device)
    try:
        module, loading = MODELS[info.family].from_pretrained(
            info.path,
            dtype=getattr(torch, model.dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise _problem("VRLT-M04", "weights can't be loaded", model.name, str(error).splitlines()[0]) from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            first = sorted(map(str, loading[kind]))[0]
            raise _problem(
                "VRLT-M04",
                f"{len(loading[kind])} {kind.replace('_', ' ')}, first {first}",
                model.name,
                "the weights belong to another configuration",
                "use the folder as it was saved",
            )
    # set behind from_pretrained, which would look for a flash-attn wheel
    module.model.visual.config._attn_implementation = SEGMENTS
    module.model.language_model.config._attn_implementation = PASS
    module.to(device)
    module.train()
    linear_patches_(module.model.visual)
    set_layers(module, layers)
    if model.freeze_vision:
        module.model.visual.requires_grad_(False)
        fold_normalize_(module.model.visual, info.mean, info.std)
    return VideoLM(info, module)
