"""The part of YAML that lists of annotation files use: one key with a list of flat mappings.

Nothing else of the language is understood, so nothing in such a file can surprise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vrlt_fast.data.formats.entries import decoded
from vrlt_fast.data.paths import shorten
from vrlt_fast.errors import Problem

_PAIR = re.compile(r"(- +)?([A-Za-z_][A-Za-z0-9_]*):(?: +(.*))?")
_PLAIN = re.compile(r"[^\s\"'&*!|>%@`{}\[\],#?:-][^#]*|")


@dataclass(frozen=True)
class Node:
    """The text of a value, and its line."""

    text: str
    line: int


def read_list(path: Path, key: str, problems: list[Problem]) -> list[dict[str, Node]]:
    """The mappings of ``key: [- name: value ...]``, in block style, with comments; values are texts.

    A line that isn't of this form is a problem VRLT-D15.
    """
    items: list[dict[str, Node]] = []
    opened = False
    for number, line in enumerate(decoded(path, problems).split("\n"), 1):
        bare = line.strip()
        if not bare or bare.startswith("#") or bare == "---":
            continue
        why = ""
        match = _PAIR.fullmatch(bare)
        value = _value(match[3] or "") if match else None
        if match is None or value is None:
            why = "this part of YAML isn't understood"
        elif not opened:
            opened = bare.partition("#")[0].strip() == f"{key}:" and line[0] == key[0]
            why = "" if opened else f'the file must begin with "{key}:"'
        elif match[1]:
            items.append({match[2]: Node(value, number)})
        elif not items or line[0] == bare[0] or match[2] in items[-1]:
            why = "it stands in no item of the list, or is there twice"
        else:
            items[-1][match[2]] = Node(value, number)
        if why:
            problems.append(
                Problem("VRLT-D15", f"the line is {shorten(bare)}", f"{path.name}:{number}", why, _fix(key))
            )
            return []
    if not items and not problems:
        problems.append(Problem("VRLT-D15", "the list is empty", f"{path.name}:1", "", _fix(key)))
    return items


def _fix(key: str) -> str:
    return f'"{key}:", then items like "  - json_path: a.json" and below, indented, "    data_folder: videos"'


def _value(text: str) -> str | None:
    """A plain or quoted text without what follows as a comment; None when it is anything else."""
    text = text.strip()
    for quote in "'\"":
        if text.startswith(quote):
            inner, end, rest = text[1:].partition(quote)
            ends = not rest.strip() or rest.strip().startswith("#")
            return inner if end and ends and "\\" not in inner else None
    if text.startswith("#"):
        return ""
    bare = re.split(r"\s#", text, maxsplit=1)[0].strip()
    return bare if _PLAIN.fullmatch(bare) and ": " not in bare else None
