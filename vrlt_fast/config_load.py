"""Read the configuration: defaults < TOML files (left to right) < overrides.

Types are strict in files (``steps = "5"`` is an error). All problems of all files are raised together.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vrlt_fast.config import Config
from vrlt_fast.errors import ConfigError, Problem

Verb = Literal["train", "eval"]
Origins = dict[str, str]

_SHOW = "vrlt recipe show demo prints a complete file; docs/config.md lists every key"


def load_config(
    files: Sequence[Path] = (),
    overrides: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    *,
    verb: Verb | None = None,
) -> Config:
    """Merge files and overrides into a validated configuration.

    ``overrides`` maps dotted keys (``grpo.lr``) to values. A string is read as the key's type (``"1e-6"``), any other
    value must have the type already. With ``verb``, what that command can't do without is required too. Relative paths
    stay relative to the current folder.

    Raises ConfigError with one Problem per mistake: C01 unknown key, C02 type or range, C03 file, C04 contradiction.
    """
    tree: dict[str, Any] = {}
    origins: Origins = {}
    problems: list[Problem] = []
    for path in files:
        text, table, problem = _read(path)
        if problem is None:
            _merge(tree, table, origins, str(path), text)
        else:
            problems.append(problem)
    for key, value in dict(overrides).items():
        _override(tree, key, value, origins)
    if problems:
        verb = None  # what is missing may stand in the file that can't be read
    problems += _not_finite(tree, origins)
    config: Config | None = None
    try:
        config = Config.model_validate(_tuples(tree), strict=True)
    except ValidationError as error:
        problems += [p for detail in error.errors() for p in _problems(detail, tree, origins)]
    if config is not None:
        problems += check(config, verb, origins)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def check(config: Config, verb: Verb | None = None, origins: Mapping[str, str] | None = None) -> list[Problem]:
    """What is wrong between keys, or missing for a command; [] when all is well. Reads no file."""
    at = dict(origins or {})
    found: list[Problem] = []

    def bad(code: str, key: str, what: str, fix: str) -> None:
        found.append(Problem(code, f"{key} {what}", at.get(key, ""), fix=fix))

    stages = config.train.stages
    if not stages:
        bad("VRLT-C02", "train.stages", "is empty", 'set it to ["sft", "grpo"], or to one of these')
    if len(set(stages)) < len(stages):
        bad("VRLT-C04", "train.stages", f"names a stage twice: {list(stages)}", "name each stage once, in order")
    if "grpo" in stages and config.rollout.group_size < 2:
        bad(
            "VRLT-C04",
            "rollout.group_size",
            "is 1, but stage grpo compares the responses of a group",
            "set rollout.group_size to 2 or more, or take grpo out of train.stages",
        )
    if not all(0.0 <= beta < 1.0 for beta in config.optim.betas):
        bad("VRLT-C02", "optim.betas", f"is {list(config.optim.betas)}", "both values must be in [0, 1)")
    if config.sft.narration and config.prompt.video_layout != "interleaved":
        bad("VRLT-C04", "sft.narration", "needs prompt.video_layout = interleaved", "set it to 0, or change the layout")
    if config.train.verify_shared_prefix != "off" and config.train.prefix == "replicated":
        fix = 'set it to "off", or train.prefix to "shared"'
        bad("VRLT-C04", "train.verify_shared_prefix", "checks what train.prefix = replicated doesn't do", fix)
    if "<|" in config.prompt.system:
        bad("VRLT-C02", "prompt.system", "contains a control token such as <|video_pad|>", "remove it from the text")
    if config.train.seed >= 2**63:
        bad("VRLT-C02", "train.seed", f"is {config.train.seed}", "give a number below 2^63")
    if verb is not None and not config.model.name:
        bad("VRLT-C04", "model.name", "is empty", "set it to the folder of an HF model, or pass --model.name FOLDER")
    if verb == "train" and not config.data.train:
        bad("VRLT-C04", "data.train", "is empty", "set it to a JSONL file of samples, or pass --data.train FILE")
    if verb == "eval" and not config.data.eval:
        bad("VRLT-C04", "data.eval", "is empty", "pass --data FILE, a JSONL file of held-out samples")
    return found


def dump_toml(config: Config) -> str:
    """The whole tree as TOML; ``load_config`` of it gives an equal Config."""
    return tomli_w.dumps(config.model_dump(mode="json"))


def keys() -> dict[str, Any]:
    """Every dotted key with its field (pydantic FieldInfo)."""
    return {
        f"{section}.{name}": field
        for section, info in Config.model_fields.items()
        for name, field in _section_type(info.annotation).model_fields.items()
    }


def suggest(key: str, known: Iterable[str] | None = None) -> str:
    """A sentence fragment that names what the user may have meant, or ''."""
    names = list(keys()) if known is None else list(known)
    section, _, leaf = key.rpartition(".")
    leaves = {name: name.rpartition(".")[2] for name in names}
    # A slip of the finger inside the section, then the right word in the wrong section, then whatever looks similar.
    inside = [leaves[name] for name in names if section and name.startswith(f"{section}.")]
    hits = [f"{section}.{near}" for near in difflib.get_close_matches(leaf, inside, n=1, cutoff=0.7)]
    hits += [name for name in names if leaves[name] == leaf and "." in name]
    if not hits:
        hits = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if not hits:
        near = difflib.get_close_matches(leaf, set(leaves.values()), n=1, cutoff=0.7)
        hits = [name for name in names if near and leaves[name] == near[0]]
    hits = list(dict.fromkeys(hits))[:3]
    return f"did you mean {' or '.join(hits)}?" if hits else ""


def read_value(key: str, text: str) -> Any:
    """A command-line text as a value of the key's type. What doesn't fit stays text, for the validation to refuse."""
    field = keys().get(key)
    kinds = _kinds(field.annotation) if field is not None else set()
    if str in kinds:
        return text
    if tuple in kinds and not text.lstrip().startswith("["):
        return tuple(_scalar(part.strip()) for part in text.split(",") if part.strip())
    value = _scalar(text)
    if isinstance(value, str) and kinds == {float}:
        with contextlib.suppress(ValueError):
            return float(text)  # ".5" is no TOML
    return int(value) if kinds == {int} and isinstance(value, float) and value.is_integer() else value


def is_flag(key: str) -> bool:
    """Whether the key is boolean, so that ``--section.key`` alone means true."""
    field = keys().get(key)
    return field is not None and _kinds(field.annotation) == {bool}


def _scalar(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"] if "\n" not in text else text
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _kinds(annotation: Any) -> set[type]:
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    origin = get_origin(annotation)
    return {origin or annotation}


def _section_type(annotation: Any) -> type[BaseModel]:
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        raise TypeError(f"section {annotation} is not a pydantic model")
    return annotation


def _read(path: Path) -> tuple[str, dict[str, Any], Problem | None]:
    name = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return text, tomllib.loads(text), None
    except UnicodeDecodeError as error:
        return "", {}, Problem("VRLT-C03", "not UTF-8", name, str(error), "save the file as UTF-8")
    except OSError as error:
        why = error.strerror or str(error)
        fix = "check the path; vrlt recipe ls lists the recipes that can be given by name"
        return "", {}, Problem("VRLT-C03", "configuration file can't be read", name, why, fix)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        line = re.search(r"at line (\d+)", str(error))
        where = f"{name}:{line[1]}" if line else name
        fix = "mend the line; strings need quotes in TOML"
        return "", {}, Problem("VRLT-C03", "not TOML", where, str(error), fix)


def _merge(tree: dict[str, Any], table: Mapping[str, Any], origins: Origins, name: str, text: str) -> None:
    lines = _lines(text)
    for section, values in table.items():
        origins[section] = f"{name}:{lines[section]}" if section in lines else name
        if not isinstance(values, dict):
            tree[section] = values
            continue
        old = tree.get(section)
        tree[section] = {**old, **values} if isinstance(old, dict) else dict(values)
        for key in values:
            dotted = f"{section}.{key}"
            origins[dotted] = f"{name}:{lines[dotted]}" if dotted in lines else name


def _lines(text: str) -> dict[str, int]:
    """Line of each ``[section]``, ``key =`` and ``section.key =``. Keys inside inline tables aren't found."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        head = re.match(r"\s*\[\s*([\w-]+)\s*\]", line)
        pair = re.match(r"""\s*["']?([\w.-]+)["']?\s*=""", line)
        if head:
            section = head[1]
            found.setdefault(section, number)
        elif pair:
            found.setdefault(f"{section}.{pair[1]}" if section else pair[1], number)
    return found


def _override(tree: dict[str, Any], key: str, value: Any, origins: Origins) -> None:
    section, _, name = key.partition(".")
    origins[key] = f"--{key}"
    origins.setdefault(section, f"--{key}")
    if not isinstance(tree.get(section), dict):
        tree[section] = {}
    tree[section][name] = read_value(key, value) if isinstance(value, str) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def _not_finite(tree: Mapping[str, Any], origins: Origins) -> list[Problem]:
    return [
        Problem("VRLT-C02", f"{section}.{key} is {value}", origins.get(f"{section}.{key}", ""), fix="give a number")
        for section, values in tree.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if isinstance(value, float) and math.isinf(value)
    ]


def _problems(detail: ErrorDetails, tree: Mapping[str, Any], origins: Origins) -> list[Problem]:
    path = [str(part) for part in detail["loc"]]
    key = ".".join(path[:2])
    where = origins.get(key) or origins.get(path[0] if path else "", "")
    if detail["type"] == "extra_forbidden":
        return _unknown(key, tree, origins)
    if len(path) == 1 and detail["type"] == "value_error":
        reason = detail["msg"].removeprefix("Value error, ")
        named = set(reason.split())
        places = {at for name, at in origins.items() if name.startswith(f"{key}.") and name.rpartition(".")[2] in named}
        return [Problem("VRLT-C04", f"[{key}] {reason}", ", ".join(sorted(places)), fix="change one of the two")]
    if len(path) == 1:
        what = f"{key} is {_short(detail['input'])}, but it is a section"
        return [Problem("VRLT-C02", what, where, fix=f"write a table [{key}] with its keys below it")]
    index = "".join(f"[{part}]" for part in path[2:])
    what = f"{key}{index} is {_short(detail['input'])}; needs {_needs(detail)}"
    field = keys().get(key)
    return [Problem("VRLT-C02", what, where, why=field.description or "" if field else "", fix=_SHOW)]


def _unknown(key: str, tree: Mapping[str, Any], origins: Origins) -> list[Problem]:
    where = origins.get(key, "")
    values = tree.get(key)
    if "." in key or not isinstance(values, dict):
        hint = suggest(key if "." in key else f".{key}")
        return [Problem("VRLT-C01", f'unknown key "{key}"', where, hint, _SHOW)]
    known = keys()
    homes = [name for name in Config.model_fields if not values or any(f"{name}.{k}" in known for k in values)]
    near = difflib.get_close_matches(key, homes, n=1, cutoff=0.5)
    hint = f"did you mean [{near[0]}]?" if near else next(filter(None, (suggest(f"{key}.{k}") for k in values)), "")
    return [Problem("VRLT-C01", f"unknown section [{key}]", where, hint, _SHOW)]


def _needs(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    if detail["type"] == "too_long":
        return f"a list of {detail['ctx']['max_length']}"
    names = {
        "Field required": "one more value",
        "string": "text in quotes",
        "tuple": "a list",
        "boolean": "true or false",
        "integer": "a whole number",
        "number": "a number",
    }
    return names.get(message, message)


def _short(value: object) -> str:
    if isinstance(value, tuple):
        value = list(value)
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else text[:57] + "..."
