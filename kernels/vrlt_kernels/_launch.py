"""Which backend an operator takes, said once in the log, and what Triton launches share."""

from __future__ import annotations

import importlib.util
import logging
import os
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Dict, Iterator, List, Literal, Optional, Sequence, Tuple, Union, cast, get_args

import torch
from torch.autograd import forward_ad

from ._checks import bad, describe, one_of

Backend = Literal["triton", "native", "flash", "reference"]
ENVIRONMENT = "VRLT_KERNELS_BACKEND"
NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_log = logging.getLogger("vrlt_kernels")
# Not a context variable: the backward pass of a GPU runs in another thread and must see the same choice.
_forced: List[Optional[Backend]] = []
_said: Dict[Tuple[str, Backend], str] = {}


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@contextmanager
def use_backend(backend: Optional[Backend]) -> Iterator[None]:
    """Force a backend inside the block, None: the automatic choice, whatever the environment says.

    An operator that doesn't have the backend (only the row kernels have a native one) takes its automatic choice.

    Raises:
        KernelInputError: an unknown name; at the operator's call: the backend can't run here.
    """
    if backend is not None:
        one_of("backend", backend, get_args(Backend))
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def choose(op: str, tensor: torch.Tensor, *, has: Sequence[Backend] = ("triton", "native", "reference")) -> Backend:
    """The backend for operator ``op``, which has the backends ``has``, on the device and dtype of ``tensor``.

    Without a forced one: the compiled one on the CPU; else torch's flash attention where the operator is built on it,
    and Triton on CUDA; else the reference.

    Raises:
        KernelInputError: the forced backend can't run here, with the reason.
    """
    forced = _forced[-1] if _forced else cast(Optional[Backend], os.environ.get(ENVIRONMENT) or None)
    if forced is not None:
        one_of(ENVIRONMENT, forced, get_args(Backend))
    if forced is not None and forced in has:
        reason = _obstacle(forced, tensor)
        if reason:
            raise bad("backend", f"{forced!r} for {op} ({describe(tensor)})", f"another one: {reason}")
        return _say(op, forced, "as asked")
    order: Tuple[Backend, ...] = ("native", "flash") if tensor.device.type == "cpu" else ("flash", "triton")
    reasons = {backend: _obstacle(backend, tensor) for backend in order if backend in has}
    why = "; ".join(f"not {backend}: {reason}" for backend, reason in reasons.items() if reason)
    for backend, reason in reasons.items():
        if not reason:
            return _say(op, backend, why)
    usual = "native" if tensor.device.type == "cpu" else "triton"
    return _say(op, "reference", why or f"{op} has no {usual} backend")


def report() -> Dict[str, str]:
    """Of every operator that ran: its latest backend, with the reason where a faster one wasn't taken."""
    return {op: f"{backend} ({why})" if why else backend for (op, backend), why in _said.items()}


def availability(device: Union[str, torch.device] = "cpu") -> Dict[Backend, str]:
    """Of every backend: why it can't run on a device, empty where it can. Operators in other dtypes than fp32, or
    without that backend, may still take another one: :func:`report` has what ran.
    """
    sample = torch.empty(0, device=device)
    return {backend: _obstacle(backend, sample) for backend in get_args(Backend)}


def _obstacle(backend: Backend, tensor: torch.Tensor) -> str:
    """Why a backend can't run; empty where it can."""
    if backend == "flash" and tensor.is_cuda and tensor.dtype not in (torch.float16, torch.bfloat16):
        return "torch's flash attention takes fp16 and bf16 on CUDA"
    if backend == "triton":
        if not has_triton():
            return "triton is not installed"
        if tensor.device.type != "cuda" and not interpreting():
            return "Triton needs a CUDA device, or TRITON_INTERPRET=1"
    if backend == "native":
        from . import _native

        missing = _native.obstacle(tensor.device)
        if missing:
            return missing
        if tensor.dtype not in (CUDA_DTYPES if tensor.is_cuda else NATIVE_DTYPES):
            return f"the compiled operators take no {str(tensor.dtype).removeprefix('torch.')}"
    return ""


def _say(op: str, backend: Backend, why: str) -> Backend:
    key = (op, backend)
    if key not in _said:
        _log.info("%s: %s%s", op, backend, f" ({why})" if why else "")
    else:
        del _said[key]  # moves it to the end: the report shows the latest
    _said[key] = why
    return backend


@lru_cache(maxsize=512)
def _hyper(values: Tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # kept for later calls, which may need it in their backward pass
        return torch.tensor(values, dtype=dtype, device=device)


def hyper(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Hyper-parameters as a small device tensor, kept by value: a schedule costs a small copy, never a compilation."""
    if torch.compiler.is_compiling():  # where a cache of tensors would hold ones that don't exist yet
        return torch.tensor(list(values), dtype=dtype, device=device)
    return _hyper(tuple(float(v) for v in values), dtype, device)


def scalar(value: float, dtype: torch.dtype, device: Optional[torch.device] = None) -> torch.Tensor:
    """A number as a 0-d tensor, on the CPU or a device: what operators take for a number that changes between calls.

    torch.compile compiles a graph for every value of a float that an operator takes, and that `torch.full` takes.
    """
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device=device or "cpu") * value
    return torch.full((), value, dtype=dtype, device=device or "cpu")


def no_forward_mode(name: str, *tensors: Optional[torch.Tensor]) -> None:
    """Refuse tensors that carry a tangent: an operator without a forward derivative drops it in silence."""
    if torch.compiler.is_compiling() or getattr(forward_ad, "_current_level", 0) < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(f"{name} has no forward-mode derivative; backward() and torch.autograd.grad() work")


def no_double_backward(op: Any, name: str) -> None:
    """Make a backward operator refuse to be differentiated, instead of returning zeros in silence."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name} has no second derivative: its gradient can't be differentiated again")

    op.register_autograd(refuse)


__all__ = [
    "ENVIRONMENT",
    "Backend",
    "availability",
    "choose",
    "has_triton",
    "hyper",
    "interpreting",
    "no_double_backward",
    "no_forward_mode",
    "report",
    "scalar",
    "use_backend",
]
