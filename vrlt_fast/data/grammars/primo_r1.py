"""PRIMO R1 (github.com/10-OASIS-01/PRIMO-R1): a plan, an observation and a reasoning inside the think tag.

As the released rewards do, the form is a full match of the text as it is, with nothing but white space around the
three tags, and the answer is what the first answer tag holds; letters may be lower case. Numbers in percent are shares,
as there. Of progress, "45%" and "45" are both 0.45; what isn't in 0..100 says nothing, while the code would still pay
110 for 100 in part.
"""

from __future__ import annotations

import re

from vrlt_fast.data.grammars import pieces
from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.sample import Sample

_ASKS = {
    "videoqa": "Give only the letter of the option: <answer>letter</answer>",
    "number": "Give the number: <answer>number</answer>",
    "regression": "Give the number: <answer>number</answer>",
    "ocr": "Write down the text that is to be read: <answer>text</answer>",
    "open": "Give the answer as a text: <answer>text</answer>",
    "progress": "Give how much of the task is done, in percent: <answer>number%</answer>",
}
_BEGIN = re.compile(r"<think>\s*+<planning>")
_OBSERVE = re.compile(r"</planning>\s*+<observation>")
_REASON = re.compile(r"</observation>\s*+<reasoning>")
_ANSWER = re.compile(r"</reasoning>\s*+</think>\s*+<answer>")


class PrimoR1(pieces.Wording):
    """Progress, options, numbers and texts."""

    name = "primo_r1"
    asks = _ASKS
    thinks = (
        "Think between <think> and </think> first, in three parts: <planning>the goal and its steps</planning>"
        "<observation>what is seen</observation><reasoning>what follows from it</reasoning>. "
    )

    def write(self, sample: Sample, *, think: bool) -> str:
        """The right response; a sample's own reasoning may have the three tags already. Raises as :meth:`check`."""
        self.check(sample)
        answer = f"<answer>{pieces.percentage(sample) if sample.task == 'progress' else pieces.said(sample)}</answer>"
        return f"<think>\n{_thought(sample)}\n</think>\n{answer}" if think else answer

    def read(self, text: str, sample: Sample, *, think: bool) -> Parsed:
        """What a response says."""
        text = pieces.readable(text)
        if sample.task not in self.asks:
            return Parsed()
        if think:
            form = pieces.in_order(text, _BEGIN, (_OBSERVE, _REASON, _ANSWER), "</answer>")
        else:
            form = pieces.thought_and_answer(text, think=False)
        body = (pieces.first(text, "answer") or "").strip()
        if sample.wants_answer:
            return Parsed(pieces.alone(body.upper()), well_formed=form)
        if sample.task == "progress":
            return Parsed(progress=_share(body), well_formed=form)
        if sample.task in pieces.NUMBER_TASKS:
            body = _number(body)
        return Parsed(pieces.read_text(body, sample), well_formed=form)


def _bare(body: str) -> str:
    return body.strip("\u2248~ ").replace("\uff05", "%")


def _share(body: str) -> float | None:
    body = _bare(body).removesuffix("%").strip()
    return pieces.percent(body) if pieces.is_number(body) else None


def _number(body: str) -> str:
    body = _bare(body)
    share = body.removesuffix("%").replace(",", "")
    return repr(float(share) / 100) if body.endswith("%") and pieces.is_number(share) else body


def _thought(sample: Sample) -> str:
    own = f"<think>{sample.reasoning}</think><answer></answer>"
    if not pieces.TAGS.search(sample.reasoning) and pieces.in_order(
        own, _BEGIN, (_OBSERVE, _REASON, _ANSWER), "</answer>"
    ):
        return sample.reasoning
    return (
        f"<planning>{pieces.untagged(sample.question)}</planning>\n"
        f"<observation>{pieces.thought(sample)}</observation>\n"
        f"<reasoning>{pieces.thought(sample)}</reasoning>"
    )
