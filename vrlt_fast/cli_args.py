"""Arguments of the command line: verbs and flags through argparse, ``--section.key value`` pairs as overrides.

argparse alone can't name the key that a typo meant, so unknown flags and bad values are raised as coded errors here.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from vrlt_fast.errors import ConfigError, Problem

_OVERRIDES = "--section.key VALUE overrides a key of the configuration (docs/config.md), e.g. --grpo.lr 1e-4"


@dataclass(frozen=True)
class Command:
    """A parsed command line. ``overrides`` maps dotted keys to their text; ``words`` are all as they were given."""

    verb: str
    flags: argparse.Namespace
    overrides: dict[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(Problem("VRLT-C02", message, self.prog, fix=f"{self.prog} --help"))


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="RECIPE|FILE.toml", help="merged left to right")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of train.out")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")


def _check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="RECIPE|FILE.toml", help="merged left to right")


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", help="an HF folder; a checkpoint brings its run's configuration")
    parser.add_argument("--data", metavar="FILE.jsonl", help="held-out samples (data.eval)")
    parser.add_argument(
        "--config", "--recipe", action="append", default=[], metavar="RECIPE|FILE.toml", help="may be repeated"
    )
    parser.add_argument("--out", metavar="FILE.jsonl", help="one line a question")


def _data_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-clips", type=int, default=1000)
    parser.add_argument("--heldout-clips", type=int, default=220)


def _data_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.jsonl")
    parser.add_argument("--root", metavar="DIR", help="folder of the videos; default: the file's")
    parser.add_argument("--decode", action="store_true", help="also decode the frames that a run would take")
    parser.add_argument(
        "--config", action="append", default=[], metavar="RECIPE|FILE.toml", help="whose [video] says which; repeatable"
    )
    parser.add_argument("--quarantine", metavar="OUT.jsonl", help="write the bad lines there, for data.quarantine")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CHECKPOINT|RUN", help="of a run: its newest checkpoint")
    parser.add_argument("out", metavar="OUT", help="new folder, an HF model")
    parser.add_argument("--adapter", action="store_true", help="also OUT/adapter, for peft")


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")


def _nothing(_parser: argparse.ArgumentParser) -> None:
    pass


def _name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")


def _name_out(parser: argparse.ArgumentParser) -> None:
    _name(parser)
    parser.add_argument("out", nargs="?", metavar="OUT.toml", help="default: NAME.toml in this folder")


VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "train": ("train a model", _train),
    "eval": ("measure a model on held-out samples", _eval),
    "check": ("check a run's inputs, and whether it fits into memory", _check),
    "data demo": ("make the demo data set and its tiny model", _data_demo),
    "data check": ("check a file of samples", _data_check),
    "report": ("write RUN/report.html again", _report),
    "export": ("copy a checkpoint's model, for others", _export),
    "doctor": ("say what is installed and which paths are active", _doctor),
    "bench": ("measure, or list what was measured; as python -m bench in the sources", _nothing),
    "recipe ls": ("list the recipes", _nothing),
    "recipe show": ("print a recipe", _name),
    "recipe cp": ("copy a recipe, to edit it", _name_out),
}
_WITH_OVERRIDES = ("train", "eval", "check", "data check")
_PASSED_ON = ("bench",)


def usage() -> str:
    """The text of ``vrlt --help``."""
    rows = "\n".join(f"  {verb:<12} {about}" for verb, (about, _) in VERBS.items())
    return (
        "usage: vrlt COMMAND ...\n\nReinforcement learning tuning of video LLMs.\n\n"
        f"commands (vrlt COMMAND --help says more):\n{rows}\n\n"
        "options:\n  --help       this text\n  --version    the version\n"
        "  --debug      with any command: show the traceback of an unexpected error\n\n"
        "exit codes: 0 done, 2 configuration, 3 data, 4 environment, 75 stopped but resumable, 1 a bug\n"
    )


def parse(argv: Sequence[str]) -> Command:
    """Split a command line (without "vrlt"). Raises ConfigError C01 (unknown word or flag) or C02 (bad value)."""
    verb, rest = _verb(list(argv))
    if verb in _PASSED_ON:
        return Command(verb, argparse.Namespace(words=rest))
    about, build = VERBS[verb]
    takes_overrides = verb in _WITH_OVERRIDES
    parser = _Parser(
        prog=f"vrlt {verb}",
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=_OVERRIDES if takes_overrides else None,
        allow_abbrev=False,
    )
    build(parser)
    problems: list[Problem] = []
    overrides = _take_overrides(rest, problems) if takes_overrides else {}
    known = [flag for action in parser._actions for flag in action.option_strings]
    problems += _take_unknown(rest, known, takes_overrides)
    if problems:
        raise ConfigError(problems)
    flags, extra = parser.parse_known_intermixed_args(rest)
    if extra:
        raise ConfigError(
            Problem("VRLT-C01", f'unexpected argument "{extra[0]}"', parser.prog, fix=parser.prog + " -h")
        )
    return Command(verb, flags, overrides, tuple(argv))


def _verb(argv: list[str]) -> tuple[str, list[str]]:
    first = argv[0] if argv else ""
    if first in VERBS:
        return first, argv[1:]
    seconds = [verb.split()[1] for verb in VERBS if verb.startswith(f"{first} ")]
    second = argv[1] if len(argv) > 1 else ""
    if second in seconds:
        return f"{first} {second}", argv[2:]
    if seconds:
        raise ConfigError(_unknown_word(second, seconds, f"vrlt {first}"))
    raise ConfigError(_unknown_word(first, list(dict.fromkeys(verb.split()[0] for verb in VERBS)), "vrlt"))


def _unknown_word(word: str, known: Sequence[str], prefix: str) -> Problem:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    why = f"did you mean {prefix} {near[0]}?" if near else f"{prefix} takes: {', '.join(known)}"
    what = f'unknown command "{prefix} {word}"' if word else f'"{prefix}" needs one more word'
    return Problem("VRLT-C01", what, why=why, fix="vrlt --help")


def _take_overrides(rest: list[str], problems: list[Problem]) -> dict[str, str]:
    """Remove the ``--a.b value`` and ``--a.b=value`` pairs from ``rest``."""
    from vrlt_fast.config_load import is_flag

    taken: dict[str, str] = {}
    index = 0
    while index < len(rest):
        name, equals, value = rest[index].partition("=")
        if not (name.startswith("--") and "." in name):
            index += 1
            continue
        key = name[2:].replace("-", "_")
        del rest[index]
        following = rest[index] if index < len(rest) else None
        if equals:
            taken[key] = value
        elif is_flag(key) and following not in ("true", "false"):
            taken[key] = "true"
        elif following is None or following.startswith("--"):
            problems.append(Problem("VRLT-C02", f"{name} has no value", "command line", fix=f"{name} VALUE"))
        else:
            taken[key] = rest.pop(index)
    return taken


def _take_unknown(rest: list[str], known: Sequence[str], takes_overrides: bool) -> list[Problem]:
    problems = []
    for word in rest:
        name = word.partition("=")[0]
        if not name.startswith("--") or name in known or name == "--":
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        why = f"did you mean {near[0]}?" if near else ""
        if takes_overrides and not near:
            from vrlt_fast.config_load import suggest

            why = suggest(name[2:].replace("-", "_")).replace("mean ", "mean --").replace(" or ", " or --")
        problems.append(Problem("VRLT-C01", f'unknown flag "{name}"', "command line", why, "vrlt COMMAND --help"))
    return problems
