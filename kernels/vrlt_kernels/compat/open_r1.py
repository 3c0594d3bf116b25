"""What open-r1 trains with: the GRPO trainer of TRL 0.18.0, the version that it pins.

Its one function of logits is `selective_log_softmax`, without temperature or mask; the log-probs have the dtype of the
logits, on every device.
"""

from __future__ import annotations

import sys

import torch

from .._checks import bad, describe
from ._patch import Handle, replace
from ._rows import in_half, logprob_of

VERSIONS = ("0.18.0",)


def selective_log_softmax(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`trl.trainer.utils.selective_log_softmax` of TRL 0.18: log-probs of ``index`` [...], of logits [..., V]."""
    if index.shape != logits.shape[:-1]:
        raise bad("index", describe(index), f"the shape {list(logits.shape[:-1])} of the rows of the logits")
    logp = logprob_of(logits, index, name="index").logp
    return in_half(logits, logp, labels=index)[0] if logits.dtype in (torch.float16, torch.bfloat16) else logp


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
