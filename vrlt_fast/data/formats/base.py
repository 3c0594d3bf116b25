"""What the readers share: where to look for files, checked fields of an entry, samples, problems and counts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from vrlt_fast.data.fields import Line, as_number
from vrlt_fast.data.formats.entries import Entry, scan, scan_rows
from vrlt_fast.data.formats.media import Media, stem
from vrlt_fast.data.paths import Root, shorten
from vrlt_fast.data.sample import LETTERS, Sample, Span
from vrlt_fast.errors import DataError, Problem

_LATE, _EARLY = 1.0, 0.5  # seconds that a span may be outside the video, whose length is often rounded
_LABEL = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[.):])\s*")
_DURATION_FIX = "--durations FILE (a line VIDEO,SECONDS each, or JSON), or --videos DIR with the files themselves"


@dataclass(frozen=True)
class Context:
    """What a reader is told beside the file.

    ``durations`` has seconds by video, under its id or path; ``duration_of`` measures the file of a written path
    (raises DataError). ``split`` is part of the ids and names companion files; ``seed`` is for random choices.
    """

    media: Media = field(default_factory=Media)
    durations: Mapping[str, float] = field(default_factory=dict)
    duration_of: Callable[[str], float] | None = None
    split: str = ""
    seed: int = 0


class Output:
    """What a reader finds: ``samples``, ``problems``, how many entries were ``skipped`` for which reason, and how many
    were ``changed`` in which way.
    """

    def __init__(self, name: str, context: Context):
        self.name, self.context = name, context
        self.samples: list[Sample] = []
        self.problems: list[Problem] = []
        self.skipped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self._root = Root(Path())
        self._first: dict[str, str] = {}
        self._measured: dict[str, float | Problem] = {}

    def rows(self, path: Path) -> Iterator[Row]:
        """The objects of a JSON list, or one a line."""
        _, entries = scan_rows(path, self.problems)
        yield from self._objects(path, entries)

    def members(self, path: Path) -> Iterator[Row]:
        """The objects of a JSON object; ``key`` names each."""
        kind, entries = scan(path, self.problems)
        if kind != "object" and (entries or not self.problems):
            why = f"{self.name} files are an object with a member for each video"
            self.problems.append(Problem("VRLT-D15", "the file isn't a JSON object", f"{path.name}:1", why))
            return
        seen: dict[str, str] = {}
        for row in self._objects(path, entries):
            if seen.setdefault(row.key, row.where) != row.where:
                row.report("VRLT-D07", f"{shorten(row.key)} is there already", f"first in {seen[row.key]}")
            else:
                yield row

    def _objects(self, path: Path, entries: Sequence[Entry]) -> Iterator[Row]:
        if not entries and not self.problems:
            self.problems.append(Problem("VRLT-D01", "the annotation file has no entries", f"{path.name}:1"))
        for entry in entries:
            row = Row(self, entry.value, f"{path.name}:{entry.line}", entry.key)
            if isinstance(entry.value, dict):
                yield row
            else:
                row.report("VRLT-D15", f"the entry is {shorten(entry.value)}", "it must be a JSON object")

    def add(self, row: Row, key: str, fields: Mapping[str, Any]) -> None:
        """Take the sample with the ``fields`` of a line of JSONL (docs/data.md), unless ``row`` has a problem. ``key``
        makes its id.
        """
        if row.failed:
            return
        name = "-".join(part for part in (self.name, self.context.split, key) if part)
        given = {"id": name, "source": self.name, **fields}
        line = Line(given, row.where, self._root, check_files=False)
        sample = line.sample()
        if sample is None:
            self.problems += line.problems
        elif name in self._first:
            row.report("VRLT-D07", f"id {shorten(name)} is there already", f"first in {self._first[name]}")
        else:
            self._first[name] = row.where
            self.samples.append(sample)

    def seconds(self, path: str, names: Sequence[str]) -> float | Problem:
        """How long a video lasts, by its path, or the names that it has in the file."""
        for name in (*names, path, *(stem(name) for name in (*names, path))):
            if name in self.context.durations:
                return self.context.durations[name]
        if self.context.duration_of is None:
            return Problem("VRLT-D15", f"no duration of {shorten(path)}", "", f"{self.name} has none", _DURATION_FIX)
        if path not in self._measured:
            try:
                self._measured[path] = self.context.duration_of(path)
            except DataError as error:
                self._measured[path] = error.problems[0]
        return self._measured[path]


class Row:
    """An entry's fields. What is missing or wrong is reported with the line, and makes ``failed`` true; then values
    are empty.
    """

    def __init__(self, out: Output, fields: Any, where: str, key: str = ""):
        self.out, self.fields, self.where, self.key = out, fields, where, key
        self.failed = False

    def report(self, code: str, what: str, why: str = "", fix: str = "") -> None:
        self.failed = True
        self.out.problems.append(Problem(code, what, self.where, why, fix))

    def wrong(self, name: str, wanted: str) -> None:
        """Report that a field is missing or isn't what it should be."""
        if name in self.fields:
            self.report("VRLT-D03", f'"{name}" is {shorten(self.fields[name])}', f"it must be {wanted}")
        else:
            self.report("VRLT-D03", f'field "{name}" is missing', f"it must be {wanted}")

    def skip(self, reason: str) -> None:
        self.out.skipped[reason] += 1

    def text(self, *names: str) -> str:
        """The text of the first of these fields that is there."""
        name = next((name for name in names if name in self.fields), names[0])
        value = self.fields.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
        self.wrong(name, "a text that isn't empty")
        return ""

    def name(self, *names: str, otherwise: str = "") -> str:
        """An id: a text or a whole number; ``otherwise`` when no such field is there."""
        for name in names:
            value = self.fields.get(name)
            if isinstance(value, str) and value.strip():
                return value.strip()
            if type(value) is int and 0 <= value < 2**63:
                return str(value)
            if name in self.fields:
                self.wrong(name, "a text that isn't empty or a whole number")
                return ""
        if not otherwise:
            self.wrong(names[0], "a text that isn't empty or a whole number")
        return otherwise

    def number(self, name: str) -> float:
        value = as_number(self.fields.get(name))
        if value is None:
            self.wrong(name, "a number")
        return value or 0.0

    def texts(self, name: str) -> list[str]:
        value = self.fields.get(name)
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            return [text.strip() for text in value]
        self.wrong(name, "a list of texts")
        return []

    def items(self, name: str) -> list[Any]:
        value = self.fields.get(name)
        if isinstance(value, list):
            return value
        self.wrong(name, "a list")
        return []

    def video(self, name: str) -> str:
        """The written path of the video of that name."""
        return self._path(self.out.context.media.video, name)

    def image(self, name: str) -> str:
        return self._path(self.out.context.media.image, name)

    def _path(self, find: Callable[[str], str], name: str) -> str:
        try:
            return find(name) if name else ""
        except DataError as error:
            self.failed = True
            self.out.problems += [replace(problem, where=self.where) for problem in error.problems]
            return ""

    def duration(self, path: str, *names: str, field_name: str = "") -> float:
        """Seconds that the video lasts: the field, if the format has one, else as the context knows."""
        if field_name and field_name in self.fields:
            seconds = as_number(self.fields[field_name])
            if seconds is None or seconds <= 0:
                self.wrong(field_name, "a number of seconds above 0")
            return seconds or 0.0
        if not path:
            return 0.0
        found = self.out.seconds(path, names)
        if isinstance(found, Problem):
            self.failed = True
            self.out.problems.append(replace(found, where=self.where))
            return 0.0
        return found

    def spans(self, value: object, duration: float, what: str) -> list[Span]:
        """Sorted, disjoint spans in seconds. One that ends up to 1 s after the video, or begins up to 0.5 s before
        it, is cut there; ones that overlap are joined; both are counted.
        """
        if self.failed:
            return []
        if not isinstance(value, list) or not value:
            self.report("VRLT-D03", f"{what} is {shorten(value)}", "it must be a list of [start, end]")
            return []
        spans = [span for span in (self._span(pair, duration, what) for pair in value) if span]
        if self.failed:
            return []
        spans.sort()
        if any(a[1] > b[0] for a, b in pairwise(spans)):
            self.out.changed["overlapping spans joined"] += 1
            spans = _joined(spans)
        return spans

    def _span(self, pair: object, duration: float, what: str) -> Span | None:
        numbers = [as_number(x) for x in pair] if isinstance(pair, list) and len(pair) == 2 else []
        if len(numbers) != 2 or numbers[0] is None or numbers[1] is None:
            self.report("VRLT-D03", f"{what} has {shorten(pair)}", "a span is [start, end], two numbers")
            return None
        start, end = numbers[0], numbers[1]
        if duration < end <= duration + _LATE or -_EARLY <= start < 0:
            self.out.changed["spans cut at the border of their video"] += 1
            start, end = max(start, 0.0), min(end, duration)
        if start >= end:
            self.report("VRLT-D05", f"{what} has {shorten(pair)}", "it doesn't start before its end")
        elif start < 0 or end > duration:
            self.report("VRLT-D05", f"{what} has {shorten(pair)}", f"the video lasts {duration:g} s")
        return start, end

    def letter(self, answer: str, options: Sequence[str]) -> str:
        """The letters of right options, as "B" or "B,C", from how formats write them: B, (B), "B. text", or several
        letters with commas; else the option itself.
        """
        letters = [re.sub(r"[().:\s]", "", part) for part in answer.split(",")]
        if all(len(part) == 1 and part in LETTERS[: len(options)] for part in letters):
            return ",".join(sorted(set(letters)))
        label = _LABEL.match(answer)
        text = answer[label.end() :].strip() if label else ""
        if label and text in options and chr(65 + options.index(text)) == (label[1] or label[2]):
            return self.option(text, options)
        return self.option(answer, options)

    def option(self, answer: str, options: Sequence[str]) -> str:
        """The letter of the option that is the answer."""
        if self.failed:
            return ""
        if answer in options[: len(LETTERS)]:
            return LETTERS[options.index(answer)]
        self.report("VRLT-D06", f"answer {shorten(answer)} is not among the options", f"options: {shorten(options)}")
        return ""


def unlabelled(options: Sequence[str]) -> list[str]:
    """Options without their letters ("A. x", "(A) x", "A) x"), where every one has its own."""
    matches = [_LABEL.match(option) for option in options]
    if options and all(m and (m[1] or m[2]) == chr(65 + i) for i, m in enumerate(matches)):
        return [option[m.end() :].strip() for option, m in zip(options, matches, strict=True) if m]
    return list(options)


def asked_when(sentence: str) -> str:
    """The question for when a described thing happens; a text that is a question already stays."""
    text = sentence.strip()
    return text if text.endswith("?") or not text else f"When does this happen in the video: {text}"


def _joined(spans: Collection[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in spans:
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined
