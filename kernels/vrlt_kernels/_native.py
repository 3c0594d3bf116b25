"""The compiled operators of csrc/, `torch.ops.vrlt_native.*`, where they were built.

z = logits * inv_temperature, p = softmax(z), N rows, V columns; logits [N, V], inv_temperature [1] or [N], others [N]:
    row_stats(logits, target, inv_temperature, want_p2) -> logp, entropy, lse, sum_p2 (which is [0] if not wanted)
    row_grad_(out, logits, target, inv_temperature, lse, entropy, a, e)
        out = inv_temperature * (a (onehot - p) - e p (log p + entropy)); out may be the logits
    row_fused_(logits, target, inv_temperature) -> logp, entropy, lse; leaves onehot - p in the logits
    patchify_plan(low, end, weights, precision, source, vertical, level) -> the weights of an axis, for patchify_
    patchify_(out, frames, uv, slots, across, down, height, width, patch, merge, tubelet, rotation, factors, mean_std)
        frames to their slots of out, see patchify.py; CPU only; uv and mean_std may be empty; across, down: plans
    group_decode, decode_layer, decode_head, linear_rows: CPU only; see group_decode.py and decode_layer.py
    group_attention, group_attention_backward, chunk_attention: CPU only; see group_attention.py
    rms_norm, swiglu and their backward operators: CPU only; see layers.py
Of the row operators: rows must be contiguous, with any stride between them. Logits are fp32, fp64 or bf16 on the CPU;
where the library was built for CUDA, fp32, fp16 or bf16 on devices of compute capability 9.0 and later. Results are
fp32, for fp64 logits fp64. A row of -inf only has logp = lse = -inf, entropy 0, gradient 0; a = e = 0 gives zeros
whatever the logits hold.
Where lse is so large that rounding took digits from it, row_grad_ restores them from the row, if it is the row's own:
lse may be of more than the row (a vocabulary in shards).
Wrong arguments raise RuntimeError. A target outside the vocabulary raises on the CPU; on CUDA, where the check would
have to wait for the device, its logp is NaN.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Iterator, Optional, Tuple

import torch

MAX_DIM = 256  # of a head, in the attention operators
_SCHEMA_VERSION = 5  # of csrc/binding.cpp
_PACKAGE = Path(__file__).resolve().parent
_SOURCE = _PACKAGE.parent.parent  # of a checkout: csrc/ and setup.py are there
_lock = threading.Lock()
_outcome: Optional[str] = None  # why there is no library; "" once it is loaded; None before the first try


def available() -> bool:
    """Whether the operators are there. The first call loads the library; the outcome stays."""
    return _load() == ""


def reason() -> str:
    """Why the operators are not there; empty where they are."""
    return _load()


def obstacle(device: torch.device) -> str:
    """Why the operators can't run on a device; empty where they can."""
    if not available() or device.type == "cpu":
        return reason()
    if device.type != "cuda":
        return "the compiled operators run on CPUs and CUDA devices"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("vrlt_native::row_fused_", "CUDA"):
        return "the compiled operators were built without CUDA (see docs/csrc.md)"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "the compiled operators need compute capability 9.0 (Hopper)"
    return ""


def build(folder: Optional[str] = None) -> Path:
    """Compile csrc/ of a source checkout into ``folder`` (a cache folder of the user by default) and load the result.

    Later processes find it in the default folder by the contents of csrc/. Returns the path of the library.

    Raises:
        RuntimeError: no sources, the compiler's message, or another build is loaded already.
    """
    global _outcome
    if not (_SOURCE / "csrc").is_dir():
        raise RuntimeError(f"there is no csrc/ next to {_PACKAGE}: an installed package can't build its operators")
    target = Path(folder).expanduser().resolve() if folder else _cache()
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(target), "--build-temp", str(target / "objects")]
    environment = {**os.environ, "VRLT_NATIVE": "1"}
    done = subprocess.run(command, cwd=_SOURCE, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"csrc/ doesn't build:\n{done.stderr}")
    library = next(iter(sorted((target / "vrlt_kernels").glob("_C*.so"))))
    with _lock:
        if _registered():
            raise RuntimeError(f"{library} is built, but this process has loaded the operators already: start another")
        _outcome = _load_file(library)
        if _outcome:
            raise RuntimeError(_outcome)
    return library


def _registered() -> bool:
    """A second library would abort the process; another copy of this package may have loaded one."""
    return hasattr(torch.ops.vrlt_native, "schema_version")


def _cache() -> Path:
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted((_SOURCE / "csrc").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "vrlt_kernels" / digest.hexdigest()[:16]


def _candidates() -> Iterator[Path]:
    yield from sorted(_PACKAGE.glob("_C*.so"))
    if (_SOURCE / "csrc").is_dir():
        yield from sorted((_cache() / "vrlt_kernels").glob("_C*.so"))


def _load() -> str:
    global _outcome
    if _outcome is None:
        with _lock:
            if _outcome is None:
                _outcome = _try_all()
    return _outcome


def _try_all() -> str:
    why = "the compiled operators are not built (they need a C++ compiler at installation; see docs/csrc.md)"
    if _registered():
        return _mismatch("the library that another copy of this package loaded")
    for library in _candidates():
        why = _load_file(library)
        if not why or _registered():
            break
    return why


def _load_file(library: Path) -> str:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library} can't be loaded: {error}"
    why = _mismatch(str(library)) if _registered() else f"{library} holds no operators"
    if not why:
        _register_fakes()
    return why


def _mismatch(library: str) -> str:
    version = torch.ops.vrlt_native.schema_version()
    if version == _SCHEMA_VERSION:
        return ""
    return f"{library} was built from other sources (schema {version}, needs {_SCHEMA_VERSION}): build it again"


def _rows(logits: torch.Tensor, count: int) -> Tuple[torch.Tensor, ...]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(count))


def _register_fakes() -> None:
    """Shapes for torch.compile. The operators know no autograd: those that call them do."""

    def row_stats(
        logits: torch.Tensor, target: torch.Tensor, inv_temperature: torch.Tensor, want_p2: bool
    ) -> Tuple[torch.Tensor, ...]:
        results = _rows(logits, 4)
        return results if want_p2 else (*results[:3], results[3].new_empty(0))

    def row_grad_(out: torch.Tensor, *rest: torch.Tensor) -> None:
        return None

    def row_fused_(
        logits: torch.Tensor, target: torch.Tensor, inv_temperature: torch.Tensor
    ) -> Tuple[torch.Tensor, ...]:
        return _rows(logits, 3)

    def patchify_plan(low: torch.Tensor, *rest: object) -> torch.Tensor:
        raise RuntimeError("the size of a plan depends on the machine: make it outside of the traced code")

    def patchify_(out: torch.Tensor, *rest: object) -> None:
        return None

    for fake in (row_stats, row_grad_, row_fused_, patchify_plan, patchify_):
        torch.library.register_fake(f"vrlt_native::{fake.__name__}", fake)


__all__ = ["available", "build", "obstacle", "reason"]
