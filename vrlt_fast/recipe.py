"""The recipes of the package: complete TOML files that can be named instead of a path."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from vrlt_fast.errors import ConfigError, Problem


def recipe_names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe. Raises ConfigError C05."""
    names = recipe_names()
    if name in names:
        return _folder() / f"{name}.toml"
    near = difflib.get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.5)
    why = f"did you mean {near[0]}?" if near else f"recipes are: {', '.join(names)}"
    fix = "vrlt recipe ls lists them; a file's name must end in .toml"
    raise ConfigError(Problem("VRLT-C05", f'no recipe "{name}"', why=why, fix=fix))


def find_file(name: str) -> Path:
    """A path that ends in .toml, has a folder or exists is a file; anything else is the name of a recipe."""
    path = Path(name)
    return path if path.suffix == ".toml" or len(path.parts) > 1 or path.is_file() else recipe_path(name)


def summary(name: str) -> str:
    """The recipe's first comment line."""
    return recipe_path(name).read_text("utf-8").splitlines()[0].lstrip("# ")


def _folder() -> Path:
    return Path(str(files("vrlt_fast") / "recipes"))
