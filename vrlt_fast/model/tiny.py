"""A tiny random Qwen-VL with a tokenizer of its own, saved as an ordinary HF folder. It learns the demo on a CPU."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrlt_fast.config import PromptConfig
from vrlt_fast.data.prompts import answer_text, user_text
from vrlt_fast.data.readers import read_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<glue>", "</glue>")
"""Tokens of their own, as ``<think>`` is one for Qwen3."""

# Qwen's rule, but a number is one piece: seconds are what this model says most
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+(?:\.\p{N}+)?"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}


def build_tiny(
    out: Path, *, train_jsonl: Path, seed: int = 0, vocab_size: int = 768, family: str = "qwen2_5_vl"
) -> Path:
    """Write a randomly initialised model of about 2 million parameters to ``out``.

    The tokenizer is a byte-level BPE trained on the prompts and answers of ``train_jsonl``, with Qwen's splitting rule
    but for numbers, and with tags as tokens: fewer tokens a prompt and a response, each of which says more. Same seed
    and data, same bytes.

    Args:
        family: a key of ``vrlt_fast.model.load.MODELS``.
    """
    import torch

    from vrlt_fast.model.load import MODELS, quiet_transformers

    quiet_transformers()
    samples = read_jsonl(train_jsonl, check_files=False)
    prompt = PromptConfig(think=True)
    texts = [text for s in samples for text in (user_text(s, prompt), answer_text(s, prompt))]
    texts += [f"<{i / 10:.1f} seconds>" for i in range(100)]
    texts += ["system\nYou are a helpful assistant.\nuser\nassistant\n"] * 2  # what stands once is not merged
    tokenizer = _tokenizer(texts, vocab_size)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}

    config = MODELS[family].config_class(**_architecture(family, len(tokenizer), ids))
    torch.manual_seed(seed)
    model = MODELS[family](config)
    _initialise(model)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": _PROCESSORS[family],
        "patch_size": config.vision_config.patch_size,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3 if family == "qwen3_vl" else [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.5] * 3 if family == "qwen3_vl" else [0.26862954, 0.26130258, 0.27577711],
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")
    return out


def _architecture(family: str, vocab: int, ids: dict[str, int]) -> dict[str, Any]:
    """Arguments of the family's configuration: the released architecture, narrow and shallow."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
    }
    vision: dict[str, Any]
    if family == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 128, "hidden_size": 192, "num_heads": 4, "mlp_ratio": 2}
    else:
        vision = {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 192}
    if family == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": [1], "tokens_per_second": 2}
    elif family == "qwen3_vl":
        text |= {"head_dim": 32, "rope_parameters": rope | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}}
        vision |= {"depth": 3, "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
    return {
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": True,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _initialise(model: PreTrainedModel) -> None:
    """Scale every matrix by its fan-in (transformers' fixed 0.02 suits wide models), and bring the tower's output
    down to the size of token embeddings, so that its tokens don't drown the timestamps that they attend to.
    """
    import torch

    tower = model.model.visual
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(std=0.05 if "embed_tokens" in name else 0.8 / math.sqrt(weight[0].numel()))
        for merger in mergers:
            (merger.linear_fc2 if hasattr(merger, "linear_fc2") else merger.mlp[-1]).weight.mul_(0.15)


def _tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = vocab_size - len(SPECIAL_TOKENS) - len(TAGS)
    trainer = trainers.BpeTrainer(vocab_size=merged, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
    tags = re.compile("|".join(TAGS))
    core.train_from_iterator([piece for text in texts for piece in tags.split(text)], trainer)
    core.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
