"""A decoder layer of the Qwen2 and Qwen3 language models on one new token a row, as one compiled operator on the CPU.

In a decode step of few rows a product of BLAS spends its time on packing weights that are used once, and Python its on
dozens of small operations. Here a layer is one call: norm, projections, rotation, the new keys and values into the
cache, `group_decode`, and the gated MLP, weights read once, as they lie. Nothing is added up across rows: the bits of a
row depend on its own token and keys alone, whatever the other rows and the number of threads.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from . import _native
from ._checks import bad, describe
from ._launch import choose

DTYPES = (torch.float32, torch.float64)


class LayerWeights(NamedTuple):
    """Contiguous weights of a layer, [out, in] and [out]; None: the layer has no such."""

    input_norm: torch.Tensor
    query: torch.Tensor
    query_bias: Optional[torch.Tensor]
    key: torch.Tensor
    key_bias: Optional[torch.Tensor]
    value: torch.Tensor
    value_bias: Optional[torch.Tensor]
    query_norm: Optional[torch.Tensor]
    key_norm: Optional[torch.Tensor]
    output: torch.Tensor
    output_bias: Optional[torch.Tensor]
    post_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class DecodeCaches(NamedTuple):
    """Of one layer, as `group_decode` takes them."""

    prefix_key: torch.Tensor
    prefix_value: torch.Tensor
    suffix_key: torch.Tensor
    suffix_value: torch.Tensor


class DecodeNumbers(NamedTuple):
    """As `group_decode` takes them; ``columns`` int64 [rows]: where in its slot a row's new key and value go."""

    prefix_start: torch.Tensor
    prefix_length: torch.Tensor
    row_offsets: torch.Tensor
    slots: torch.Tensor
    columns: torch.Tensor
    suffix_length: torch.Tensor


def obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why :func:`decode_layer` can't run; empty where it can."""
    if device.type != "cpu" or dtype not in DTYPES:
        return "the compiled decoder layer runs on CPUs in fp32 and fp64"
    return _native.obstacle(device)


def chosen(weight: torch.Tensor) -> bool:
    """Whether a model with such weights should take the operator: it can run, and no other backend is forced."""
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return False
    attention = choose("group_decode", weight, has=("triton", "native", "reference"))
    return attention == "native" and choose("decode_layer", weight, has=("native", "reference")) == "native"


def decode_layer(
    hidden: torch.Tensor,
    weights: LayerWeights,
    rotation: tuple[torch.Tensor, torch.Tensor],
    caches: DecodeCaches,
    numbers: DecodeNumbers,
    *,
    scale: float,
    eps: float,
    max_group: int,
) -> torch.Tensor:
    """The layer's output [rows, hidden], without gradients; new keys and values go to the suffix caches.

    Args:
        hidden: fp32 or fp64 [rows, hidden], contiguous, on the CPU.
        weights: in its dtype.
        rotation: cosines and sines [rows, d] of the rows' positions, halves alike, as transformers makes them.
        scale: of the attention's scores.
        eps: of all norms.
        max_group: the most rows of a group.

    Raises:
        KernelInputError: the operator can't run on this device or dtype.
        RuntimeError: a wrong size or number.
    """
    why = obstacle(hidden.device, hidden.dtype)
    if why:
        raise bad("hidden", describe(hidden), f"something else: {why}")
    none = hidden.new_empty(0)
    tensors = [none if w is None else w for w in weights]
    with torch.no_grad():
        out: torch.Tensor = torch.ops.vrlt_native.decode_layer(
            hidden, tensors, *rotation, list(caches), list(numbers), scale, eps, max_group
        )
    return out


def decode_head(
    hidden: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], eps: float
) -> torch.Tensor:
    """Logits [rows, V] of the head ``weight`` [V, hidden], ``bias`` [V] on the RMS norm of hidden, without gradients.

    Raises:
        KernelInputError: the operator can't run on this device or dtype.
        RuntimeError: a wrong size, dtype or stride.
    """
    why = obstacle(hidden.device, hidden.dtype)
    if why:
        raise bad("hidden", describe(hidden), f"something else: {why}")
    with torch.no_grad():
        out: torch.Tensor = torch.ops.vrlt_native.decode_head(hidden, norm, weight, bias, eps)
    return out


__all__ = ["DecodeCaches", "DecodeNumbers", "LayerWeights", "chosen", "decode_head", "decode_layer", "obstacle"]
