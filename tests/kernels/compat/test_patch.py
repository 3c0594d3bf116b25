"""Replacing and undoing, on a small stand-in for a library."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from vrlt_kernels import KernelInputError
from vrlt_kernels.compat import easyr1, open_r1, verl
from vrlt_kernels.compat._patch import replace


def original(x: int, y: int = 1) -> int:
    return x + y


def ours(x: int, y: int = 1) -> int:
    return 100 * x + y


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor


def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor * 10


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Modules lib, lib.utils (where the functions are), lib.trainer (which imported one under another name)."""
    modules = {name: ModuleType(name) for name in ("lib", "lib.utils", "lib.trainer")}
    modules["lib"].__version__ = "1.2"  # type: ignore[attr-defined]
    modules["lib.utils"].add = original  # type: ignore[attr-defined]
    modules["lib.utils"].Scale = Scale  # type: ignore[attr-defined]
    modules["lib.trainer"]._add = original  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


def test_everywhere_and_back(library: dict[str, Any]) -> None:
    handle = replace(library["lib"], "lib", ["1.2"], {"lib.utils": {"add": ours, "Scale": scale}})
    assert library["lib.utils"].add(2) == 201
    assert library["lib.trainer"]._add(2, y=5) == 205
    assert library["lib.utils"].Scale.apply(torch.ones(1), 2.0) == 20
    add, scaled = handle.report()
    assert add.name == "lib.utils.add"
    assert add.by.endswith("test_patch.ours")
    assert add.places == ("lib.trainer._add", "lib.utils.add")
    assert (add.calls, scaled.calls) == (2, 1)
    handle.undo()
    assert library["lib.utils"].add is library["lib.trainer"]._add is original
    assert library["lib.utils"].Scale is Scale
    assert all(r.places == () for r in handle.report())
    handle.undo()


def test_undo_finds_modules_that_were_loaded_later(library: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with replace(library["lib"], "lib", ["1.2"], {"lib.utils": {"add": ours}}) as handle:
        late = ModuleType("lib.late")
        late.add = library["lib.utils"].add  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lib.late", late)
        assert "lib.late.add" in handle.report()[0].places
    assert late.add is original


def test_a_trainer_is_a_target(library: dict[str, Any]) -> None:
    trainer = type("Trainer", (), {"__module__": "lib.trainer"})
    mine = type("Mine", (trainer,), {"__module__": "my.code"})
    for target in (trainer, mine, mine()):
        replace(target, "lib", ["1.2"], {"lib.utils": {"add": ours}}).undo()
    with pytest.raises(KernelInputError, match="a trainer of it"):
        replace(object(), "lib", ["1.2"], {"lib.utils": {"add": ours}})


def test_all_or_nothing(library: dict[str, Any]) -> None:
    with pytest.raises(KernelInputError, match="without sub"):
        replace(library["lib"], "lib", ["1.2"], {"lib.utils": {"add": ours, "sub": ours}})
    assert library["lib.utils"].add is original


def test_unknown_version(library: dict[str, Any]) -> None:
    with pytest.raises(KernelInputError, match=r"lib 1\.2, needs lib 1\.1 or 1\.3"):
        replace(library["lib"], "lib", ["1.1", "1.3"], {"lib.utils": {"add": ours}})


def test_twice(library: dict[str, Any]) -> None:
    with replace(library["lib"], "lib", ["1.2"], {"lib.utils": {"add": ours}}):
        with pytest.raises(KernelInputError, match="already replaced"):
            replace(library["lib"], "lib", ["1.2"], {"lib.utils": {"add": ours}})
        assert library["lib.utils"].add(2) == 201


def test_other_arguments(library: dict[str, Any]) -> None:
    library["lib.utils"].add = lambda x, z=1: x
    with pytest.raises(KernelInputError, match="z=1"):
        replace(library["lib"], "lib", ["1.2"], {"lib.utils": {"add": ours}})


def test_calls_under_compile_are_left_to_the_graph(library: dict[str, Any]) -> None:
    with replace(library["lib"], "lib", ["1.2"], {"lib.utils": {"Scale": scale}}) as handle:
        compiled = torch.compile(library["lib.utils"].Scale.apply, backend="eager", fullgraph=True)
        assert compiled(torch.ones(1), 2.0) == 20
        assert compiled(torch.ones(1), 2.0) == 20
        assert handle.report()[0].calls == 0


@pytest.mark.parametrize(("module", "package"), [(verl, "verl"), (easyr1, "verl"), (open_r1, "trl")])
def test_other_versions_are_refused(module: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType(package)
    stand_in.__version__ = "0.0.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, stand_in)
    with pytest.raises(KernelInputError, match=r"0\.0\.1, needs"):
        module.apply(stand_in)
