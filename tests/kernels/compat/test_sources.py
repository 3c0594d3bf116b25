"""The stand-ins for verl 0.9.1, EasyR1 0.3.3.dev0 and open-r1 (TRL 0.18.0) against those libraries' own functions.

Their packages need more than can be installed here together, so the functions are taken out of the source files alone.
VRLT_PEERS names a folder with the unpacked sources in `verl`, `easyr1` and `trl`; without it the tests are skipped.
"""

from __future__ import annotations

import ast
import itertools
import os
import sys
import typing
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vrlt_kernels.compat import easyr1, open_r1, verl

PEERS = Path(os.environ.get("VRLT_PEERS", "/nowhere"))
pytestmark = pytest.mark.skipif(not PEERS.is_dir(), reason="VRLT_PEERS: no folder with the peers' sources")
ADAPTERS = {"verl": verl, "easyr1": easyr1, "trl": open_r1}
FILES = {
    "verl": ("verl.utils.torch_functional", "verl.utils.experimental.torch_functional",
             "verl.utils.kernel.linear_cross_entropy"),
    "easyr1": ("verl.utils.torch_functional", "verl.trainer.core_algos"),
    "trl": ("trl.trainer.utils",),
}  # fmt: skip
VERSIONS = {"verl": "0.9.1", "easyr1": "0.3.3.dev0", "trl": "0.18.0"}


def version_of(peer: str) -> str:
    package = PEERS / peer / ("trl" if peer == "trl" else "verl")
    if peer == "verl":
        return (package / "version" / "version").read_text().strip()
    lines = (package / "__init__.py").read_text().splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("__version__"))


def extract(module: ModuleType, path: Path, aside: Path) -> None:
    """The file's functions and autograd functions, with annotations as strings and none of its imports."""
    import numpy

    names: dict[str, Any] = dict.fromkeys(
        ("FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", "NPU_CROSS_ENTROPY_LOSS_AVAILABLE",
         "_FLASH_ATTN_CROSS_ENTROPY_AVAILABLE"), False,
    )  # fmt: skip
    names |= {"torch": torch, "F": torch.nn.functional, "np": numpy, "os": os, "typing": typing, "dist": None}
    names |= {"Optional": typing.Optional, "Literal": typing.Literal}
    vars(module).update(names)
    kept = []
    for node in ast.parse(path.read_text()).body:
        is_function = isinstance(node, ast.ClassDef) and any(ast.unparse(b).endswith("Function") for b in node.bases)
        alias = isinstance(node, ast.Assign) and ast.unparse(node.value).endswith(".apply")
        if is_function or alias or (isinstance(node, ast.FunctionDef) and not node.decorator_list):
            kept.append(node)
    future = ast.parse("from __future__ import annotations").body
    copy = aside / f"{module.__name__}.py"
    copy.write_text(ast.unparse(ast.Module([*future, *kept], [])))
    SourceFileLoader(module.__name__, str(copy)).exec_module(module)


@pytest.fixture
def peer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A package of the peer's name whose modules hold its own functions."""
    name = request.param
    assert version_of(name) == VERSIONS[name]
    package = FILES[name][0].partition(".")[0]
    for loaded in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    root: Any = ModuleType(package)
    root.__version__ = VERSIONS[name]
    modules = {package: root}
    for file in FILES[name]:
        modules[file] = ModuleType(file)
    for loaded, module in modules.items():
        monkeypatch.setitem(sys.modules, loaded, module)
    for file in FILES[name]:
        extract(modules[file], (PEERS / name).joinpath(*file.split(".")).with_suffix(".py"), tmp_path)
    if name == "easyr1":
        vars(modules[FILES[name][1]])["VF"] = modules[FILES[name][0]]
    return SimpleNamespace(root=root, **{f"file{i}": modules[file] for i, file in enumerate(FILES[name])})


def every_peer(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("peer", names, indirect=True)


@pytest.mark.parametrize(("peer", "adapter"), list(ADAPTERS.items()), indirect=["peer"])
def test_apply_accepts_the_real_functions(peer: Any, adapter: Any) -> None:
    with adapter.apply(peer.root) as handle:
        assert handle.report()
        assert all(r.places for r in handle.report())
    assert not any(r.places for r in handle.report())


def agree(mine: Any, theirs: Any, inputs: list[torch.Tensor], **tolerance: float) -> None:
    pairs = []
    for outputs in (mine, theirs):
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum((x * torch.linspace(0.5, 2.0, x.numel()).view(x.shape)).sum() for x in outputs if x.requires_grad)
        pairs.append([*outputs, *torch.autograd.grad(total, inputs)])  # type: ignore[arg-type]
    for a, b in zip(*pairs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, **tolerance)


@every_peer("verl")
def test_verl(peer: Any, generator: torch.Generator) -> None:
    logits = torch.randn(6, 50, generator=generator).requires_grad_()
    labels = torch.randint(50, (6,), generator=generator)
    agree(verl.logprobs_from_logits(logits, labels, False), peer.file0.logprobs_from_logits(logits, labels), [logits])
    for name in ("entropy_from_logits", "entropy_from_logits_with_chunking"):
        agree(getattr(verl, name)(logits), getattr(peer.file0, name)(logits), [logits])
    for dtype in (torch.float32, torch.bfloat16):
        rows = logits.detach().to(dtype)
        for name in ("entropy_from_logits", "calculate_sum_pi_squared_from_logits"):
            mine, theirs = getattr(verl, name)(rows), getattr(peer.file0, name)(rows)
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-2)
        hidden, weight = (torch.randn(*s, 8, generator=generator).to(dtype).requires_grad_() for s in ((2, 3), (50,)))
        given = (hidden, weight, labels.view(2, 3), 0.7)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
        function = peer.file1.FusedLinearForPPOFunction.apply
        agree(verl.fused_linear_for_ppo(*given), function(*given), [hidden, weight], **tolerance)


@every_peer("easyr1")
def test_easyr1(peer: Any, generator: torch.Generator) -> None:
    logits = torch.randn(4, 5, 50, generator=generator).requires_grad_()
    labels = torch.randint(50, (4, 5), generator=generator)
    labels[0, 1] = -100
    agree(easyr1.log_probs_from_logits(logits * 1.0, labels), peer.file0.log_probs_from_logits(logits, labels),
          [logits])  # fmt: skip
    logp, noise, advantages = torch.randn(3, 4, 5, generator=generator)
    logp = logp.requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    kinds = ("default", "gspo", "gspo_token", "cispo", "sapo")
    for kind, mode in itertools.product(kinds, ("token", "seq")):
        given: Any = ((logp - 0.5 * noise).detach(), logp, advantages, mask, 0.2, 0.3, 1.5, 0.8, 1.2, kind, mode)
        mine, theirs = easyr1.compute_policy_loss(*given), peer.file1.compute_policy_loss(*given)
        agree(mine[0], theirs[0], [logp], rtol=1e-4, atol=1e-6)
        assert mine[1] == pytest.approx(theirs[1], rel=1e-4, abs=1e-6)


@every_peer("trl")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_open_r1(peer: Any, generator: torch.Generator, dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 50, generator=generator).to(dtype).requires_grad_()
    index = torch.randint(50, (2, 3), generator=generator)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-6}
    functions = (open_r1.selective_log_softmax, peer.file0.selective_log_softmax)
    mine, theirs = (function(logits, index) for function in functions)
    assert torch.equal(mine, theirs) or dtype.itemsize > 2
    agree(mine, theirs, [logits], **tolerance)
