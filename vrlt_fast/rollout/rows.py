"""The responses of a call while they are drawn: which wait, which run, when they end, what they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vrlt_fast.model.load import ModelInfo
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.rewards.base import Response
from vrlt_fast.rollout.group import Completion, Group, RolloutRequest


@dataclass(eq=False)
class Row:
    """One response. ``slot`` in the KV slab while it runs; ``number`` counts the rows of the call."""

    request: int
    number: int
    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: str = ""


@dataclass(eq=False)
class Resident:
    """A prompt and its rows, of one or several requests; ``start`` of its keys and values in the arena."""

    prompt: Prompt
    waiting: list[Row]
    order: int
    start: int = -1
    last: torch.Tensor | None = None
    running: int = 0

    @property
    def done(self) -> bool:
        return not self.waiting and not self.running


def by_prompt(requests: Sequence[RolloutRequest]) -> list[Resident]:
    """The work of a call: requests for the same prompt share its prefill."""
    found: dict[int, Resident] = {}
    number = 0
    for index, request in enumerate(requests):
        resident = found.setdefault(id(request.prompt), Resident(request.prompt, [], len(found)))
        for _ in range(request.n):
            resident.waiting.append(Row(index, number))
            number += 1
    return list(found.values())


def row_seeds(requests: Sequence[RolloutRequest]) -> list[int]:
    """Seeds of all rows in order: a request's seed and the row's number in it, whatever else is in the call."""
    return [(r.seed * 1_000_003 + i) % 2**63 for r in requests for i in range(r.n)]


class Ending:
    """When a response ends: a stop token, a stop string, or its length."""

    def __init__(self, info: ModelInfo, requests: Sequence[RolloutRequest]):
        self._info, self._requests = info, requests
        self._stops = set(info.stop_tokens)
        self._tails = [max((len(s.encode()) for s in r.sampling.stop), default=0) for r in requests]

    def append(self, row: Row, token: int, logprob: float) -> bool:
        """Give the row its next token; whether it has ended."""
        row.tokens.append(token)
        row.logprobs.append(logprob)
        sampling = self._requests[row.request].sampling
        if token in self._stops or (sampling.stop and self._says(row, sampling.stop)):
            row.reason = "stop"
        elif len(row.tokens) == sampling.max_new_tokens:
            row.reason = "length"
        return bool(row.reason)

    def _says(self, row: Row, stop: Sequence[str]) -> bool:
        # a token holds at least one byte: so many tokens hold the longest string, and a cut character in front of it
        text = self._text(row.tokens[-(self._tails[row.request] + 4) :])
        return any(s in text for s in stop)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._info.tokenizer.decode(tokens, skip_special_tokens=False))

    def completion(self, row: Row) -> Completion:
        """The finished response; a stop token counts as one of its tokens but not as text."""
        tokens = row.tokens[:-1] if row.tokens[-1] in self._stops else row.tokens
        response = Response(self._text(tokens), len(row.tokens), row.reason)  # type: ignore[arg-type]
        return Completion(response, tuple(row.tokens), torch.tensor(row.logprobs, dtype=torch.float32))


class Collector:
    """Finished rows, handed on as groups once all rows of a request have ended."""

    def __init__(self, requests: Sequence[RolloutRequest]):
        self._requests = requests
        self._first: list[int] = []
        total = 0
        for request in requests:
            self._first.append(total)
            total += request.n
        self._done: list[dict[int, Completion]] = [{} for _ in requests]
        self.groups: list[Group | None] = [None] * len(requests)

    def add(self, row: Row, completion: Completion) -> Group | None:
        """Take a response in; its group where it was the last one."""
        done, request = self._done[row.request], self._requests[row.request]
        done[row.number - self._first[row.request]] = completion
        if len(done) < request.n:
            return None
        group = Group(request, tuple(done[i] for i in range(request.n)))
        self.groups[row.request] = group
        return group
