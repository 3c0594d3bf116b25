"""Video-R1 (github.com/tulerfeng/Video-R1): a sentence a kind of question says what the answer tag
holds.

As the released rewards do, the form is a full match of think and answer tags on the text as it is, whatever they hold,
and the answer is what the first answer tag holds. Options are compared as text: "A,C" is read, "C,A" or "a" isn't.
"""

from __future__ import annotations

from vrlt_fast.data.grammars import pieces
from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.sample import Sample

_ASKS = {
    "videoqa": "Give only the letter of the option: <answer>letter</answer>",
    "number": "Give the number, like 42 or 3.14: <answer>number</answer>",
    "regression": "Give the number, like 42 or 3.14: <answer>number</answer>",
    "ocr": "Write down the text that is to be read: <answer>text</answer>",
    "open": "Give the answer as a text: <answer>text</answer>",
}


class VideoR1(pieces.Wording):
    """Options, numbers and texts."""

    name = "video_r1"
    asks = _ASKS
    thinks = (
        "Think about the question as a human would, with pauses and second thoughts (let me think, wait), and check "
        "your own reasoning. Put this between <think> and </think> first, then answer. "
    )

    def read(self, text: str, sample: Sample, *, think: bool) -> Parsed:
        """What a response says; for numbers only what is one of ASCII digits, commas included."""
        text = pieces.readable(text)
        if sample.task not in self.asks:
            return Parsed()
        answer = pieces.read_text(pieces.first(text, "answer"), sample)
        if answer is not None and sample.wants_answer and pieces.alone(answer) != answer:
            answer = None
        return Parsed(answer, well_formed=pieces.thought_and_answer(text, think=think))
