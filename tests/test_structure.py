"""What the whole source must look like: sizes, forbidden calls, imports of the kernels, error codes."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vrlt_fast.errors import CODES

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("vrlt_fast", "kernels", "bench", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "yaml", "joblib"}
BANNED_CALLS = {"eval", "exec", "compile", "torch.load", "os.system", "os.popen", "np.load", "numpy.load"}


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def test_sizes() -> None:
    too_large = []
    for path in SOURCES:
        lines = len(path.read_text("utf-8").splitlines())
        if lines > 400:
            too_large.append(f"{relative(path)}: {lines} lines")
        limit = 120 if relative(path).startswith("kernels/") else 60
        for function in functions(parsed(path)):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > limit:
                too_large.append(f"{relative(path)}:{function.lineno}: {function.name} has {lines} lines")
            names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args)]
            count = len([name for name in names if name not in ("self", "cls")])
            # operators, kernels and peers' signatures have the parameters that they have
            if count > 7 and not relative(path).startswith("kernels/"):
                too_large.append(
                    f"{relative(path)}:{function.lineno}: {function.name} has {count} positional parameters"
                )
    assert not too_large, "\n".join(too_large)


def banned(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that could run code from data or from a shell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.partition(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in BANNED_MODULES:
                yield node.lineno, node.module or ""
            yield from (
                (node.lineno, f"{node.module}.{a.name}")
                for a in node.names
                if f"{node.module}.{a.name}" in BANNED_CALLS
            )
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in BANNED_CALLS:
                yield node.lineno, ast.unparse(node.func)
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and not (
                    isinstance(value, ast.Constant) and value.value is False
                ):
                    yield node.lineno, f"{keyword.arg}={ast.unparse(value)}"


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from torch import load", "torch.load(f)", "eval(x)", "run(c, shell=True)", "import yaml.x as y"],
)
def test_banned_finds(line: str) -> None:
    assert list(banned(ast.parse(line)))


@pytest.mark.parametrize("line", ["model.eval()", "run(c, shell=False)", "re.compile(x)", "torch.compile(f)"])
def test_banned_lets_pass(line: str) -> None:
    assert not list(banned(ast.parse(line)))


def test_nothing_runs_code_from_data() -> None:
    found = [f"{relative(path)}:{line}: {what}" for path in SOURCES for line, what in banned(parsed(path))]
    assert not found, "\n".join(found)


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "vrlt_kernels" / "__init__.py").is_file()


def test_kernels_import_stdlib_torch_and_triton_only() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton", "vrlt_kernels"}
    foreign = []
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            foreign += [f"{relative(path)}: {name}" for name in names if name.partition(".")[0] not in allowed]
    assert not foreign


def test_no_relics() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    for path in (ROOT / "vrlt_fast").rglob("__init__.py"):
        body = [n for n in parsed(path).body if not isinstance(n, ast.Expr)]
        assert all(isinstance(n, ast.Assign) for n in body), f"{relative(path)} has more than a docstring"


def used_codes() -> dict[str, str]:
    """Every code in the source beside the table itself, with one file that has it."""
    return {
        code: relative(path)
        for path in SOURCES
        if relative(path) != "vrlt_fast/errors.py" and not relative(path).startswith("tests/")
        for code in re.findall(r"VRLT-[A-Z]\d\d", path.read_text("utf-8"))
    }


def test_every_used_code_is_known() -> None:
    unknown = {code: path for code, path in used_codes().items() if code not in CODES}
    assert not unknown


def test_every_code_is_used() -> None:
    assert sorted(set(CODES) - set(used_codes())) == []


def test_every_code_is_explained() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    parts = re.split(r"^### (VRLT-\w+)\n", page, flags=re.MULTILINE)
    headings, texts = parts[1::2], parts[2::2]
    assert len(headings) == len(set(headings))
    assert set(headings) == set(CODES)
    short = [code for code, text in zip(headings, texts, strict=True) if len(text.split()) < 15]
    assert not short, f"{short} say too little"
