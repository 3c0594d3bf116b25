"""Keys and values of rollouts: an arena with one contiguous prefix a prompt, and a slab with one slot a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vrlt_fast.errors import ConfigError, Problem

AUTO_GB_CPU = 4.0
AUTO_SHARE_CUDA = 0.4


@dataclass(frozen=True)
class KvShape:
    """What one token costs: layers, key heads, head size and data type."""

    layers: int
    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.heads * self.dim * self.dtype.itemsize


@dataclass(frozen=True)
class KvPlan:
    """Room for ``tokens`` of at most ``prompts`` prompts at a time, and ``slots`` responses of ``length`` tokens;
    ``longest`` prompt and most rows of a prompt (``group``) that it is made for.
    """

    tokens: int
    prompts: int
    slots: int
    length: int
    longest: int
    group: int

    def holds(self, other: KvPlan) -> bool:
        """Whether everything that fits into ``other`` fits here."""
        return self == self.joined(other)

    def joined(self, other: KvPlan) -> KvPlan:
        """The larger of each."""
        return KvPlan(*(max(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__))

    def nbytes(self, shape: KvShape) -> int:
        """Bytes of its buffers; one slot more takes what padding rows write."""
        return (self.tokens + (self.slots + 1) * self.length) * shape.token_bytes


def budget_bytes(gigabytes: float, device: torch.device) -> int:
    """``rollout.kv_gb`` in bytes; 0: a share of the free GPU memory, or a few GB of host memory."""
    if gigabytes:
        return int(gigabytes * 1e9)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch holds it, for anyone
        return int(AUTO_SHARE_CUDA * (torch.cuda.mem_get_info(device)[0] + unused))
    return int(AUTO_GB_CPU * 1e9)


def plan_kv(
    shape: KvShape, prefixes: Sequence[int], rows: Sequence[int], length: int, *, budget: int, max_rows: int
) -> KvPlan:
    """As much as the work needs, or as many whole prompts with all their rows as the budget holds, or one prompt and
    some of its rows.

    Args:
        prefixes: tokens of each prompt; ``rows`` its responses; ``length`` of the longest response.

    Raises:
        ConfigError: C04 when not even the longest prompt and one response fit.
    """
    per, longest, most = shape.token_bytes, max(prefixes), min(max(rows), max_rows)
    slots = min(sum(rows), max_rows)
    budget -= per * length  # the slot of padding rows
    if per * (sum(prefixes) + slots * length) <= budget:
        return KvPlan(sum(prefixes), len(prefixes), slots, length, longest, most)
    resident = budget // (per * (longest + most * length))
    if resident > 0:
        return KvPlan(resident * longest, resident, min(resident * most, max_rows), length, longest, most)
    fit = (budget // per - longest) // length
    if fit < 1:
        needed = per * (longest + 2 * length) / 1e9
        raise ConfigError(
            Problem(
                "VRLT-C04",
                f"a prompt of {longest} tokens and one response of {length} need {needed:.3g} GB of keys and values",
                where="rollout.kv_gb",
                why=f"the budget is {(budget + per * length) / 1e9:.3g} GB",
                fix="raise rollout.kv_gb, or lower rollout.max_new_tokens, video.max_frames or video.max_pixels",
            )
        )
    return KvPlan(longest, 1, int(min(fit, most)), length, longest, int(min(fit, most)))


class KvStore:
    """Buffers of a plan. ``prefix_keys[layer]`` [tokens, heads, d]; ``own_keys[layer]`` [slots + 1, length, heads, d],
    the last slot takes what padding rows write.
    """

    def __init__(self, shape: KvShape, plan: KvPlan):
        self.shape, self.plan = shape, plan
        self.prefix_keys, self.prefix_values = self._buffers(plan.tokens), self._buffers(plan.tokens)
        self.own_keys = self._buffers(plan.slots + 1, plan.length)
        self.own_values = self._buffers(plan.slots + 1, plan.length)
        self.clear()

    def _buffers(self, *size: int) -> list[torch.Tensor]:
        s = self.shape
        return [torch.zeros(*size, s.heads, s.dim, dtype=s.dtype, device=s.device) for _ in range(s.layers)]

    def clear(self) -> None:
        """Free everything, whatever an interrupted call has left."""
        self._free_slots = list(range(self.plan.slots - 1, -1, -1))
        self._holes = [(0, self.plan.tokens)]

    @property
    def free_slots(self) -> int:
        """Slots that no row has."""
        return len(self._free_slots)

    def take_slot(self) -> int:
        """A free slot."""
        return self._free_slots.pop()

    def give_slot(self, slot: int) -> None:
        """Free a slot."""
        self._free_slots.append(slot)

    def take_prefix(self, tokens: int) -> int | None:
        """Start of a contiguous place for so many tokens; None where there is none."""
        for i, (start, size) in enumerate(self._holes):
            if size >= tokens:
                self._holes[i : i + 1] = [(start + tokens, size - tokens)] if size > tokens else []
                return start
        return None

    def give_prefix(self, start: int, tokens: int) -> None:
        """Free a place; neighbouring holes are joined."""
        joined: list[tuple[int, int]] = []
        for begin, size in sorted([*self._holes, (start, tokens)]):
            if joined and joined[-1][0] + joined[-1][1] == begin:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((begin, size))
        self._holes = joined
