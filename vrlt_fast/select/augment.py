"""Easier or harder versions of a sample, by how it compares to others (DeepVideo-R1, arXiv 2506.07464).

Delta is the mean reward of the last samples minus that of this one. A hard sample (above 0) is asked again with a hint,
the beginning of a reasoning that led to the answer; an easy one (below 0) with noise on its frames
(:func:`vrlt_fast.video.alter.noisy_frames`). The paper says that both grow with delta, but not how: that they grow
linearly up to :data:`SCALE` is our choice. Rewards here are shares of the highest that a sample can earn, so that
samples of several tasks can be compared.

A hint must not say the answer, or copying it would be rewarded. :func:`without_answer` takes out what says it word for
word; what follows from the rest is left, that is what a hint is for.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vrlt_fast.data.grammars.pieces import NUMBER_TASKS, first, untagged
from vrlt_fast.data.sample import LETTERS, TEXT_TASKS, Sample

SCALE = 0.5
"""Delta, as a share of the highest reward, at which hint and noise are as strong as the configuration allows."""
MARK = "…"
"""Stands where something was taken out."""

_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_DECIMALS = r"(?:\.\d+)?(?:[eE][+-]?\d{1,2}(?!\d))?"
_CLOCK = re.compile(r"(?<![\d.:])(?:(\d{1,2}):)?(\d{1,3}):(\d{2}(?:\.\d+)?)(?![\d:])")
_NUMBER = re.compile(
    rf"(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+){_DECIMALS}|\.\d+|\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE
)


class Window:
    """Mean rewards of the last ``size`` samples that were rolled out (the paper's is 100)."""

    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        self._means: deque[float] = deque(maxlen=size)

    def add(self, mean: float) -> None:
        """Count the mean reward of one sample's group."""
        self._means.append(mean)

    def delta(self, mean: float) -> float:
        """The mean of the window minus this one: above 0 for a hard sample; 0.0 while the window is empty."""
        return math.fsum(self._means) / len(self._means) - mean if self._means else 0.0

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as JSON."""
        return {"means": list(self._means)}

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`; of a longer window the newest are taken."""
        self._means = deque(map(float, state["means"]), maxlen=self._means.maxlen)


def hint_share(delta: float, *, hint: float, scale: float = SCALE) -> float:
    """Share of the reasoning to give away: ``hint * clip(delta / scale, 0, 1)``."""
    return hint * min(max(delta / scale, 0.0), 1.0)


def noise_sigma(delta: float, *, noise: float, scale: float = SCALE) -> float:
    """Deviation of the noise on frames, in the unit of ``noise``: ``noise * clip(-delta / scale, 0, 1)``."""
    return noise * min(max(-delta / scale, 0.0), 1.0)


def best_trace(responses: Sequence[str], rewards: Sequence[float], sample: Sample, *, above: float = 0.0) -> str | None:
    """What stands between the think tags of the response with the highest reward, of those that have such a text and
    earned more than ``above`` (then the first one); else the sample's own reasoning, or None.

    Args:
        above: what a wrong response can earn, as for its form, so that no hint leads to a wrong answer.
    """
    thoughts = [(first(text, "think") or "").strip() for text in responses]
    right = [place for place, reward in enumerate(rewards) if reward > above and thoughts[place]]
    if right:
        return thoughts[max(right, key=lambda place: (rewards[place], -place))]
    return sample.reasoning.strip() or None


def hint_for(sample: Sample, share: float, trace: str | None = None) -> Sample:
    """The sample with the beginning of ``trace`` (None: of its own reasoning) under its question, as "Hint: ...".

    Args:
        share: of the words of the trace, rounded down, once the answer is taken out; without a word to give the sample
            is returned as it is.
    """
    words = without_answer(sample.reasoning if trace is None else trace, sample).split()
    hint = " ".join(words[: math.floor(share * len(words) + 1e-9)])
    return replace(sample, question=f"{sample.question}\nHint: {hint}") if hint else sample


def without_answer(text: str, sample: Sample) -> str:
    """The text with :data:`MARK` wherever it says the sample's right answer, without tags and control tokens, and
    with single blanks for any white space.

    Taken out are, by task: right letters (capital ones that stand alone; small ones in brackets, or after "option" and
    the like) and the texts of right options; answers in words, whatever their case; numbers, times, corners and
    percentages that equal the right one to the digits that they have ("3", "3.3" and "00:03" for 3.27 seconds), in
    digits or, up to twenty, in words.
    """
    text = _plain(text)
    in_words = [*_phrases(sample), *_letters(sample)]
    removals = [_numbers(sample), *in_words] if sample.task in NUMBER_TASKS else [*in_words, _numbers(sample)]
    while True:
        before = text
        for remove in removals:
            text = remove(text)
        text = " ".join(text.split())
        if text == before:
            return text


_Removal = Callable[[str], str]


def _phrases(sample: Sample) -> list[_Removal]:
    said = [sample.options[LETTERS.index(letter)] for letter in sorted(sample.letters)]
    said += [sample.answer] if sample.task in TEXT_TASKS else []
    return [_without(_phrase(text)) for text in said if text.strip()]


def _phrase(text: str) -> re.Pattern[str]:
    """The words in any case, not as parts of words."""
    words = _plain(text)
    begin = r"(?<!\w)" if re.match(r"\w", words) else ""
    end = r"(?!\w)" if re.search(r"\w\Z", words) else ""
    return re.compile(begin + re.escape(words) + end, re.IGNORECASE)


def _plain(text: str) -> str:
    """The text on one line, without what a prompt reads as tags or control tokens."""
    return " ".join(untagged(text.replace("<|", "< |")).split())


def _letters(sample: Sample) -> list[_Removal]:
    if not sample.letters:
        return []
    some = "".join(sorted(sample.letters))
    alone = re.compile(rf"(?<!\w)[{some}](?!\w)")
    small = re.compile(
        rf"(?:(?<=[(\[{{])|(?<=option )|(?<=choice )|(?<=letter )|(?<=answer )|(?<=answer: )|(?<=answer is ))"
        rf"[{some}](?!\w)|(?<!\w)[{some}](?=[)\]}}])",
        re.IGNORECASE,
    )
    return [_without(alone), _without(small)]


def _without(pattern: re.Pattern[str]) -> _Removal:
    mark = " " if pattern.search(MARK) else MARK
    return lambda text: pattern.sub(mark, text)


def _numbers(sample: Sample) -> _Removal:
    values, shares = _values(sample)

    def says(value: float, half: float) -> bool:
        """Whether a number with an error of ``half`` at most is one of them; shares may be in percent, too."""
        near = any(abs(value - v) <= half + 1e-9 for v in values)
        return near or any(
            (half < 0.1 and abs(value - s) <= half + 1e-9) or abs(value - 100 * s) <= half + 1e-9 for s in shares
        )

    def number(match: re.Match[str]) -> str:
        text = match[0].lower()
        written = [str(_WORDS.index(text))] if text in _WORDS else [text, *text.split(",")]
        return MARK if any(says(*_read(one)) for one in written) else match[0]

    def clock(match: re.Match[str]) -> str:
        seconds, half = _read(match[3])
        total = 3600.0 * int(match[1] or 0) + 60.0 * int(match[2]) + seconds
        return MARK if says(total, half) else match[0]

    if not values and not shares:
        return lambda text: text
    return lambda text: _NUMBER.sub(number, _CLOCK.sub(clock, text))


def _read(text: str) -> tuple[float, float]:
    """A number as written, and half a unit of its last digit."""
    digits, _, exponent = text.lower().replace(",", "").partition("e")
    power = int(exponent or 0) - len(digits.partition(".")[2])
    return float(digits) * 10.0 ** int(exponent or 0), 0.5 * 10.0**power


def _values(sample: Sample) -> tuple[list[float], list[float]]:
    """Numbers that the right answer consists of, and those of them that are shares."""
    values: list[float] = []
    shares: list[float] = []
    if sample.task in NUMBER_TASKS:
        values += _as_number(sample.answer)
        shares += [v for v in values if 0 <= v <= 1]
    if sample.wants_spans:
        values += [border for span in sample.spans for border in span]
    if sample.task == "instance" and sample.object_id is not None:
        values.append(float(sample.object_id))
    if sample.task == "boxes":
        shares += [corner for box in sample.boxes for corner in (box.x0, box.y0, box.x1, box.y1)]
    if sample.task == "progress" and sample.progress is not None:
        shares.append(sample.progress)
    return values, shares


def _as_number(text: str) -> list[float]:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return []
    return [abs(value)] if math.isfinite(value) else []
