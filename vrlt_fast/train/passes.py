"""Passes of one model over the micro-batches of an update: packed, in stages, replicated, or shared by processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from vrlt_fast.model.language import target_logprobs
from vrlt_fast.model.layout import GroupLayout, Row, build_layout, response_row
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.replicated import replicated_logprobs
from vrlt_fast.model.sequence import Method, SharedLayout, shared_logprobs
from vrlt_fast.model.staged import StagedPrompt
from vrlt_fast.model.staged_sequence import SharedStagedPrompt
from vrlt_fast.model.vision import Embeddings, VisionEmbeds, shared_vision
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.train.plan import MicroBatch, Unit, update_units
from vrlt_fast.train.scored import ScoredGroup

Prefix = Literal["shared", "replicated"]


@dataclass(frozen=True)
class How:
    """The way an update goes through the model.

    ``prefix``: "replicated" computes a prompt once a response, to check that the shared one is the same. ``peers``:
    processes with the same groups that share every pass, each with its rows, by ``method``; ``micro_tokens`` is then
    what each of them computes.
    """

    temperature: float
    micro_rows: int
    micro_tokens: int = 0
    prefix: Prefix = "shared"
    peers: Peers = field(default_factory=Peers)
    method: Method = "gather_kv"

    def units(self, scored: Sequence[ScoredGroup]) -> list[Unit]:
        """What goes through together."""
        units = update_units(scored, self.micro_rows, self.micro_tokens * self.peers.size)
        return units if self.prefix == "shared" else [[batch] for unit in units for batch in unit]

    def vision(self, lm: VideoLM, unit: Unit, held: Embeddings | None = None) -> VisionEmbeds:
        """The visual tokens of the unit's prompts."""
        return shared_vision(lm, prompts_of(unit), held, self.peers)


@dataclass(frozen=True, eq=False)
class Scores:
    """Log-probs [n], with gradients, and entropies [n] of the targets of ``rows``: groups and numbers of responses,
    those of this process. ``offsets`` int64 [rows + 1]: where each row's begin. ``logical``: tokens that they would be
    with a prompt each.
    """

    logp: torch.Tensor
    entropy: torch.Tensor
    rows: list[tuple[ScoredGroup, int]]
    logical: int

    @property
    def offsets(self) -> torch.Tensor:
        lengths = [0, *(len(s.group.completions[i].tokens) for s, i in self.rows)]
        return torch.tensor(lengths, device=self.logp.device).cumsum(0)


class UnitPass:
    """The passes of one model over the micro-batches of a unit, one after the other; ``tokens`` that this process
    computed.
    """

    def __init__(self, lm: VideoLM, unit: Unit, vision: VisionEmbeds, how: How):
        self._lm, self._vision, self._how = lm, vision, how
        self._staged: StagedPrompt | None = None
        self.tokens = 0
        if len(unit) > 1:
            (prompt,) = prompts_of(unit)
            shared = how.peers.size > 1
            self._staged = (
                SharedStagedPrompt(lm, prompt, vision, how.peers) if shared else StagedPrompt(lm, prompt, vision)
            )
            self.tokens = self._staged.tokens

    def scores(self, chunk: MicroBatch) -> Scores:
        """Of a micro-batch of the unit."""
        prompts, rows = [s.group.request.prompt for s in chunk], rows_of(chunk)
        every = [(s, i) for s in chunk for i in s.trained]
        if self._how.peers.size > 1:
            return self._shared(chunk, prompts, rows)
        layout = build_layout(prompts, rows, device=self._lm.device)
        if self._staged is not None:
            self.tokens += layout.tokens_trained - len(prompts[0])
            logp, entropy = self._staged.logprobs(rows[0], self._how.temperature)
        elif self._how.prefix == "shared":
            self.tokens += layout.tokens_trained
            logp, entropy = target_logprobs(self._lm, layout, self._vision, self._how.temperature)
        else:
            self.tokens += layout.tokens_logical
            logp, entropy = replicated_logprobs(self._lm, prompts, rows, self._vision, self._how.temperature)
        return Scores(logp, entropy, every, layout.tokens_logical)

    def _shared(self, chunk: MicroBatch, prompts: list[Prompt], rows: list[list[Row]]) -> Scores:
        how = self._how
        if isinstance(self._staged, SharedStagedPrompt):
            logp, entropy, shared = self._staged.shared_logprobs(rows[0], how.temperature)
            self.tokens += sum(map(sum, shared.share.lengths))
        else:
            shared = SharedLayout(build_layout(prompts, rows, device=self._lm.device), how.peers)
            logp, entropy = shared_logprobs(self._lm, shared, self._vision, how.temperature, method=how.method)
            self.tokens += shared.share.tokens
        own = [(s, s.trained[r]) for s, mine in zip(chunk, shared.rows, strict=True) for r in mine]
        logical = [
            len(prompt) + n for prompt, lengths in zip(prompts, shared.share.lengths, strict=True) for n in lengths
        ]
        return Scores(logp, entropy, own, sum(logical))

    def backward(self) -> None:
        """What the backward passes of the micro-batches have left to do."""
        if self._staged is not None:
            self._staged.backward()


def prompts_of(unit: Unit) -> list[Prompt]:
    """The prompts that a unit computes: those of its groups; pieces of a group have the same one."""
    return [s.group.request.prompt for s in unit[0]]


def group_layout(lm: VideoLM, chunk: Sequence[ScoredGroup]) -> GroupLayout:
    """The layout of some groups' prompts and the responses in the loss."""
    return build_layout([s.group.request.prompt for s in chunk], rows_of(chunk), device=lm.device)


def rows_of(chunk: Sequence[ScoredGroup]) -> list[list[Row]]:
    """The responses in the loss, by group."""
    return [[response_row(s.group.request.prompt, s.group.completions[i].tokens) for i in s.trained] for s in chunk]
