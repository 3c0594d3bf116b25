"""Paths of annotation files: always relative, always inside the data root."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from vrlt_fast.data.sample import Sample
from vrlt_fast.errors import DataError, Problem

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:(//|[\\/])|file:", re.IGNORECASE)  # also drives: C:\
_SEPARATOR = re.compile(r"[\\/]")
_MAX_NAME, _MAX_PATH = 255, 4096  # bytes, Linux

_FIX = "give a path relative to the data root (the folder of the JSONL file unless data.root says otherwise)"


class Root:
    """The folder that the paths of a file of samples are relative to. Remembers what it has checked."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._real = os.path.realpath(folder)
        self._seen: dict[str, tuple[str, str, str] | None] = {}

    def problem(self, path: str, where: str, *, check_files: bool) -> Problem | None:
        """What is wrong with ``path``: VRLT-D08 when it may lead out of the root, VRLT-V01 when it names no file."""
        if path not in self._seen:
            self._seen[path] = self._examine(path, check_files)
        found = self._seen[path]
        return found and Problem(found[0], found[1], where, found[2], _FIX)

    def _examine(self, path: str, check_files: bool) -> tuple[str, str, str] | None:
        why = escape_reason(path)
        if why:
            return "VRLT-D08", f"path {shorten(path)} is refused", why
        if not check_files:
            return None
        real = os.path.realpath(os.path.join(self._real, path))
        if not real.startswith(self._real.rstrip(os.sep) + os.sep):
            return "VRLT-D08", f"path {shorten(path)} is refused", f"a symbolic link leads out of {self.folder}"
        if not os.path.isfile(real):
            return "VRLT-V01", f"no file {shorten(path)}", f"looked for {os.path.join(self.folder, path)}"
        return None


def escape_reason(path: str) -> str:
    """Why a path as written isn't allowed, or an empty string. Looks at the text only."""
    plain = unquote(path)
    if "\0" in plain:
        return "it has a NUL character"
    if _URL.match(path) or _URL.match(plain):
        return "URLs and drives aren't allowed"
    parts = _SEPARATOR.split(plain)
    if not parts[0]:
        return "absolute paths aren't allowed"
    if ".." in parts:
        return "it goes up with '..'" if plain == path else "it hides '..' behind percent-encoding"
    encoded = os.fsencode(path) if path.isascii() else path.encode("utf-8", "replace")
    if len(encoded) > _MAX_PATH or max(len(part) for part in encoded.split(b"/")) > _MAX_NAME:
        return f"the name is too long (more than {_MAX_NAME} bytes a part or {_MAX_PATH} in all)"
    return ""


def resolve_video(sample: Sample, root: Path) -> Path:
    """Where the video of a sample is. The file needn't exist.

    Raises :class:`DataError` VRLT-D08 when the path, or a symbolic link on it, leads out of ``root``.
    """
    return _resolve(sample.video, root, sample.line)


def resolve_images(sample: Sample, root: Path) -> tuple[Path, ...]:
    """Where the images of a sample are, as :func:`resolve_video`."""
    return tuple(_resolve(image, root, sample.line) for image in sample.images)


def _resolve(name: str, root: Path, where: str) -> Path:
    why = escape_reason(name)
    path = Path(root) / name
    if not why and not path.resolve().is_relative_to(Path(root).resolve()):
        why = f"a symbolic link leads out of {root}"
    if why:
        raise DataError(Problem("VRLT-D08", f"path {shorten(name)} is refused", where, why, _FIX))
    return path


def shorten(text: object, limit: int = 80) -> str:
    """A value as it may stand in a message: quoted, escaped, cut."""
    shown = ascii(text[: 2 * limit] if isinstance(text, str) else text)
    return shown if len(shown) <= limit else shown[: limit - 4] + "...'"
