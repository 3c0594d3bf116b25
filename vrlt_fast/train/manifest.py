"""Checkpoint folders on disk: published complete or not at all, found again, verified, removed. Doesn't import torch.

Layout: ``checkpoints/<stage>-000050/`` inside a stage and ``checkpoints/<stage>-final/`` at its end. Each folder holds
``COMMIT.json`` with the size and SHA-256 of every other file. Folders being written or removed are called ``.tmp-*``;
``.old-<name>`` is a checkpoint that is being replaced by a new one of the same name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vrlt_fast.errors import Problem, SetupError

FORMAT = 1
COMMIT = "COMMIT.json"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME = re.compile(r"(?P<stage>[a-z0-9_]+)-(?P<step>\d{6,}|final)")


def checkpoint_name(stage: str, step: int | None) -> str:
    """Folder name of a checkpoint inside a stage, or of the stage's end (``step=None``)."""
    return f"{stage}-final" if step is None else f"{stage}-{step:06d}"


@contextmanager
def publish(folder: Path, needed_bytes: int) -> Iterator[Path]:
    """Yield an empty folder to fill; on a clean exit it is committed and renamed to ``folder``, else removed.

    Everything is on disk (fsync) before the rename, so that ``folder`` is complete or absent whenever the machine
    stops. An existing ``folder`` is replaced.

    Raises:
        SetupError: VRLT-R03 no space (``needed_bytes`` is checked first), VRLT-R02 the folder can't be written.
    """
    folder = folder.absolute()
    tmp = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    with _write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _require_space(folder, needed_bytes)
        _remove(tmp)
        tmp.mkdir()
        try:
            yield tmp
            _write_manifest(tmp)
            _replace(tmp, folder)
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        SetupError: VRLT-K01, one problem for each file that is missing, short, changed or not in the manifest.
    """
    faults = list(_faults(folder))
    if faults:
        fix = _way_on(folder)
        raise SetupError([Problem("VRLT-K01", what, str(folder / name), fix=fix) for name, what in faults])


def latest_checkpoint(checkpoints_dir: Path, stage_order: Sequence[str]) -> Path | None:
    """Newest complete checkpoint: of the last stage that has one, its final one or the one with the most steps.

    Removes what an interrupted save left behind. Complete means that ``COMMIT.json`` exists, which is written last;
    loading verifies the files, so that a damaged checkpoint is an error rather than passed over in silence.
    """
    _clean(checkpoints_dir)
    found = [
        (stage_order.index(stage), step, path)
        for path, stage, step in _complete(checkpoints_dir)
        if stage in stage_order
    ]
    return max(found)[2] if found else None


def prune(checkpoints_dir: Path, stage: str, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints inside ``stage``. The stage's final one stays."""
    steps = sorted(
        (step, path) for path, name, step in _complete(checkpoints_dir) if name == stage and step != float("inf")
    )
    for _, path in steps[: max(0, len(steps) - keep)]:
        with _write_errors(path):
            _discard(path)


def _complete(checkpoints_dir: Path) -> Iterator[tuple[Path, str, float]]:
    if not checkpoints_dir.is_dir():
        return
    for path in checkpoints_dir.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and (path / COMMIT).is_file():
            step = match["step"]
            yield path, match["stage"], float("inf") if step == "final" else float(step)


def _clean(checkpoints_dir: Path) -> None:
    if not checkpoints_dir.is_dir():
        return
    with _write_errors(checkpoints_dir):
        for path in sorted(checkpoints_dir.iterdir()):
            if path.name.startswith(".tmp-"):
                _remove(path)
            elif path.name.startswith(".old-"):
                # The replacement was renamed into place, or else the old checkpoint is still the only one.
                current = path.with_name(path.name.removeprefix(".old-"))
                if current.exists():
                    _remove(path)
                else:
                    path.rename(current)


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        _fsync(path)
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    commit = folder / COMMIT
    commit.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n", encoding="utf-8")
    _fsync(commit)
    _fsync(folder)


def _replace(tmp: Path, folder: Path) -> None:
    old = folder.with_name(f".old-{folder.name}")
    if folder.exists():
        _remove(old)
        folder.rename(old)
    try:
        tmp.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    _fsync(folder.parent)
    _remove(old)


def _faults(folder: Path) -> Iterator[tuple[str, str]]:
    """(file name, what is wrong) for everything that disagrees with the manifest."""
    try:
        files = _read_manifest(folder / COMMIT)
    except FileNotFoundError:
        yield COMMIT, "file missing: this checkpoint was never completed" if folder.is_dir() else "no such checkpoint"
        return
    except (OSError, ValueError) as error:
        yield COMMIT, f"manifest unreadable: {error}"
        return
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            found = path.stat().st_size
            if not path.is_file():
                yield name, "not a regular file"
            elif found != size:
                yield name, f"file has {found} bytes instead of {size}"
            elif _sha256(path) != digest:
                yield name, "file has changed since it was written (SHA-256 differs)"
        except FileNotFoundError:
            yield name, "file missing"
        except (OSError, ValueError) as error:
            yield name, f"file unreadable: {error}"
    # A stray weight file would be loaded in place of ours by from_pretrained.
    for path in sorted(folder.rglob("*.safetensors")):
        if path.relative_to(folder).as_posix() not in files:
            yield path.relative_to(folder).as_posix(), "file isn't part of the checkpoint"


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    data: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise ValueError(f"format is not {FORMAT}")
    try:
        return {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in data["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"malformed entry: {error!r}") from error


def _way_on(folder: Path) -> str:
    others = [path for path, _, _ in _complete(folder.absolute().parent) if path.name != folder.name]
    if not others:
        return f"no other checkpoint is left: rm -r {folder.absolute().parent} and train again without --resume"
    previous = max(others, key=lambda path: (path / COMMIT).stat().st_mtime_ns)
    return f"rm -r {folder} and run the same command with --resume: it then continues from {previous.name}"


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        what = f"a checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        raise SetupError(Problem("VRLT-R03", what, str(folder), "nothing was written", _SPACE_FIX))


_SPACE_FIX = "free space there, or lower checkpoint.keep, or set train.out to another disk; then run with --resume"


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        if error.errno in _NO_SPACE:
            problem = Problem("VRLT-R03", "checkpoint not written", str(folder), cause, _SPACE_FIX)
        else:
            fix = f"make {folder.parent} writable, or set train.out to another folder"
            problem = Problem("VRLT-R02", "checkpoint can't be written", str(folder), cause, fix)
        raise SetupError(problem) from error


def _discard(folder: Path) -> None:
    """Remove a complete checkpoint; it stops being one at once, however far the removal gets."""
    trash = folder.with_name(f".tmp-{folder.name}-{os.getpid()}-removed")
    _remove(trash)
    folder.rename(trash)
    _remove(trash)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
