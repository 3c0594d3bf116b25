"""Checks of what callers pass: every error names the argument, what it got and what it needs."""

from __future__ import annotations

from itertools import pairwise
from typing import Iterable, Optional, Sequence, Tuple, cast

import torch


class KernelInputError(ValueError):
    """An argument a kernel can't work with: "<argument>: got <what>, needs <what>"."""


def bad(name: str, got: object, needs: str) -> KernelInputError:
    """The error to raise."""
    return KernelInputError(f"{name}: got {got}, needs {needs}")


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """``value`` must be one of the allowed strings."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise bad(name, repr(value), "one of " + ", ".join(repr(a) for a in allowed))


def describe(tensor: object) -> str:
    """dtype, shape and device of a tensor; the type of anything else."""
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def tensor(
    name: str,
    value: object,
    *,
    shape: Optional[Sequence[Optional[int]]] = None,
    dtypes: Optional[Sequence[torch.dtype]] = None,
    like: Optional[torch.Tensor] = None,
) -> None:
    """``value`` must be a tensor of this shape (None: any size), one of these dtypes, on the device of ``like``."""
    if not isinstance(value, torch.Tensor):
        raise bad(name, type(value).__name__, "a tensor")
    if shape is not None and (
        value.dim() != len(shape) or any(s is not None and s != v for s, v in zip(shape, value.shape, strict=True))
    ):
        wanted = "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
        raise bad(name, describe(value), f"shape {wanted}")
    if dtypes is not None and value.dtype not in dtypes:
        raise bad(name, describe(value), " or ".join(str(d).removeprefix("torch.") for d in dtypes))
    if like is not None and value.device != like.device:
        raise bad(name, describe(value), f"a tensor on {like.device}")


FLOATS: Tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS: Tuple[torch.dtype, ...] = (torch.int32, torch.int64)


def offsets(name: str, value: object, total: Optional[int], like: torch.Tensor) -> None:
    """Offsets int32/int64 [n + 1] from 0 to ``total``, not decreasing.

    The values are read on the CPU only: on a GPU that would wait for the device, and kernels clamp them instead.
    """
    tensor(name, value, shape=[None], dtypes=INTEGERS, like=like)
    checked = cast(torch.Tensor, value)
    if checked.numel() == 0:
        raise bad(name, describe(value), "at least one offset, 0")
    if checked.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = checked.tolist()
    if ends[0] != 0 or any(a > b for a, b in pairwise(ends)):
        raise bad(name, _short(ends), "offsets that begin at 0 and never decrease")
    if total is not None and ends[-1] != total:
        raise bad(name, f"offsets that end at {ends[-1]}", f"{total} as the last one")


def values_in_range(name: str, value: torch.Tensor, low: int, high: int) -> None:
    """All values of an integer tensor must be in [low, high); looked at on the CPU only, see `offsets`."""
    if value.device.type != "cpu" or value.numel() == 0 or torch.compiler.is_compiling():
        return
    smallest, largest = int(value.min()), int(value.max())
    if smallest < low or largest >= high:
        raise bad(name, smallest if smallest < low else largest, f"values in [{low}, {high})")


def _short(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 12 else f"{list(values[:12])[:-1]}..."


def compute_dtype(*tensors: Optional[torch.Tensor]) -> torch.dtype:
    """fp64 when any given tensor is fp64, else fp32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


__all__ = [
    "FLOATS",
    "INTEGERS",
    "KernelInputError",
    "bad",
    "compute_dtype",
    "describe",
    "offsets",
    "one_of",
    "tensor",
    "values_in_range",
]
