"""verl: its fused linear cross-entropy with entropy; the loss from log-probs is PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from bench.problem import Problem, flat_loss
from bench.providers import Arm, Provider, gradients, head, needs_cuda

_MODULE = "verl.utils.kernel.linear_cross_entropy"


def providers() -> list[Provider]:
    return [Provider("verl", "linear", _linear, _obstacle)]


def _obstacle(device: torch.device) -> str:
    if importlib.util.find_spec("verl") is None:
        return "not installed"
    return needs_cuda(device)


def _linear(problem: Problem) -> Arm:
    function = _kernels().linear_cross_entropy
    hidden, weight, variables = head(problem)

    def step() -> tuple[torch.Tensor, ...]:
        logp, _ = function(hidden, weight, problem.target, 1.0, "none")
        return gradients(flat_loss(logp, problem.terms, problem.cell.loss), variables)

    return Arm(step)


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """verl's module of kernels. Importing verl itself takes Ray and more; where they aren't installed the module is
    loaded from verl's folder beneath empty packages, with a stand-in for what it asks of the device.
    """
    try:
        return importlib.import_module(_MODULE)
    except ImportError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
            del sys.modules[name]
    spec = importlib.util.find_spec("verl")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for name, below in (("verl", ""), ("verl.utils", "/utils")):
        package = ModuleType(name)
        package.__path__ = [f"{folder}{below}" for folder in folders]
        sys.modules[name] = package
    device: Any = ModuleType("verl.utils.device")
    device.is_cuda_available = torch.cuda.is_available()
    device.get_device_capability = torch.cuda.get_device_capability
    device.get_device_name = lambda: "cuda"
    device.get_torch_device = lambda: torch.cuda
    sys.modules["verl.utils.device"] = device
    return importlib.import_module(_MODULE)
