"""The samples that a configuration names: those that are trained on, and those held out."""

from __future__ import annotations

from pathlib import Path

from vrlt_fast.config import Config
from vrlt_fast.data.invert import prepared
from vrlt_fast.data.quarantine import read_quarantine
from vrlt_fast.data.readers import read_jsonl
from vrlt_fast.data.sample import Sample
from vrlt_fast.errors import ConfigError, Problem


def training_samples(config: Config) -> list[Sample]:
    """The samples of ``data.train`` that a run trains on, as it asks them.

    Raises:
        DataError: the readers' problems.
        ConfigError: C04 none is left.
    """
    samples = read_split(config, "train")
    wanted = config.data.tasks
    kept = [s for s in samples if not wanted or s.task in wanted]
    if samples and not kept:
        tasks = ", ".join(dict.fromkeys(s.task for s in samples))
        what = f"no sample has a task of data.tasks = {list(wanted)}"
        raise ConfigError(Problem("VRLT-C04", what, config.data.train, f"it has {tasks}"))
    if config.sft.reasoned and "sft" in config.train.stages and not any(s.reasoning for s in kept):
        fix = "give samples a reasoning (docs/data.md), or set sft.reasoned = false"
        raise ConfigError(Problem("VRLT-C04", "no sample has a reasoning", config.data.train, "sft.reasoned", fix))
    data = config.data
    return prepared(kept, shuffle_options=data.shuffle_options, invert=data.invert, seed=config.train.seed)


def read_split(config: Config, split: str) -> list[Sample]:
    """The samples of ``data.train`` or ``data.eval`` without the lines of ``data.quarantine``. Raises DataError."""
    leave_out = read_quarantine(Path(config.data.quarantine)) if config.data.quarantine else frozenset()
    return read_jsonl(Path(getattr(config.data, split)), data_root(config, split), leave_out=leave_out)


def data_root(config: Config, split: str) -> Path:
    """Folder that the video paths of ``data.train`` or ``data.eval`` are relative to."""
    return Path(config.data.root) if config.data.root else Path(getattr(config.data, split)).parent
