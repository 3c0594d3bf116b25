"""Where the video and image files of another format are, and how long the videos last."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from vrlt_fast.data.fields import as_number
from vrlt_fast.data.formats.entries import Entry, decoded, scan
from vrlt_fast.data.paths import escape_reason, shorten
from vrlt_fast.errors import ConfigError, DataError, Problem

EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")
_IDS = ("id", "vid", "video", "video_id", "videoid", "name")
_SECONDS = ("seconds", "duration", "length", "video_length")
_PATH_FIX = "--videos names the folder that the videos are in, --strip what to remove from the front of each path"


def stem(name: str) -> str:
    """The file name without folders and without the extension of a video; other dots are part of the name."""
    last = name.rpartition("/")[2]
    base, extension = os.path.splitext(last)
    return base if extension.lower() in EXTENSIONS else last


class Media:
    """Turns the names of a format into paths relative to the data root.

    ``videos`` is the folder with the files, whose list is read once; ``root`` a folder above it that the paths written
    are relative to (default: ``videos``); ``strip`` is removed from the front of names that begin with it.

    Raises ConfigError C04 when ``videos`` isn't inside ``root``.
    """

    def __init__(self, videos: Path | None = None, root: Path | None = None, strip: str = ""):
        self.videos, self.base, self._strip = videos, root or videos, strip
        self._front = ""
        if root is not None:
            inside = os.path.relpath(os.path.realpath(videos or root), os.path.realpath(root)).replace(os.sep, "/")
            if inside == ".." or inside.startswith("../"):
                why = "samples name their videos relative to the data root"
                raise ConfigError(Problem("VRLT-C04", f"--videos {videos} isn't inside --root {root}", why=why))
            self._front = "" if inside == "." else inside + "/"

    @cached_property
    def _files(self) -> frozenset[str]:
        found = []
        for folder, _, names in os.walk(self.videos or "/nonexistent"):
            inside = os.path.relpath(folder, self.videos).replace(os.sep, "/")
            found += names if inside == "." else [f"{inside}/{name}" for name in names]
        return frozenset(found)

    @cached_property
    def _stems(self) -> Mapping[str, list[str]]:
        known: dict[str, list[str]] = {}
        for name in sorted(self._files):
            if name.lower().endswith(EXTENSIONS):
                known.setdefault(stem(name), []).append(name)
        return known

    def video(self, name: str) -> str:
        """The path of the video ``name``: an id, a file name or a path, with or without extension.

        With a folder of videos: the file of that name, else of that name with another extension, else the only one
        with that stem in any folder. Without: the name itself, with .mp4 where it has no extension of a video.

        Raises DataError D08 (leads out of the folder) or V01 (no such file, or several).
        """
        inner = self._inner(name)
        if self.videos is None:
            return self._front + (inner if inner.lower().endswith(EXTENSIONS) else inner + ".mp4")
        if inner in self._files:
            return self._front + inner
        folder = inner.rpartition("/")[0]
        near = [f"{folder}/{stem(inner)}{end}" if folder else stem(inner) + end for end in EXTENSIONS]
        found = [path for path in near if path in self._files][:1] or self._stems.get(stem(inner), [])
        if len(found) == 1:
            return self._front + found[0]
        what = f"{len(found) or 'no'} files for the video {shorten(name)}"
        why = f"looked in {self.videos}" + (f": {shorten(found[0])}, {shorten(found[1])}" if found else "")
        raise DataError(Problem("VRLT-V01", what, "", why, "fetch the file, or leave such entries out: --skip-bad"))

    def image(self, name: str) -> str:
        """The path of an image. Raises DataError D08 or, with a folder of videos, V01."""
        inner = self._inner(name)
        if self.videos is not None and inner not in self._files:
            fix = "fetch the file, or leave such entries out: --skip-bad"
            raise DataError(Problem("VRLT-V01", f"no image {shorten(name)}", "", f"looked in {self.videos}", fix))
        return self._front + inner

    def _inner(self, name: str) -> str:
        inner = name.removeprefix(self._strip)
        while inner.startswith("./"):
            inner = inner[2:]
        if inner.startswith("/") and self.videos is not None and ".." not in inner.split("/"):
            for folder in (os.path.abspath(self.videos), os.path.realpath(self.videos)):
                inner = inner.removeprefix(folder.rstrip("/") + "/")
        why = escape_reason(inner) if inner else "nothing is left of it"
        if why:
            raise DataError(Problem("VRLT-D08", f"path {shorten(name)} is refused", "", why, _PATH_FIX))
        return inner


def read_durations(path: Path) -> dict[str, float]:
    """Seconds by video: JSON ``{video: seconds}`` or ``{video: {"duration": seconds}}``, else CSV of two columns or
    with a header (id, vid, video, video_id or name; seconds, duration, length or video_length).

    Raises DataError D01, D02 or D03 with the line of every problem.
    """
    problems: list[Problem] = []
    if path.suffix.lower() == ".json":
        kind, entries = scan(path, problems)
        if entries and kind != "object":
            why = "it must be an object of videos and their seconds"
            problems.append(Problem("VRLT-D03", "the file of durations is a list", f"{path.name}:1", why))
            entries = []
    else:
        entries = _csv_durations(path, problems)
    found: dict[str, float] = {}
    for entry in entries:
        value = entry.value.get("duration") if isinstance(entry.value, dict) else entry.value
        seconds = as_number(value)
        if seconds is None or seconds <= 0:
            what = f"the duration of {shorten(entry.key)} is {shorten(value)}"
            why = "it must be a number of seconds above 0"
            problems.append(Problem("VRLT-D03", what, f"{path.name}:{entry.line}", why))
        else:
            found[entry.key] = seconds
    if problems:
        raise DataError(problems)
    return found


def _csv_durations(path: Path, problems: list[Problem]) -> list[Entry]:
    text = decoded(path, problems)
    rows = list(numbered_csv(text))
    if not rows:
        return []
    columns = [0, 1]
    head = [cell.strip().lower() for cell in rows[0][1]]
    named = [[head.index(name) for name in names if name in head] for names in (_IDS, _SECONDS)]
    if all(named):
        columns = [named[0][0], named[1][0]]
        rows = rows[1:]
    entries = []
    for line, cells in rows:
        if len(cells) <= max(columns):
            why = f"columns {columns[0] + 1} and {columns[1] + 1} have the video and its seconds"
            problems.append(Problem("VRLT-D03", f"a line of {len(cells)} cells", f"{path.name}:{line}", why))
            continue
        key, value = cells[columns[0]].strip(), cells[columns[1]].strip()
        entries.append(Entry(float_or_text(value), line, key))
    return entries


def numbered_csv(text: str) -> Iterable[tuple[int, list[str]]]:
    """The rows of a CSV text that have a cell, each with the number of its first line."""
    reader = csv.reader(text.splitlines(keepends=True))
    first = 1
    for cells in reader:
        if any(cell.strip() for cell in cells):
            yield first, cells
        first = reader.line_num + 1


def float_or_text(text: str) -> float | str:
    """The number that a text says, or the text itself."""
    try:
        return float(text)
    except ValueError:
        return text
