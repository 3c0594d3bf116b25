"""Formats in the manner of Video-R1: a problem, its type, options, and a solution in answer tags."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vrlt_fast.data.fields import as_number
from vrlt_fast.data.formats.base import Output, Row, unlabelled
from vrlt_fast.data.paths import shorten
from vrlt_fast.data.sample import LETTERS

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_TASKS = {
    "multiple choice": "videoqa",
    "numerical": "number",
    "ocr": "ocr",
    "free-form": "open",
    "regression": "regression",
    "boolean": "videoqa",
}
_NEGATIVES = 3  # wrong options that SEED-Bench-R1 shows


def video_r1(path: Path, out: Output) -> None:
    """Video-R1 (tulerfeng/Video-R1; also VideoHallu's files): a list with problem_id, problem, data_type,
    problem_type (multiple choice, numerical, OCR, free-form, regression), options, process, solution, path and
    data_source.

    Rows about images alone are skipped and counted. ``process`` becomes the reasoning of the warm-up.
    """
    for index, row in enumerate(out.rows(path), 1):
        _add(row, index)


def tw_grpo(path: Path, out: Output) -> None:
    """TW-GRPO (longmalongma/TW-GRPO): as Video-R1, with ``video`` for ``path``, a ``question`` beside the problem that
    repeats the options, and solutions of several letters, "B,C". Its files of NExT-GQA have no problem_type, but a
    duration: their questions have options and are read without their ``glue``.
    """
    for index, row in enumerate(out.rows(path), 1):
        _add(row, index, kind="" if "problem_type" in row.fields else "multiple choice")


def primo_r1(path: Path, out: Output) -> None:
    """PRIMO-R1 (10-OASIS-01/PRIMO-R1): as Video-R1, with ``init_frame_path`` and ``current_frame_path`` (images: the
    first and the present state) and percentages, with or without "%", for how much of a task is done (numerical).

    Its rows of type boolean have the options Yes and No. Rows with ``select`` false are skipped, as its loader does.
    """
    for index, row in enumerate(out.rows(path), 1):
        if row.fields.get("select") is False:
            row.skip("not selected")
            continue
        images = [row.image(row.text(name)) for name in ("init_frame_path", "current_frame_path") if name in row.fields]
        if len(images) == 1:
            row.report("VRLT-D03", "one of init_frame_path and current_frame_path is missing", "they belong together")
        if row.fields.get("problem_type") == "numerical":
            _progress(row, index, images)
        else:
            _add(row, index, {"images": images} if images else {})


def _progress(row: Row, index: int, images: list[str]) -> None:
    said = _solution(row)
    try:
        percent = as_number(float(said.removesuffix("%").strip()))
    except ValueError:
        percent = None
    if said and (percent is None or not 0 <= percent <= 100):
        row.report("VRLT-D03", f"the solution is {shorten(said)}", "it must be a percentage from 0 to 100")
    more = {"progress": (percent or 0.0) / 100.0, "images": images}
    _write(row, index, {"task": "progress", "question": row.text("problem"), **_reasoning(row), **more})


def _add(row: Row, index: int, more: Mapping[str, Any] | None = None, *, kind: str = "") -> None:
    """Add the sample of a row of type ``kind``, if the row doesn't say its own."""
    data = row.fields.get("data_type", "video")
    if data in ("image", "frame"):
        row.skip("about an image" if data == "image" else "a folder of frames")
        return
    if data != "video":
        row.wrong("data_type", "video, image or frame")
    kind = kind or row.text("problem_type")
    task = _TASKS.get(kind.lower(), "")
    if kind and not task:
        row.report("VRLT-D04", f"problem_type {shorten(kind)} isn't known", f"known: {', '.join(_TASKS)}")
    solution = _solution(row)
    found: dict[str, Any] = {"task": task, "question": row.text("problem"), "answer": solution}
    if task == "videoqa":
        boolean = kind.lower() == "boolean"
        options = ["Yes", "No"] if boolean else unlabelled(row.texts("options"))
        answer = solution.capitalize() if boolean else solution
        found |= {"options": options, "answer": row.letter(answer, options) if solution else ""}
        found["question"] = _bare(row, options)
    _write(row, index, {**found, **_reasoning(row), **(more or {})})


def _write(row: Row, index: int, fields: Mapping[str, Any]) -> None:
    name = row.text("path", "video", "video_path")
    video = row.video(name)
    measured = as_number(row.fields.get("duration")) is not None
    seconds = row.duration(video, name, field_name="duration" if measured else "")
    given = {key: value for key, value in fields.items() if value not in ("", [])}
    source = row.fields.get("data_source")
    given |= {"source": source} if isinstance(source, str) and source.strip() else {}
    row.out.add(row, row.name("problem_id", "id", otherwise=str(index)), {"video": video, "duration": seconds, **given})


def _solution(row: Row) -> str:
    """The solution without its answer tags."""
    text = row.text("solution")
    match = _ANSWER.search(text)
    inner = match[1].strip() if match else text
    if text and not inner:
        row.report("VRLT-D03", "the solution is empty")
    return inner


def _bare(row: Row, options: list[str]) -> str:
    """The problem without the lines at its end that repeat the options."""
    lines = row.text("problem").split("\n")
    tails = tuple(option for option in options if option)
    while len(lines) > 1 and (not lines[-1].strip() or (tails and lines[-1].strip().endswith(tails))):
        lines.pop()
    return "\n".join(lines).removesuffix("Options:").strip()


def _reasoning(row: Row) -> dict[str, str]:
    process = row.fields.get("process")
    match = _THINK.search(process) if isinstance(process, str) else None
    text = match[1] if match else process if isinstance(process, str) else ""
    return {"reasoning": text.strip()} if text.strip() else {}


def seed_bench_r1(path: Path, out: Output) -> None:
    """SEED-Bench-R1 (TencentARC/SEED-Bench-R1): JSON lines with question, answer, negative_answers (training) or
    choice_a .. choice_d and golden_choice_idx, task_progress_metadata, video_source, video_basename,
    current_observation_basename and sample_id. Files lie in ``videos/SOURCE/`` and ``images/SOURCE/``.

    Of more than three negative answers three are drawn by the seed, and their order with the right one too, as the
    official code does at each load. Rows without progress have no video and are skipped.
    """
    for index, row in enumerate(out.rows(path), 1):
        if row.items("task_progress_metadata") == [] and not row.failed:
            row.skip("about an image")
            continue
        key, question, right = row.name("sample_id", otherwise=str(index)), row.text("question"), row.text("answer")
        folder = row.text("video_source")
        name = f"videos/{folder}/{row.text('video_basename')}"
        image = row.image(f"images/{folder}/{row.text('current_observation_basename')}" if not row.failed else "")
        video = row.video(name if not row.failed else "")
        seconds = row.duration(video, name, row.fields.get("video_basename", ""))
        if "golden_choice_idx" not in row.fields:
            options, letter = _drawn(row, right, random.Random(f"{out.context.seed} {key}"))
        else:
            options = [row.text(f"choice_{letter}") for letter in "abcd"]
            letter = row.letter(row.text("golden_choice_idx"), options)
            if letter and not row.failed and options[ord(letter) - 65] != right:
                row.report("VRLT-D06", f"golden_choice_idx {letter} isn't the answer", shorten(options))
        fields = {"video": video, "duration": seconds, "task": "videoqa", "question": question, "images": [image]}
        row.out.add(row, key, {**fields, "options": options, "answer": letter})


def _drawn(row: Row, right: str, chance: random.Random) -> tuple[list[str], str]:
    """Options in random order, and the letter of the right one."""
    wrong = row.texts("negative_answers")
    options = [right, *(chance.sample(wrong, _NEGATIVES) if len(wrong) > _NEGATIVES else wrong)]
    chance.shuffle(options)
    return options, LETTERS[options.index(right)]
