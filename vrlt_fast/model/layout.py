"""The layout that all passes over a batch of groups share: one packed sequence of prefixes and rows, and its targets.

A group is one prefix and its continuations. In GRPO the prefix is the prompt and the rows are its responses; in the
supervised warm-up the prefix is the part of the prompt that the questions about one video share, and a row is the
rest of the prompt and the answer. The prefix is computed once; its last token predicts the first token of every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from vrlt_fast.model.prompt import Prompt
from vrlt_kernels import GroupSpans


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
    """N input tokens: prefix and rows of group 0, of group 1, and so on, without padding. The last token of a row
    predicts nothing that is trained, so it isn't an input.

    ``ids`` int64 [N], ``positions`` int64 [3, N], ``spans`` the lengths in packed order, ``visual`` int64 [n] the
    places of visual tokens. ``targets`` int64 [M] the tokens to predict, rows in order; ``source`` int64 [M] the place
    whose hidden state predicts each; ``target_offsets`` int64 [rows + 1] where each row's targets begin.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    spans: GroupSpans
    visual: torch.Tensor
    targets: torch.Tensor
    source: torch.Tensor
    target_offsets: torch.Tensor

    @property
    def tokens_trained(self) -> int:
        """Tokens that one forward pass computes: every prefix once, every token of a row but its last."""
        return self.spans.tokens

    @property
    def tokens_logical(self) -> int:
        """Tokens that a pass over replicated rows would compute."""
        return sum(p + n for p, group in zip(self.spans.prefix, self.spans.rows, strict=True) for n in group)


def build_layout(
    prompts: Sequence[Prompt],
    rows: Sequence[Sequence[Row]],
    *,
    cuts: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> GroupLayout:
    """Lay out prefixes and, for each, its rows; a prefix may have none.

    Args:
        cuts: how many tokens of each prompt are the prefix, at least 1; default: all. A cut may not leave visual tokens
            behind.
    """
    cuts = [len(p) for p in prompts] if cuts is None else cuts
    spans = GroupSpans.of(cuts, [[max(len(row.tokens) - 1, 0) for row in group] for group in rows])
    ids: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    targets: list[int] = []
    source: list[int] = []
    counts: list[int] = []
    for g, (prompt, cut, group) in enumerate(zip(prompts, cuts, rows, strict=True)):
        ids.append(prompt.ids[:cut])
        positions.append(prompt.positions[:, :cut])
        last = spans.starts[g] + cut - 1
        for row, start in zip(group, spans.row_starts[g], strict=True):
            ids.append(torch.tensor(row.tokens[:-1], dtype=torch.int64))
            positions.append(row.positions[:, : len(ids[-1])])
            places = [last, *range(start, start + len(row.tokens) - 1)] if row.tokens else []
            targets.extend(row.tokens[row.context :])
            source.extend(places[row.context :])
            counts.append(max(len(row.tokens) - row.context, 0))
    return GroupLayout(
        ids=torch.cat(ids).to(device),
        positions=torch.cat(positions, dim=1).to(device),
        spans=spans,
        visual=torch.cat([p.visual + start for p, start in zip(prompts, spans.starts[:-1], strict=True)]).to(device),
        targets=torch.tensor(targets, dtype=torch.int64, device=device),
        source=torch.tensor(source, dtype=torch.int64, device=device),
        target_offsets=torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int64, device=device),
    )
