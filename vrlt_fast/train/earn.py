"""What the groups of a run earn: each response for itself, then what shapers make of the whole group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from vrlt_fast.config import Config
from vrlt_fast.rewards.base import Parts, ResponseGroup
from vrlt_fast.rewards.earned import Earned
from vrlt_fast.rewards.shapers import make_shaper
from vrlt_fast.rollout.group import Group
from vrlt_fast.train.scored import ScoredGroup, from_parts


class Earnings:
    """Scores groups; arguments and errors as those of :class:`~vrlt_fast.rewards.earned.Earned`, which is ``each``."""

    def __init__(self, config: Config, *, device: torch.device, warn: Callable[[str], None], tasks: Collection[str]):
        self.each = Earned(config, device=device, warn=warn, tasks=tasks)
        self._shape, self._grpo = make_shaper(config.reward, config.rollout.max_new_tokens), config.grpo

    def of(self, group: Group, beside: Sequence[Group] = ()) -> ScoredGroup:
        """The scored group; ``beside`` are those that shapers compare it with."""
        parts = self._shape(self._parts(group), _view(group), [self._parts(other, own=False) for other in beside])
        (scored,) = from_parts([group], [parts], self.each.weights, self._grpo)
        return scored

    def _parts(self, group: Group, *, own: bool = True) -> list[Parts]:
        view = _view(group)
        return self.each(view.responses, view.sample, own=own)


def _view(group: Group) -> ResponseGroup:
    return ResponseGroup(group.request.prompt.sample, tuple(c.response for c in group.completions))
