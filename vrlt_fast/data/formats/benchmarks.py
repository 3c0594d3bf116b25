"""Formats of benchmarks with options: Video-MME, MVBench, MMVU, TempCompass, and the files that VST evaluates on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vrlt_fast.data.fields import as_number
from vrlt_fast.data.formats.base import Output, Row, unlabelled
from vrlt_fast.data.paths import shorten

_PART = 1.0  # seconds by which the end of a part may differ from that of the video
_SIMPLE = re.compile(r"([A-Z])\. ?(.*)")
_CAPTION = re.compile(r"(?:Caption|Sentence|Option|Description) ([A-Z]|[1-9]): (.*)")
_MMVU_FRONT = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/"


def videomme(path: Path, out: Output) -> None:
    """Video-MME (lmms-lab/Video-MME): a list or lines with videoID, question_id, question, options ("A. text") and
    answer, or a list of videos that have those as ``questions``. Its ``duration`` is a class (short, medium, long).
    """
    for row in out.rows(path):
        if "questions" not in row.fields:
            _letters(row, row.name("question_id"), row.name("videoID", "video_id"), row.text("question"))
            continue
        name = row.name("videoID", "video_id")
        for item in row.items("questions"):
            part = Row(out, item, row.where)
            if isinstance(item, dict):
                _letters(part, part.name("question_id"), name, part.text("question"))
            else:
                row.report("VRLT-D15", f'"questions" has {shorten(item)}', "it must have JSON objects")


def _letters(row: Row, key: str, name: str, question: str) -> None:
    options = unlabelled(row.texts("options"))
    _choice(row, key, name, question, options, row.letter(row.text("answer"), options))


def mvbench(path: Path, out: Output) -> None:
    """MVBench (OpenGVLab/MVBench): one list a task, with video, question, candidates and the right one as answer.

    A row with start and end asks about a part of its video, which a sample can't say: such rows are skipped unless the
    part is the whole video.
    """
    for index, row in enumerate(out.rows(path), 1):
        _candidates(row, f"{path.stem}-{index}", row.texts("candidates"), row.text("answer"))


def vst(path: Path, out: Output) -> None:
    """VST's files for evaluation (1ranGuan/VST: OVOBench, StreamingBench, VideoHolmes): as MVBench's.

    Rows with a ``context`` belong to a dialogue of several turns, which isn't supported; rows without candidates are
    questions for yes or no, or else open. Parts of videos are as in MVBench.
    """
    for index, row in enumerate(out.rows(path), 1):
        if row.fields.get("context"):
            row.skip("several turns")
        elif "candidates" in row.fields:
            _candidates(row, f"{path.stem}-{index}", row.texts("candidates"), row.text("answer"))
        elif str(row.fields.get("answer")).strip().lower() in ("yes", "no"):
            _candidates(row, f"{path.stem}-{index}", ["Yes", "No"], row.text("answer").capitalize())
        elif row.text("answer") and row.text("question") and row.text("video"):
            row.skip("open questions")


def _candidates(row: Row, key: str, options: list[str], answer: str) -> None:
    video, question, letter = row.text("video"), row.text("question"), row.option(answer, options)
    borders = [name for name in ("start", "end") if row.fields.get(name) is not None]
    for border in borders:
        if as_number(row.fields[border]) is None:
            row.wrong(border, "a number of seconds")
    _choice(row, key, video, question, options, letter, part=bool(borders))


def mmvu(path: Path, out: Output) -> None:
    """MMVU (yale-nlp/MMVU): a list with id, video (an address in its repository, whose front is removed),
    question_type, question, choices ``{"A": text, ...}`` and answer. Open questions are skipped.
    """
    for row in out.rows(path):
        kind = row.text("question_type")
        if kind == "open-ended":
            row.skip("open questions")
            continue
        if kind and kind != "multiple-choice":
            row.report("VRLT-D04", f"question_type {shorten(kind)} isn't known", "multiple-choice or open-ended")
        choices = row.fields.get("choices")
        letters = [chr(65 + i) for i in range(len(choices))] if isinstance(choices, dict) else []
        if not isinstance(choices, dict) or list(choices) != letters:
            row.wrong("choices", "an object of texts under A, B, C and so on")
            continue
        options = list(choices.values())
        while options and options[-1] == "":
            options.pop()
        if not all(isinstance(option, str) and option.strip() for option in options):
            row.wrong("choices", "an object of texts under A, B, C and so on")
            continue
        options = [option.strip() for option in options]
        name, question = row.text("video").removeprefix(_MMVU_FRONT), row.text("question")
        _choice(row, row.name("id"), name, question, options, row.letter(row.text("answer"), options))


def tempcompass(path: Path, out: Output) -> None:
    """TempCompass (llyx97/TempCompass, questions/*.json): ``{video: {aspect: [{question, answer}]}}``.

    The options of multi-choice ("A. text") and caption matching ("Caption A: text") stand in the question; questions
    for yes or no get those options. Captioning is skipped.
    """
    for row in out.members(path):
        for aspect, items in row.fields.items():
            if not isinstance(items, list):
                row.wrong(aspect, "a list of questions")
                continue
            for index, item in enumerate(items):
                part = Row(out, item, row.where)
                if isinstance(item, dict):
                    _compass(part, f"{path.stem}-{row.key}-{aspect}-{index + 1}", row.key)
                else:
                    row.report("VRLT-D15", f"{shorten(aspect)} has {shorten(item)}", "it must have JSON objects")


def _compass(row: Row, key: str, name: str) -> None:
    text, answer = row.text("question"), row.text("answer")
    if "Generated Caption:" in text:
        row.skip("captioning")
        return
    lines = text.split("\n")
    if len(lines) == 1:
        options = ["Yes", "No"]
        _choice(row, key, name, text, options, row.option(answer.capitalize(), options))
        return
    pattern = _SIMPLE if _SIMPLE.fullmatch(lines[1]) else _CAPTION
    found = list(_options(lines[1:], pattern))
    right = [option for line, option in found if line == answer]
    if text and (len(found) != len(lines) - 1 or not found):
        row.report("VRLT-D06", "the lines below the question aren't options", shorten(lines[1:], 200))
    elif answer and len(right) != 1:
        row.report("VRLT-D06", f"answer {shorten(answer)} is not among the options", shorten(lines[1:], 200))
    options = [option for _, option in found]
    _choice(row, key, name, lines[0].strip(), options, row.option(right[0] if right else "", options))


def _options(lines: list[str], pattern: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    for index, line in enumerate(lines):
        match = pattern.fullmatch(line.strip())
        if match and match[1] in (chr(65 + index), str(index + 1)) and match[2].strip():
            yield line.strip(), match[2].strip()


def _choice(
    row: Row, key: str, name: str, question: str, options: list[str], letter: str, *, part: bool = False
) -> None:
    """Add a sample of task videoqa. ``part``: fields start and end say which part of the video it is about."""
    video = row.video(name)
    seconds = row.duration(video, name)
    if part and not row.failed:
        start, end = as_number(row.fields.get("start")) or 0.0, as_number(row.fields.get("end"))
        if start > 0 or (end is not None and end < seconds - _PART):
            row.skip("about a part of a video")
            return
    fields: dict[str, Any] = {"video": video, "duration": seconds, "task": "videoqa", "question": question}
    row.out.add(row, key, {**fields, "options": options, "answer": letter})
