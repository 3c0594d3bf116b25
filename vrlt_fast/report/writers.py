"""Optional writers beside metrics.jsonl: TensorBoard, trackio, wandb. Each package is imported when it is asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from vrlt_fast.errors import Problem, SetupError

_MODULES = {"tensorboard": ("tensorboard", "torch.utils.tensorboard"), "trackio": ("trackio",), "wandb": ("wandb",)}


class Writer(Protocol):
    """Takes the records of metrics.jsonl."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record under flat names: ``grpo/parts/semantic``, ``grpo/eval/greedy/all/tiou``."""
    stage = str(record.get("stage", "run"))
    prefix = f"{stage}/eval" if record.get("kind") == "eval" else stage
    values = record.get("metrics", {}) if record.get("kind") == "eval" else record
    return {f"{prefix}/{name}": value for name, value in _flat(values) if name not in ("step", "steps", "time")}


def _flat(tree: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{name}", number) for name, number in _flat(value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, float(value)


def check_writers(names: Sequence[str]) -> None:
    """Raises SetupError E01 when the package of a writer is missing; opens nothing."""
    for name in names:
        _load(name)


def open_writers(names: Sequence[str], run_dir: Path, project: str) -> list[Writer]:
    """Imports all packages first, so that a missing one (VRLT-E01) stops before any writer has begun."""
    modules = {name: _load(name) for name in names}
    writers: list[Writer] = []
    for name, module in modules.items():
        if name == "tensorboard":
            writers.append(_TensorBoard(module, run_dir))
        elif name == "trackio":
            writers.append(_Trackio(module, run_dir, project))
        else:
            writers.append(_Wandb(module, run_dir, project))
    return writers


def _load(name: str) -> ModuleType:
    if name not in _MODULES:
        raise SetupError(
            Problem(
                "VRLT-E01", f"no writer is called {name!r}", "log.to", "known: " + ", ".join(_MODULES), "mend log.to"
            )
        )
    try:
        return [importlib.import_module(module) for module in _MODULES[name]][-1]
    except ImportError as error:
        raise SetupError(
            Problem(
                "VRLT-E01",
                f"package {name} is missing",
                "log.to",
                str(error),
                f"pip install {name}, or take it out of log.to",
            )
        ) from error


class _TensorBoard:
    def __init__(self, module: ModuleType, run_dir: Path):
        self._writer = module.SummaryWriter(log_dir=str(run_dir / "tensorboard"))

    def write(self, record: dict[str, Any]) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, int(record.get("step", 0)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """Local by design: trackio keeps its own data base under the user's cache folder."""

    def __init__(self, module: ModuleType, run_dir: Path, project: str):
        self._module = module
        module.init(project=project, name=run_dir.name, resume="allow")

    def write(self, record: dict[str, Any]) -> None:
        self._module.log({**scalars(record), f"{record.get('stage', 'run')}/step": int(record.get("step", 0))})

    def close(self) -> None:
        self._module.finish()


class _Wandb:
    """Offline unless WANDB_MODE says otherwise. Steps start again at every stage, hence a step metric a stage."""

    def __init__(self, module: ModuleType, run_dir: Path, project: str):
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = module.init(project=project, name=run_dir.name, dir=str(run_dir), mode=mode)
        self._stages: set[str] = set()

    def write(self, record: dict[str, Any]) -> None:
        stage = str(record.get("stage", "run"))
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({**scalars(record), f"{stage}/step": int(record.get("step", 0))})

    def close(self) -> None:
        self._run.finish()
