"""Which code runs between the matrix products of a layer: the models' own, or fused operators in its place.

A module keeps its weights, names and methods; its class becomes a subclass with another ``forward``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

from vrlt_fast.errors import Problem, SetupError
from vrlt_kernels import rms_norm, swiglu

Layers = Literal["auto", "liger", "torch"]
Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def set_layers(module: nn.Module, layers: Layers) -> None:
    """Have RMSNorm and SwiGLU of a model run as ``layers`` says, whatever they ran as before.

    auto: on a CPU `vrlt_kernels.rms_norm` and `vrlt_kernels.swiglu`, elsewhere the model's own; liger: the functions of
    the package liger-kernel, which need a GPU; torch: the model's own.

    Raises:
        SetupError: E01 liger without the package, E02 without a GPU.
    """
    device = next(module.parameters()).device
    check_layers(layers, device)
    fused: tuple[Norm, Gate] | None = (_liger_norm, _liger_gate) if layers == "liger" else None
    if layers == "auto" and device.type == "cpu":
        fused = (rms_norm, swiglu)
    for part in module.modules():
        plain: Any = getattr(type(part), "plain", type(part))
        kind = _kind(part)
        if kind:
            part.__class__ = plain if fused is None else _subclass(plain, kind, *fused)


def _kind(part: nn.Module) -> str:
    if type(part).__name__.endswith("RMSNorm") and hasattr(part, "variance_epsilon"):
        return "norm"
    gated = all(hasattr(part, name) for name in ("gate_proj", "up_proj", "down_proj"))
    silu = type(getattr(part, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    return "mlp" if gated and silu else ""


@lru_cache
def _subclass(plain: Any, kind: str, norm: Norm, gate: Gate) -> Any:
    def norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return norm(hidden_states, self.weight, self.variance_epsilon)

    def mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(gate(self.gate_proj(x), self.up_proj(x)))
        return out

    forward = norm_forward if kind == "norm" else mlp_forward
    return type(plain.__name__, (plain,), {"forward": forward, "plain": plain, "__module__": plain.__module__})


def check_layers(layers: Layers, device: torch.device) -> None:
    """Raises SetupError E01 or E02 where a device can't run them."""
    if layers != "liger":
        return
    if importlib.util.find_spec("liger_kernel") is None:
        fix = "pip install liger-kernel    (or set kernels.layers = 'auto')"
        raise SetupError(Problem("VRLT-E01", "the package liger-kernel is not installed", "kernels.layers", fix=fix))
    if device.type != "cuda":
        what = f"Liger's kernels don't run on {device.type}"
        raise SetupError(Problem("VRLT-E02", what, "kernels.layers", fix="set kernels.layers = 'auto'"))


def _liger_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    function = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    out: torch.Tensor = function.apply(x, weight, eps, 0.0, "llama", False)  # not in place: x is a residual too
    return out


def _liger_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply(gate, up)
    return out
