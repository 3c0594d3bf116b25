"""Whose kernels are measured: every provider makes one arm of a cell, or says why it can't run here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from bench.problem import Problem


@dataclass(frozen=True)
class Arm:
    """What is timed is ``step``, forward and backward; ``setup`` comes before each and isn't timed.

    ``collect`` turns what ``step`` returned into the loss and the gradients of `bench.problem.truth`.
    """

    step: Callable[[], Any]
    setup: Callable[[], Any] = lambda: None
    collect: Callable[[Any], Sequence[torch.Tensor]] = list


@dataclass(frozen=True)
class Provider:
    """Makes arms of one stage.

    Args:
        name: the arm's name in the records.
        prepare: the arm of a problem.
        obstacle: why it can't run on this device, or is not installed; empty where it can.
        cross_entropy: it computes the sum of -log p instead of a policy loss: the line nobody can beat by much.
        rough: its fp32 products may be TF32.
    """

    name: str
    stage: str
    prepare: Callable[[Problem], Arm]
    obstacle: Callable[[torch.device], str] = lambda device: ""
    cross_entropy: bool = False
    rough: bool = False


def all_providers() -> list[Provider]:
    """Of both stages; ours first."""
    found: list[Provider] = []
    for name in ("ours", "eager", "liger", "trl", "verl", "quack"):
        found += importlib.import_module(f"bench.providers.{name}").providers()
    return found


def missing(package: str, *modules: str) -> str:
    """Why these modules of a package can't be used; empty where they can. Imports them."""
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == package.partition(".")[0]:
            return "not installed"
        return f"can't be imported: {error}"
    except Exception as error:
        return f"can't be imported: {type(error).__name__}: {error}"
    return ""


def needs_cuda(device: torch.device) -> str:
    return "" if device.type == "cuda" else "needs a CUDA device"


def leaf(x: torch.Tensor, *, trains: bool = True) -> torch.Tensor:
    """The same tensor as a variable of its own."""
    return x.detach().requires_grad_(trains)


def head(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Hidden states and weight as variables, and those of them that a gradient is taken of."""
    hidden, weight = leaf(problem.hidden), leaf(problem.weight, trains=not problem.cell.frozen)
    return hidden, weight, [x for x in (hidden, weight) if x.requires_grad]


def gradients(loss: torch.Tensor, variables: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The loss and its gradients, as `torch.autograd.grad` gives them: no copy into .grad."""
    return (loss.detach(), *torch.autograd.grad(loss, variables))


def tf32(on: bool) -> AbstractContextManager[None]:
    """Products of fp32 matrices on CUDA in TF32 inside the block."""
    return _Tf32() if on else nullcontext()


class _Tf32:
    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True

    def __exit__(self, *exc: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._before
