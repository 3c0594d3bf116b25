"""Reads and writes files of samples: JSONL, one sample a line (docs/data.md)."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vrlt_fast.data.fields import Line
from vrlt_fast.data.paths import Root, resolve_images, resolve_video
from vrlt_fast.data.quarantine import line_digest
from vrlt_fast.data.sample import Sample
from vrlt_fast.errors import DataError, Problem

__all__ = ["AnnotationError", "read_jsonl", "resolve_images", "resolve_video", "scan_jsonl", "to_json", "write_jsonl"]

_SHOWN = 50


class AnnotationError(DataError):
    """All problems of one file: ``problems`` has every one, the message the first 50."""

    def __str__(self) -> str:
        shown = [str(problem) for problem in self.problems[:_SHOWN]]
        more = len(self.problems) - _SHOWN
        return "\n".join([*shown, f"and {more} more problems"] if more > 0 else shown)


def read_jsonl(
    path: Path | str,
    root: Path | str | None = None,
    *,
    check_files: bool = True,
    leave_out: Collection[str] = (),
) -> list[Sample]:
    """The samples of a file, in its order.

    ``root`` is the folder that video and image paths are relative to and may not leave (default: the folder of the
    file). ``check_files=False`` skips what needs the files themselves: that they exist, and where symbolic links lead.
    ``leave_out`` has the digests of lines that are passed over (:mod:`vrlt_fast.data.quarantine`).

    Raises :class:`AnnotationError` (a :class:`DataError`) with every problem of the file, each with its line.
    """
    samples, problems = scan_jsonl(path, root, check_files=check_files, leave_out=leave_out)
    if problems:
        raise AnnotationError(problems)
    return samples


def scan_jsonl(
    path: Path | str,
    root: Path | str | None = None,
    *,
    check_files: bool = True,
    leave_out: Collection[str] = (),
) -> tuple[list[Sample], list[Problem]]:
    """Like :func:`read_jsonl`, but returns the good samples and the problems side by side."""
    path = Path(path)
    folder = Path(root) if root is not None else path.parent
    try:
        unusable = (
            "it isn't a file" if not path.is_file() else "" if folder.is_dir() else f"its root {folder} isn't a folder"
        )
        if unusable:
            return [], [Problem("VRLT-D01", "can't read the annotation file", str(path), unusable, f"ls -l {path}")]
        return _scan(path, Root(folder), check_files=check_files, leave_out=leave_out)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return [], [Problem("VRLT-D01", "can't read the annotation file", str(path), str(error))]


def _scan(
    path: Path, root: Root, *, check_files: bool, leave_out: Collection[str]
) -> tuple[list[Sample], list[Problem]]:
    samples: list[Sample] = []
    problems: list[Problem] = []
    first_line: dict[str, str] = {}
    blank = True
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not text.strip():
                continue
            blank = False
            if leave_out and line_digest(text) in leave_out:
                continue
            where = f"{path.name}:{number}"
            fields = _parse(text, where)
            if isinstance(fields, Problem):
                problems.append(fields)
                continue
            line = Line(fields, where, root, check_files=check_files)
            sample = line.sample()
            name = fields.get("id")
            if isinstance(name, str) and name and first_line.setdefault(name, where) != where:
                line.report(
                    "VRLT-D07",
                    f"id {name[:80]!r} is there already",
                    f"first in {first_line[name]}",
                    "make the ids distinct",
                )
            problems += line.problems
            if sample is not None and not line.problems:
                samples.append(sample)
    if blank:
        problems.append(Problem("VRLT-D01", "the annotation file is empty", str(path)))
    return samples, problems


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(f"key {next(key for key in keys if keys.count(key) > 1)[:80]!r} is there twice")
    return fields


def _parse(raw: bytes, where: str) -> dict[str, Any] | Problem:
    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return Problem("VRLT-D02", "not UTF-8", where, f"byte {error.start + 1} of the line", "save the file as UTF-8")
    except json.JSONDecodeError as error:
        return Problem(
            "VRLT-D02", "malformed JSON", where, f"{error.msg} (column {error.colno})", "one JSON object a line"
        )
    except _DuplicateKeyError as error:
        return Problem("VRLT-D02", "malformed JSON", where, str(error))
    except RecursionError:
        return Problem("VRLT-D02", "malformed JSON", where, "nested too deeply")
    except ValueError:  # Python refuses to convert integers of thousands of digits
        return Problem("VRLT-D03", "a number has too many digits", where)
    if not isinstance(fields, dict):
        return Problem("VRLT-D03", "the line isn't a JSON object", where, fix='one {"id": ..., "video": ...} a line')
    return fields


def to_json(sample: Sample) -> dict[str, Any]:
    """The fields of a line; optional ones only where they are set."""
    fields: dict[str, Any] = {
        "id": sample.id,
        "video": sample.video,
        "duration": sample.duration,
        "task": sample.task,
        "question": sample.question,
        "options": list(sample.options),
        "answer": sample.answer,
        "spans": [list(span) for span in sample.spans],
        "images": list(sample.images),
        "boxes": [asdict(box) for box in sample.boxes],
        "object_id": sample.object_id,
        "progress": sample.progress,
        "instances": [{"id": one.id, "boxes": [asdict(box) for box in one.boxes]} for one in sample.instances],
        "difficulty": sample.difficulty,
        "source": sample.source,
        "reasoning": sample.reasoning,
        "timeline": [{"start": m.start, "end": m.end, "text": m.text} for m in sample.timeline],
    }
    return {name: value for name, value in fields.items() if value not in ("", [], None)}


def write_jsonl(samples: Iterable[Sample], path: Path | str) -> None:
    """Writes samples, one a line. ``path`` appears (or is replaced) only when all is written."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            for sample in samples:
                file.write(json.dumps(to_json(sample), ensure_ascii=False, allow_nan=False) + "\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
