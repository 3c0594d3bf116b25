"""The commands ``vrlt select ...``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vrlt_fast.cli_args import Command
from vrlt_fast.cli_common import Bar, read_config
from vrlt_fast.errors import ConfigError, DataError, Problem, SetupError

if TYPE_CHECKING:
    from vrlt_fast.report.console import Console
    from vrlt_fast.select.policies import Choice
    from vrlt_fast.select.score import Progress

_SAID_EVERY = 60.0
_NAMED = 20  # failures on the console
_BELONG_TO = {
    "alpha": ("sigma", "buckets"),
    "tau": ("buckets",),
    "ratio": ("buckets",),
    "target": ("gauss",),
    "width": ("gauss",),
}


def select_score(command: Command) -> int:
    """``vrlt select score``; with ``parallel.replicas`` above 1 a process a shard, here and now."""
    flags = command.flags
    config = read_config(flags.files, command.overrides, "train")
    out, replicas = Path(flags.out), config.parallel.replicas
    _folder_of(out)
    from vrlt_fast.parallel.launch import launch, started

    if replicas > 1 and flags.shard:
        fix = "use --shard for processes that you start yourself, parallel.replicas for those of this machine"
        raise ConfigError(Problem("VRLT-C04", "--shard and parallel.replicas exclude each other", fix=fix))
    if config.parallel.sp > 1:
        raise ConfigError(Problem("VRLT-C04", "parallel.sp is above 1", fix="score with parallel.sp = 1"))
    if replicas > 1 and not started():
        code = launch(command.words, replicas)
        return code or _summarise(out, [(i, replicas) for i in range(1, replicas + 1)])
    shard = (int(os.environ["RANK"]) + 1, replicas) if replicas > 1 else _shard(flags.shard)
    from vrlt_fast.report.console import Console
    from vrlt_fast.select.score import score_samples, shard_path

    console = Console()
    with Bar(console, "score") as bar:
        found = score_samples(
            config,
            out,
            shard=shard,
            retry_failed=flags.retry_failed,
            progress=_Said(console, bar) if shard[0] == 1 or replicas == 1 else None,
            warn=console.warn,
        )
    if found.done:
        console.message(_line(found))
    return 0 if replicas > 1 else _summarise(shard_path(out, shard), [(1, 1)])


def _summarise(out: Path, shards: list[tuple[int, int]]) -> int:
    from vrlt_fast.select.score import shard_path
    from vrlt_fast.select.summary import summary_path, write_summary

    sys.stdout.write(write_summary([shard_path(out, shard) for shard in shards], out))
    sys.stdout.write(f"summary: {summary_path(out)}\n")
    return 0


class _Said:
    """Moves the bar, and now and then says how fast it goes and what was saved."""

    def __init__(self, console: Console, bar: Bar):
        self._console, self._bar, self._last = console, bar, time.monotonic()

    def __call__(self, now: Progress) -> None:
        self._bar(now.done, now.todo)
        if time.monotonic() - self._last >= _SAID_EVERY:
            self._last = time.monotonic()
            self._console.message(f"{now.done}/{now.todo}: {_line(now)}")


def _line(now: Progress) -> str:
    saved = 1 - now.drawn / now.possible if now.possible else 0.0
    rate = now.done / max(now.seconds, 1e-9)
    return f"{rate:.2f} samples/s, {now.drawn} responses, {saved:.0%} of them saved"


def _shard(text: str | None) -> tuple[int, int]:
    if not text:
        return 1, 1
    first, _, last = text.partition("/")
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise ConfigError(Problem("VRLT-C02", f'--shard is "{text}"', "command line", fix="--shard 1/4 to --shard 4/4"))


def _folder_of(out: Path) -> None:
    if not out.parent.is_dir():
        raise SetupError(Problem("VRLT-R02", "no such folder", str(out.parent), fix=f"mkdir -p {out.parent}"))


def _no_input(out: Path, inputs: Sequence[Path]) -> None:
    if any(out.exists() and path.exists() and out.samefile(path) for path in inputs):
        what, fix = "--out is one of the inputs", "name another file"
        raise DataError(Problem("VRLT-D13", what, str(out), fix=fix))


def select_reflect(command: Command) -> int:
    """``vrlt select reflect``. The list may be written over the one that ``data.quarantine`` names."""
    flags = command.flags
    config = read_config(flags.files, command.overrides, "train")
    out = Path(flags.out)
    _folder_of(out)
    _no_input(out, [Path(name) for name in (config.data.train, config.data.eval) if name])
    from vrlt_fast.report.console import Console
    from vrlt_fast.select.reflect import reflect

    console = Console()
    with Bar(console, "reflect") as bar:
        found = reflect(config, out, progress=bar)
    for error in found.failed[:_NAMED]:
        console.warn(str(error))
    sys.stdout.write(
        f"{found.asked} samples asked, {found.passed} without spans passed over\n"
        f"{found.partial} annotated in part only, {len(found.failed)} failed, {found.unread} answers without a span\n"
        f"{out}: {found.listed} lines; leave them out with --data.quarantine {out}\n"
    )
    return 0


def select_pick(command: Command) -> int:
    flags = command.flags
    out, data, report = Path(flags.out), Path(flags.data), Path(flags.report) if flags.report else None
    for path in (out, report):
        if path is not None:
            _folder_of(path)
    _no_input(out, [data, *(Path(name) for name in flags.scores)])
    choice = _choice(flags)
    from vrlt_fast.select.pick import pick_file

    picked = pick_file(
        [Path(name) for name in flags.scores],
        data,
        out,
        choice,
        report=report,
        root=Path(flags.root) if flags.root else None,
        parts=[name for name in (flags.parts or "").split(",") if name],
        partial=flags.partial,
    )
    for task, (kept, scored) in picked.by_task.items():
        sys.stdout.write(f"{task}: {kept} of {scored}\n")
    sys.stdout.write(f"{out}: {picked.kept} of {picked.scored} samples\n")
    if report is not None:
        sys.stdout.write(f"report: {report}\n")
    return 0


def _choice(flags: argparse.Namespace) -> Choice:
    from vrlt_fast.select.policies import Choice

    for name, policies in _BELONG_TO.items():
        if getattr(flags, name) is not None and flags.policy not in policies:
            what = f"--{name} has no meaning for --policy {flags.policy}"
            raise ConfigError(Problem("VRLT-C04", what, "command line", fix=f"--policy {' or '.join(policies)}"))
    given = {name: getattr(flags, name) for name in _BELONG_TO if getattr(flags, name) is not None}
    if "ratio" in given:
        given["ratio"] = tuple(given["ratio"])
    quotas, equal = _quotas(flags.quota)
    size = flags.count if flags.count is not None else flags.share
    if flags.share is not None and not 0.0 < flags.share <= 1.0:
        raise ConfigError(Problem("VRLT-C02", f"--share is {flags.share}", "command line", fix="a number in (0, 1]"))
    if flags.count is not None and flags.count < 1:
        raise ConfigError(Problem("VRLT-C02", f"--count is {flags.count}", "command line", fix="1 or more"))
    if quotas and size is not None:
        fix = "quotas say how many there are; or --quota equal"
        raise ConfigError(Problem("VRLT-C04", "--quota TASK=N excludes --count and --share", "command line", fix=fix))
    return Choice(
        policy=flags.policy,
        size=None if flags.share == 1.0 else size,
        drop_flat=flags.drop_flat,
        least_std=flags.min_std,
        mean=tuple(flags.mean),
        quotas=quotas or None,
        equal=equal,
        seed=flags.seed,
        **given,
    )


def _quotas(texts: list[str]) -> tuple[dict[str, int], bool]:
    quotas: dict[str, int] = {}
    for text in texts:
        task, equals, count = text.partition("=")
        if text == "equal":
            continue
        if not equals or not count.isdecimal() or task in quotas:
            fix = "--quota equal, or --quota grounding=1000, once a task"
            raise ConfigError(Problem("VRLT-C02", f'--quota is "{text}"', "command line", fix=fix))
        quotas[task] = int(count)
    if quotas and "equal" in texts:
        raise ConfigError(Problem("VRLT-C04", "--quota equal excludes --quota TASK=N", "command line"))
    return quotas, "equal" in texts
