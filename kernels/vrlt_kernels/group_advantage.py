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
    return size, offsets, _weights(weights, rewards)


def _is_finite(value: Any) -> bool:
    try:  # not math.isfinite, which torch.compile can't trace for a number that changes
        return bool(float("-inf") < value < float("inf"))
    except TypeError:
        return False


def _weights(weights: Optional[Union[torch.Tensor, Sequence[float]]], rewards: torch.Tensor) -> torch.Tensor:
    """[K] on the device of the rewards, constants."""
    kinds, dtype = rewards.shape[1], check.compute_dtype(rewards)
    if weights is None:
        return torch.ones(kinds, dtype=dtype, device=rewards.device)
    if isinstance(weights, torch.Tensor):
        check.tensor("weights", weights, shape=[kinds])
        given = weights.detach().to(torch.float64)
    else:
        try:
            numbers = list(weights)
        except TypeError:
            raise check.bad("weights", type(weights).__name__, f"shape [{kinds}]") from None
        if len(numbers) != kinds:
            raise check.bad("weights", f"{len(numbers)} numbers", f"shape [{kinds}], one for each reward of a response")
        wrong = [weight for weight in numbers if not _is_finite(weight)]
        if wrong:
            raise check.bad("weights", f"{wrong[0]!r} among them", "finite numbers")
        # one by one: torch.compile would make constants of a list's numbers
        given = torch.empty(0, dtype=torch.float64, device="cpu")
        if numbers:
            given = torch.stack([scalar(weight, torch.float64) for weight in numbers])
    if given.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(given.isfinite().all()):
        raise check.bad("weights", given.tolist(), "finite numbers")
    return given.to(rewards.device, dtype)


def group_advantages(
    rewards: torch.Tensor,
    groups: Groups,
    *,
    scale: str = "group",
    eps: float = 1e-4,
    ddof: int = 1,
    singleton: str = "zero",
    weights: Optional[Union[torch.Tensor, Sequence[float]]] = None,
    combine: str = "sum_then_normalize",
    lengths: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Advantages fp32 [R] (fp64 for fp64 rewards), without gradient, of rewards [R] or [R, K], any float type.

    One launch for the modes of a group, two for those of the whole batch. A group whose rewards are all equal gets
    exactly 0 (but for "reinforce++", which knows no groups). A reward that is not finite gets 0 and is left out of all
    statistics; of several rewards of a response, those that are.

    Args:
        groups: the size of every group, or offsets int32/int64 [groups + 1] of consecutive responses.
        scale: the formula, see the top of this file.
        eps: added to the standard deviation.
        ddof: what is taken from the count in the standard deviation: 1 (unbiased) or 0. Too few values: 0.
        singleton: a group with one finite reward gets "zero", or its reward "raw" (mean 0, deviation 1; as verl does).
        weights: [K], finite, of the rewards of a response; constants, default 1. On CUDA they aren't looked at: with
            one that isn't finite all advantages are NaN.
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
    rewards, refused = rewards.to(given.dtype), ~given.isfinite().all()
    if combine == "sum_then_normalize":
        missing = rewards.isnan()
        total = torch.where(missing, 0.0, rewards * given).sum(1)
        total = total.masked_fill(missing.all(1), float("nan"))
        return run(total, scale).masked_fill(refused, float("nan"))
    columns = [
        run(column.contiguous(), scale) * weight
        for column, weight in zip(rewards.unbind(1), given.unbind(), strict=True)
    ]
    out = torch.stack(columns).sum(0) if columns else rewards.new_zeros(len(rewards))
    if combine == "normalize_then_sum_then_whiten":
        out = run(out.masked_fill(~rewards.isfinite().any(1), float("nan")), "reinforce++")
    return out.masked_fill(refused, float("nan"))


def check_options(*, scale: str, eps: float, ddof: int, prefix: str = "") -> None:
    """The options that policy_coef takes too, under names with a prefix."""
    check.one_of(prefix + "scale", scale, SCALES)
    if not _is_finite(eps) or eps < 0:
        raise check.bad(prefix + "eps", repr(eps), "a finite number of at least 0")
    if isinstance(ddof, bool) or not isinstance(ddof, (int, torch.SymInt)) or ddof not in (0, 1):
        raise check.bad(prefix + "ddof", repr(ddof), "0 or 1, an int")


def group_advantages_ref(rewards: torch.Tensor, groups: Groups, **options: object) -> torch.Tensor:
    """`group_advantages` in plain PyTorch, same arguments; the statistics in fp64."""
    from ._launch import use_backend

    with use_backend("reference"):
        return group_advantages(rewards, groups, **options)  # type: ignore[arg-type]


__all__ = ["group_advantages", "group_advantages_ref"]
