"""The grammar of responses, strict for the format part and lenient for what was meant."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vrlt_fast.data.sample import LETTERS, Sample, Span

LONGEST = 20_000
"""Characters of a response that are read; what is longer is malformed."""

_NUMBER = r"[0-9]{1,7}(?:\.[0-9]{1,6})?"
_THINK = r"<think>(?:(?!</?think>).)*</think>\s*"
_PAIR = rf"\(\s?{_NUMBER}\s?,\s?{_NUMBER}\s?\)"
_BODY = {
    "videoqa": rf"<answer>[{LETTERS}]</answer>",
    "grounding": rf"<answer>{_NUMBER} to {_NUMBER}</answer>",
    "grounded_qa": rf"<answer>[{LETTERS}]</answer>\s?<glue>\[{_PAIR}(?:,\s?{_PAIR})*\]</glue>",
}
_FORMAT = {
    (task, think): re.compile((_THINK if think else "") + body, re.DOTALL)
    for task, body in _BODY.items()
    for think in (False, True)
}
_ANSWER = re.compile(r"<answer>([^<]{0,200})</answer>")
_GLUE = re.compile(r"<glue>([^<]{0,2000})</glue>")
_LETTER = re.compile(rf"\s*\(?([{LETTERS}])(?:[).:]|\s*$)")
_RANGE = re.compile(rf"({_NUMBER})\s?(?:to|and|-)\s?({_NUMBER})")
_SPAN = re.compile(rf"\(\s?({_NUMBER})\s?,\s?({_NUMBER})\s?\)")


@dataclass(frozen=True)
class Parsed:
    """What a response says: the option's letter, the spans in seconds as written (None: not said), and its form."""

    answer: str | None
    spans: tuple[Span, ...] | None
    well_formed: bool


def parse(text: str, sample: Sample, *, think: bool) -> Parsed:
    """Read a response for a sample's task.

    ``well_formed`` asks for the whole text to follow the grammar, letters to be among the options and every span to
    start before it ends. Answer and spans are read from the last answer (and glue) tag even where the form is wrong.
    """
    readable = text if len(text) <= LONGEST else ""
    answer: str | None = None
    spans: tuple[Span, ...] | None = None
    answers = _ANSWER.findall(readable)
    body = answers[-1] if answers else ""
    if sample.wants_answer and (match := _LETTER.match(body)):
        answer = match[1]
    if sample.task == "grounding" and (match := _RANGE.search(body)):
        spans = ((float(match[1]), float(match[2])),)
    if sample.task == "grounded_qa" and (glues := _GLUE.findall(readable)):
        spans = tuple((float(s), float(e)) for s, e in _SPAN.findall(glues[-1])) or None
    form = _FORMAT[sample.task, think].fullmatch(readable.strip()) is not None
    letters = LETTERS[: len(sample.options)]
    form &= not sample.wants_answer or (answer is not None and answer in letters)
    form &= not sample.wants_spans or (spans is not None and all(s < e for s, e in spans))
    return Parsed(answer, spans, form)
