"""SOLE-R1 (github.com/philipmit/sole-r1-model): the progress of a task, as whole percent.

As its reward server does, the number fills the first answer tag, with or without "%", and counts as 100 above that; a
negative one says nothing here. Its training code isn't released: that the form is think and answer tags around a whole
number with "%" is our choice.
"""

from __future__ import annotations

import re

from vrlt_fast.data.grammars import pieces
from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.sample import Sample

_ASKS = {"progress": "Reply with how much of the task is done, in whole percent: <answer>number%</answer>"}
_PERCENT = re.compile(r"\+?([0-9]{1,9})\s*+(%?)")


class SoleR1(pieces.Wording):
    """Progress."""

    name = "sole_r1"
    asks = _ASKS

    def body(self, sample: Sample) -> str:
        """What fills the answer tag of the right response."""
        return pieces.percentage(sample)

    def read(self, text: str, sample: Sample, *, think: bool) -> Parsed:
        """What a response says."""
        text = pieces.readable(text)
        if sample.task not in self.asks:
            return Parsed()
        said = _PERCENT.fullmatch((pieces.first(text, "answer") or "").strip())
        form = said is not None and said[2] == "%" and pieces.thought_and_answer(text.strip(), think=think)
        return Parsed(progress=min(int(said[1]), 100) / 100 if said else None, well_formed=form)
