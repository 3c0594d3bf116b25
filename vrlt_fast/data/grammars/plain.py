"""Our own grammar, with a form for every task: strict for the format part, lenient for what was meant.

What the answer tag holds is as short as can be; grounded questions add spans in a glue tag, as VideoChat-R1 does.
Questions with several right options aren't told from others ("letter" in both), so that the prompt doesn't give their
number away; "A,C" is read everywhere.
"""

from __future__ import annotations

import re

from vrlt_fast.data.grammars import pieces
from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.sample import LETTERS, TEXT_TASKS, Box, Sample, Span

_NUMBER = r"[0-9]{1,7}(?:\.[0-9]{1,6})?"
_PAIR = rf"\(\s?{_NUMBER}\s?,\s?{_NUMBER}\s?\)"
_BOX = rf"\({_NUMBER}(?:,\s?{_NUMBER}){{3}}\)"
_CHOICE = rf"<answer>[{LETTERS}](?:,\s?[{LETTERS}]){{0,7}}</answer>"
_FORMAT = {
    "videoqa": re.compile(_CHOICE),
    "grounding": re.compile(rf"<answer>{_NUMBER} to {_NUMBER}</answer>"),
    "grounded_qa": re.compile(rf"{_CHOICE}\s?<glue>\[{_PAIR}(?:,\s?{_PAIR})*+\]</glue>"),
    "boxes": re.compile(rf"<answer>\[{_BOX}(?:,\s?{_BOX})*+\]</answer>"),
    "instance": re.compile(rf"<answer>[0-9]{{1,10}}, {_NUMBER} to {_NUMBER}</answer>"),
    "progress": re.compile(r"<answer>[0-9]{1,3}%</answer>"),
}
_ANSWER = re.compile(r"<answer>([^<]{0,200})</answer>")
_GLUE = re.compile(r"<glue>([^<]*+)</glue>")
_LETTER = re.compile(rf"\s*+\(?([{LETTERS}])(?:[).:]|\s*+$)")
_RANGE = re.compile(rf"({_NUMBER})\s?(?:to|and|-)\s?({_NUMBER})")
_SPAN = re.compile(rf"\(\s?({_NUMBER})\s?,\s?({_NUMBER})\s?\)")
_ID = re.compile(r"[^0-9]{0,20}([0-9]{1,10})(?![0-9.])\s?+[,;:]?+\s?+([^\n]*)")
_ASKS = {
    "videoqa": "Reply with the letter: <answer>letter</answer>",
    "grounding": "Reply with the time span in seconds: <answer>start to end</answer>",
    "grounded_qa": (
        "Reply with the letter and the time spans in seconds: <answer>letter</answer><glue>[(start, end)]</glue>"
    ),
    "number": "Reply with the number: <answer>number</answer>",
    "regression": "Reply with the number: <answer>number</answer>",
    "ocr": "Reply with the text that is to be read: <answer>text</answer>",
    "open": "Reply in a few words: <answer>text</answer>",
    "boxes": (
        "Reply with the box of the object at each of these seconds: {times}. "
        "Corners are shares of width and height, from the top left: <answer>[(x0, y0, x1, y1), ...]</answer>"
    ),
    "instance": (
        "Reply with the number of the object and the time span in seconds: <answer>number, start to end</answer>"
    ),
    "progress": "Reply with how much is done, in whole percent: <answer>number%</answer>",
}


class Plain(pieces.Wording):
    """Asks for, writes and reads all tasks."""

    name = "plain"
    asks = _ASKS

    def write(self, sample: Sample, *, think: bool) -> str:
        """The right response. Raises as :meth:`check`."""
        self.check(sample)
        glue = f"<glue>{pieces.glue(sample.spans)}</glue>" if sample.task == "grounded_qa" else ""
        return pieces.reply(sample, _body(sample), think=think) + glue

    def read(self, text: str, sample: Sample, *, think: bool) -> Parsed:
        """What a response says, from the last answer (and glue) tag even where the form is wrong.

        ``well_formed`` asks for the whole text to follow the grammar, letters to be different and among the options,
        every span to start before it ends, boxes to be as many as asked and percent to be 0..100.
        """
        text = pieces.readable(text)
        if sample.task not in self.asks:
            return Parsed()
        rest = pieces.after_thought(text.strip(), think=think)
        if sample.task in TEXT_TASKS:
            return _read_text(text, rest, sample)
        form = rest is not None and _FORMAT[sample.task].fullmatch(rest) is not None
        return _read_form(text, sample, form=form)


def _body(sample: Sample) -> str:
    if sample.task == "boxes":
        return pieces.corners(sample.boxes)
    if sample.task == "progress":
        return pieces.percentage(sample)
    if sample.task in ("grounding", "instance"):
        span = " to ".join(pieces.hull(sample.spans))
        return span if sample.task == "grounding" else f"{sample.object_id}, {span}"
    return pieces.said(sample)


def _read_text(text: str, rest: str | None, sample: Sample) -> Parsed:
    body = (pieces.innermost(text, "answer") or "").strip()
    answer = (pieces.only_number(body) if sample.task in pieces.NUMBER_TASKS else body) or None
    inside = rest[8:-9] if rest is not None and pieces.thought_and_answer(rest, think=False) else ""
    form = answer is not None and inside.strip() == answer and not pieces.TAGS.search(inside)
    return Parsed(answer=answer, well_formed=form)


def _read_form(text: str, sample: Sample, *, form: bool) -> Parsed:
    bodies = _ANSWER.findall(text) if sample.task != "boxes" else [pieces.innermost(text, "answer") or ""]
    body = bodies[-1] if bodies else ""
    if sample.task == "boxes":
        boxes = pieces.read_boxes(body, sample)
        return Parsed(boxes=boxes, well_formed=form and boxes is not None and all(map(_inside, boxes)))
    if sample.task == "progress":
        progress = pieces.percent(body)
        return Parsed(progress=progress, well_formed=form and progress is not None)
    object_id: int | None = None
    if sample.task == "instance":
        match = _ID.match(body)
        object_id = pieces.whole(match[1]) if match else None
        body = match[2] if match else ""
        form &= object_id is not None
    answer = _answer(body) if sample.wants_answer else None
    spans = _spans(text, body, sample.task) if sample.wants_spans else None
    form &= pieces.fits(answer, sample)
    form &= spans is not None if sample.wants_spans else True
    return Parsed(answer, spans, object_id=object_id, well_formed=form and all(s < e for s, e in spans or ()))


def _answer(body: str) -> str | None:
    if "," in body and (several := pieces.alone(body)):
        return several
    match = _LETTER.match(body)
    return match[1] if match else None


def _spans(text: str, body: str, task: str) -> tuple[Span, ...] | None:
    if task == "grounded_qa":
        glues = _GLUE.findall(text)
        return tuple((float(s), float(e)) for s, e in _SPAN.findall(glues[-1])) or None if glues else None
    match = _RANGE.search(body)
    return ((float(match[1]), float(match[2])),) if match else None


def _inside(box: Box) -> bool:
    return 0.0 <= box.x0 < box.x1 <= 1.0 and 0.0 <= box.y0 < box.y1 <= 1.0
