"""Liger's options in terms of this package: the loss, the normalizer, [B, L] tensors as rows."""

from __future__ import annotations

import math
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch

from .._checks import bad, describe, one_of, tensor
from ..loss_spec import LossSpec
from ..policy_coef import policy_coef

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
Number = Union[int, float, torch.Tensor]
_REDUCTIONS = {"grpo": "grpo", "sapo": "grpo", "bnpo": "bnpo", "dr_grpo": "dr_grpo", "luspo": "dr_grpo"}
_POLICIES = {"cispo": "cispo", "sapo": "sapo", "vespo": "reinforce"}
_LOWEST = math.log(1e-8)  # of VESPO's log-weights


class Vespo(NamedTuple):
    """VESPO's constants, by the sign of the advantage."""

    k_pos: float
    lambda_pos: float
    k_neg: float
    lambda_neg: float


def spec_of(
    loss_type: str,
    level: str,
    *,
    beta: Optional[float],
    clip: Tuple[float, float],
    delta: Optional[float],
    taus: Tuple[float, float],
    weigh_kl: bool,
    clip_names: Tuple[str, str] = ("eps_low", "eps_high"),
) -> LossSpec:
    """The member of the family; ``beta`` None: without KL. ``clip_names`` are what the caller calls the bounds."""
    one_of("loss_type", loss_type, LOSS_TYPES)
    one_of("importance_sampling_level", level, ("token", "sequence"))
    sequence = level == "sequence"
    if loss_type in _POLICIES:
        if sequence:
            raise bad("importance_sampling_level", repr(level), f"'token' with loss_type {loss_type!r}")
        if delta is not None:
            raise bad("delta", delta, f"None with loss_type {loss_type!r}")
    low, high = clip
    if loss_type == "cispo":
        if not _is_number(high) or not high > 0:
            raise bad(clip_names[1], high, "a bound of the ratio above 0 with loss_type 'cispo'")
        low, high = 1.0, high - 1.0
    elif loss_type in ("sapo", "vespo"):
        low = high = 0.0  # not used, so that any value is fine
    else:
        _check_clip(clip, clip_names)
    if loss_type != "sapo":
        taus = (1.0, 1.0)  # the same
    for name, tau in zip(("sapo_temperature_pos", "sapo_temperature_neg"), taus, strict=True):
        if not _is_number(tau) or not 0 < tau < math.inf:
            raise bad(name, tau, "a finite number above 0 with loss_type 'sapo'")
    weight = "none" if beta is None or not weigh_kl else "sequence" if sequence else "token"
    return LossSpec(
        policy=_POLICIES.get(loss_type, "gspo" if sequence else "clip"),
        reduction=_REDUCTIONS.get(loss_type, "dapo"),
        clip_low=low,
        clip_high=high,
        delta=delta,
        tau_pos=taus[0],
        tau_neg=taus[1],
        kl="none" if beta is None else "k3",
        kl_weight=weight,
        beta=beta or 0.0,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat))


def _check_clip(clip: Tuple[float, float], names: Tuple[str, str]) -> None:
    low, high = clip
    if not _is_number(low) or not low >= 0:
        raise bad(names[0], low, "a number of at least 0")
    if not _is_number(high) or not high >= -low or not high > -1:
        raise bad(names[1], high, f"a number of at least {-min(low, 1.0)}, above -1")


def normalizer(
    loss_type: str, mask: torch.Tensor, length: Optional[int], items: Optional[Number]
) -> Union[float, torch.Tensor, None]:
    """What the reduction divides by: a length, a factor, or the tokens of a process, on the device."""
    if loss_type == "dr_grpo":
        if length is None or not length > 0:
            raise bad("max_completion_length", length, "a length above 0 with loss_type 'dr_grpo'")
        return float(length)
    if loss_type == "luspo":  # the sum over a sequence's tokens, mean over sequences
        return 1.0
    if loss_type in _REDUCTIONS:
        return None
    processes = 1
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if together:
        processes = torch.distributed.get_world_size()
    if items is None:
        count = mask.sum(dtype=torch.float32)
        if together:
            torch.distributed.all_reduce(count)
    else:
        count = torch.as_tensor(items, dtype=torch.float32, device=mask.device)
    return (count / processes).clamp(min=1.0)


def _unknown(values: torch.Tensor) -> bool:
    """Whether looking at values would wait for a device, or break a graph."""
    return values.device.type != "cpu" or torch.compiler.is_compiling()


class Layout:
    """[B, L] tensors as rows [B (L + spare)], the spare ones masked: logits needn't be copied to drop a position."""

    def __init__(
        self, mask: Optional[torch.Tensor], name: str, shape: Tuple[int, ...], like: torch.Tensor, *, spare: int
    ) -> None:
        self.shape, self.spare, self.like = shape, spare, like
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=like.device)
        tensor(name, mask, shape=shape, like=like)
        self.mask = mask != 0
        self.wrong: Optional[torch.Tensor] = None  # 0-d: whether the mask can't be one, where that isn't known yet
        if mask.dtype != torch.bool:
            wrong = self.mask & (mask != 1)
            if _unknown(mask):
                self.wrong = wrong.any()
            elif bool(wrong.any()):
                raise bad(name, f"{float(mask[wrong][0])} in a tensor", "0 or 1 everywhere")
        self.cu_seqlens = torch.arange(shape[0] + 1, device=like.device) * (shape[1] + spare)

    def rows(self, name: str, values: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        if values is None:
            return None
        tensor(name, values, shape=self.shape, like=self.like)
        return torch.nn.functional.pad(values.detach(), (0, self.spare)).reshape(-1)

    def targets(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        tensor(name, ids, shape=self.shape, like=self.like)
        return torch.nn.functional.pad(ids.masked_fill(~self.mask, 0), (0, self.spare)).reshape(-1)

    def padded(self, rows: torch.Tensor) -> torch.Tensor:
        values = rows.view(self.shape[0], self.shape[1] + self.spare)[:, : self.shape[1]]
        return values.masked_fill(~self.mask, 0.0)

    def numbers(
        self,
        spec: LossSpec,
        logp: torch.Tensor,
        old: Optional[torch.Tensor],
        kl: torch.Tensor,
        advantages: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """KL and clipped as 0 or 1, [B, L], by Liger's definitions.

        The KL is already multiplied by the ratio where the loss has that; neither ``delta`` nor the rollout's ratio
        counts for what is clipped.
        """
        with torch.no_grad():  # as a decorator it would break the graph of torch.compile
            log_ratio = torch.zeros(self.shape, device=logp.device) if old is None else self.padded(logp - old)
            if spec.policy == "gspo":
                log_ratio = log_ratio.sum(dim=-1, keepdim=True) / self.mask.sum(dim=-1, keepdim=True).clamp(min=1)
            ratio, sign = log_ratio.exp(), advantages[:, None]
            per_token = self.padded(kl)
            if spec.kl_weight != "none":
                per_token = per_token * ratio
            bound = (ratio > 1.0 + spec.clip_high) & (sign > 0)
            if spec.policy != "cispo":
                bound = bound | ((ratio < 1.0 - spec.clip_low) & (sign < 0))
            if spec.policy in ("sapo", "reinforce"):
                bound = torch.zeros_like(bound)
            return per_token, (bound & self.mask).float()

    def metrics(self, numbers: Tuple[torch.Tensor, torch.Tensor], with_kl: bool) -> List[torch.Tensor]:
        """Means over the tokens of KL, if wanted, and clipped."""
        count = self.mask.sum(dtype=torch.float32).clamp(min=1.0)
        return [x.sum() / count for x in (numbers if with_kl else numbers[1:])]

    def rollout_ratio(self, values: torch.Tensor, *, padding_counts: bool = False) -> torch.Tensor:
        """The rollout's ratio as [B, 1] or [B, L]; where it must be at least 0 and isn't, NaN on a device."""
        if values.dim() == 1:
            values = values[:, None]
        if tuple(values.shape) not in ((self.shape[0], 1), self.shape):
            raise bad(
                "vllm_is_ratio", describe(values), f"[{self.shape[0]}], [{self.shape[0]}, 1] or {list(self.shape)}"
            )
        values = values.detach()
        live = self.mask if tuple(values.shape) == self.shape else self.mask.any(dim=1, keepdim=True)
        wrong = ~(values >= 0) if padding_counts else live & ~(values >= 0)
        if _unknown(values):
            return torch.where(wrong, math.nan, values)
        if bool(wrong.any()):
            raise bad("vllm_is_ratio", f"{float(values[wrong][0])} in a tensor", "values of at least 0")
        return values

    def advantages(self, values: torch.Tensor, ratio: Optional[torch.Tensor]) -> torch.Tensor:
        """[B]; with a ratio, which every policy term but VESPO's is proportional to as it is to A, a value a row.

        NaN where the mask turns out to be none on a device.
        """
        tensor("advantages", values, shape=[self.shape[0]], like=self.like)
        values = values.detach()
        if self.wrong is not None:
            values = torch.where(self.wrong, math.nan, values)
        if ratio is None:
            return values
        weighted = (values[:, None] * self.rollout_ratio(ratio)).expand(self.shape).masked_fill(~self.mask, 0.0)
        return torch.nn.functional.pad(weighted, (0, self.spare)).reshape(-1)

    def vespo(
        self,
        logp: torch.Tensor,
        old: Optional[torch.Tensor],
        advantages: torch.Tensor,
        ratio: Optional[torch.Tensor],
        constants: Vespo,
    ) -> torch.Tensor:
        """A phi(w) [B]: phi = exp(lambda + k log w - lambda w), w the product of all ratios, in [1e-8, e^20]."""
        with torch.no_grad():
            log_ratio = torch.zeros_like(logp) if old is None else logp - old
            log_w = self.padded(log_ratio.clamp(-20.0, 20.0)).sum(dim=-1)
            refused = torch.zeros_like(log_w, dtype=torch.bool)
            if ratio is not None:  # Liger sums over padding, too, where vLLM's ratio is 1
                log_ratio = self.rollout_ratio(ratio, padding_counts=True).log().clamp(_LOWEST, 20.0).sum(dim=-1)
                log_w, refused = log_w + log_ratio, log_ratio.isnan()
            log_w = log_w.clamp(_LOWEST, 20.0)
            positive = advantages >= 0
            k = torch.where(positive, constants.k_pos, constants.k_neg)
            rate = torch.where(positive, constants.lambda_pos, constants.lambda_neg).clamp(min=1e-4)
            phi = (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            return self.advantages(advantages, None) * phi.masked_fill(refused, math.nan)


class PerToken(torch.autograd.Function):
    """The loss and KL [N] of each token, with an upstream gradient for each token's loss.

    A token's upstream gradient multiplies its loss, as a token weight does, so that the coefficients of the weighted
    sum are the gradient; also where a sequence's tokens share a ratio.
    """

    @staticmethod
    def forward(
        ctx: Any, logp: torch.Tensor, cu_seqlens: torch.Tensor, spec: LossSpec, arguments: Dict[str, Any]
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """``spec`` has the reduction "sum"; ``arguments`` are those of `policy_coef`."""
        out = policy_coef(logp, cu_seqlens, spec, **arguments)
        ctx.save_for_backward(logp)
        ctx.rest = cu_seqlens, spec, arguments
        ctx.mark_non_differentiable(out.kl)
        return out.loss, out.kl

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: torch.Tensor, _: Any) -> Tuple[Optional[torch.Tensor], ...]:
        """One more launch, with the upstream gradient [N] as token weights."""
        (logp,) = ctx.saved_tensors
        cu_seqlens, spec, arguments = ctx.rest
        return policy_coef(logp, cu_seqlens, spec, token_weight=upstream.contiguous(), **arguments).a, None, None, None


__all__ = ["LOSS_TYPES", "Layout", "Number", "PerToken", "Vespo", "normalizer", "spec_of"]
