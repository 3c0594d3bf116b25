"""Video-Thinker (github.com/shijian2001/Video-Thinker): a trace of times, captions and thoughts, then the answer.

The paper names the tags; its exact pattern isn't known to us, so this one is our choice: one or more time and caption
tags, a think tag behind them, this once or several times, then one answer tag, nothing but white space between and
around, and no tag inside another. Without thinking the whole trace is left out.
"""

from __future__ import annotations

import re

from vrlt_fast.data.grammars import pieces
from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.sample import Moment, Sample

_ASKS = {"videoqa": "Reply with the letter of the option: <answer>letter</answer>"}
_TAG = re.compile(r"<(/?)(time|caption|think|answer)>")
_SIGN = {"time": "t", "caption": "c", "think": "k", "answer": "a"}
_TRACE = re.compile(r"(?:(?:tTcC)++kK)++aA")


class VideoThinker(pieces.Wording):
    """Options, behind a trace."""

    name = "video_thinker"
    asks = _ASKS
    thinks = (
        "First name the parts of the video that matter, one after the other: <time>start to end</time>"
        "<caption>what is seen</caption>, and think about them between <think> and </think>. "
    )

    def write(self, sample: Sample, *, think: bool) -> str:
        """The right response, with the sample's timeline as trace. Raises as :meth:`check`."""
        self.check(sample)
        spans = sample.spans or ((0.0, sample.duration),)
        seen = pieces.thought(sample)
        moments = sample.timeline or tuple(Moment(start, end, seen) for start, end in spans)
        trace = "".join(
            f"<time>{' to '.join(pieces.borders(moment.start, moment.end))}</time>\n"
            f"<caption>{pieces.untagged(moment.text)}</caption>\n"
            for moment in moments
        )
        return (trace if think else "") + pieces.reply(sample, pieces.said(sample), think=think)

    def read(self, text: str, sample: Sample, *, think: bool) -> Parsed:
        """What the first answer tag says; letters must be alone in it."""
        text = pieces.readable(text)
        if sample.task not in self.asks:
            return Parsed()
        return Parsed(pieces.alone(pieces.first(text, "answer") or ""), well_formed=_form(text.strip(), think=think))


def _form(text: str, *, think: bool) -> bool:
    signs, at = [], 0
    for tag in _TAG.finditer(text):
        sign = _SIGN[tag[2]]
        if not tag[1] and text[at : tag.start()].strip():
            return False
        signs.append(sign.upper() if tag[1] else sign)
        at = tag.end()
    trace = "".join(signs)
    return at == len(text) and (_TRACE.fullmatch(trace) is not None if think else trace == "aA")
