"""The command ``vrlt serve``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vrlt_fast.cli_args import Command
from vrlt_fast.errors import ConfigError, Problem

if TYPE_CHECKING:
    from vrlt_fast.config import Config

_GRAMMAR = "sole_r1"
_TOKEN = "VRLT_TOKEN"


def run_serve(command: Command) -> int:
    flags = command.flags
    if not 0 <= flags.port < 1 << 16:
        raise ConfigError(Problem("VRLT-C02", f"--port is {flags.port}; needs 0 to 65535", "command line"))
    token = read_token(flags.token_env)
    config = serve_config(flags.model, flags.config, command.overrides)
    from vrlt_fast.serve import serve

    def ready(url: str) -> None:
        sys.stdout.write(f"{url}: POST /progress, GET /health\n")
        sys.stdout.flush()

    serve(config, flags.host, flags.port, token, ready)
    return 0


def read_token(name: str | None) -> str:
    """The token in an environment variable; "" where none was named and VRLT_TOKEN is not set.

    Raises:
        ConfigError: C04 the named variable is not set, C02 it can't be a token.
    """
    token = os.environ.get(name or _TOKEN, "").strip()
    if name and not token:
        fix = f"export {name}=$(openssl rand -hex 16)"
        raise ConfigError(Problem("VRLT-C04", f"the environment variable {name} has no token", "--token-env", fix=fix))
    if not token.isascii() or not token.isprintable() or " " in token:
        what = f"the token in {name or _TOKEN} has characters that no header has"
        raise ConfigError(Problem("VRLT-C02", what, "--token-env", fix="use letters and digits"))
    return token


def serve_config(model: str, files: Sequence[str], overrides: dict[str, str]) -> Config:
    """The configuration of ``vrlt serve``: a checkpoint's run < files < overrides, with MODEL_DIR on top. Where nothing
    says anything, the grammar is SOLE-R1's.
    """
    from vrlt_fast.config_load import load_config
    from vrlt_fast.recipe import find_file

    own = Path(model).resolve().parent
    resolved = own.parent / "config.resolved.toml"
    found = [resolved] if own.name == "checkpoints" and resolved.is_file() else []
    found += [find_file(name) for name in files]
    given = {**({} if found else {"prompt.grammar": _GRAMMAR}), **overrides, "model.name": model}
    return load_config(found, given)
