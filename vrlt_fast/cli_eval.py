"""The command ``vrlt eval``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vrlt_fast.cli_args import Command
from vrlt_fast.cli_common import Bar, read_config
from vrlt_fast.errors import Problem, SetupError

if TYPE_CHECKING:
    from vrlt_fast.config import Config

_RESOLVED = "config.resolved.toml"


def run_eval(command: Command) -> int:
    flags = command.flags
    config = eval_config(flags.model, flags.data, flags.config, command.overrides)
    from vrlt_fast.evals.run import evaluate_folder
    from vrlt_fast.report.console import Console

    console = Console()
    out = Path(flags.out) if flags.out else None
    if out is not None and not out.parent.is_dir():  # known before an hour of evaluation rather than after it
        raise SetupError(Problem("VRLT-R02", "no such folder", str(out.parent), fix=f"mkdir -p {out.parent}"))
    with Bar(console, "evaluate") as bar:
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
    return read_config([*from_run, *files], given, "eval")
