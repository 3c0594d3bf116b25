"""The layout that all passes over a batch of groups share: padded prompts, responses as rows, targets as flat rows.

A group is one prompt and its responses. The prompt is computed once; row ``lengths[g] - 1`` of it predicts the first token
of every response of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vrlt_fast.model.prompt import Prompt


@dataclass(frozen=True, eq=False)
class GroupLayout:
    """P prompts padded right to L, ``rows`` responses padded right to R.

    ``ids`` int64 [P, L], ``positions`` int64 [3, P, L], ``lengths`` int64 [P], ``visual`` int64 [n] flat places in [P * L];
    ``group`` int64 [rows] the prompt of each response, ``responses`` int64 [rows, R], ``response_lengths`` int64 [rows],
    ``response_positions`` int64 [rows, R].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    visual: torch.Tensor
    next_position: torch.Tensor
    group: torch.Tensor
    responses: torch.Tensor
    response_lengths: torch.Tensor
    response_positions: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """bool [rows, R]: true where a response has a token."""
        columns = torch.arange(self.responses.shape[1], device=self.responses.device)
        return columns < self.response_lengths[:, None]

    @property
    def tokens_trained(self) -> int:
        """Tokens that one forward pass computes: every prompt once, every response token but the last of each row."""
        return int(self.lengths.sum() + (self.response_lengths - 1).clamp(min=0).sum())

    @property
    def tokens_logical(self) -> int:
        """Tokens that a pass over replicated rows would compute."""
        return int((self.lengths[self.group] + (self.response_lengths - 1).clamp(min=0)).sum())


def build_layout(
    prompts: Sequence[Prompt], responses: Sequence[Sequence[Sequence[int]]], *, pad: int, device: torch.device | str = "cpu"
) -> GroupLayout:
    """Lay out prompts and, for each, its responses (token ids); a prompt may have none."""
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    positions = torch.zeros(3, len(prompts), width, dtype=torch.int64)
    visual = []
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt.ids
        positions[:, row, : len(prompt)] = prompt.positions
        visual.append(prompt.visual + row * width)
    rows = [r for group in responses for r in group]
    padded = torch.full((len(rows), max((len(r) for r in rows), default=0)), pad, dtype=torch.int64)
    for row, response in enumerate(rows):
        padded[row, : len(response)] = torch.tensor(response, dtype=torch.int64)
    group = torch.tensor([g for g, group in enumerate(responses) for _ in group], dtype=torch.int64)
    after = torch.tensor([p.next_position for p in prompts])
    return GroupLayout(
        ids=ids.to(device),
        positions=positions.to(device),
        lengths=torch.tensor([len(p) for p in prompts], device=device),
        visual=torch.cat(visual).to(device),
        next_position=after.to(device),
        group=group.to(device),
        responses=padded.to(device),
        response_lengths=torch.tensor([len(r) for r in rows], dtype=torch.int64, device=device),
        response_positions=(after[group][:, None] + torch.arange(padded.shape[1])).to(device),
    )
