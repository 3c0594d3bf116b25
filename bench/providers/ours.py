"""vrlt_kernels, on the backend that they choose and on every other one that runs on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bench.cells import OURS
from bench.problem import SPECS, Problem
from bench.providers import Arm, Provider, gradients, head
from vrlt_kernels import LossSpec, _launch, grpo_loss, linear_grpo_loss, policy_coef, use_backend
from vrlt_kernels._rows import inverse_of, row_fused_

BACKENDS: Sequence[_launch.Backend] = ("triton", "native", "reference")


def providers() -> list[Provider]:
    """Stages: `grpo_loss` in place, and `linear_grpo_loss`. "deferred" is the row stage inside the latter: one read of
    the logits and one write of onehot - p, and the coefficients a of the rows, which scale the hidden states later.
    """
    found = []
    for stage, name, make in (("row", OURS, _row), ("row", f"{OURS} deferred", _deferred), ("linear", OURS, _linear)):
        found.append(Provider(name, stage, partial(make, backend=None)))
        found += [_forced(f"{name} ({backend})", stage, make, backend) for backend in BACKENDS]
    return found


def _forced(name: str, stage: str, make: Callable[..., Arm], backend: _launch.Backend) -> Provider:
    return Provider(name, stage, partial(make, backend=backend), lambda device: _obstacle(backend, device))


def _obstacle(backend: _launch.Backend, device: torch.device) -> str:
    fast: _launch.Backend = "triton" if device.type == "cuda" else "native"
    reason = _launch._obstacle(backend, torch.empty(0, device=device))
    if backend == fast and not reason:
        return f"it is what {OURS!r} takes here"
    if backend == "reference" and _launch._obstacle(fast, torch.empty(0, device=device)):
        return f"it is what {OURS!r} takes here"
    return reason


def _inputs(problem: Problem) -> dict[str, Any]:
    inputs: dict[str, Any] = {"advantages": problem.advantages, "old_logp": problem.terms.old_logp}
    spec = SPECS[problem.cell.loss]
    if "kl" in spec:
        inputs["ref_logp"] = problem.terms.ref_logp
    if spec["reduction"] == "dapo":
        inputs["normalizer"] = float(len(problem.target))
    return inputs


def _linear(problem: Problem, backend: _launch.Backend | None) -> Arm:
    hidden, weight, variables = head(problem)
    spec, inputs = LossSpec(**SPECS[problem.cell.loss]), _inputs(problem)

    def step() -> tuple[torch.Tensor, ...]:
        with use_backend(backend):
            out = linear_grpo_loss(hidden, weight, problem.target, problem.cu_seqlens, spec, **inputs)
            return gradients(out.loss, variables)

    return Arm(step)


def _row(problem: Problem, backend: _launch.Backend | None) -> Arm:
    logits = torch.empty_like(problem.logits).requires_grad_()
    spec, inputs = LossSpec(**SPECS[problem.cell.loss]), _on_device(problem)

    def step() -> tuple[torch.Tensor, ...]:
        with use_backend(backend):
            out = grpo_loss(logits, problem.target, spec=spec, inplace=True, **inputs)
            return gradients(out.loss, [logits])

    return Arm(step, lambda: logits.detach().copy_(problem.logits))


def _deferred(problem: Problem, backend: _launch.Backend | None) -> Arm:
    logits = torch.empty_like(problem.logits)
    spec, inputs = LossSpec(**SPECS[problem.cell.loss]), _on_device(problem)
    cu_seqlens = inputs.pop("cu_seqlens")

    def step() -> tuple[torch.Tensor, ...]:
        with use_backend(backend):
            logp, entropy, _ = row_fused_(logits, problem.target, inverse_of(1.0, None, logits))
            out = policy_coef(logp, cu_seqlens, spec, entropy=entropy, **inputs)
            return out.loss.sum(), logits, out.a

    def collect(found: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        loss, rest, a = found
        return [loss, rest.double() * a[:, None].double()]

    return Arm(step, lambda: logits.copy_(problem.logits), collect)


def _on_device(problem: Problem) -> dict[str, Any]:
    """The inputs of an operator that takes all of them on the logits' device."""
    inputs = {**_inputs(problem), "cu_seqlens": problem.cu_seqlens}
    return {k: v.to(problem.target.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
