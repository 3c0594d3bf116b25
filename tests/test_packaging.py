"""The wheel: everything that is needed is in it, and it imports from elsewhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
META = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def pip(*arguments: str | Path, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the work tree gets no build folder."""
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("vrlt_fast", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp, source, cwd=tmp)
    return next(tmp.glob("*.whl"))


def test_wheel_has_all_sources_and_data(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    suffixes = {".py", ".toml", ".css", ".js", ".json", ".typed"}
    wanted = {
        path.relative_to(base).as_posix()
        for base, package in ((ROOT, "vrlt_fast"), (ROOT / "kernels", "vrlt_kernels"))
        for path in (base / package).rglob("*")
        if path.suffix in suffixes or path.name == "py.typed"
    }
    assert wanted - inside == set()
    assert {name.partition("/")[0] for name in inside if ".dist-info" not in name} == {"vrlt_fast", "vrlt_kernels"}
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    program = f"""
import sys
sys.path.insert(0, {str(target)!r})
import vrlt_fast, vrlt_fast.cli, vrlt_kernels
assert vrlt_fast.__file__.startswith({str(target)!r}), vrlt_fast.__file__
assert vrlt_kernels.__file__.startswith({str(target)!r}), vrlt_kernels.__file__
assert vrlt_fast.cli.main(["recipe", "show", "demo"]) == 0
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "tiny-model" in done.stdout


def test_one_version() -> None:
    from vrlt_fast import __version__

    assert META["project"]["version"] == __version__


def test_core_needs_torch_and_triton_only() -> None:
    names = {line.partition(">")[0] for line in META["project"]["dependencies"]}
    assert names == {"torch", "triton"}


def test_every_folder_with_modules_is_packaged() -> None:
    folders = {
        ".".join(path.parent.relative_to(base).parts)
        for base, package in ((ROOT, "vrlt_fast"), (ROOT / "kernels", "vrlt_kernels"))
        for path in (base / package).rglob("*.py")
    }
    assert set(META["tool"]["setuptools"]["packages"]) == folders


def test_one_version_of_ruff() -> None:
    from importlib.metadata import version

    assert f"ruff=={version('ruff')}" in META["project"]["optional-dependencies"]["dev"]
