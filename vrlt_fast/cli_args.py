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
    parser.add_argument(
        "target",
        nargs="?",
        metavar="MODEL_DIR|SUITE",
        help="an HF folder; a checkpoint brings its run's configuration. Or, with --model, a suite",
    )
    parser.add_argument("--model", metavar="MODEL_DIR", help="the folder, where the first word is a suite")
    parser.add_argument("--suite", metavar="NAME", help="metrics, order of columns and sampling of a benchmark")
    parser.add_argument("--data", metavar="FILE.jsonl", help="held-out samples (data.eval)")
    parser.add_argument(
        "--config", "--recipe", action="append", default=[], metavar="RECIPE|FILE.toml", help="may be repeated"
    )
    parser.add_argument(
        "--out", metavar="FILE.jsonl|DIR", help="one line a question; of a suite also a folder for it and results.json"
    )
    parser.add_argument(
        "--count-failed", action="store_true", help="of a suite: questions whose video can't be read count as wrong"
    )
    parser.add_argument("--list", action="store_true", help="print the suites")


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


def _select_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="RECIPE|FILE.toml", help="merged left to right")
    parser.add_argument("--out", required=True, metavar="SCORES.jsonl", help="goes on where it exists")
    parser.add_argument("--shard", metavar="I/N", help="part I of N of the data, into SCORES.I-of-N.jsonl")
    parser.add_argument("--retry-failed", action="store_true", help="try videos again that couldn't be read")


def _select_reflect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="RECIPE|FILE.toml", help="merged left to right")
    parser.add_argument("--out", required=True, metavar="PARTIAL.jsonl", help="their lines, for data.quarantine")


def _select_pick(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("scores", nargs="+", metavar="SCORES.jsonl", help="all shards of vrlt select score")
    add("--data", required=True, metavar="FILE.jsonl", help="the file that was scored")
    add("--out", required=True, metavar="PICKED.jsonl", help="its chosen lines, byte for byte")
    add("--report", metavar="REPORT.html", help="a page on what was kept and dropped")
    add("--root", metavar="DIR", help="folder of the videos, for the page; default: the data file's")
    policies = ("variance", "sigma", "buckets", "gauss", "random")
    add("--policy", choices=policies, default="variance", help="docs/select.md; default: variance")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--count", type=int, metavar="N", help="how many to keep; default: all that pass the filters")
    size.add_argument("--share", type=float, metavar="X", help="or which share of those that pass the filters")
    add("--drop-flat", action="store_true", help="filter: no samples that are always right or always wrong")
    add("--min-std", type=float, default=0.0, metavar="X", help="filter: deviation in units of the task's own")
    add("--mean", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"), help="filter: mean reward, 0 to 1")
    add("--alpha", type=float, help="sigma and buckets: chances in proportion to deviation^alpha; default: 1")
    add("--tau", type=float, help="buckets: rewards of so much of the highest are hits; default: 0.5")
    add("--ratio", type=float, nargs=3, metavar=("HARD", "MEDIUM", "EASY"), help="buckets: default: 1 6 3")
    add("--target", type=float, help="gauss: wanted mean reward; default: 0.3")
    add("--width", type=float, help="gauss: its deviation; default: 0.15")
    add("--quota", action="append", default=[], metavar="TASK=N|equal", help="how many of a task; may be repeated")
    add("--parts", metavar="NAME,NAME", help="count these parts of the reward alone; default: all")
    add("--partial", action="store_true", help="pick though some samples have no score yet")
    add("--seed", type=int, default=0)


def _data_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", metavar="FORMAT", help="docs/data.md lists them")
    parser.add_argument("file", metavar="FILE", help="annotations of a public data set")
    parser.add_argument("out", metavar="OUT.jsonl", help="new file")
    parser.add_argument("--videos", metavar="DIR", help="folder of the videos and images, to find and measure them")
    parser.add_argument("--root", metavar="DIR", help="folder above it that paths are relative to; default: --videos")
    parser.add_argument("--strip", default="", metavar="TEXT", help="remove this from the front of the file's paths")
    parser.add_argument("--durations", metavar="FILE", help="CSV or JSON: seconds by video")
    parser.add_argument("--split", default="", metavar="NAME", help="part of the ids; of nextgqa, the companion's name")
    parser.add_argument("--seed", type=int, default=0, help="of what a format chooses at random")
    parser.add_argument("--skip-bad", action="store_true", help="write the good entries in spite of problems")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CHECKPOINT|RUN", help="of a run: its newest checkpoint")
    parser.add_argument("out", metavar="OUT", help="new folder, an HF model")
    parser.add_argument("--adapter", action="store_true", help="also OUT/adapter, for peft")


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", help="an HF folder; a checkpoint brings its run's configuration")
    parser.add_argument("--port", type=int, default=8123, metavar="N", help="0: a free one; default: 8123")
    parser.add_argument("--host", default="127.0.0.1", help="others than this machine's own need a token")
    parser.add_argument(
        "--config", "--recipe", action="append", default=[], metavar="RECIPE|FILE.toml", help="may be repeated"
    )
    parser.add_argument(
        "--token-env", metavar="NAME", help="environment variable with the token of requests; default: VRLT_TOKEN"
    )


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
    "data convert": ("make samples of a public data set's annotations", _data_convert),
    "select score": ("draw responses to training samples and note what they earn", _select_score),
    "select reflect": ("ask the model for times that the annotations lack", _select_reflect),
    "select pick": ("choose training samples by their scores", _select_pick),
    "report": ("write RUN/report.html again", _report),
    "export": ("copy a checkpoint's model, for others", _export),
    "serve": ("answer how far along a task is, over HTTP", _serve),
    "doctor": ("say what is installed and which paths are active", _doctor),
    "bench": ("measure, or list what was measured; as python -m bench in the sources", _nothing),
    "recipe ls": ("list the recipes", _nothing),
    "recipe show": ("print a recipe", _name),
    "recipe cp": ("copy a recipe, to edit it", _name_out),
}
_WITH_OVERRIDES = ("train", "eval", "check", "select score", "select reflect", "data check", "serve")
_PASSED_ON = ("bench",)


def usage() -> str:
    """The text of ``vrlt --help``."""
    rows = "\n".join(f"  {verb:<14} {about}" for verb, (about, _) in VERBS.items())
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
