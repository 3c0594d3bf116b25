"""The command ``vrlt``. Exit codes: 0 done, 2 configuration, 3 data, 4 environment, 75 stopped, 1 a bug."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from vrlt_fast.cli_args import Command, parse, usage
from vrlt_fast.cli_common import read_config
from vrlt_fast.cli_data import data_check, data_convert, data_demo
from vrlt_fast.cli_eval import run_eval
from vrlt_fast.cli_select import select_pick, select_reflect, select_score
from vrlt_fast.cli_serve import run_serve
from vrlt_fast.errors import ConfigError, Problem, SetupError, VrltError

if TYPE_CHECKING:
    pass

_SHOWN = 50  # problems on the console; vrlt data check prints all
_TRAIN_PACKAGES = {"av", "numpy", "pydantic", "rich", "safetensors", "tomli_w", "torch", "transformers"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. Prints every error itself."""
    # OpenMP threads that spin while they wait cost far more than they gain as soon as another process wants the core
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except VrltError as error:
        _print_problems(error.problems)
        return error.exit_code
    except SystemExit as error:  # argparse's --help
        return int(error.code or 0)
    except KeyboardInterrupt:
        _print_problems(
            [Problem("VRLT-S02", "interrupted", fix="a training run goes on with: vrlt train ... --resume")]
        )
        return 75
    except BrokenPipeError:  # vrlt recipe show demo | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _TRAIN_PACKAGES:
            return _unexpected(error, debug)
        fix = "pip install 'vrlt-fast[train]'"
        _print_problems([Problem("VRLT-E01", f"the package {error.name} is not installed", fix=fix)])
        return 4
    except Exception as error:
        return _unexpected(error, debug)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0 if words else 2
    if words[0] in ("--version", "-V"):
        from vrlt_fast import __version__

        sys.stdout.write(f"vrlt_fast {__version__}\n")
        return 0
    command = parse(words)
    return _COMMANDS[command.verb](command)


def _train(command: Command) -> int:
    config = read_config(command.flags.files, command.overrides, "train")
    if command.flags.resume and command.flags.dry_run:
        raise ConfigError(Problem("VRLT-C04", "--resume and --dry-run exclude each other", fix="leave one out"))
    from vrlt_fast.parallel.launch import launch, started

    processes = config.parallel.replicas * config.parallel.sp
    if processes > 1 and not command.flags.dry_run and not started():
        return launch(command.words, processes)
    from vrlt_fast.train.trainer import dry_run, train

    if command.flags.dry_run:
        sys.stdout.write(dry_run(config) + "\n")
    else:
        train(config, resume=command.flags.resume)
    return 0


def _check(command: Command) -> int:
    config = read_config(command.flags.files, command.overrides, "train")
    from vrlt_fast.train.fit import check_fits, fit_of, report
    from vrlt_fast.train.setup import read_inputs

    inputs = read_inputs(config)
    found = fit_of(config, inputs)
    sys.stdout.write(report(config, inputs, found))
    check_fits(found)
    return 0


def _report(command: Command) -> int:
    from vrlt_fast.report.html import write_report

    sys.stdout.write(f"{write_report(Path(command.flags.run))}\n")
    return 0


def _export(command: Command) -> int:
    from vrlt_fast.train.export import export

    flags = command.flags
    checkpoint = export(Path(flags.source), Path(flags.out), adapter=flags.adapter)
    sys.stdout.write(f"{flags.out}: {checkpoint}\n")
    return 0


def _doctor(command: Command) -> int:
    from vrlt_fast import doctor

    found = doctor.examine()
    sys.stdout.write(doctor.as_json(found) if command.flags.json else doctor.as_text(found))
    return 4 if found.missing else 0


def _bench(command: Command) -> int:
    """``python -m bench`` of the source checkout that this package is part of; its exit code."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        what = f"there is no folder bench next to {root / 'vrlt_fast'}"
        fix = "clone the repository, make check, then vrlt bench in it"
        raise SetupError(Problem("VRLT-E03", what, why="benchmarks are part of the sources only", fix=fix))
    return subprocess.run([sys.executable, "-m", "bench", *command.flags.words], cwd=root, check=False).returncode


def _recipe_ls(_command: Command) -> int:
    from vrlt_fast.recipe import recipe_names, summary

    names = recipe_names()
    width = max(map(len, names), default=0)
    sys.stdout.write("".join(f"{name:<{width}}  {summary(name)}\n" for name in names))
    return 0


def _recipe_show(command: Command) -> int:
    from vrlt_fast.recipe import recipe_path

    sys.stdout.write(recipe_path(command.flags.name).read_text("utf-8"))
    return 0


def _recipe_cp(command: Command) -> int:
    from vrlt_fast.files import storage_errors
    from vrlt_fast.recipe import recipe_path

    name = command.flags.name
    out = Path(command.flags.out or f"{name}.toml")
    text = recipe_path(name).read_text("utf-8")
    try:
        with storage_errors(out), out.open("x", encoding="utf-8") as file:
            file.write(text)
    except SetupError as error:
        if not isinstance(error.__cause__, FileExistsError):
            raise
        fix = f"vrlt recipe cp {name} OTHER.toml"
        raise ConfigError(Problem("VRLT-C03", "the file exists already", str(out), fix=fix)) from error
    sys.stdout.write(f"{out}\n")
    return 0


_COMMANDS: dict[str, Callable[[Command], int]] = {
    "train": _train,
    "eval": run_eval,
    "check": _check,
    "data demo": data_demo,
    "data check": data_check,
    "data convert": data_convert,
    "select score": select_score,
    "select reflect": select_reflect,
    "select pick": select_pick,
    "report": _report,
    "export": _export,
    "serve": run_serve,
    "doctor": _doctor,
    "bench": _bench,
    "recipe ls": _recipe_ls,
    "recipe show": _recipe_show,
    "recipe cp": _recipe_cp,
}


def _print_problems(problems: Sequence[Problem]) -> None:
    said = "".join(f"{_red('error', sys.stderr)} {problem}\n" for problem in problems[:_SHOWN])
    if len(problems) > _SHOWN:
        said += f"and {len(problems) - _SHOWN} more; vrlt data check FILE prints all problems of a data file\n"
    _say_last(said)


def _say_last(text: str) -> None:
    """What the command ends with: for the reader, and for the launcher of several processes."""
    from vrlt_fast.parallel.launch import tell

    sys.stderr.write(text)
    tell(text)


def _red(text: str, stream: TextIO) -> str:
    plain = not stream.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[1;31m{text}\x1b[0m"


def _unexpected(error: Exception, debug: bool) -> int:
    details = "".join(traceback.format_exception(error))
    head = f"{_red('error', sys.stderr)} unexpected {type(error).__name__}: {error}\n"
    if not debug:
        try:
            with tempfile.NamedTemporaryFile("w", prefix="vrlt-", suffix=".log", delete=False, encoding="utf-8") as log:
                log.write(details)
            details = f"    why: a bug in vrlt_fast; the traceback is in {log.name} (--debug prints it)\n"
        except OSError:
            pass  # no place for a log: the traceback itself
    _say_last(head + details)
    return 1
