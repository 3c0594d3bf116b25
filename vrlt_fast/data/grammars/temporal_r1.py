"""Temporal-R1 (arXiv 2506.01908; github.com/appletea233/Temporal-R1): spans as JSON in the answer tag.

As the released rewards do, the form is a full match of the text as it is, so that a newline behind it is wrong, tags
inside the thought are not, and numbers must be in quotes; what is meant is read from the first answer tag, unquoted
too. The option is graded as text, upper or lower case, in brackets or not; without a tag the whole response is.
Grounded questions: the paper doesn't publish their tags; ours are the letter's, then VideoChat-R1's glue.
"""

from __future__ import annotations

import json
import re

from vrlt_fast.data.grammars import pieces
from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.sample import Sample, Span

_ASKS = {
    "videoqa": "Reply with the letter: <answer>letter</answer>",
    "grounding": 'Reply with the times in seconds: <answer>{"start_time": "start", "end_time": "end"}</answer>',
    "grounded_qa": (
        "Reply with the letter and the time spans in seconds: <answer>letter</answer><glue>[(start, end)]</glue>"
    ),
}
_OBJECT = re.compile(
    r'<answer>\s*+{\s*+"start_time"\s*+:\s*+"[0-9.]++"\s*+,\s*+"end_time"\s*+:\s*+"[0-9.]++"\s*+}\s*+</answer>'
)


class TemporalR1(pieces.Wording):
    """Option, spans, and both."""

    name = "temporal_r1"
    asks = _ASKS

    def write(self, sample: Sample, *, think: bool) -> str:
        """The right response. Raises as :meth:`check`."""
        self.check(sample)
        if sample.task == "grounding":
            start, end = pieces.hull(sample.spans)
            return pieces.reply(sample, f'{{"start_time": "{start}", "end_time": "{end}"}}', think=think)
        glue = f"<glue>{pieces.glue(sample.spans)}</glue>" if sample.task == "grounded_qa" else ""
        return pieces.reply(sample, pieces.said(sample), think=think) + glue

    def read(self, text: str, sample: Sample, *, think: bool) -> Parsed:
        """What a response says; any letters and spans are well-formed, whatever they are worth."""
        text = pieces.readable(text)
        if sample.task == "grounding":
            return Parsed(spans=_times(pieces.first(text, "answer") or ""), well_formed=_json_form(text, think=think))
        if sample.task == "grounded_qa":
            spans = pieces.read_glue(pieces.first(text, "glue"))
            form = pieces.glued(text, think=think) and spans is not None
            return Parsed(_graded(pieces.first(text, "answer") or ""), spans, well_formed=form)
        if sample.task == "videoqa":
            return Parsed(_graded(_answer_line(text)), well_formed=pieces.thought_and_answer(text, think=think))
        return Parsed()


def _graded(text: str) -> str | None:
    text = text.strip()
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    return pieces.alone(text.upper())


def _answer_line(text: str) -> str:
    """What the first answer tag within a line holds, or all."""
    for line in text.split("\n"):
        body = pieces.first(line, "answer")
        if body is not None:
            return body
    return text


def _json_form(text: str, *, think: bool) -> bool:
    begin = text.rfind("<answer>")
    if begin < 0 or not _OBJECT.fullmatch(text, begin):
        return False
    before = text[:begin]
    if not think:
        return not before
    return before.startswith("<think>") and before.rstrip().endswith("</think>")


def _times(body: str) -> tuple[Span, ...] | None:
    try:
        said = json.loads(body.strip())
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    start, end = (str(said.get(name)) for name in ("start_time", "end_time"))
    return pieces.pair(start, end)
