"""AdamW over the trainable parameters, learning-rate schedules, and the guarded optimizer step."""

from __future__ import annotations

import math

import torch

from vrlt_fast.config import OptimConfig
from vrlt_fast.errors import Problem, Stopped
from vrlt_fast.model.load import VideoLM


def named_trainable(lm: VideoLM) -> list[tuple[str, torch.nn.Parameter]]:
    """Trainable parameters by name, in module order."""
    return [(name, p) for name, p in lm.module.named_parameters() if p.requires_grad]


def make_optimizer(lm: VideoLM, optim: OptimConfig, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    params = named_trainable(lm)
    groups = [
        {"params": [p for _, p in params if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for _, p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=optim.betas, foreach=True)


def cosine_lr(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then cosine to a tenth of the peak. ``step`` counts from 1."""
    if step <= warmup:
        return peak * step / max(warmup, 1)
    share = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.1 + 0.45 * (1.0 + math.cos(math.pi * min(share, 1.0))))


def constant_lr(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then constant. ``step`` counts from 1."""
    return peak * min(step / max(warmup, 1), 1.0)


def apply_step(lm: VideoLM, optimizer: torch.optim.Optimizer, loss: float, lr: float, grad_clip: float) -> float:
    """Clip the gradient, step, clear. Returns the gradient norm before clipping.

    Raises:
        Stopped: S01 when loss or norm is not finite; weights and optimizer are as before the step.
    """
    params = [p for _, p in named_trainable(lm)]
    norm = float(torch.nn.utils.clip_grad_norm_(params, grad_clip))
    if not (math.isfinite(norm) and math.isfinite(loss)):
        optimizer.zero_grad(set_to_none=True)
        raise Stopped(
            Problem(
                "VRLT-S01",
                f"loss {loss} with gradient norm {norm}",
                why="the weights are those of the step before",
                fix="start a new run with a lower learning rate, with --model.name at this run's newest checkpoint",
            )
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
