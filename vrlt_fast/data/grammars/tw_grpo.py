"""TW-GRPO (github.com/longmalongma/TW-GRPO): questions with one or more right options.

As the released rewards do, the form is looked for at the end of the text: anything may stand before it, white space and
"!" behind it, but no second think or answer tag. Letters are the set that commas part in the first answer tag, or
in the whole text without one. The prompt always says "letters", so that it doesn't tell how many are right.
"""

from __future__ import annotations

from vrlt_fast.data.grammars import pieces
from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.sample import LETTERS, Sample

_ASKS = {
    "videoqa": "Reply with the letter, or with letters and commas between them if several are right: "
    "<answer>letter or letters</answer>"
}


class TwGrpo(pieces.Wording):
    """One option or several."""

    name = "tw_grpo"
    asks = _ASKS

    def read(self, text: str, sample: Sample, *, think: bool) -> Parsed:
        """What a response says; letters in the order of the alphabet, each once."""
        text = pieces.readable(text)
        if sample.task not in self.asks:
            return Parsed()
        body = pieces.first(text, "answer")
        parts = {part.strip() for part in (text if body is None else body).replace(" ", "").split(",")}
        answer = ",".join(sorted(parts)) if parts <= set(LETTERS) else None
        return Parsed(answer, well_formed=_form(text, think=think))


def _form(text: str, *, think: bool) -> bool:
    if text.count("<think>") > 1 or text.count("<answer>") > 1:
        return False
    end = len(text)
    while end and (text[end - 1] == "!" or text[end - 1].isspace()):
        end -= 1
    begin = text.find("<think>" if think else "<answer>")
    return begin >= 0 and pieces.thought_and_answer(text[begin:end], think=think)
