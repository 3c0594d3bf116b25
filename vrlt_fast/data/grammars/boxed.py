r"""The answer in ``\boxed{}``, as VST (github.com/1ranGuan/VST) and VerIPO (github.com/HITsz-TMG/VerIPO) ask for it.

As VST's released reward does, the letter is the first stand-alone one of A-E in the first box, or in the whole text
where there is no box; questions with more options have more letters. Numbers must be alone in the box. VST has its
format reward switched off; the form is our choice: one box, which ends the text (a full stop may follow), and a think
tag before it where there is thinking.
"""

from __future__ import annotations

import re

from vrlt_fast.data.grammars import pieces
from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.sample import Sample

_ASKS = {
    "videoqa": r"Put the letter of the option into a box: \boxed{letter}",
    "number": r"Put the number into a box: \boxed{number}",
}
_BOX = r"\boxed{"


class Boxed(pieces.Wording):
    """One option, or a number."""

    name = "boxed"
    asks = _ASKS
    single = True

    def write(self, sample: Sample, *, think: bool) -> str:
        """The right response. Raises as :meth:`check`."""
        self.check(sample)
        answer = f"{_BOX}{pieces.said(sample)}}}"
        thought = pieces.thought(sample).replace(_BOX, "boxed {")
        return f"<think>{thought}</think>\n{answer}" if think else answer

    def read(self, text: str, sample: Sample, *, think: bool) -> Parsed:
        """What a response says."""
        text = pieces.readable(text)
        if sample.task not in self.asks:
            return Parsed()
        box = _content(text)
        if sample.wants_answer:
            letters = pieces.letters_of(sample, "ABCDE")
            found = re.search(rf"\b[{letters}]\b", text if box is None else box)
            answer = found[0] if found else None
        else:
            answer = pieces.read_text(box, sample)
        rest = pieces.after_thought(text.strip(), think=think)
        form = rest is not None and answer is not None and text.count(_BOX) == rest.count(_BOX) == 1
        return Parsed(answer, well_formed=form and (rest or "").removesuffix(".").endswith("}"))


def _content(text: str) -> str | None:
    begin = text.find(_BOX)
    end = text.find("}", begin) if begin >= 0 else -1
    return text[begin + len(_BOX) : end] if end >= 0 else None
