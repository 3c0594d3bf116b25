"""The commands ``vrlt data ...``."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from vrlt_fast.cli_args import Command
from vrlt_fast.cli_common import Bar, read_config
from vrlt_fast.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from vrlt_fast.data.formats.base import Context, Output


def data_demo(command: Command) -> int:
    from vrlt_fast.report.console import Console

    flags = command.flags
    for name in ("train_clips", "heldout_clips"):
        if getattr(flags, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(Problem("VRLT-C02", f"{flag} is {getattr(flags, name)}; needs 1 or more", "command line"))
    out, console = Path(flags.out), Console()
    from vrlt_fast.data.demo import build_demo
    from vrlt_fast.files import storage_errors

    with storage_errors(out):
        # An interrupt between the two steps leaves the data without the model: only the model is made then.
        if not (out / "train.jsonl").is_file() or (out / "tiny-model").exists():
            with Bar(console, "make videos") as bar:
                build_demo(
                    out, seed=flags.seed, train_clips=flags.train_clips, heldout_clips=flags.heldout_clips, progress=bar
                )
        _tiny_model(out, flags.seed)
    console.message(f"{out}: train.jsonl, heldout.jsonl, tasks.jsonl, videos/, tiny-model/")
    return 0


def _tiny_model(out: Path, seed: int) -> None:
    from vrlt_fast.model.tiny import build_tiny

    aside = out / "tiny-model.partial"
    shutil.rmtree(aside, ignore_errors=True)
    build_tiny(aside, train_jsonl=out / "train.jsonl", seed=seed)
    aside.rename(out / "tiny-model")


def data_check(command: Command) -> int:
    flags = command.flags
    if (flags.config or command.overrides) and not flags.decode:
        raise ConfigError(Problem("VRLT-C04", "a configuration says which frames to decode", fix="add --decode"))
    video = read_config(flags.config, command.overrides, "eval").video if flags.decode else None
    from vrlt_fast.data.quarantine import write_quarantine
    from vrlt_fast.report.console import Console
    from vrlt_fast.video.check import check_dataset

    console = Console()
    with Bar(console, "decode videos" if video else "open videos") as bar:
        report = check_dataset(flags.file, flags.root, decode=video, progress=bar)
    sys.stdout.write("".join(f"{problem}\n" for problem in report.problems) + report.summary() + "\n")
    if flags.quarantine and Path(flags.file).is_file():
        count = write_quarantine(Path(flags.quarantine), Path(flags.file), report.rejected)
        sys.stdout.write(
            f"{flags.quarantine}: {count} lines; leave them out with --data.quarantine {flags.quarantine}\n"
        )
    return 0 if report.ok else DataError(report.problems).exit_code


def data_convert(command: Command) -> int:
    flags, out = command.flags, Path(command.flags.out)
    from vrlt_fast.data.formats.convert import FORMATS, read_format
    from vrlt_fast.data.readers import write_jsonl
    from vrlt_fast.files import storage_errors

    if flags.format not in FORMATS:
        what, why = f'unknown format "{flags.format}"', f"formats: {', '.join(FORMATS)}"
        raise ConfigError(Problem("VRLT-C02", what, "command line", why, "docs/data.md says what each is"))
    if out.exists():
        raise DataError(Problem("VRLT-D13", "the file exists already", str(out), fix="name another file"))
    found = read_format(flags.format, flags.file, _context(command))
    if found.problems and not (flags.skip_bad and found.samples):
        sys.stdout.write("".join(f"{problem}\n" for problem in found.problems) + _converted(found))
        sys.stdout.write("nothing is written; --skip-bad writes the good entries\n" if found.samples else "")
        return DataError(found.problems).exit_code
    with storage_errors(out):
        write_jsonl(found.samples, out)
    sys.stdout.write(_converted(found))
    root = flags.root or flags.videos
    sys.stdout.write(f"{out}: {len(found.samples)} samples" + (f"; data.root is {root}\n" if root else "\n"))
    return 0


def _context(command: Command) -> Context:
    """Where the files are and how long they last, as the command line says."""
    flags = command.flags
    from vrlt_fast.data.formats.base import Context
    from vrlt_fast.data.formats.media import Media, read_durations
    from vrlt_fast.video.index import probe

    for name in ("videos", "root"):
        folder = getattr(flags, name)
        if folder and not Path(folder).is_dir():
            raise ConfigError(Problem("VRLT-C02", f"--{name} {folder} isn't a folder", "command line"))
    videos, root = (Path(folder) if folder else None for folder in (flags.videos, flags.root))
    media = Media(videos, root, flags.strip)
    base = media.base
    measure = (lambda path: probe(base / path).duration) if videos and base else None
    table = read_durations(Path(flags.durations)) if flags.durations else {}
    return Context(media, table, measure, flags.split, flags.seed)


def _converted(found: Output) -> str:
    """What became of the entries: tasks, what was left out and why, what was changed."""
    lines = [
        *(f"{task}: {count} samples" for task, count in sorted(Counter(s.task for s in found.samples).items())),
        *(f"skipped, {reason}: {count}" for reason, count in sorted(found.skipped.items())),
        *(f"{change}: {count}" for change, count in sorted(found.changed.items())),
        *(f"problems {code}: {count}" for code, count in sorted(Counter(p.code for p in found.problems).items())),
    ]
    return "".join(f"{line}\n" for line in lines)
