"""The documents: every TOML block and every command in them is parsed, the generated page is fresh."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vrlt_fast import config_docs
from vrlt_fast.cli_args import VERBS, parse
from vrlt_fast.config import Config
from vrlt_fast.config_load import check, keys, load_config
from vrlt_fast.recipe import find_file, recipe_names, recipe_path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:\$ |\.venv/bin/|python -m )?(vrlt(?:_fast)? .*)")
IN_TEXT = re.compile(r"(?<!`)`(vrlt [a-z][^`]*)`(?!`)")


def fences(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, text) for page in PAGES for kind, text in FENCE.findall(page.read_text("utf-8")) if kind == language
    ]


def commands() -> list[tuple[str, str]]:
    """Page and text of each vrlt command in a fenced block or in `code` of the text."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        for kind, block in FENCE.findall(text):
            if kind in ("", "bash", "sh", "console", "shell"):
                lines = block.replace("\\\n", " ").splitlines()
                found += [(page.name, m[1]) for line in lines if (m := COMMAND.fullmatch(line.strip()))]
        found += [(page.name, code.replace("\n", " ")) for code in IN_TEXT.findall(FENCE.sub("", text))]
    return found


def words_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)[1:]
    return [word for word in words if word not in ("...", "COMMAND")]


def test_there_are_commands_and_blocks() -> None:
    assert len(commands()) > 20
    assert fences("toml")


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value[:60])
def test_command(page: str, command: str) -> None:
    words = words_of(command)
    if not words or words == ["--help"]:
        return
    if " ".join(words) in {*VERBS, "recipe", "data", "train --resume"}:  # named in the text, not a line to type
        return
    parsed = parse(words)
    unknown = [key for key in parsed.overrides if key not in keys()]
    assert not unknown, f"{page}: {command}"
    if parsed.verb == "train":
        for name in parsed.flags.files:
            assert name.endswith(".toml") or name in recipe_names() or name.isupper(), f"{page}: {command}"
    if parsed.verb in ("train", "eval"):
        files = [recipe_path(name) for name in getattr(parsed.flags, "files", []) if name in recipe_names()]
        load_config(files, parsed.overrides)


@pytest.mark.parametrize(("page", "text"), fences("toml"), ids=lambda value: value[:20])
def test_toml_block(page: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "block.toml"
    path.write_text(text, encoding="utf-8")
    assert load_config([path]) != Config(), f"{page}: the block changes nothing"


@pytest.mark.parametrize("name", recipe_names())
def test_recipe(name: str) -> None:
    path = find_file(name)
    behind = [find_file("temporal_r1")] if name.startswith("on_") else []  # those are about machines alone
    config = load_config([*behind, path], verb="train")
    assert check(config, "train") == []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if number == 1:
            assert line.startswith("# "), "a recipe begins with a line that says what it is"
        elif number <= 3 and line.startswith("# "):  # its sources
            continue
        elif line and not line.startswith("["):
            assert re.fullmatch(r"\w+ = [^#]+ # \S.*", line), f"{path.name}:{number}: one key, one comment: {line}"


def test_config_page_is_fresh() -> None:
    page = (ROOT / "docs" / "config.md").read_text("utf-8")
    assert page == config_docs.render(), "run: python -m vrlt_fast.config_docs"
    for key in keys():
        assert f"| `{key.partition('.')[2]}` |" in page


def test_every_key_is_described() -> None:
    assert [key for key, field in keys().items() if not field.description] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {
        (page.name, target)
        for page in PAGES
        for target in re.findall(r"(?:^|`)make ([\w-]+)", page.read_text("utf-8"), re.MULTILINE)
    }
    assert named
    assert not {(page, target) for page, target in named if target not in targets}


def test_links_lead_somewhere() -> None:
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))]
    assert links
    assert not [
        f"{page.name}: {link}" for page, link in links if "://" not in link and not (page.parent / link).exists()
    ]
