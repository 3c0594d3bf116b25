"""Passes of one model over the micro-batches of an update: packed, in stages, replicated, or shared by processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

import torch

from vrlt_fast.config import Config
from vrlt_fast.config_rl import GrpoConfig
from vrlt_fast.model.language import target_logprobs, target_weights
from vrlt_fast.model.layout import GroupLayout, Row, build_layout, response_row
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.replicated import replicated_logprobs
from vrlt_fast.model.sequence import Method, SharedLayout, shared_logprobs
from vrlt_fast.model.sharded import ShardedLM
from vrlt_fast.model.staged import StagedPrompt
from vrlt_fast.model.staged_sequence import SharedStagedPrompt
from vrlt_fast.model.vision import Embeddings, VisionEmbeds, shared_vision
from vrlt_fast.parallel.mesh import Mesh
from vrlt_fast.parallel.replicas import Replicas
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.train.plan import MicroBatch, Unit, update_units
from vrlt_fast.train.scored import ScoredGroup

Prefix = Literal["shared", "replicated"]


@dataclass(frozen=True)
class How:
    """The way an update goes through the model.

    ``prefix``: "replicated" computes a prompt once a response, to check that the shared one is the same. ``peers``:
    processes with the same groups that share every pass, each with its rows, by ``method``; ``micro_tokens`` is then
    what each of them computes. ``in_step``: processes that gather weights in their passes, and so make equally many.
    ``alpha``: TW-GRPO's weights are wanted, up to this. ``entropy_grad``: entropies have gradients. ``whole``: the loss
    is of groups, which aren't cut.
    """

    temperature: float
    micro_rows: int
    micro_tokens: int = 0
    prefix: Prefix = "shared"
    peers: Peers = field(default_factory=Peers)
    method: Method = "gather_kv"
    in_step: Replicas = field(default_factory=Replicas)
    alpha: float = 1.0
    entropy_grad: bool = False
    whole: bool = False

    @staticmethod
    def of(config: Config, mesh: Mesh, micro_tokens: int) -> How:
        """That of a run's GRPO updates."""
        train, grpo = config.train, config.grpo
        more = (train.prefix, mesh.peers, config.parallel.sequence, mesh.in_step)
        return How(
            config.rollout.temperature,
            train.micro_rows,
            micro_tokens,
            *more,
            alpha=grpo.token_weight,
            entropy_grad=grpo.entropy > 0,
            whole=of_groups(grpo),
        )

    def rounds(self, scored: Sequence[ScoredGroup]) -> list[tuple[Unit, int]]:
        """What goes through together, with the number of passes that the process with most of them makes then; empty
        units where others have more.
        """
        units = sorted(self.units(scored), key=len, reverse=True) if self.in_step.world > 1 else self.units(scored)
        passes = most_by_place(self.in_step.gather([len(unit) for unit in units]))
        return list(zip([*units, *([] for _ in passes[len(units) :])], passes, strict=True))

    def units(self, scored: Sequence[ScoredGroup]) -> list[Unit]:
        """What goes through together."""
        units = update_units(scored, self.micro_rows, self.micro_tokens * self.peers.size, whole=self.whole)
        return units if self.prefix == "shared" else [[batch] for unit in units for batch in unit]

    def vision(self, lm: VideoLM, unit: Unit, held: Embeddings | None = None) -> VisionEmbeds:
        """The visual tokens of the unit's prompts."""
        return shared_vision(lm, prompts_of(unit), held, self.peers)


@dataclass(frozen=True, eq=False)
class Scores:
    """Log-probs [n], with gradients, and entropies [n] of the targets of ``rows``: groups and numbers of responses,
    those of this process. ``offsets`` int64 [rows + 1]: where each row's begin. ``logical``: tokens that they would be
    with a prompt each. ``weight`` [n]: TW-GRPO's, where it is wanted.
    """

    logp: torch.Tensor
    entropy: torch.Tensor
    rows: list[tuple[ScoredGroup, int]]
    logical: int
    weight: torch.Tensor | None = None

    @property
    def offsets(self) -> torch.Tensor:
        lengths = [0, *(len(s.group.completions[i].tokens) for s, i in self.rows)]
        return torch.tensor(lengths, device=self.logp.device).cumsum(0)


def of_groups(grpo: GrpoConfig) -> bool:
    """Whether the loss of a response depends on the other responses' tokens, so that a group goes through whole."""
    return grpo.policy == "reg" or grpo.token_weight > 1


def most_by_place(counts: Sequence[Sequence[int]]) -> list[int]:
    """The largest of the first numbers, of the second ones, and so on."""
    return [max(found) for found in zip_longest(*counts, fillvalue=0)]


class UnitPass:
    """The passes of one model over the micro-batches of a unit, one after the other; ``tokens`` that this process
    computed.

    Args:
        passes: that processes which share the weights make at this time, at least as many as there are micro-batches:
            what is missing are idle ones.
    """

    def __init__(self, lm: VideoLM, unit: Unit, vision: VisionEmbeds | None, how: How, passes: int = 0):
        self._lm, self._vision, self._how = lm, vision, how
        self._staged: StagedPrompt | None = None
        self._idle, self._missing = None, max(passes - len(unit), 0)
        self.tokens = 0
        if passes > 1 >= len(unit):
            self._idle = idle(lm)
        if len(unit) > 1 and vision is not None:
            (prompt,) = prompts_of(unit)
            shared = how.peers.size > 1
            self._staged = (
                SharedStagedPrompt(lm, prompt, vision, how.peers) if shared else StagedPrompt(lm, prompt, vision)
            )
            self.tokens = self._staged.tokens

    def scores(self, chunk: MicroBatch) -> Scores:
        """Of a micro-batch of the unit."""
        if self._vision is None:
            raise ValueError("no prompts, but rows")
        prompts, rows = [s.group.request.prompt for s in chunk], rows_of(chunk)
        every = [(s, i) for s in chunk for i in s.trained]
        if self._how.peers.size > 1:
            return self._shared(chunk, prompts, rows)
        lm, how, seen, weight = self._lm, self._how, self._vision, None
        more: dict[str, Any] = {"entropy_grad": how.entropy_grad}
        layout = build_layout(prompts, rows, device=lm.device)
        if self._staged is not None:
            self.tokens += layout.tokens_trained - len(prompts[0])
            logp, entropy = self._staged.logprobs(rows[0], how.temperature, **more)
        elif how.alpha > 1:
            self.tokens += layout.tokens_trained
            logp, entropy, weight = lm.run(target_weights, lm, layout, seen, how.temperature, how.alpha)
        elif how.prefix == "shared":
            self.tokens += layout.tokens_trained
            logp, entropy = lm.run(target_logprobs, lm, layout, seen, how.temperature, **more)
        else:
            self.tokens += layout.tokens_logical
            logp, entropy = replicated_logprobs(lm, prompts, rows, seen, how.temperature, **more)
        return Scores(logp, entropy, every, layout.tokens_logical, weight)

    def _shared(self, chunk: MicroBatch, prompts: list[Prompt], rows: list[list[Row]]) -> Scores:
        how = self._how
        if isinstance(self._staged, SharedStagedPrompt):
            more: dict[str, Any] = {"entropy_grad": how.entropy_grad}
            logp, entropy, shared = self._staged.shared_logprobs(rows[0], how.temperature, **more)
            self.tokens += sum(map(sum, shared.share.lengths))
        else:
            shared = SharedLayout(build_layout(prompts, rows, device=self._lm.device), how.peers)
            logp, entropy = self._lm.run(
                shared_logprobs,
                self._lm,
                shared,
                self._vision,
                how.temperature,
                method=how.method,
                entropy_grad=how.entropy_grad,
            )
            self.tokens += shared.share.tokens
        own = [(s, s.trained[r]) for s, mine in zip(chunk, shared.rows, strict=True) for r in mine]
        logical = [
            len(prompt) + n for prompt, lengths in zip(prompts, shared.share.lengths, strict=True) for n in lengths
        ]
        return Scores(logp, entropy, own, sum(logical))

    def backward(self) -> None:
        """What the backward passes of the micro-batches have left to do, and idle ones where others have more."""
        for _ in range(self._missing):
            torch.autograd.backward(idle(self._lm))
        if self._staged is not None:
            self._staged.backward()
        elif self._idle is not None:
            torch.autograd.backward(self._idle)

    def rest(self) -> None:
        """The idle passes, where there is nothing to go back through."""
        for _ in range(self._missing):
            idle(self._lm)


def idle(lm: VideoLM) -> torch.Tensor:
    """A pass over nothing, for processes that share weights: zero, with a graph."""
    if not isinstance(lm, ShardedLM):
        raise ValueError("idle passes are for processes that share weights")
    return lm.idle()


def prompts_of(unit: Unit) -> list[Prompt]:
    """The prompts that a unit computes: those of its groups; pieces of a group have the same one."""
    return [s.group.request.prompt for s in unit[0]]


def group_layout(lm: VideoLM, chunk: Sequence[ScoredGroup]) -> GroupLayout:
    """The layout of some groups' prompts and the responses in the loss."""
    return build_layout([s.group.request.prompt for s in chunk], rows_of(chunk), device=lm.device)


def rows_of(chunk: Sequence[ScoredGroup]) -> list[list[Row]]:
    """The responses in the loss, by group."""
    return [[response_row(s.group.request.prompt, s.group.completions[i].tokens) for i in s.trained] for s in chunk]
