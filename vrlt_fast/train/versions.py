"""Versions of what a run uses."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vrlt_fast.config import Config
from vrlt_fast.model.load import pick_device


def versions(config: Config) -> dict[str, str]:
    """Versions and machine, for versions.json."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "device": _device_name(config)}
    for name in ("vrlt-fast", "torch", "triton", "transformers", "peft", "safetensors", "av"):
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:
            found[name.replace("-", "_")] = "not installed"
    found["git"] = _git()
    return found


def _device_name(config: Config) -> str:
    if pick_device(config.model.device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def _git() -> str:
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
