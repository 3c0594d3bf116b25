"""The command ``vrlt``. Exit codes: 0 done, 2 configuration, 3 data, 4 environment, 75 stopped, 1 a bug."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from vrlt_fast.cli_args import Command, parse, usage
from vrlt_fast.errors import ConfigError, DataError, Problem, SetupError, VrltError

if TYPE_CHECKING:
    from vrlt_fast.config import Config
    from vrlt_fast.report.console import Console

_SHOWN = 50  # problems on the console; vrlt data check prints all
_RESOLVED = "config.resolved.toml"
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
    config = _config(command.flags.files, command.overrides, "train")
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
    config = _config(command.flags.files, command.overrides, "train")
    from vrlt_fast.train.fit import check_fits, fit_of, report
    from vrlt_fast.train.setup import read_inputs

    inputs = read_inputs(config)
    found = fit_of(config, inputs)
    sys.stdout.write(report(config, inputs, found))
    check_fits(found)
    return 0


def _config(names: Sequence[str], overrides: dict[str, str], verb: str) -> Config:
    from vrlt_fast.config_load import load_config
    from vrlt_fast.recipe import find_file

    return load_config([find_file(name) for name in names], overrides, verb="train" if verb == "train" else "eval")


def _eval(command: Command) -> int:
    flags = command.flags
    config = eval_config(flags.model, flags.data, flags.config, command.overrides)
    from vrlt_fast.evals.run import evaluate_folder
    from vrlt_fast.report.console import Console

    console = Console()
    out = Path(flags.out) if flags.out else None
    if out is not None and not out.parent.is_dir():  # known before an hour of evaluation rather than after it
        raise SetupError(Problem("VRLT-R02", "no such folder", str(out.parent), fix=f"mkdir -p {out.parent}"))
    with _Bar(console, "evaluate") as bar:
        metrics = evaluate_folder(config, out, bar)
    console.eval_table([{"label": Path(flags.model).name, "metrics": metrics}])
    if out is not None:
        console.message(f"predictions: {out}")
    return 0


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
    return _config([*from_run, *files], given, "eval")


class _Bar:
    """A ``progress(done, total)`` that opens the console's bar with its first call."""

    def __init__(self, console: Console, description: str):
        self._console, self._description = console, description
        self._stack = ExitStack()
        self._advance: Callable[[int], None] | None = None
        self._done = 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def __call__(self, done: int, total: int) -> None:
        if self._advance is None:
            self._advance = self._stack.enter_context(self._console.progress(self._description, total))
        self._advance(done - self._done)
        self._done = done


def _data_demo(command: Command) -> int:
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
            with _Bar(console, "make videos") as bar:
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


def _data_check(command: Command) -> int:
    flags = command.flags
    if (flags.config or command.overrides) and not flags.decode:
        raise ConfigError(Problem("VRLT-C04", "a configuration says which frames to decode", fix="add --decode"))
    video = _config(flags.config, command.overrides, "eval").video if flags.decode else None
    from vrlt_fast.data.quarantine import write_quarantine
    from vrlt_fast.report.console import Console
    from vrlt_fast.video.check import check_dataset

    console = Console()
    with _Bar(console, "decode videos" if video else "open videos") as bar:
        report = check_dataset(flags.file, flags.root, decode=video, progress=bar)
    sys.stdout.write("".join(f"{problem}\n" for problem in report.problems) + report.summary() + "\n")
    if flags.quarantine and Path(flags.file).is_file():
        count = write_quarantine(Path(flags.quarantine), Path(flags.file), report.rejected)
        sys.stdout.write(
            f"{flags.quarantine}: {count} lines; leave them out with --data.quarantine {flags.quarantine}\n"
        )
    return 0 if report.ok else DataError(report.problems).exit_code


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
    "eval": _eval,
    "check": _check,
    "data demo": _data_demo,
    "data check": _data_check,
    "report": _report,
    "export": _export,
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
