"""PyTorch as it comes: two ways to write the log-probs, and what torch.compile makes of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch.nn.functional import linear

from bench.problem import Problem, Terms, flat_loss
from bench.providers import Arm, Provider, gradients, head

Logp = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def log_softmax(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """fp32 log-probs [N]; what comes in half precision is widened on the way."""
    return torch.log_softmax(logits, 1, dtype=torch.float32).gather(1, target[:, None])[:, 0]


def logsumexp(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The same as the target's logit minus the logsumexp, which makes one tensor of the logits' size less."""
    wide = logits.float()
    return wide.gather(1, target[:, None])[:, 0] - wide.logsumexp(1)


def providers() -> list[Provider]:
    found: list[Provider] = []
    for stage in ("row", "linear"):
        found += [
            Provider(f"eager {logp.__name__}", stage, partial(_arm, logp=logp, function=_loss))
            for logp in (log_softmax, logsumexp)
        ]
        found.append(Provider("torch.compile", stage, _compiled_arm, _compile_obstacle))
    return found


def _loss(
    logp: Logp, rows: torch.Tensor, weight: torch.Tensor | None, target: torch.Tensor, terms: Terms, loss: str
) -> torch.Tensor:
    logits = rows if weight is None else linear(rows, weight)
    return flat_loss(logp(logits, target), terms, loss)


def _arm(problem: Problem, logp: Logp, function: Callable[..., torch.Tensor]) -> Arm:
    if problem.cell.stage == "linear":
        hidden, weight, variables = head(problem)

        def step() -> tuple[torch.Tensor, ...]:
            loss = function(logp, hidden, weight, problem.target, problem.terms, problem.cell.loss)
            return gradients(loss, variables)

        return Arm(step)
    logits = problem.logits.detach().requires_grad_()
    return Arm(
        lambda: gradients(function(logp, logits, None, problem.target, problem.terms, problem.cell.loss), [logits])
    )


def _compiled_arm(problem: Problem) -> Arm:
    return _arm(problem, log_softmax, _compiled())


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., torch.Tensor]:
    # Or lengths seen by earlier runs would make this one's graph dynamic, and slower.
    torch._dynamo.config.automatic_dynamic_local_pgo = False
    return torch.compile(_loss)


def _compile_obstacle(device: torch.device) -> str:
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        return "needs a C++ compiler"
    return ""
