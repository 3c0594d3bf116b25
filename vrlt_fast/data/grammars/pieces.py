"""What the grammars share: finding tags, reading numbers, writing spans, boxes and thoughts.

Tags are found with ``str.find`` and the patterns have possessive quantifiers (``*+``): no text takes more than linear
time. Numbers are of ASCII digits, finite and at most :data:`LARGEST`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from vrlt_fast.data.grammars.base import LONGEST
from vrlt_fast.data.sample import LETTER_TASKS, LETTERS, SPAN_TASKS, TEXT_TASKS, Box, Sample, Span
from vrlt_fast.errors import DataError, Problem

LARGEST = 1e9
"""Seconds, ids and coordinates above this count as not said, so that sums of them stay finite."""
NUMBER_TASKS = ("number", "regression")
TAGS = re.compile(r"<(/?(?:think|answer|glue))>")
THEN_ANSWER = re.compile(r"</think>\s*+<answer>")

_NUMBER = re.compile(r"[+-]?(?:[0-9][0-9,]*+(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]{1,3})?")
_THEN_GLUE = re.compile(r"</answer>\s*+<glue>")
_SECONDS = r"(?:[0-9]++\.[0-9]++|0++|[1-9][0-9]*+)"
_GLUE = re.compile(rf"\[(?:\({_SECONDS},\s*+{_SECONDS}\)(?:,\s*+\({_SECONDS},\s*+{_SECONDS}\))*+,?)?\]")
_PAIR = re.compile(r"\(([0-9.]++),\s*+([0-9.]++)\)")
_ANY_TAG = re.compile(r"<(/?(?:think|answer|glue|time|caption|planning|observation|reasoning))>")
_CORNER = r"\s*+(-?[0-9.]++)\s*+"
_BOX = re.compile(rf"[\[(]{_CORNER},{_CORNER},{_CORNER},{_CORNER}[\])]")


class Wording:
    """The half of a grammar (:class:`vrlt_fast.data.grammars.base.Grammar`) that asks, and writes what is a thought and
    an answer tag; a subclass a system.
    """

    name: str
    asks: Mapping[str, str]
    thinks: str = "Think step by step between <think> and </think> first. "
    single: bool = False

    def ask(self, sample: Sample, *, think: bool) -> str:
        """How to reply to this question. Raises as :meth:`check`."""
        self.check(sample)
        return (self.thinks if think else "") + self.asks[sample.task].replace("{times}", times(sample))

    def body(self, sample: Sample) -> str:
        """What fills the answer tag of the right response."""
        return said(sample)

    def write(self, sample: Sample, *, think: bool) -> str:
        """The right response. Raises as :meth:`check`."""
        self.check(sample)
        return reply(sample, self.body(sample), think=think)

    def check(self, sample: Sample) -> None:
        """Raises DataError D14 for a sample whose right answer this grammar has no form for."""
        several = self.single and len(sample.letters) > 1
        if sample.task in self.asks and not several:
            return
        from vrlt_fast.data.grammars.named import GRAMMARS

        fit = [name for name, g in GRAMMARS.items() if sample.task in g.asks and not (several and g.single)]
        raise DataError(
            Problem(
                "VRLT-D14",
                f"grammar {self.name} has no form for " + ("several right letters" if several else sample.task),
                sample.line or sample.id,
                "it reads one letter of a response" if several else f"its tasks are {', '.join(self.asks)}",
                f"set prompt.grammar to one of {', '.join(fit)}, or leave such samples out (data.tasks)",
            )
        )


def readable(text: str) -> str:
    """The text, or nothing where it is too long to be read."""
    return text if len(text) <= LONGEST else ""


def first(text: str, tag: str) -> str | None:
    """What the first ``<tag>`` that is closed holds, up to the next ``</tag>``; None: there is none."""
    begin = text.find(f"<{tag}>")
    if begin < 0:
        return None
    begin += len(tag) + 2
    end = text.find(f"</{tag}>", begin)
    return text[begin:end] if end >= 0 else None


def last(text: str, tag: str) -> str | None:
    """What the last of ``<tag>...</tag>`` holds, counted from the left: an opening tag inside belongs to it."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    found, at = None, 0
    while (begin := text.find(opening, at)) >= 0:
        begin += len(opening)
        end = text.find(closing, begin)
        if end < 0:
            break
        found, at = text[begin:end], end + len(closing)
    return found


def innermost(text: str, tag: str) -> str | None:
    """What stands between the last ``</tag>`` and the ``<tag>`` next before it."""
    end = text.rfind(f"</{tag}>")
    begin = text.rfind(f"<{tag}>", 0, end) if end >= 0 else -1
    return text[begin + len(tag) + 2 : end] if begin >= 0 else None


def in_order(text: str, begin: str | re.Pattern[str], middle: Sequence[re.Pattern[str]], end: str) -> bool:
    """Whether a text starts with ``begin``, ends with ``end`` and has all of ``middle`` in this order between them,
    with anything around each: the full match of ``begin.*?middle.*?end``, in linear time.
    """
    start = re.match(re.escape(begin), text) if isinstance(begin, str) else begin.match(text)
    if start is None or not text.endswith(end):
        return False
    at = start.end()
    for mark in middle:
        found = mark.search(text, at)
        if found is None:
            return False
        at = found.end()
    return at <= len(text) - len(end)


def thought_and_answer(text: str, *, think: bool) -> bool:
    """The full match of ``<think>.*?</think>\\s*<answer>.*?</answer>``, without thinking of the answer's part."""
    if think:
        return in_order(text, "<think>", (THEN_ANSWER,), "</answer>")
    return in_order(text, "<answer>", (), "</answer>")


def after_thought(text: str, *, think: bool) -> str | None:
    """What follows the think block that the text starts with, in which no think tag may stand; None: no such block."""
    if not think:
        return text
    if not text.startswith("<think>"):
        return None
    end = text.find("</think>")
    return text[end + 8 :].lstrip() if end >= 0 and text.find("<think>", 7, end) < 0 else None


def glued(text: str, *, think: bool) -> bool:
    """The full match of think, answer and glue tags in this order, without thinking of the latter two."""
    if think:
        return in_order(text, "<think>", (THEN_ANSWER, _THEN_GLUE), "</glue>")
    return in_order(text, "<answer>", (_THEN_GLUE,), "</glue>")


def read_glue(body: str | None) -> tuple[Span, ...] | None:
    """The pairs of VideoChat-R1's glue list, in which none ends before it starts; None: it isn't such a list."""
    if body is None or not _GLUE.fullmatch(body.removesuffix("\n")):
        return None
    spans: list[Span] = []
    for match in _PAIR.finditer(body):
        span = pair(match[1], match[2])
        if span is None or span[0][0] > span[0][1]:
            return None
        spans += span
    return tuple(spans)


def number(text: str) -> float | None:
    """A number that fills the text, of ASCII digits, finite and not above :data:`LARGEST`."""
    text = text.strip()
    match = _NUMBER.fullmatch(text)
    value = float(text) if match and "," not in text else math.inf
    return value if abs(value) <= LARGEST else None


def is_number(text: str) -> bool:
    """Whether the text is a finite number of ASCII digits; commas between digits are allowed."""
    return _NUMBER.fullmatch(text) is not None and math.isfinite(float(text.replace(",", "")))


def only_number(text: str) -> str | None:
    """The one number that the text has, as written; None: it has none, or several."""
    found = [match[0].rstrip(",") for match in _NUMBER.finditer(text)]
    return found[0] if len(found) == 1 and is_number(found[0]) else None


def whole(text: str) -> int | None:
    """A whole number of ASCII digits, not above :data:`LARGEST`."""
    value = number(text) if text.isascii() and text.isdigit() else None
    return None if value is None else int(value)


def pair(start: str, end: str) -> tuple[Span, ...] | None:
    """One span from two numbers as written."""
    numbers = number(start), number(end)
    return None if numbers[0] is None or numbers[1] is None else ((numbers[0], numbers[1]),)


def percent(text: str) -> float | None:
    """The one number of the text as a share, if it is in 0..100."""
    found = only_number(text)
    value = float(found.replace(",", "")) / 100 if found else math.inf
    return value if 0.0 <= value <= 1.0 else None


def read_boxes(text: str, sample: Sample) -> tuple[Box, ...] | None:
    """Boxes ``(x0, y0, x1, y1)``, in either kind of brackets, for the times that the sample asks for; None: there
    aren't as many as times.
    """
    found = [[number(corner) for corner in match] for match in _BOX.findall(text)]
    boxes = [[corner for corner in box if corner is not None] for box in found]
    if len(boxes) != len(sample.boxes) or any(len(box) < 4 for box in boxes):
        return None
    return tuple(Box(asked.time, *box) for asked, box in zip(sample.boxes, boxes, strict=True))


def alone(text: str) -> str | None:
    """Different letters of options that fill the text, in the order of the alphabet ("A,C"), as a sample has them."""
    letters = [part.strip() for part in text.split(",", len(LETTERS))]
    return ",".join(sorted(letters)) if len(set(letters) & set(LETTERS)) == len(letters) else None


def letters_of(sample: Sample, least: str) -> str:
    """The letters that can be read: ``least``, or more where the question has more options."""
    return LETTERS[: max(len(least), len(sample.options))]


def seconds(value: float) -> str:
    return f"{value:.1f}"


def borders(start: float, end: float, digits: int = 1) -> tuple[str, str]:
    """Start and end with so many decimals, or with as many as keep a short span from becoming empty, up to 6."""
    for count in range(digits, 7):
        if f"{start:.{count}f}" != f"{end:.{count}f}":
            return f"{start:.{count}f}", f"{end:.{count}f}"
    return f"{start:.6f}", f"{float(f'{start:.6f}') + 1e-6:.6f}"


def hull(spans: Sequence[Span]) -> tuple[str, str]:
    """From the start of the first to the end of the last."""
    return borders(spans[0][0], spans[-1][1])


def glue(spans: Sequence[Span]) -> str:
    """``[(1.0, 2.5), (4.0, 5.0)]``."""
    return "[" + ", ".join(f"({', '.join(borders(s, e))})" for s, e in spans) + "]"


def corners(boxes: Sequence[Box], brackets: str = "()") -> str:
    """``[(0.100, 0.200, 0.300, 0.400)]``."""
    written = []
    for box in boxes:
        (x0, x1), (y0, y1) = borders(box.x0, box.x1, 3), borders(box.y0, box.y1, 3)
        written.append(f"{brackets[0]}{x0}, {y0}, {x1}, {y1}{brackets[1]}")
    return "[" + ", ".join(written) + "]"


def said(sample: Sample) -> str:
    """The right letters, or the answer of the TEXT_TASKS: numbers in ASCII digits, tags in round brackets."""
    answer = sample.answer.strip()
    if sample.task in NUMBER_TASKS and not is_number(answer):
        return repr(float(answer.replace(",", "")))
    return TAGS.sub(r"(\1)", answer)


def read_text(body: str | None, sample: Sample) -> str | None:
    """The answer of the TEXT_TASKS that fills a tag; None: nothing there, or no number where one is asked for."""
    body = (body or "").strip()
    return None if not body or (sample.task in NUMBER_TASKS and not is_number(body)) else body


def reply(sample: Sample, body: str, *, think: bool) -> str:
    """An answer tag, behind a think tag where there is thinking."""
    answer = f"<answer>{body}</answer>"
    return f"<think>{thought(sample)}</think>\n{answer}" if think else answer


def percentage(sample: Sample) -> str:
    return f"{round(100 * (sample.progress or 0.0))}%"


def times(sample: Sample) -> str:
    """The times at which boxes are asked for, in seconds."""
    return ", ".join(f"{box.time:.6f}".rstrip("0").rstrip(".") for box in sample.boxes)


def thought(sample: Sample) -> str:
    """The sample's reasoning, or its answer in words; no tags of any grammar are in it."""
    return untagged(sample.reasoning or ", ".join(_facts(sample)))


def untagged(text: str) -> str:
    """The text with the grammars' tags in round brackets, so that they are none."""
    return _ANY_TAG.sub(r"(\1)", text)


def _facts(sample: Sample) -> list[str]:
    facts = [sample.options[LETTERS.index(letter)] for letter in sorted(sample.letters)]
    if sample.task in TEXT_TASKS:
        facts.append(sample.answer)
    if sample.task == "instance":
        facts.append(f"object {sample.object_id}")
    if sample.task in SPAN_TASKS:
        facts += [f"from {seconds(s)} to {seconds(e)} seconds" for s, e in sample.spans]
    if sample.task == "boxes":
        facts += [f"at {seconds(box.time)} seconds" for box in sample.boxes]
    if sample.task == "progress":
        facts.append(f"{percentage(sample)} done")
    return facts


def fits(answer: str | None, sample: Sample) -> bool:
    """Whether letters, of a task that asks for them, are among the sample's options."""
    if sample.task not in LETTER_TASKS:
        return True
    return answer is not None and set(answer.split(",")) <= set(LETTERS[: len(sample.options)])
