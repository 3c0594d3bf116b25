"""The commands ``vrlt data ...``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from vrlt_fast.cli_args import Command
from vrlt_fast.cli_common import Bar, read_config
from vrlt_fast.errors import ConfigError, DataError, Problem


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
    console.message(f"{out}: train.jsonl, heldout.jsonl, videos/, tiny-model/")
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
