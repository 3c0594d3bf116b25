"""VideoChat-R1 (github.com/OpenGVLab/VideoChat-R1): spans in a glue tag behind the answer, or
"start to end" in it, or a list of boxes.

As the released rewards do, the form is a full match of the stripped text, and the first glue tag must hold a list of
pairs that don't end before they start; ``[]`` is one. The letter is the first of A-G in the first answer tag, once
stock phrases are out, so one only; questions with more options have more letters. Spans of the task grounding are the
last "X to Y" or "X and Y" in the last answer tag. Boxes must fill the first answer tag, as many as asked for (there:
eight).
Options without spans: the paper has such questions, the code of their reward isn't released; ours is the letter alone.
"""

from __future__ import annotations

import re

from vrlt_fast.data.grammars import pieces
from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.sample import Box, Sample, Span

_ASKS = {
    "videoqa": "Reply with the letter of the option: <answer>letter</answer>",
    "grounding": "Reply with when it begins and ends, in seconds: <answer>start to end</answer>",
    "grounded_qa": (
        "Reply with the letter of the option, and with the list of the time spans, in seconds, that show it: "
        "<answer>letter</answer><glue>[(start, end), (start, end)]</glue>"
    ),
    "boxes": (
        "Reply with the box of the object at each of these seconds: {times}. "
        "Corners are shares of width and height: <answer>[[x0, y0, x1, y1], ...]</answer>"
    ),
}
_STOCK = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
)
_RANGE = re.compile(r"(?<![0-9])([0-9]++(?:\.[0-9]*+)?) (?:to|and) ([0-9]++(?:\.[0-9]*+)?)", re.IGNORECASE)
_CORNER = r"\s*+-?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)\s*+"
_BOX = rf"\s*+\[{_CORNER},{_CORNER},{_CORNER},{_CORNER},?+\s*+\]\s*+"
_BOXES = re.compile(rf"\[{_BOX}(?:,{_BOX})*+,?+\s*+\]")


class VideoChatR1(pieces.Wording):
    """Option, spans, both, and boxes."""

    name = "videochat_r1"
    asks = _ASKS
    single = True

    def write(self, sample: Sample, *, think: bool) -> str:
        """The right response. Raises as :meth:`check`."""
        self.check(sample)
        if sample.task == "grounding":
            return pieces.reply(sample, " to ".join(pieces.hull(sample.spans)), think=think)
        if sample.task == "boxes":
            return pieces.reply(sample, pieces.corners(sample.boxes, "[]"), think=think)
        glue = f"\n<glue>{pieces.glue(sample.spans)}</glue>" if sample.task == "grounded_qa" else ""
        return pieces.reply(sample, pieces.said(sample), think=think) + glue

    def read(self, text: str, sample: Sample, *, think: bool) -> Parsed:
        """What a response says."""
        text = pieces.readable(text)
        stripped = text.strip()
        form = pieces.thought_and_answer(stripped, think=think)
        if sample.task == "grounding":
            return Parsed(spans=_range(pieces.last(text, "answer") or ""), well_formed=form)
        body = pieces.first(text, "answer")
        if sample.task == "boxes":
            boxes = _boxes(body or "", sample)
            return Parsed(boxes=boxes, well_formed=form and boxes is not None)
        if sample.task == "videoqa":
            return Parsed(_letter(body or "", sample), well_formed=form)
        if sample.task == "grounded_qa":
            spans = pieces.read_glue(pieces.first(text, "glue"))
            form = pieces.glued(stripped, think=think) and spans is not None
            return Parsed(_letter(body or "", sample), spans, well_formed=form)
        return Parsed()


def _letter(body: str, sample: Sample) -> str | None:
    for phrase in _STOCK:
        body = body.replace(phrase, "")
    found = re.search(f"[{pieces.letters_of(sample, 'ABCDEFG')}]", body)
    return found[0] if found else None


def _range(body: str) -> tuple[Span, ...] | None:
    found = _RANGE.findall(body)
    return pieces.pair(*found[-1]) if found else None


def _boxes(body: str, sample: Sample) -> tuple[Box, ...] | None:
    body = body.replace("\n", "").strip()
    return pieces.read_boxes(body, sample) if _BOXES.fullmatch(body) else None
