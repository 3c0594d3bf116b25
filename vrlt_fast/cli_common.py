"""What several commands of the command line share: a configuration from the words, a bar on the console."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vrlt_fast.config import Config
    from vrlt_fast.report.console import Console


def read_config(names: Sequence[str], overrides: dict[str, str], verb: str) -> Config:
    from vrlt_fast.config_load import load_config
    from vrlt_fast.recipe import find_file

    return load_config([find_file(name) for name in names], overrides, verb="train" if verb == "train" else "eval")


class Bar:
    """A ``progress(done, total)`` that opens the console's bar with its first call."""

    def __init__(self, console: Console, description: str):
        self._console, self._description = console, description
        self._stack = ExitStack()
        self._advance: Callable[[int], None] | None = None
        self._done = 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def __call__(self, done: int, total: int) -> None:
        if self._advance is None:
            self._advance = self._stack.enter_context(self._console.progress(self._description, total))
        self._advance(done - self._done)
        self._done = done
