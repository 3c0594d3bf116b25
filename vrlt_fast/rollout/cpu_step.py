"""Decode steps on a CPU by the compiled decoder layer: Python is left once a layer instead of once an operation."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from transformers.activations import ACT2FN

from vrlt_fast.model.load import VideoLM
from vrlt_fast.rollout.passes import DecodePass
from vrlt_kernels.decode_layer import DecodeCaches, DecodeNumbers, LayerWeights, chosen, decode_head, decode_layer

_log = logging.getLogger(__name__)


class CpuStep:
    """The language model of ``lm`` in decode steps. It holds the weights' tensors: make a new one where they may have
    been replaced.
    """

    def __init__(self, lm: VideoLM):
        self.text = lm.module.model.language_model
        self.head = lm.module.lm_head
        self.layers = [_weights(layer) for layer in self.text.layers]
        self.eps = float(self.text.config.rms_norm_eps)
        self._table: tuple[torch.Tensor, ...] = (torch.empty(0), torch.empty(0))

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor, group_pass: DecodePass) -> torch.Tensor:
        """Logits [rows, V] behind one token a row, int64 [rows], at its position."""
        hidden = self.text.embed_tokens(tokens)
        rotation = self._rotation(positions)
        p = group_pass
        numbers = DecodeNumbers(p.prefix_start, p.prefix_length, p.row_offsets, p.slots, p.columns, p.own_length)
        scale = float(rotation[0].shape[-1] ** -0.5)
        for i, weights in enumerate(self.layers):
            s = p.store
            caches = DecodeCaches(s.prefix_keys[i], s.prefix_values[i], s.own_keys[i], s.own_values[i])
            hidden = decode_layer(
                hidden, weights, rotation, caches, numbers, scale=scale, eps=self.eps, max_group=p.max_group
            )
        return decode_head(hidden, self.text.norm.weight, self.head.weight, self.head.bias, self.eps)

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [rows, d], from a table."""
        last = int(positions.max())
        if last >= len(self._table[0]):
            every = torch.arange(last + 256)
            like = self.head.weight.new_empty(0)
            # positions are alike in time, height and width, so their rotations are, put together already or not
            found = self.text.rotary_emb(like, every.expand(3, 1, -1))
            self._table = tuple(x.reshape(-1, *x.shape[-2:])[0].contiguous() for x in found)
        cos, sin = (x.index_select(0, positions) for x in self._table)
        return cos, sin


def cpu_step(lm: VideoLM) -> CpuStep | None:
    """None where the model is more than its family's plain layers, which is said in the log, runs elsewhere, or the
    operator wasn't built.
    """
    weight = lm.module.get_input_embeddings().weight
    if weight.device.type != "cpu":
        return None
    other = _other_than_plain(lm, weight.dtype)
    if other:
        _say(other)
        return None
    return CpuStep(lm) if chosen(weight) else None


@lru_cache
def _say(other: str) -> None:
    """Once a reason."""
    _log.info("decode steps take transformers' modules: %s", other)


def _other_than_plain(lm: VideoLM, dtype: torch.dtype) -> str:
    """What the compiled layer wouldn't compute as the model does; empty where there is nothing."""
    text, head = lm.module.model.language_model, lm.module.lm_head
    if torch.nn.modules.module._has_any_global_hook():
        return "hooks on all modules"
    # other kinds may depend on the length of the sequence
    if getattr(text.rotary_emb, "rope_type", "") not in ("default", "linear", "llama3", "yarn"):
        return "its rotation"
    eps = float(text.config.rms_norm_eps)
    for name, module in (("", text), ("norm", text.norm), ("lm_proj", head), *text.layers.named_modules()):
        if not _plain(name.rpartition(".")[2], module, eps):
            return f"{name or type(module).__name__} is replaced, has a hook or another eps or bias"
    plain = all(p.dtype == dtype and p.is_contiguous() for p in text.parameters())
    return "" if plain else "weights of several dtypes, or not contiguous"


def _plain(name: str, module: Any, eps: float) -> bool:
    """Whether it is what its family has under this name, and nobody wants to be called: no adapter, no hook."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    if name.endswith("_proj"):
        mlp = name in ("gate_proj", "up_proj", "down_proj")
        return type(module) is torch.nn.Linear and not (mlp and module.bias is not None)
    if name == "act_fn":
        return type(module) is type(ACT2FN["silu"])
    own = type(module).__module__.startswith("transformers.models.qwen") or type(module) is torch.nn.ModuleList
    return own and (not name.endswith("norm") or getattr(module, "variance_epsilon", None) == eps)


def _weights(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return LayerWeights(
        input_norm=layer.input_layernorm.weight,
        query=attention.q_proj.weight,
        query_bias=attention.q_proj.bias,
        key=attention.k_proj.weight,
        key_bias=attention.k_proj.bias,
        value=attention.v_proj.weight,
        value_bias=attention.v_proj.bias,
        query_norm=None if q_norm is None else q_norm.weight,
        key_norm=None if k_norm is None else k_norm.weight,
        output=attention.o_proj.weight,
        output_bias=attention.o_proj.bias,
        post_norm=layer.post_attention_layernorm.weight,
        gate=mlp.gate_proj.weight,
        up=mlp.up_proj.weight,
        down=mlp.down_proj.weight,
    )
