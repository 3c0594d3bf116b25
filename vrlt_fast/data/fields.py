"""One line of JSONL: checks every field and makes the :class:`Sample`. docs/data.md describes the schema."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

from vrlt_fast.data.paths import Root, shorten
from vrlt_fast.data.sample import (
    LETTER_TASKS,
    LETTERS,
    SPAN_TASKS,
    TASKS,
    TEXT_TASKS,
    Box,
    Instance,
    Moment,
    Sample,
    Span,
)
from vrlt_fast.errors import Problem

FIELDS = (
    "id", "video", "duration", "task", "question", "options", "answer", "spans",
    "images", "boxes", "object_id", "progress", "instances", "difficulty", "source", "reasoning", "timeline",
)  # fmt: skip
_OF_TASK = {"options": LETTER_TASKS, "answer": (*LETTER_TASKS, *TEXT_TASKS), "spans": SPAN_TASKS}
_NEEDED = {"boxes": "boxes", "instance": "object_id", "progress": "progress"}
_BOX = ("time", "x0", "y0", "x1", "y1")
_SPECIAL = re.compile(r"<\|[a-z_]+\|>")
_TAGS = re.compile(r"</?(?:think|answer|glue)>")
_NUMBER = re.compile(r"[+-]?(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_ROUNDING = 1e-6  # seconds


class Line:
    """The fields of one line. Problems gather in ``problems``; a value that has one is replaced by an empty value."""

    def __init__(self, fields: Mapping[str, Any], where: str, root: Root, *, check_files: bool):
        self.fields, self.where, self.root, self.check_files = fields, where, root, check_files
        self.problems: list[Problem] = []

    def report(self, code: str, what: str, why: str = "", fix: str = "") -> None:
        self.problems.append(Problem(code, what, self.where, why, fix))

    def sample(self) -> Sample | None:
        """The sample; None when there are problems."""
        for name in self.fields:
            if name not in FIELDS:
                near = _near(name, FIELDS)
                self.report("VRLT-D11", f"unknown field {shorten(name)}", fix=near or "fields: " + ", ".join(FIELDS))
        task, duration = self.task(), self.duration()
        made = Sample(
            id=self.text("id"),
            video=self.path("video"),
            duration=duration,
            task=task,
            question=self.text("question"),
            options=self.options(task),
            answer=self.answer(task),
            spans=self.spans(task, duration),
            images=self.images(),
            boxes=self.boxes("boxes", self.fields.get("boxes", []), duration),
            object_id=self.whole("object_id", self.fields.get("object_id")),
            progress=self.share("progress"),
            instances=self.instances(duration),
            difficulty=self.share("difficulty"),
            source=self.text("source") if "source" in self.fields else "",
            reasoning=self.reasoning(),
            timeline=self.timeline(duration),
            line=self.where,
        )
        return None if self.problems else made

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            self.wrong(name, "a text that isn't empty")
            return ""
        return self.clean(name, value)

    def clean(self, name: str, value: str) -> str:
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            self.report("VRLT-D02", f'"{name}" has half a surrogate pair', "such a text can't be written as UTF-8")
        if "<|" in value and name not in ("id", "video", "images"):
            found = _SPECIAL.search(value)
            if found:
                why = "the tokenizer would read it as a control token of the prompt"
                self.report("VRLT-D09", f'"{name}" contains {found.group()}', why, "remove it from the text")
        return value

    def wrong(self, name: str, wanted: str) -> None:
        if name not in self.fields:
            near = _near(name, tuple(key for key in self.fields if key not in FIELDS))
            self.report("VRLT-D03", f'field "{name}" is missing', fix=f"add {name}: {wanted}" if not near else "")
        else:
            self.report("VRLT-D03", f'"{name}" is {shorten(self.fields[name])}', f"it must be {wanted}")

    def path(self, name: str) -> str:
        value = self.text(name)
        return self.confine(value) if value else ""

    def confine(self, path: str) -> str:
        problem = self.root.problem(path, self.where, check_files=self.check_files)
        if problem:
            self.problems.append(problem)
        return path

    def duration(self) -> float:
        """Seconds; nan when unusable, so that comparisons with it report nothing more."""
        value = as_number(self.fields.get("duration"))
        if value is None or value <= 0:
            self.wrong("duration", "a number of seconds above 0")
            return math.nan
        return value

    def task(self) -> str:
        value = self.fields.get("task")
        if isinstance(value, str) and value in TASKS:
            for name, tasks in _OF_TASK.items():
                if value not in tasks and self.fields.get(name):
                    fix = f"remove it, or set task to {' or '.join(tasks)}"
                    self.report("VRLT-D11", f'"{name}" doesn\'t belong to task {value}', fix=fix)
            needed = _NEEDED.get(value, "")
            if needed and self.fields.get(needed) in (None, []):
                self.report("VRLT-D03", f'field "{needed}" is missing', f"task {value} asks for it", f"add {needed}")
            return value
        if isinstance(value, str):
            self.report(
                "VRLT-D04", f"unknown task {shorten(value)}", fix=_near(value, TASKS) or "tasks: " + ", ".join(TASKS)
            )
        else:
            self.wrong("task", "one of " + ", ".join(TASKS))
        return ""

    def options(self, task: str) -> tuple[str, ...]:
        if task not in _OF_TASK["options"]:
            return ()
        value = self.fields.get("options")
        if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
            self.wrong("options", f"a list of 2 to {len(LETTERS)} texts")
            return ()
        if not 2 <= len(value) <= len(LETTERS):
            self.report("VRLT-D06", f"{len(value)} options", f"a question has 2 to {len(LETTERS)} options")
        stripped = [option.strip() for option in value]
        if not all(stripped) or len(set(stripped)) < len(stripped):
            self.report("VRLT-D06", "an option is empty or there twice", f"options: {shorten(value, 200)}")
        return tuple(self.clean("options", option) for option in value)

    def answer(self, task: str) -> str:
        if task not in _OF_TASK["answer"]:
            return ""
        if task in TEXT_TASKS:
            return self.text_answer(task)
        value, options = self.fields.get("answer"), self.fields.get("options")
        if not isinstance(value, str):
            self.wrong("answer", 'the letter of an option, or several: "A,C"')
            return ""
        count = min(len(options), len(LETTERS)) if isinstance(options, list) else len(LETTERS)
        letters = value.split(",")
        if len(value) > 2 * len(LETTERS) or letters != sorted(set(letters) & set(LETTERS[:count])):
            fix = ""
            if isinstance(options, list) and value in options[: len(LETTERS)]:
                fix = f'give the letter: "{LETTERS[options.index(value)]}"'
            elif value.upper() in tuple(LETTERS[:count]):
                fix = f'capital letter: "{value.upper()}"'
            allowed = f"letters of the options: {LETTERS[:count]}; several in their order, with commas"
            self.report("VRLT-D06", f"answer {shorten(value)} is not among the options", allowed, fix)
        return value

    def text_answer(self, task: str) -> str:
        """Of a task without options."""
        value = self.text("answer")
        if value and task in ("number", "regression") and not _is_number(value):
            self.report("VRLT-D03", f'"answer" is {shorten(value)}', f"task {task} wants a number, as a text")
        if _TAGS.search(value):
            self.report("VRLT-D03", '"answer" has think or answer tags', "the trainer writes them", "remove them")
        return value

    def spans(self, task: str, duration: float) -> tuple[Span, ...]:
        if task not in _OF_TASK["spans"]:
            return ()
        value = self.fields.get("spans")
        if not isinstance(value, list):
            self.wrong("spans", "a list of [start, end] in seconds")
            return ()
        if not value:
            self.report("VRLT-D05", "no spans", f"task {task} asks for them", "add [[start, end]], in seconds")
        spans = []
        for pair in value:
            numbers = [as_number(x) for x in pair] if isinstance(pair, list) and len(pair) == 2 else []
            if len(numbers) != 2 or numbers[0] is None or numbers[1] is None:
                self.report(
                    "VRLT-D03", f'"spans" has {shorten(pair)}', "a span is [start, end], two numbers of seconds"
                )
                continue
            start, end = numbers[0], numbers[1]
            if start >= end:
                self.report("VRLT-D05", f"span [{start:g}, {end:g}] doesn't start before its end")
            elif start < 0 or end > duration + _ROUNDING:
                self.report(
                    "VRLT-D05", f"span [{start:g}, {end:g}] is outside the video", f"which lasts {duration:g} s"
                )
            spans.append((start, end))
        spans.sort()
        if any(a[1] > b[0] for a, b in pairwise(spans)):
            self.report("VRLT-D05", "spans overlap", shorten(value), "join them into one")
        return tuple(spans)

    def images(self) -> tuple[str, ...]:
        value = self.fields.get("images", [])
        if not isinstance(value, list) or not all(isinstance(path, str) and path for path in value):
            self.wrong("images", "a list of paths")
            return ()
        return tuple(self.confine(self.clean("images", path)) for path in value)

    def boxes(self, field: str, value: object, duration: float) -> tuple[Box, ...]:
        if not isinstance(value, list):
            self.report("VRLT-D03", f'"{field}" has {shorten(value)}', "it must be a list of boxes")
            return ()
        boxes = []
        for item in value:
            numbers = [as_number(item.get(name)) for name in _BOX] if isinstance(item, dict) else [None]
            values = [number for number in numbers if number is not None]
            if len(values) != len(numbers) or len(item) != len(_BOX):
                self.report("VRLT-D03", f'"{field}" has {shorten(item)}', "a box has the numbers " + ", ".join(_BOX))
                continue
            box = Box(*values)
            inside = 0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1
            if not inside or box.time < 0 or box.time > duration + _ROUNDING:
                why = "0 <= x0 < x1 <= 1, the same for y, and a time inside the video"
                self.report("VRLT-D03", f'"{field}" has {shorten(item)}', why)
            boxes.append(box)
        return tuple(boxes)

    def instances(self, duration: float) -> tuple[Instance, ...]:
        value = self.fields.get("instances", [])
        if not isinstance(value, list):
            self.wrong("instances", "a list of objects with a number and boxes")
            return ()
        found: dict[int, Instance] = {}
        for item in value:
            if not isinstance(item, dict) or set(item) != {"id", "boxes"}:
                self.report("VRLT-D03", f'"instances" has {shorten(item)}', 'it needs {"id": number, "boxes": [...]}')
                continue
            number = self.whole("instances", item["id"], needed=True)
            boxes = self.boxes("instances", item["boxes"], duration)
            if number is not None and number in found:
                self.report("VRLT-D03", f'"instances" has the number {number} twice')
            elif number is not None:
                found[number] = Instance(number, boxes)
        return tuple(found.values())

    def reasoning(self) -> str:
        value = self.text("reasoning") if "reasoning" in self.fields else ""
        if _TAGS.search(value):
            why = "the trainer writes the think tags around it and the answer behind it"
            self.report("VRLT-D03", '"reasoning" has think or answer tags', why, "keep only what stands between them")
        return value

    def timeline(self, duration: float) -> tuple[Moment, ...]:
        value = self.fields.get("timeline", [])
        if not isinstance(value, list):
            self.wrong("timeline", "a list of moments")
            return ()
        moments = []
        for item in value:
            start, end = (as_number(item.get(name)) if isinstance(item, dict) else None for name in ("start", "end"))
            text = item.get("text") if isinstance(item, dict) else None
            if start is None or end is None or not isinstance(text, str) or not text.strip() or len(item) != 3:
                why = "a moment has the numbers start and end (seconds) and a text"
                self.report("VRLT-D03", f'"timeline" has {shorten(item)}', why)
            elif not 0 <= start < end <= duration + _ROUNDING:
                self.report("VRLT-D05", f'"timeline" has {shorten(item)}', f"needs 0 <= start < end <= {duration}")
            else:
                moments.append(Moment(start, end, self.clean("timeline", text)))
        return tuple(moments)

    def whole(self, name: str, value: object, *, needed: bool = False) -> int | None:
        if value is None and not needed:
            return None
        if type(value) is int and 0 <= value < 2**31:
            return value
        self.report("VRLT-D03", f'"{name}" has {shorten(value)}', "it must be a whole number from 0")
        return None

    def share(self, name: str) -> float | None:
        value = self.fields.get(name)
        number = as_number(value)
        if value is not None and (number is None or not 0 <= number <= 1):
            self.wrong(name, "a number from 0 to 1")
        return number


def as_number(value: object) -> float | None:
    """A finite float, or None when ``value`` isn't a finite number (booleans and NaN aren't)."""
    if type(value) is float:
        return value if math.isfinite(value) else None
    if type(value) is not int:
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None and math.isfinite(float(text.replace(",", "")))


@lru_cache(maxsize=1024)
def _near(name: str, names: tuple[str, ...]) -> str:
    found = difflib.get_close_matches(name[:64], names, n=1, cutoff=0.6)
    return f'did you mean "{found[0]}"?' if found else ""
