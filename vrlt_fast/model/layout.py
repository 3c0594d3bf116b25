"""The layout that all passes over a batch of groups share: padded prefixes, continuations as rows, targets as flat
rows.

A group is one prefix and its continuations. In GRPO the prefix is the prompt and the rows are its responses; in the
supervised warm-up the prefix is the part of the prompt that the questions about one video share, and a row is the
rest of the prompt and the answer. The prefix is computed once; its last row predicts the first token of every
continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vrlt_fast.model.prompt import Prompt


@dataclass(frozen=True, eq=False)
class Row:
    """One continuation: token ids, int64 positions [3, n] of each, and how many leading tokens are context, not
    targets.
    """

    tokens: Sequence[int]
    positions: torch.Tensor
    context: int = 0


def response_row(prompt: Prompt, tokens: Sequence[int]) -> Row:
    """A response behind its whole prompt."""
    return Row(tokens, (torch.arange(len(tokens)) + prompt.next_position).expand(3, -1))


def answer_row(prompt: Prompt, start: int, tokens: Sequence[int]) -> Row:
    """The prompt from token ``start`` on, and an answer behind it."""
    after = (torch.arange(len(tokens)) + prompt.next_position).expand(3, -1)
    rest = prompt.ids[start:].tolist()
    return Row([*rest, *tokens], torch.cat([prompt.positions[:, start:], after], dim=1), len(rest))


@dataclass(frozen=True, eq=False)
class GroupLayout:
    """P prefixes padded right to L, ``rows`` continuations padded right to R.

    ``ids`` int64 [P, L], ``positions`` int64 [3, P, L], ``lengths`` int64 [P], ``visual`` int64 [n] flat places in [P
    * L]; ``group`` int64 [rows] the prefix of each row, ``row_ids`` int64 [rows, R], ``row_positions`` int64 [3,
    rows, R], ``row_lengths`` and ``row_context`` int64 [rows].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    visual: torch.Tensor
    group: torch.Tensor
    row_ids: torch.Tensor
    row_positions: torch.Tensor
    row_lengths: torch.Tensor
    row_context: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """bool [rows, R]: true for targets."""
        columns = torch.arange(self.row_ids.shape[1], device=self.row_ids.device)
        return (columns >= self.row_context[:, None]) & (columns < self.row_lengths[:, None])

    @property
    def targets(self) -> torch.Tensor:
        """int64 [N]: the target tokens, rows in order."""
        return self.row_ids[self.mask]

    @property
    def tokens_trained(self) -> int:
        """Tokens that one forward pass computes: every prefix once, every token of a row but its last."""
        return int(self.lengths.sum() + (self.row_lengths - 1).clamp(min=0).sum())

    @property
    def tokens_logical(self) -> int:
        """Tokens that a pass over replicated rows would compute."""
        return int((self.lengths[self.group] + (self.row_lengths - 1).clamp(min=0)).sum())


def build_layout(
    prompts: Sequence[Prompt],
    rows: Sequence[Sequence[Row]],
    *,
    pad: int,
    cuts: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> GroupLayout:
    """Lay out prefixes and, for each, its rows; a prefix may have none.

    Args:
        cuts: how many tokens of each prompt are the prefix; default: all. A cut may not leave visual tokens behind.
    """
    cuts = [len(p) for p in prompts] if cuts is None else cuts
    width = max(cuts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    positions = torch.zeros(3, len(prompts), width, dtype=torch.int64)
    for i, (prompt, cut) in enumerate(zip(prompts, cuts, strict=True)):
        ids[i, :cut] = prompt.ids[:cut]
        positions[:, i, :cut] = prompt.positions[:, :cut]
    flat = [row for group in rows for row in group]
    longest = max((len(row.tokens) for row in flat), default=0)
    row_ids = torch.full((len(flat), longest), pad, dtype=torch.int64)
    row_positions = torch.zeros(3, len(flat), longest, dtype=torch.int64)
    for i, row in enumerate(flat):
        row_ids[i, : len(row.tokens)] = torch.tensor(row.tokens, dtype=torch.int64)
        row_positions[:, i, : len(row.tokens)] = row.positions
    return GroupLayout(
        ids=ids.to(device),
        positions=positions.to(device),
        lengths=torch.tensor(cuts, device=device),
        visual=torch.cat([p.visual + i * width for i, p in enumerate(prompts)]).to(device),
        group=torch.tensor([g for g, group in enumerate(rows) for _ in group], dtype=torch.int64, device=device),
        row_ids=row_ids.to(device),
        row_positions=row_positions.to(device),
        row_lengths=torch.tensor([len(r.tokens) for r in flat], dtype=torch.int64, device=device),
        row_context=torch.tensor([r.context for r in flat], dtype=torch.int64, device=device),
    )
