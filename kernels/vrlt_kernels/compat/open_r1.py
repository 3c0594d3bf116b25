"""What open-r1 trains with: the GRPO trainer of TRL 0.18.0, the version that it pins.

Its one function of logits is `selective_log_softmax`, without temperature or mask. Ours returns fp32 for bf16 logits,
where TRL 0.18's log-probs are bf16 (steps of 0.06 at a log-prob of -10).
"""

from __future__ import annotations

import sys

import torch

from . import trl
from ._patch import Handle, replace

VERSIONS = ("0.18.0",)


def selective_log_softmax(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`trl.trainer.utils.selective_log_softmax` of TRL 0.18: log-probs of ``index`` [...], of logits [..., V]."""
    return trl.selective_log_softmax(logits, index)


def apply(target: object) -> Handle:
    """Put the function into the TRL that open-r1 uses; before or after a trainer is made.

    Args:
        target: the imported `open_r1` or `trl`, a module or a trainer of either.

    Raises:
        KernelInputError: another TRL than 0.18.0 (for 1.16 there is `compat.trl.apply`), or it's replaced already.
    """
    name = getattr(target, "__name__", type(target).__module__)
    if name.partition(".")[0] == "open_r1" and "trl" in sys.modules:
        target = sys.modules["trl"]
    return replace(target, "trl", VERSIONS, {"trl.trainer.utils": {"selective_log_softmax": selective_log_softmax}})


__all__ = ["apply", "selective_log_softmax"]
