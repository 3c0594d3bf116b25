"""What a grammar is: how responses of a system look, as one object that asks for them, writes the right one and reads
what a policy wrote. A module of this folder a system; :mod:`vrlt_fast.data.grammars.named` names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from vrlt_fast.data.sample import Box, Sample, Span

LONGEST = 20_000
"""Characters of a response that are read; what is longer is malformed and says nothing."""


@dataclass(frozen=True)
class Parsed:
    """What a response says; None: not said.

    ``answer`` of LETTER_TASKS: letters as in a sample's, "B" or "A,C"; of other tasks: the text of the answer.
    ``spans`` in seconds as written, not sorted, ``start > end`` included, empty where a list is. ``boxes`` in order, as
    many as asked for, with corners as written. ``object_id``, ``progress`` (0..1). ``well_formed``: the whole text
    follows the grammar. Numbers are finite and at most 1e9.
    """

    answer: str | None = None
    spans: tuple[Span, ...] | None = None
    boxes: tuple[Box, ...] | None = None
    object_id: int | None = None
    progress: float | None = None
    well_formed: bool = False


class Grammar(Protocol):
    """The form of responses.

    ``name``: as ``prompt.grammar`` says it. ``asks``: by task, what the prompt says about how to reply; tasks that
    aren't there have no form. ``thinks``: what the prompt says about reasoning, for ``prompt.think``. ``single``:
    it reads one letter only.
    """

    name: str
    thinks: str
    single: bool

    @property
    def asks(self) -> Mapping[str, str]: ...

    def check(self, sample: Sample) -> None:
        """Raises DataError D14 for a sample whose right answer this grammar has no form for."""
        ...

    def ask(self, sample: Sample, *, think: bool) -> str:
        """The end of the user's text: how to reply to this question. Raises as :meth:`check`."""
        ...

    def write(self, sample: Sample, *, think: bool) -> str:
        """The response that earns every part of the reward, for supervised steps. Raises as :meth:`check`."""
        ...

    def read(self, text: str, sample: Sample, *, think: bool) -> Parsed:
        """What a response to this question says. Never raises, in time linear in the length of the text."""
        ...
