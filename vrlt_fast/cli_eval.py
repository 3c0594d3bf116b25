"""The command ``vrlt eval``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vrlt_fast.cli_args import Command
from vrlt_fast.cli_common import Bar, read_config
from vrlt_fast.errors import ConfigError, Problem, SetupError

if TYPE_CHECKING:
    from vrlt_fast.config import Config

_RESOLVED = "config.resolved.toml"


def run_eval(command: Command) -> int:
    flags = command.flags
    if flags.list:
        from vrlt_fast.evals.tasks import listing

        sys.stdout.write(listing())
        return 0
    model, name = _model_and_suite(flags)
    if name is not None:
        return _run_suite(command, model, name)
    if flags.count_failed:
        raise ConfigError(Problem("VRLT-C04", "--count-failed is of a suite", "command line", fix="name it: --suite"))
    config = eval_config(model, flags.data, flags.config, command.overrides)
    from vrlt_fast.evals.run import evaluate_folder
    from vrlt_fast.report.console import Console

    console = Console()
    out = _file(flags.out)
    with Bar(console, "evaluate") as bar:
        metrics = evaluate_folder(config, out, bar)
    console.eval_table([{"label": Path(model).name, "metrics": metrics}])
    if out is not None:
        console.message(f"predictions: {out}")
    return 0


def _model_and_suite(flags: argparse.Namespace) -> tuple[str, str | None]:
    """The model's folder, and the suite where one is named. ``vrlt eval SUITE --model DIR`` is the same as
    ``vrlt eval DIR --suite SUITE``.
    """
    if flags.model is None:
        if flags.target is None:
            raise ConfigError(Problem("VRLT-C02", "MODEL_DIR is required", "vrlt eval", fix="vrlt eval --help"))
        from vrlt_fast.evals.tasks import SUITES

        if flags.target in SUITES and not Path(flags.target).is_dir():
            fix = f"vrlt eval {flags.target} --model MODEL_DIR ..."
            raise ConfigError(Problem("VRLT-C02", f"{flags.target} is a suite: of which model?", "vrlt eval", fix=fix))
        return flags.target, flags.suite
    if flags.target is not None and flags.suite is not None:
        what = f"two models or two suites: {flags.target}, beside --model and --suite"
        raise ConfigError(Problem("VRLT-C04", what, "vrlt eval", fix="leave one out"))
    return flags.model, flags.suite if flags.target is None else flags.target


def _run_suite(command: Command, model: str, name: str) -> int:
    flags = command.flags
    from vrlt_fast.evals.tasks import suite

    chosen = suite(name)
    config = eval_config(model, flags.data, flags.config, {**chosen.frames, **command.overrides})
    from vrlt_fast.evals.results import make_folder, run_suite, write_results
    from vrlt_fast.evals.run import raise_failed
    from vrlt_fast.files import write_lines
    from vrlt_fast.report.console import Console
    from vrlt_fast.train.versions import versions

    folder = Path(flags.out) if flags.out and not flags.out.endswith(".jsonl") else None
    out = _file(flags.out) if folder is None else None
    if folder is not None:
        make_folder(folder)  # that it can't be made is known before the evaluation too
    console = Console()
    with Bar(console, f"evaluate {chosen.name}") as bar:
        result = run_suite(chosen, config, count_failed=flags.count_failed, progress=bar)
    if folder is not None:
        write_results(result, folder, config, versions=versions(config))
    elif out is not None:
        write_lines(out, result.evaluation.rows)
    console.suite_table(f"{chosen.title}, {Path(model).name}", chosen.columns, result.rows())
    how = "counted as wrong" if result.failed_counted else "left out; --count-failed counts them as wrong"
    console.message(f"questions {result.n}, failed {result.failed}" + (f": {how}" if result.failed else ""))
    if flags.out:
        console.message(f"written: {flags.out}")
    if not result.failed_counted:
        raise_failed(result.evaluation)
    for problem in result.problems:
        console.warn(str(problem))
    return 0


def _file(name: str | None) -> Path | None:
    """The file to write; a missing folder is known before an hour of evaluation rather than after it."""
    out = Path(name) if name else None
    if out is not None and not out.parent.is_dir():
        raise SetupError(Problem("VRLT-R02", "no such folder", str(out.parent), fix=f"mkdir -p {out.parent}"))
    return out


def eval_config(model: str, data: str | None, files: Sequence[str], overrides: dict[str, str]) -> Config:
    """The configuration of ``vrlt eval``: a checkpoint's run < files < overrides, with MODEL_DIR and --data on top."""

    from vrlt_fast.config_load import load_config

    own = Path(model).resolve().parent
    resolved = own.parent / _RESOLVED
    from_run = [str(resolved)] if own.name == "checkpoints" and resolved.is_file() else []
    given = {**overrides, "model.name": model}
    if data is not None:
        given["data.eval"] = data
        if from_run and not files and "data.root" not in overrides:
            before = load_config([resolved]).data.eval
            # The run's root belongs to the run's file; another file brings its own folder.
            if not before or Path(before).resolve() != Path(data).resolve():
                given["data.root"] = ""
    return read_config([*from_run, *files], given, "eval")
