"""What pyproject.toml can't say: the optional compiled ops of csrc/.

They are built when torch and a C++ compiler are there; without them the package is the same, with Triton and PyTorch.
The environment variable VRLT_NATIVE is "0" (don't build), "1" (a failed build is an error), or unset (a failed build is
a warning). Where torch has CUDA and nvcc is on the path, the cluster kernel is built too.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SWITCH = os.environ.get("VRLT_NATIVE", "")
TORCH_ABI = "0x020b000000000000ull"  # torch 2.11: the oldest the library then runs with
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Icsrc"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
CPU_SOURCES = {  # with the flags of their instruction set, which the library asks the machine for before it uses them
    "binding.cpp": ["-O2"],
    "row_cpu.cpp": [],
    "row_cpu_generic.cpp": [],
    "row_cpu_avx2.cpp": AVX2,
    "row_cpu_avx512.cpp": AVX512,
    "decode_binding.cpp": ["-O2"],
    "decode_cpu.cpp": [],
    "decode_cpu_generic.cpp": [],
    "decode_cpu_avx2.cpp": AVX2,
    "decode_cpu_avx512.cpp": AVX512,
    "attention_binding.cpp": ["-O2"],
    "attention_cpu.cpp": [],
    "attention_cpu_generic.cpp": [],
    "attention_cpu_avx2.cpp": AVX2,
    "attention_cpu_avx512.cpp": AVX512,
    "linear_binding.cpp": ["-O2"],
    "layer_binding.cpp": [],
    "linear_cpu.cpp": [],
    "linear_cpu_generic.cpp": [],
    "linear_cpu_avx2.cpp": AVX2,
    "linear_cpu_avx512.cpp": AVX512,
    "pointwise_binding.cpp": ["-O2"],
    "pointwise_cpu.cpp": [],
    "pointwise_cpu_generic.cpp": [],
    "pointwise_cpu_avx2.cpp": AVX2,
    "pointwise_cpu_avx512.cpp": AVX512,
    "patchify_binding.cpp": ["-O2"],
    "patchify_plan.cpp": [],
    "patchify_cpu.cpp": [],
    "patchify_generic.cpp": [],
    "patchify_avx2.cpp": AVX2,
    "patchify_vbmi.cpp": [*AVX512, "-mavx512vbmi", "-mavx512vnni"],
}
X86_ONLY = {
    *(
        f"{name}_cpu_{isa}.cpp"
        for name in ("row", "decode", "linear", "attention", "pointwise")
        for isa in ("avx2", "avx512")
    ),
    *("patchify_avx2.cpp", "patchify_vbmi.cpp"),
}
GENCODE = [
    *("-gencode", "arch=compute_80,code=sm_80"),
    *("-gencode", "arch=compute_90,code=[sm_90,compute_90]"),
]


def command(arguments: list[str]) -> None:
    try:
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"{arguments[0]}: {error}") from error
    if done.returncode:
        raise CompileError(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")


class BuildNative(build_ext):
    """Compiles each source with its own flags, and the CUDA ones with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # or a failed build would install the last one
        try:
            import torch
        except ImportError as error:
            raise CompileError(f"torch can't be imported ({error}); with pip use --no-build-isolation") from error
        base = Path(torch.__file__).parent
        cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
        out = Path(self.build_temp).resolve()
        out.mkdir(parents=True, exist_ok=True)
        include = [f"-DTORCH_TARGET_VERSION={TORCH_ABI}", "-isystem", str(base / "include")]
        x86 = platform.machine() in ("x86_64", "AMD64")
        sources = {name: flags for name, flags in CPU_SOURCES.items() if x86 or name not in X86_ONLY}
        objects = [str(out / f"{name}.o") for name in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiling = [
                pool.submit(command, [cxx, *COMMON, *flags, *include, "-c", f"csrc/{name}", "-o", to])
                for (name, flags), to in zip(sources.items(), objects, strict=True)
            ]
            for each in compiling:
                each.result()
        linker, libraries = [cxx, "-shared"], [f"-L{base / 'lib'}", "-ltorch_cpu"]
        nvcc = shutil.which("nvcc")
        if torch.version.cuda and nvcc:
            cuda_objects = self.compile_cuda(nvcc, include, out)
            if cuda_objects:
                objects += cuda_objects
                linker = [nvcc, "-shared", "-cudart", "static"]
                libraries.append("-ltorch_cuda")
        if platform.system() == "Darwin":
            linker += ["-undefined", "dynamic_lookup"]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        command([*linker, "-o", str(target), *objects, *libraries])

    def compile_cuda(self, nvcc: str, include: list[str], out: Path) -> list[str]:
        """The object files; without them, after a warning, where nvcc fails: the CPU operators don't need it."""
        kernel, binding = str(out / "row_cluster.cu.o"), str(out / "binding_cuda.cpp.o")
        common = [nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc", *include]
        try:
            command([*common, *GENCODE, "--threads", "0", "-c", "csrc/row_cluster.cu", "-o", kernel])
            command([*common, "-DUSE_CUDA", "-c", "csrc/binding_cuda.cpp", "-o", binding])
        except CompileError as error:
            if SWITCH == "1":
                raise
            self.warn(f"the CUDA operators are left out: {error}")
            return []
        return [kernel, binding]

    def copy_extensions_to_source(self) -> None:
        """Not over the old file, which a running process may have mapped, nor beside one that no longer fits."""
        for old in (ROOT / "kernels" / "vrlt_kernels").glob("_C*.so"):
            old.unlink()
        super().copy_extensions_to_source()


def extensions() -> list[Extension]:
    if SWITCH == "0" or not (ROOT / "csrc").is_dir():
        return []
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir())
    sources = [name for name in files if name.endswith(".cpp")]
    rest = [name for name in files if name not in sources]
    # the library holds no Python code: one file serves every Python
    return [Extension("vrlt_kernels._C", sources, depends=rest, optional=SWITCH != "1", py_limited_api=True)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions() else {},
)
