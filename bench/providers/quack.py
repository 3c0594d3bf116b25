"""QuACK's cross-entropy, one read and one write of the logits: how fast the hardware lets a policy loss be."""

from __future__ import annotations

import importlib

import torch

from bench.problem import Problem
from bench.providers import Arm, Provider, gradients, head, missing, needs_cuda


def providers() -> list[Provider]:
    return [
        Provider("QuACK cross-entropy", stage, prepare, _obstacle, cross_entropy=True)
        for stage, prepare in (("row", _row), ("linear", _linear))
    ]


def _obstacle(device: torch.device) -> str:
    return missing("quack", "quack.cross_entropy", "quack.linear_cross_entropy") or needs_cuda(device)


def _row(problem: Problem) -> Arm:
    function = importlib.import_module("quack.cross_entropy").cross_entropy_fwd
    logits = torch.empty_like(problem.logits)

    def step() -> tuple[torch.Tensor, ...]:
        loss, gradient = function(logits, problem.target, return_dx=True, inplace_backward=True)
        return loss.sum(), gradient

    return Arm(step, lambda: logits.copy_(problem.logits))


def _linear(problem: Problem) -> Arm:
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    hidden, weight, variables = head(problem)
    return Arm(lambda: gradients(function(hidden, weight, problem.target, reduction="sum"), variables))
