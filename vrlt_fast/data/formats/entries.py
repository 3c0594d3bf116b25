"""The entries of an annotation file, each with the line that it begins in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrlt_fast.data.paths import shorten
from vrlt_fast.errors import Problem

_BLANK = re.compile(r"[ \t\n\r]*")
_DIGITS = 400  # of an integer; a longer one is above every float


@dataclass(frozen=True)
class Entry:
    """A value of a file: an element of a list, a member of an object (``key``), or a line."""

    value: Any
    line: int
    key: str = ""


class _TwiceError(ValueError):
    pass


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(f"key {shorten(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return fields


def _whole(digits: str) -> float:
    return int(digits) if len(digits) <= _DIGITS else math.inf


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_whole)


def decoded(path: Path, problems: list[Problem]) -> str:
    """The text of a file; empty, with a problem, when it is missing, empty (D01) or not UTF-8 (D02)."""
    try:
        raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        problems.append(Problem("VRLT-D01", "can't read the annotation file", str(path), str(error), f"ls -l {path}"))
        return ""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + raw[: error.start].count(b"\n")
        where = f"{path.name}:{line}"
        problems.append(Problem("VRLT-D02", "not UTF-8", where, f"byte {error.start + 1}", "save the file as UTF-8"))
        return ""
    if not text.strip():
        problems.append(Problem("VRLT-D01", "the annotation file is empty", f"{path.name}:1"))
        return ""
    return text


def scan(path: Path, problems: list[Problem]) -> tuple[str, list[Entry]]:
    """The elements or members of the one JSON value of a file, as far as they can be read; its kind: "list", "object",
    or "other".
    """
    text = decoded(path, problems)
    if not text:
        return "other", []
    scanner = _Scanner(path, text, problems)
    return scanner.kind, scanner.entries()


def scan_rows(path: Path, problems: list[Problem]) -> tuple[str, list[Entry]]:
    """Like :func:`scan` for a file that is a JSON list, or one JSON value a line (kind "lines")."""
    text = decoded(path, problems)
    if not text:
        return "other", []
    scanner = _Scanner(path, text, problems)
    if scanner.kind == "list":
        return "list", scanner.entries()
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                entries.append(Entry(_DECODER.decode(line), number))
            except (ValueError, RecursionError) as error:
                problems.append(_broken(error, f"{path.name}:{number}"))
    return "lines", entries


def _broken(error: Exception, where: str) -> Problem:
    why = "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        why = f"{error.msg} (column {error.colno})"
    elif isinstance(error, ValueError):
        why = str(error)
    return Problem("VRLT-D02", "malformed JSON", where, why, "fetch the file again if it was cut off")


class _Scanner:
    """Walks over the outermost list or object of a JSON text."""

    def __init__(self, path: Path, text: str, problems: list[Problem]):
        self._name, self._text, self._problems = path.name, text, problems
        self._at = self._counted = 0
        self._line = 1
        self._blank()
        self.kind = {"[": "list", "{": "object"}.get(text[self._at], "other")

    def entries(self) -> list[Entry]:
        found: list[Entry] = []
        try:
            if self.kind == "other":
                _DECODER.decode(self._text)
            else:
                self._walk(found)
        except json.JSONDecodeError as error:
            self._problems.append(_broken(error, f"{self._name}:{error.lineno}"))
        except (ValueError, RecursionError) as error:
            self._problems.append(_broken(error, f"{self._name}:{self._line_now()}"))
        return found

    def _walk(self, found: list[Entry]) -> None:
        end = "]" if self.kind == "list" else "}"
        self._at += 1
        self._blank()
        if self._peek() == end:
            self._at += 1
        else:
            self._member(found)
            while self._peek() == ",":
                self._at += 1
                self._blank()
                self._member(found)
            self._expect(end)
        self._blank()
        if self._at < len(self._text):
            raise json.JSONDecodeError("Extra data", self._text, self._at)

    def _member(self, found: list[Entry]) -> None:
        line, key = self._line_now(), ""
        if self.kind == "object":
            if self._peek() != '"':
                raise json.JSONDecodeError("Expecting a name in quotes", self._text, self._at)
            key, self._at = _DECODER.raw_decode(self._text, self._at)
            self._blank()
            self._expect(":")
            self._blank()
        value, self._at = _DECODER.raw_decode(self._text, self._at)
        found.append(Entry(value, line, key))
        self._blank()

    def _expect(self, char: str) -> None:
        if self._peek() != char:
            raise json.JSONDecodeError(f"Expecting {char}", self._text, self._at)
        self._at += 1

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _blank(self) -> None:
        found = _BLANK.match(self._text, self._at)
        self._at = found.end() if found else self._at

    def _line_now(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line
