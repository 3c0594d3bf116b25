"""Liger-Kernel: its Triton kernel on logits, and the chunked loss on hidden states; both take [B, T, ...]."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from bench.problem import SPECS, Problem
from bench.providers import Arm, Provider, gradients, leaf, missing, needs_cuda, tf32

_TRITON = "liger_kernel.transformers.grpo_loss"
_CHUNKED = "liger_kernel.chunked_loss"


def providers() -> list[Provider]:
    """The chunked loss goes over a sequence at a time by default; "whole" is all sequences in one of its chunks. It
    multiplies in fp32, which is TF32 only where the caller has asked PyTorch for it.
    """
    found = [
        Provider("Liger Triton", "row", _row, _triton_obstacle),
        Provider("Liger Triton", "linear", _linear, _triton_obstacle),
    ]
    for name, whole, rough in (("", False, False), (" whole", True, False), (" whole TF32", True, True)):
        prepare, obstacle = partial(_chunked, whole=whole, rough=rough), partial(_chunked_obstacle, rough=rough)
        found.append(Provider(f"Liger chunked{name}", "linear", prepare, obstacle, rough=rough))
    return found


def _triton_obstacle(device: torch.device) -> str:
    return missing("liger_kernel", _TRITON) or needs_cuda(device)


def _chunked_obstacle(device: torch.device, rough: bool) -> str:
    return missing("liger_kernel", _CHUNKED) or (needs_cuda(device) if rough else "")


def _options(problem: Problem) -> dict[str, Any]:
    spec = SPECS[problem.cell.loss]
    high = spec.get("clip_high", 0.2)
    cispo = problem.cell.loss == "cispo"
    return {
        "beta": spec.get("beta", 0.0),
        "loss_type": "cispo" if cispo else spec["reduction"],
        "importance_sampling_level": "sequence" if problem.cell.loss == "gspo" else "token",
        "temperature": 1.0,
        "low": 0.2,
        "high": 1.0 + high if cispo else high,  # of CISPO: the bound itself
    }


def _batch(problem: Problem) -> dict[str, Any]:
    """Its arguments beside logits or hidden states, on the device."""
    terms, device = problem.terms, problem.target.device
    return {
        "target": problem.padded(problem.target),
        "mask": problem.padded(torch.ones_like(problem.target)),
        "advantages": problem.advantages.to(device),
        "old": problem.padded(terms.old_logp),
        "ref": problem.padded(terms.ref_logp) if "kl" in SPECS[problem.cell.loss] else None,
    }


def _triton_loss(problem: Problem, batch: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
    options = _options(problem)
    low, high = options.pop("low"), options.pop("high")
    loss: torch.Tensor = importlib.import_module(_TRITON).triton_grpo_loss(
        logits, batch["old"], batch["ref"], batch["target"], batch["advantages"],
        completion_mask=None if problem.full else batch["mask"], eps_low=low, eps_high=high, inplace=True, reduce=True,
        **options,
    )[0]  # fmt: skip
    return loss


def _row(problem: Problem) -> Arm:
    """Its logits have one more position a sequence, whose gradient is 0."""
    source, batch = problem.padded(problem.logits, spare=1), _batch(problem)
    logits = torch.empty_like(source).requires_grad_()

    def collect(found: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        return [found[0], found[1].reshape(-1, problem.cell.vocab)[problem.spaced(1)]]

    return Arm(
        lambda: gradients(_triton_loss(problem, batch, logits), [logits]),
        lambda: logits.detach().copy_(source),
        collect,
    )


def _linear(problem: Problem) -> Arm:
    """After a matrix product that makes the logits."""
    batch, hidden = _batch(problem), leaf(problem.padded(problem.hidden, spare=1))
    weight = leaf(problem.weight, trains=not problem.cell.frozen)
    variables = [x for x in (hidden, weight) if x.requires_grad]

    def step() -> tuple[torch.Tensor, ...]:
        return gradients(_triton_loss(problem, batch, linear(hidden, weight)), variables)

    return Arm(step, collect=partial(_flat, problem, spare=1))


def _chunked(problem: Problem, whole: bool, rough: bool) -> Arm:
    batch, hidden = _batch(problem), leaf(problem.padded(problem.hidden))
    weight = leaf(problem.weight, trains=not problem.cell.frozen)
    variables = [x for x in (hidden, weight) if x.requires_grad]
    options = _options(problem)
    loss = importlib.import_module(_CHUNKED).LigerFusedLinearGRPOLoss(
        epsilon_low=options.pop("low"),
        epsilon_high=options.pop("high"),
        use_ref_model=batch["ref"] is not None,
        chunk_size=problem.sequences if whole else 1,
        **options,
    )

    def step() -> tuple[torch.Tensor, ...]:
        with tf32(rough):
            found = loss(
                hidden, weight, batch["target"], batch["mask"], batch["advantages"],
                ref_per_token_logps=batch["ref"], old_per_token_logps=batch["old"],
            )[0]  # fmt: skip
            return gradients(found, variables)

    return Arm(step, collect=partial(_flat, problem, spare=0))


def _flat(problem: Problem, found: tuple[torch.Tensor, ...], spare: int) -> list[torch.Tensor]:
    loss, hidden, *rest = found
    return [loss, hidden.reshape(-1, hidden.shape[-1])[problem.spaced(spare)], *rest]
