"""STVG-R1 (github.com/XiaowZhang00/stvg-r1): the number that is drawn on the object, and when.

As the released reward does, both are read from the last answer tag, upper or lower case, "to" or "and"; where one is
missing, neither is said, and ``start > end`` is kept. The form is a full match of the stripped text, whatever the
answer tag holds. The paper also wants the number to be visible in the span; the code doesn't look, nor do we.
"""

from __future__ import annotations

import re

from vrlt_fast.data.grammars import pieces
from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.sample import Sample

_ASKS = {
    "instance": (
        "Each object has its number drawn on it. Reply with the number of the object, and with when it is, in seconds: "
        "<answer>Target ID: number; Time range: start to end</answer>"
    )
}
_ID = re.compile(r"Target ID:\s*+([0-9]++)", re.IGNORECASE)
_SECONDS = r"([0-9]++(?:\.[0-9]*+)?)"
_RANGE = re.compile(rf"Time range:\s*+{_SECONDS}\s*+(?:to|and)\s*+{_SECONDS}", re.IGNORECASE)


class StvgR1(pieces.Wording):
    """A numbered object and its span."""

    name = "stvg_r1"
    asks = _ASKS
    thinks = (
        "Think between <think> and </think> first: which times matter, and which of the numbered objects is meant. "
    )

    def body(self, sample: Sample) -> str:
        """What fills the answer tag of the right response."""
        span = " to ".join(pieces.hull(sample.spans))
        return f"Target ID: {sample.object_id}; Time range: {span}"

    def read(self, text: str, sample: Sample, *, think: bool) -> Parsed:
        """What a response says."""
        text = pieces.readable(text)
        if sample.task not in self.asks:
            return Parsed()
        body = pieces.last(text, "answer") or ""
        number, times = _ID.search(body), _RANGE.search(body)
        object_id = pieces.whole(number[1]) if number else None
        spans = pieces.pair(times[1], times[2]) if times else None
        form = pieces.thought_and_answer(text.strip(), think=think)
        if object_id is None or spans is None:
            return Parsed(well_formed=form)
        return Parsed(spans=spans, object_id=object_id, well_formed=form)
