"""rms_norm and swiglu: what stands between the matrix products of a layer, each in one pass forward and one backward.

RMSNorm over the last dimension of x [..., d] with weight w [d], as Llama and Qwen have it:
    r = (mean(x^2) + eps)^-1/2      y = w x r      dx = r (w dy - x r mean(w dy x r))      dw = sum dy x r
SwiGLU of gate g and up u, any shape: y = g s u with s = 1 / (1 + exp(-g)); dg = dy u s (1 + g (1 - s)), du = dy g s.
Compiled for the CPU; elsewhere these are PyTorch's own operations (on CUDA, Liger's kernels do the same).
"""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._checks import FLOATS, bad, compute_dtype, describe, tensor
from ._launch import Backend, choose, no_forward_mode


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, rstd = torch.ops.vrlt_native.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        found: torch.Tensor = out
        return found

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        dx, dweight = torch.ops.vrlt_native.rms_norm_backward(grad.contiguous(), *ctx.saved_tensors)
        return dx, dweight, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        out: torch.Tensor = torch.ops.vrlt_native.swiglu(gate, up)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        dgate, dup = torch.ops.vrlt_native.swiglu_backward(grad.contiguous(), *ctx.saved_tensors)
        return dgate, dup


def _compiled(op: str, x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the compiled operator takes these tensors. Under torch.compile, which fuses by itself, it doesn't."""
    if torch.compiler.is_compiling():
        return False
    alike = all(t.dtype == x.dtype and t.device == x.device for t in others)
    has: List[Backend] = ["native", "reference"] if x.device.type == "cpu" and x.numel() and alike else ["reference"]
    return choose(op, x, has=has) == "native"


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, differentiable once.

    Args:
        x: [..., d] fp32, fp64, bf16 or fp16.
        weight: [d].
        eps: added to the mean square.

    Returns:
        The shape of x, in the dtype of x and weight promoted.

    Raises:
        KernelInputError: a wrong type, shape or dtype.
        RuntimeError: in a second derivative of the compiled operator, or under forward-mode AD.
    """
    tensor("x", x, dtypes=FLOATS)
    tensor("weight", weight, shape=[x.shape[-1] if x.ndim else None], dtypes=FLOATS)
    if not _compiled("rms_norm", x, weight):
        return rms_norm_ref(x, weight, eps)
    no_forward_mode("rms_norm", x, weight)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out: torch.Tensor = _RmsNorm.apply(rows, weight.contiguous(), eps)  # type: ignore[no-untyped-call]
    return out.view(x.shape)


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The mathematics of `rms_norm` in plain PyTorch, rounded as transformers' models round."""
    wide = x.to(compute_dtype(x))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, differentiable once.

    Args:
        gate, up: fp32, fp64, bf16 or fp16 of one shape, dtype and device.

    Raises:
        KernelInputError: a wrong type, shape, dtype or device.
        RuntimeError: in a second derivative of the compiled operator, or under forward-mode AD.
    """
    tensor("gate", gate, dtypes=FLOATS)
    tensor("up", up, dtypes=[gate.dtype], like=gate)
    if up.shape != gate.shape:
        raise bad("up", describe(up), f"the shape of gate, {list(gate.shape)}")
    if not _compiled("swiglu", gate, up):
        return swiglu_ref(gate, up)
    no_forward_mode("swiglu", gate, up)
    out: torch.Tensor = _Swiglu.apply(gate.contiguous(), up.contiguous())  # type: ignore[no-untyped-call]
    return out


def swiglu_ref(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The mathematics of `swiglu` in plain PyTorch."""
    return F.silu(gate) * up


__all__ = ["rms_norm", "rms_norm_ref", "swiglu", "swiglu_ref"]
