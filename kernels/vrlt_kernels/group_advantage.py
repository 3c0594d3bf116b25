"""group_advantage: rewards of the responses of a group, centred and scaled.

Shapes: R responses in groups of consecutive ones; rewards [R], or [R, K] for K rewards of each. _g: of a group.
    group  (r - mean_g) / (std_g + eps)   GRPO          none   r - mean_g          Dr.GRPO
    batch  (r - mean_g) / (std + eps)                   rloo   n / (n - 1) (r - mean_g)
    opo    r - sum_g l r / sum_g l, l the lengths       pass@k the best gets r_1 - r_2, the others 0
    reinforce++ whitens the rewards of the batch, reinforce++_baseline whitens r - mean_g;
    gpg    n_batch / (nonzero rewards of the batch) (r - mean_g)
"""

from __future__ import annotations

from typing import Any, Optional, Sequence, Tuple, Union

import torch

from . import _checks as check
from ._launch import choose, scalar
from ._ops import add_op_namespace_prefix
from .group_advantage_ref import advantages_ref

SCALES: Tuple[str, ...] = (
    "group",
    "none",
    "rloo",
    "pass@k",
    "opo",
    "batch",
    "gpg",
    "reinforce++",
    "reinforce++_baseline",
)
"""Those from "batch" on look at the whole batch. The place of a name is its code in the kernel."""
BATCH_WIDE = frozenset(SCALES[5:])
COMBINE: Tuple[str, ...] = ("sum_then_normalize", "normalize_then_sum", "normalize_then_sum_then_whiten")
Groups = Union[int, torch.Tensor]


def split_groups(groups: Groups, total: int, like: torch.Tensor) -> Tuple[int, Optional[torch.Tensor]]:
    """A group size (0: see the offsets), or offsets [groups + 1], of ``total`` responses, checked."""
    if isinstance(groups, torch.Tensor):
        check.offsets("groups", groups, total, like)
        return 0, groups
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise check.bad("groups", type(groups).__name__, "a group size or a tensor of offsets [groups + 1]")
    if groups < 1 or total % groups:
        raise check.bad("groups", groups, f"a group size of at least 1 that divides {total} responses")
    return groups, None


@torch.library.custom_op(add_op_namespace_prefix("group_advantages"), mutates_args=())
def _advantages(
    rewards: torch.Tensor,
    size: int,
    offsets: Optional[torch.Tensor],
    lengths: Optional[torch.Tensor],
    eps: torch.Tensor,
    *,
    scale: str,
    ddof: int,
    singleton: str,
) -> torch.Tensor:
    """rewards [R] to advantages [R], in groups of ``size``, or between the offsets where it is 0."""
    if choose("group_advantages", rewards, has=("triton", "reference")) == "triton":
        from .group_advantage_triton import advantages_triton

        return advantages_triton(
            rewards, size, offsets, lengths, SCALES.index(scale), eps.item(), ddof, singleton == "raw"
        )
    out = advantages_ref(rewards, size, offsets, lengths, scale=scale, eps=eps.item(), ddof=ddof, singleton=singleton)
    return out.to(check.compute_dtype(rewards))


@_advantages.register_fake
def _(rewards: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return rewards.new_empty(rewards.shape, dtype=check.compute_dtype(rewards))


def _prepare(
    rewards: torch.Tensor, groups: Groups, weights: Optional[Union[torch.Tensor, Sequence[float]]], lengths: object
) -> Tuple[int, Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Group size, offsets and weights [K] (None for one reward), all arguments checked."""
    check.tensor("rewards", rewards, dtypes=check.FLOATS)
    if rewards.dim() not in (1, 2):
        raise check.bad("rewards", check.describe(rewards), "shape [R] or [R, K]")
    if lengths is not None:
        check.tensor("lengths", lengths, shape=[rewards.shape[0]], like=rewards)
    size, offsets = split_groups(groups, rewards.shape[0], rewards)
    if rewards.dim() == 1:
        if weights is not None:
            raise check.bad("weights", "weights for rewards [R]", "rewards [R, K]")
        return size, offsets, None
    dtype = check.compute_dtype(rewards)
    kinds = rewards.shape[1]
    given = torch.ones(kinds) if weights is None else torch.as_tensor(weights)
    check.tensor("weights", given, shape=[kinds])
    return size, offsets, given.to(rewards.device, dtype)


def group_advantages(
    rewards: torch.Tensor,
    groups: Groups,
    *,
    scale: str = "group",
    eps: float = 1e-4,
    ddof: int = 1,
    singleton: str = "zero",
    nan: str = "zero",
    weights: Optional[Union[torch.Tensor, Sequence[float]]] = None,
    combine: str = "sum_then_normalize",
    lengths: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Advantages fp32 [R] (fp64 for fp64 rewards), without gradient, of rewards [R] or [R, K], any float type.

    One launch for the modes of a group, two for those of the whole batch. A group whose rewards are all equal gets
    exactly 0 (but for "reinforce++", which knows no groups).

    Args:
        groups: the size of every group, or offsets int32/int64 [groups + 1] of consecutive responses.
        scale: the formula, see the top of this file.
        eps: added to the standard deviation.
        ddof: what is taken from the count in the standard deviation: 1 (unbiased) or 0. Too few values: 0.
        singleton: a group with one finite reward gets "zero", or its reward "raw" (mean 0, deviation 1; as verl does).
        nan: only "zero": a reward that is not finite gets 0 and is left out of all statistics.
        weights: [K], of the rewards of a response; default 1.
        combine: "sum_then_normalize": weighted sum first, its parts that are NaN left out; "normalize_then_sum": every
            reward gets its advantages, then the weighted sum; "normalize_then_sum_then_whiten": and that is whitened
            over the batch (GDPO).
        lengths: tokens [R] of each response: the weights of "opo" (needed there), and of the statistics of the
            "reinforce++" modes, which whiten tokens.

    Raises:
        KernelInputError: a wrong shape, type, device, name, or sizes that don't add up.
    """
    check_options(scale=scale, eps=eps, ddof=ddof)
    check.one_of("singleton", singleton, ("zero", "raw"))
    check.one_of("nan", nan, ("zero",))
    check.one_of("combine", combine, COMBINE)
    if scale == "opo" and lengths is None:
        raise check.bad("lengths", "None with scale 'opo'", "the tokens of each response")
    size, offsets, given = _prepare(rewards, groups, weights, lengths)
    rewards = rewards.detach()
    constant = scalar(eps, torch.float64)

    def run(values: torch.Tensor, how: str) -> torch.Tensor:
        out: torch.Tensor = _advantages(
            values, size, offsets, lengths, constant, scale=how, ddof=ddof, singleton=singleton
        )
        return out

    if given is None:
        return run(rewards, scale)
    rewards = rewards.to(given.dtype)
    if combine == "sum_then_normalize":
        missing = rewards.isnan()
        total = torch.where(missing, 0.0, rewards * given).sum(1)
        total = total.masked_fill(missing.all(1), float("nan"))
        return run(total, scale)
    columns = [
        run(column.contiguous(), scale) * weight
        for column, weight in zip(rewards.unbind(1), given.unbind(), strict=True)
    ]
    out = torch.stack(columns).sum(0) if columns else rewards.new_zeros(len(rewards))
    return run(out, "reinforce++") if combine == "normalize_then_sum_then_whiten" else out


def check_options(*, scale: str, eps: float, ddof: int, prefix: str = "") -> None:
    """The options that policy_coef takes too, under names with a prefix."""
    check.one_of(prefix + "scale", scale, SCALES)
    if not eps >= 0:
        raise check.bad(prefix + "eps", eps, "a number of at least 0")
    if ddof not in (0, 1):
        raise check.bad(prefix + "ddof", ddof, "0 or 1")


def group_advantages_ref(rewards: torch.Tensor, groups: Groups, **options: object) -> torch.Tensor:
    """`group_advantages` in plain PyTorch, same arguments; the statistics in fp64."""
    from ._launch import use_backend

    with use_backend("reference"):
        return group_advantages(rewards, groups, **options)  # type: ignore[arg-type]


__all__ = ["group_advantages", "group_advantages_ref"]
