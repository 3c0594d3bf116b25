"""The torch-free cores of csrc/: C++ programs against fp64, and what nvcc makes of the CUDA kernels."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
INCLUDE = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'csrc'}"]
CXX = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", *INCLUDE]
INSTRUCTIONS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}
MOST_SPILLED = 16  # bytes

pytestmark = pytest.mark.timeout(300)  # compilers on a busy machine
compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
cuda_compiler = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(x) for x in command], cwd=cwd, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@compiler
def test_cluster_arithmetic_over_simulated_ctas(tmp_path, seed):
    run(*CXX, ROOT / "tests/csrc/row_core_test.cpp", "-o", "program", cwd=tmp_path)
    assert run("./program", str(seed), cwd=tmp_path) == "ok\n"


@compiler
def test_cuda_kernels_on_the_host(tmp_path, seed):
    """Their source as it is: barriers, shuffles and shared memory of a cluster are those of tests/csrc/cuda_host.h."""
    for name in ("cooperative_groups", "cuda_bf16", "cuda_fp16", "cuda_runtime", "cuda_runtime_api"):
        (tmp_path / f"{name}.h").write_text('#include "cuda_host.h"\n')
    program = ROOT / "tests/csrc/row_cluster_test.cpp"
    run(*CXX, "-Wno-unknown-pragmas", f"-I{tmp_path}", program, "-o", "program", "-pthread", cwd=tmp_path)
    assert run("./program", str(seed), cwd=tmp_path) == "ok\n"


@compiler
@pytest.mark.parametrize("kernels", ["row", "attention"])
def test_cpu_kernels_of_every_instruction_set(kernels, tmp_path, seed):
    x86 = platform.machine() in ("x86_64", "AMD64")
    for name, flags in INSTRUCTIONS.items():
        for part in {"row", kernels} if x86 or not flags else ():
            run(*CXX, *flags, "-c", ROOT / f"csrc/{part}_cpu_{name}.cpp", cwd=tmp_path)
    for part in {"row", kernels}:
        run(*CXX, "-c", ROOT / f"csrc/{part}_cpu.cpp", cwd=tmp_path)
    objects = sorted(tmp_path.glob("*.o"))
    run(*CXX, ROOT / f"tests/csrc/{kernels}_cpu_test.cpp", *objects, "-o", "program", cwd=tmp_path)
    said = run("./program", str(seed), cwd=tmp_path)
    assert said.endswith("ok\n")
    assert kernels != "row" or "generic: exp within" in said


@compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not x86")
@pytest.mark.parametrize(
    "kernels", ["row", *(pytest.param(k, marks=pytest.mark.slow) for k in ("decode", "linear", "attention"))]
)
def test_no_code_for_one_instruction_set_is_shared(kernels, tmp_path):
    """A function that the linker may merge would run with AVX-512 instructions on machines without them."""
    for name, flags in INSTRUCTIONS.items():
        run(*CXX, "-O3", *flags, "-c", ROOT / f"csrc/{kernels}_cpu_{name}.cpp", cwd=tmp_path)
        for line in run("nm", "--defined-only", f"{kernels}_cpu_{name}.o", cwd=tmp_path).splitlines():
            kind, symbol = line.split()[-2:]
            assert kind in "bdrt" or name in symbol, line  # local, or named after the set


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """{(architecture, mangled kernel): (registers, bytes of stack, bytes spilled)}"""
    folder = tmp_path_factory.mktemp("nvcc")
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)]
    command = ["nvcc", "-std=c++17", "-O3", *targets, "-c", "--resource-usage", "--Werror", "all-warnings"]
    said = run(*command, ROOT / "csrc/row_cluster.cu", "-o", "out.o", cwd=folder)
    pattern = r"entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes"
    found = re.findall(pattern + r" spill loads.*?Used (\d+) registers", said, re.DOTALL)
    return {(int(sm), name): (int(regs), int(frame), max(int(st), int(ld))) for name, sm, frame, st, ld, regs in found}


@cuda_compiler
def test_no_kernel_spills(resources):
    assert {sm for sm, _ in resources} == {80, 90}
    assert sum("row_gradient" in name for _, name in resources) == 2 * 3
    spilled = {key: usage for key, usage in resources.items() if max(usage[1:]) > MOST_SPILLED}
    assert not spilled


@cuda_compiler
def test_two_rows_of_a_16_bit_qwen_vocabulary_share_a_multiprocessor(resources):
    """152064 columns take 5 vectors a thread: 512 threads of 64 registers are half of the register file."""
    kernels = {k: v for k, v in resources.items() if k[0] == 90 and "row_cluster" in k[1] and "Li5E" in k[1]}
    assert len(kernels) == 3 * 3
    assert all(registers <= 64 for registers, _, _ in kernels.values())


@cuda_compiler
def test_the_cluster_kernel_is_empty_before_hopper(resources):
    old = [usage for (sm, name), usage in resources.items() if sm == 80 and "row_cluster" in name]
    assert old
    assert all(registers < 10 for registers, _, _ in old)


@cuda_compiler
def test_the_cuda_binding_compiles(tmp_path):
    import torch

    include = ["-isystem", Path(torch.__file__).parent / "include", *INCLUDE]
    abi = re.search(r'TORCH_ABI = "(\w+)"', (ROOT / "setup.py").read_text())
    assert abi
    define = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={abi[1]}"]
    run("nvcc", "-std=c++17", *define, *include, "-c", ROOT / "csrc/binding_cuda.cpp", cwd=tmp_path)
