"""The package folder as a kernel of the hub: PyPI's ``kernels`` loads it as it stands, beside an installed copy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels" / "vrlt_kernels"
METADATA = json.loads((FOLDER / "metadata.json").read_text("utf-8"))

# What the loader does: the folder's __init__.py becomes a module named by the metadata's id.
BY_HAND = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location({METADATA["id"]!r}, {str(FOLDER / "__init__.py")!r})
loaded = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = loaded
spec.loader.exec_module(loaded)
"""
BY_KERNELS = f"""
import kernels
from pathlib import Path
assert kernels.__file__, "the repository's folder of that name was imported"
loaded = kernels.get_local_kernel(Path({str(FOLDER)!r}))
"""
COMPARE = """
import torch, vrlt_kernels
assert loaded is not vrlt_kernels
assert loaded.__all__ == vrlt_kernels.__all__
def results(package):
    logp = torch.linspace(-3, 0, 12, requires_grad=True)
    cu, own = torch.tensor([0, 2, 5, 9, 12]), package.LossSpec(kl="k3", beta=0.1)
    loss = package.policy_loss(logp, cu, own, rewards=torch.arange(4.0), groups=2, ref_logp=logp.detach() - 0.1).loss
    loss.backward()
    logits = torch.sin(torch.arange(12 * 50.0)).view(12, 50)
    return loss, logp.grad, package.token_weight(logits, cu, 2)
assert all(torch.equal(a, b) for a, b in zip(results(loaded), results(vrlt_kernels), strict=True))
assert hasattr(torch.ops, loaded.__name__) and hasattr(torch.ops.vrlt_kernels, "policy_coef")
try:
    loaded.token_weight(torch.zeros(2, 2), torch.tensor([0, 1]), 1)
except loaded.KernelInputError as error:
    print(error)
"""


def run(program: str, *folders: Path) -> str:
    path = os.pathsep.join(map(str, [ROOT / "kernels", *folders]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_metadata() -> None:
    assert METADATA.keys() == {"id", "name", "version", "license", "python-depends", "backend"}
    assert METADATA["id"].isidentifier(), "it becomes the namespace of the operators"
    assert METADATA["id"] != "vrlt_kernels", "it would replace the installed package"
    assert METADATA["name"] == "vrlt-kernels"
    assert METADATA["python-depends"] == [], "torch and triton are not listed there"


def test_two_copies_in_one_process() -> None:
    assert "cu_seqlens: got offsets that end at 1" in run(BY_HAND + COMPARE)


def test_the_folder_hides_no_package(tmp_path: Path) -> None:
    """Even in the repository's root a ``kernels`` that is installed is found before our folder."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("here = True\n", encoding="utf-8")
    run("import kernels, vrlt_kernels\nassert kernels.here", tmp_path)


def test_the_code_of_the_card_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "kernels" / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 2
    run("\n".join(blocks))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_get_local_kernel(tmp_path: Path) -> None:
    folders = []
    try:
        version("kernels")
    except PackageNotFoundError:  # beside what is installed: transformers changes its behaviour where it is
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
        done = subprocess.run([*pip, "kernels>=0.17", "tomlkit"], capture_output=True, text=True, timeout=200)
        if done.returncode:
            pytest.skip(f"no package kernels: {done.stderr.strip().splitlines()[-1]}")
        folders = [tmp_path]
    assert "cu_seqlens: got offsets that end at 1" in run(BY_KERNELS + COMPARE, *folders)
