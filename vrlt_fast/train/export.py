"""From a checkpoint to a model folder for others: without what only training needs, with the adapters beside it on
request.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vrlt_fast.config_load import load_config
from vrlt_fast.errors import Problem, SetupError
from vrlt_fast.files import storage_errors
from vrlt_fast.model.lora import check_lora, saved_adapters, write_adapter
from vrlt_fast.train.checkpoint import STATE, TRAINER, latest_checkpoint, load_checkpoint
from vrlt_fast.train.manifest import COMMIT, verify
from vrlt_fast.train.setup import RESOLVED


def export(source: Path, out: Path, *, adapter: bool = False) -> Path:
    """Copy the HF folder of a checkpoint to ``out``, whole or not at all; returns the checkpoint.

    Args:
        source: a checkpoint, or a run folder: then its newest one.
        adapter: also write the adapters, in peft's format, to ``out/adapter``.

    Raises:
        SetupError: K02 no checkpoint, K01 a damaged one, R01 ``out`` exists, C04 it was trained without adapters.
    """
    checkpoint = _checkpoint(source)
    if out.exists():
        raise SetupError(Problem("VRLT-R01", "there is such a folder already", str(out), fix="choose another one"))
    verify(checkpoint)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with storage_errors(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(checkpoint, aside, ignore=shutil.ignore_patterns(TRAINER, STATE, COMMIT))
            if adapter:
                _adapter(checkpoint, aside / "adapter")
            aside.rename(out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return checkpoint


def _checkpoint(source: Path) -> Path:
    if (source / COMMIT).is_file():
        return source
    resolved = source / RESOLVED
    stages = load_config([resolved], []).train.stages if resolved.is_file() else ()
    found = latest_checkpoint(source / "checkpoints", stages)
    if found is None:
        fix = "name a run folder, or one of its checkpoints: RUN/checkpoints/grpo-final"
        raise SetupError(Problem("VRLT-K02", "no checkpoint there", str(source), fix=fix))
    return found


def _adapter(checkpoint: Path, folder: Path) -> None:
    weights = saved_adapters(load_checkpoint(checkpoint).tensors)
    resolved = checkpoint.parent.parent / RESOLVED
    if not weights or not resolved.is_file():
        what = (
            "the checkpoint has no adapters" if not weights else f"{resolved} is missing, which describes the adapters"
        )
        raise SetupError(Problem("VRLT-C04", what, str(checkpoint), fix="leave out --adapter"))
    config = load_config([resolved], [])
    check_lora(config.lora, "group")
    write_adapter(folder, weights, config.lora, config.model.name)
