"""loss_spec: which member of the loss family, and its hyper-parameters.

The loss is a sum over the tokens of B sequences; m is the mask, n_i the unmasked tokens of sequence i, A the advantage,
r = exp(logp - old) the token's ratio, s = exp(mean_t (logp - old)) the sequence's:
    loss = sum_t W_t (nu_t L_t + beta k_t KL_t - entropy_coef H_t),   W_t = m_t token_weight_t w(reduction)
nu_t is the rollout correction (a constant), k_t the KL weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Dict, Optional, Tuple

import torch

from ._checks import bad, one_of

POLICIES: Tuple[str, ...] = (
    "clip",
    "cispo",
    "sapo",
    "gspo",
    "gspo_token",
    "gmpo",
    "luspo",
    "reinforce",
    "reg",
)
REDUCTIONS: Tuple[str, ...] = ("grpo", "bnpo", "dapo", "dr_grpo", "seq_sum", "seq_sum_norm", "sum")
KLS: Tuple[str, ...] = ("none", "k1", "abs", "k2", "k3", "k1+", "k3+")
KL_WEIGHTS: Tuple[str, ...] = ("none", "token", "sequence")
CORRECTIONS: Tuple[str, ...] = ("none", "tis", "mis", "icepop", "reject")
CORRECTION_LEVELS: Tuple[str, ...] = ("token", "sequence", "geometric")
SEQUENCE_POLICIES: Tuple[str, ...] = ("gspo", "luspo", "gmpo")
"""Policies whose gradient is shared by the tokens of a sequence."""


@dataclass(frozen=True)
class LossSpec:
    """A loss; hyper-parameters are runtime values, so that changing one never compiles anything.

    Args:
        policy: L_t is
            "clip": -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), the first r at most ``delta`` where it is given
                (GRPO, DAPO's clip-higher; for delta > 1 + clip_high this is the dual clip with c = delta);
            "cispo": -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logp (clip_low = 1: no lower bound);
            "sapo": -(4 / tau) sigmoid(tau (r - 1)) A, tau = tau_pos for A > 0, else tau_neg;
            "gspo": as "clip" with s in place of r; its gradient is shared by the tokens of the sequence;
            "gspo_token": the value of "gspo", its gradient taken by each token on its own;
            "luspo": n_i times "gspo" (with reduction "grpo": the sum over the sequence's tokens, mean over sequences);
            "gmpo": -A exp(mean_t d_t), d_t the log-ratio, at most clip_high where A > 0 and at least -clip_low where A
                < 0 (bounds of the logarithm);
            "reinforce": -A logp;
            "reg": (A_i - z_i)^2, z_i = (rho_i - mean) / (std + reg_eps) over the group, rho_i = sum_t (logp - old),
                std with n - 1: Reg-GRPO as the text of DeepVideo-R1 has it (arXiv 2506.07464; no clipping, beta KL
                added; with reduction "grpo" the mean over responses). The text doesn't say how std = 0 is treated:
                reg_eps is ours. Where all rho of a group are equal, as they are before the first update, the derivative
                of std is taken as 0, and the gradient is of the size of 1 / reg_eps: clip it, or choose reg_eps larger.
        reduction: w is "grpo" 1 / (B n_i), "bnpo" 1 / sum m, "dapo" 1 / normalizer, "dr_grpo" 1 / (B normalizer),
            "seq_sum" 1 / (sequences that have tokens), "seq_sum_norm" 1 / normalizer, "sum" 1. A normalizer given to
            "grpo", "bnpo" or "seq_sum" replaces B, sum m or the number of sequences (those of the whole step where
            this call holds a part of it).
        log_ratio_clamp: the log-ratio is clamped to +-this; no gradient beyond. Of "gspo", "gspo_token" and "luspo" it
            clamps the mean log-ratio.
        kl: with u = ref - logp: "k1" -u, "abs" |u|, "k2" u^2 / 2, "k3" exp(u) - u - 1; "k1+" and "k3+" have the value
            of k1 and k3 and the gradient of k2.
        kl_weight: "token": times r, "sequence": times s, both with their gradient (the estimate is then unbiased
            under the old policy).
        kl_clamp_in, kl_clamp_out: u and KL are clamped to +-this; no gradient beyond, except for "k1+" and "k3+".
        correction: with rho = exp(old - rollout): "tis" min(rho, correction_high), "mis" and "icepop" rho where
            correction_low <= rho <= correction_high, else 0, "reject" 1 there, else 0.
        correction_level: rho of the "token", of the "sequence" (product) or its "geometric" mean.
        entropy_coef: weight of the entropy bonus.
        gate_delta: the policy term of a sequence counts only where A >= 0 or mean_t (rollout - logp) <= this (the old
            policy's log-probs where no rollout's are given); a constant.

    Raises:
        KernelInputError: an unknown name or a value out of its range.
    """

    policy: str = "clip"
    reduction: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: Optional[float] = None
    log_ratio_clamp: Optional[float] = None
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    kl: str = "none"
    kl_weight: str = "none"
    beta: float = 0.0
    kl_clamp_in: Optional[float] = None
    kl_clamp_out: Optional[float] = None
    correction: str = "none"
    correction_level: str = "token"
    correction_low: float = 0.0
    correction_high: float = 2.0
    entropy_coef: float = 0.0
    reg_eps: float = 1e-6
    gate_delta: Optional[float] = None

    def __post_init__(self) -> None:
        one_of("policy", self.policy, POLICIES)
        one_of("reduction", self.reduction, REDUCTIONS)
        one_of("kl", self.kl, KLS)
        one_of("kl_weight", self.kl_weight, KL_WEIGHTS)
        one_of("correction", self.correction, CORRECTIONS)
        one_of("correction_level", self.correction_level, CORRECTION_LEVELS)
        if self.correction == "icepop" and self.correction_level != "token":
            raise bad("correction_level", repr(self.correction_level), "'token' with correction 'icepop'")
        if self.kl == "none" and (self.kl_weight != "none" or self.beta != 0):
            raise bad("kl", "'none' with a KL weight or beta", "a KL, or kl_weight 'none' and beta 0")
        for name in _NUMBERS:
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) or hasattr(value, "__float__")) and (
                value is not None or name not in _OPTIONAL
            ):
                raise bad(name, repr(value), "a number or None" if name in _OPTIONAL else "a number")
        for name in ("beta", "entropy_coef", "correction_low", "gate_delta"):
            value = getattr(self, name)
            if value is not None and not -math.inf < value < math.inf:
                raise bad(name, value, "a finite number")
        for name in ("delta", "log_ratio_clamp", "kl_clamp_in", "kl_clamp_out", "tau_pos", "tau_neg", "reg_eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise bad(name, value, "a finite number above 0")
        if not self.clip_low >= 0:
            raise bad("clip_low", self.clip_low, "a number of at least 0")
        if not self.clip_high >= -self.clip_low or self.clip_high <= -1:
            raise bad("clip_high", self.clip_high, f"a number of at least {-min(self.clip_low, 1.0)}")
        if not self.correction_high >= self.correction_low:
            raise bad("correction_high", self.correction_high, f"at least correction_low, {self.correction_low}")
        values = (getattr(self, name) for name in _NUMBERS)
        numbers = torch.tensor([math.nan if v is None else float(v) for v in values], dtype=torch.float64, device="cpu")
        object.__setattr__(self, "_numbers", numbers)
        if self.delta is not None and self.policy not in ("clip", "gspo", "gspo_token", "luspo"):
            raise bad("delta", f"{self.delta} with policy {self.policy!r}", "None: this policy has no such bound")

    @property
    def names(self) -> str:
        """All names in a row: what an operator takes, with `numbers`; `unpack` undoes it."""
        return " ".join(getattr(self, name) for name in _NAMES)

    @property
    def numbers(self) -> torch.Tensor:
        """All numbers, fp64 on the CPU, NaN for None. A tensor, which torch.compile traces whatever its values."""
        return self._numbers  # type: ignore[attr-defined, no-any-return]

    @classmethod
    def unpack(cls, names: str, numbers: torch.Tensor) -> LossSpec:
        """The spec of some ``names`` and ``numbers``."""
        values: Dict[str, Any] = dict(zip(_NAMES, names.split(" "), strict=True))
        for name, value in zip(_NUMBERS, numbers.tolist(), strict=True):
            values[name] = None if math.isnan(value) else value
        return cls(**values)


_NAMES = tuple(f.name for f in fields(LossSpec) if isinstance(f.default, str))
_NUMBERS = tuple(f.name for f in fields(LossSpec) if not isinstance(f.default, str))
_OPTIONAL = tuple(f.name for f in fields(LossSpec) if f.default is None)


__all__ = ["CORRECTIONS", "CORRECTION_LEVELS", "KLS", "KL_WEIGHTS", "POLICIES", "REDUCTIONS", "LossSpec"]
