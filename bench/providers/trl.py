"""TRL: its kernel on logits, and its fused head; the loss from log-probs is PyTorch, as in its trainer."""

from __future__ import annotations

import contextlib
import importlib
import sys
from functools import lru_cache
from types import ModuleType

import torch

from bench.problem import Problem, flat_loss
from bench.providers import Arm, Provider, gradients, head, missing, needs_cuda

_ROW, _HEAD, _UTILS = "trl.kernels.logprob_entropy", "trl.kernels.chunked_logprob", "trl.trainer.utils"
_CHUNK = 32768  # columns, TRL's own default


def providers() -> list[Provider]:
    return [
        Provider("TRL", "row", _row, lambda device: missing("trl", _ROW) or needs_cuda(device)),
        Provider("TRL", "linear", _linear, lambda device: missing("trl", _HEAD)),
    ]


def _row(problem: Problem) -> Arm:
    function = importlib.import_module(_ROW).selective_log_softmax_and_entropy
    logits = problem.logits.detach().requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        logp, _ = function(logits, problem.target)
        return gradients(flat_loss(logp, problem.terms, problem.cell.loss), [logits])

    return Arm(step)


def _linear(problem: Problem) -> Arm:
    _trainer_utils()
    function = importlib.import_module(_HEAD).ChunkedLogProbFunction.apply
    hidden, weight, variables = head(problem)

    def step() -> tuple[torch.Tensor, ...]:
        logp = function(hidden, weight, None, problem.target, 1.0, _CHUNK, None, 1.0, ("entropy",))[0]
        return gradients(flat_loss(logp, problem.terms, problem.cell.loss), variables)

    return Arm(step)


@lru_cache(maxsize=1)
def _trainer_utils() -> None:
    """The backward pass takes from there what gathers DeepSpeed's shards; the module needs packages (accelerate,
    datasets) that a machine with nothing but kernels doesn't have, and then a stand-in that gathers nothing will do.
    """
    if missing("trl", _UTILS):
        stand_in = ModuleType(_UTILS)
        stand_in.maybe_gather_lm_head_ctx = lambda *parameters: contextlib.nullcontext()  # type: ignore[attr-defined]
        sys.modules[_UTILS] = stand_in
