"""Compile every Triton kernel of vrlt_kernels for GPUs that needn't be there: ``python -m bench.aot [80 90]``.

The public functions run on the CPU with Triton as their backend, but each launch is compiled for the architecture
instead (a driver without a device stands in for CUDA's). So what is compiled is what would be launched: arguments,
specialisation, constants and launch configuration. Prints JSON: Triton's version, what ptxas said of each kernel, and
the kernels that no case of ``bench.aot_cases`` reached. Results of the calls are meaningless.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SPILL_LIMIT = 16  # bytes a thread

_USED = re.compile(r"Used (\d+) registers")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


class _Driver:
    """What Triton asks of a driver while it compiles. A device is its architecture, so each has its own cache."""

    arch = 90

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorder:
    """While ``recording``: which architecture to compile for, which case runs, and a row for every compilation."""

    def __init__(self) -> None:
        self.driver = _Driver()
        self.case = ""
        self.rows: list[dict[str, Any]] = []


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Compile launches instead of running them. For a process of its own: Triton's driver is replaced for good."""
    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("TRITON_INTERPRET is set: there would be nothing to compile")
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": cache}
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction

        from vrlt_kernels import _launch

        recorder, run = Recorder(), JITFunction.run
        names = {id(function): name for name, function in kernels().items()}

        def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                compiled = run(self, *args, grid=grid, warmup=True, **options)
            if text := log.getvalue():  # empty where it was compiled before
                where = {"kernel": names[id(self)], "case": recorder.case, "arch": recorder.driver.arch}
                recorder.rows.append(where | _resources(compiled, text))
            return compiled

        driver.set_active(recorder.driver)
        JITFunction.run = compile_only
        _launch._obstacle = lambda backend, tensor: "" if backend == "triton" else "only Triton is compiled here"
        with _launch.use_backend("triton"):
            yield recorder


def _resources(compiled: Any, log: str) -> dict[str, int]:
    """Registers of a thread, the bytes it spills, and the shared memory of a program in bytes."""
    return {
        "registers": max(int(used) for used in _USED.findall(log)),
        "spill": sum(max(int(stores), int(loads)) for stores, loads in _SPILL.findall(log)),
        "shared": compiled.metadata.shared,
    }


def kernels() -> dict[str, Any]:
    """Every function of the package that Triton compiles, by ``module.name``."""
    from triton.runtime.jit import JITFunction

    import vrlt_kernels

    found = {}
    root = Path(vrlt_kernels.__path__[0])
    for path in sorted(root.rglob("*.py")):
        if "triton.jit" not in path.read_text(encoding="utf-8"):
            continue
        stem = ".".join(path.relative_to(root).with_suffix("").parts)
        module = importlib.import_module(f"vrlt_kernels.{stem}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
                found[f"{stem}.{name}"] = value
    return found


def unreached(found: dict[str, Any], launched: set[str]) -> list[str]:
    """Functions that were neither launched nor are called, directly or not, by one that was."""
    reached, queue = set(launched), list(launched)
    while queue:
        source = inspect.getsource(found[queue.pop()].fn)
        called = {key for key in found if re.search(rf"\b{key.rpartition('.')[2]}\(", source)} - reached
        reached |= called
        queue += called
    return sorted(set(found) - reached)


def compile_all(archs: list[int]) -> dict[str, Any]:
    """All cases for each architecture."""
    import triton

    from bench.aot_cases import cases

    with recording() as recorder:
        for recorder.driver.arch in archs:
            for recorder.case, call in cases():
                call()
        missed = unreached(kernels(), {row["kernel"] for row in recorder.rows})
    return {"triton": triton.__version__, "rows": recorder.rows, "unreached": missed}


def in_subprocess(program: list[str], triton_folder: Path | None = None) -> Any:
    """The JSON that ``python PROGRAM...`` prints, without the interpreter and with the Triton of a folder, if given.

    Raises:
        RuntimeError: it failed; with its error output.
    """
    path = [ROOT, ROOT / "kernels", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(part) for part in ([triton_folder] if triton_folder else []) + path)
    done = subprocess.run([sys.executable, *program], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(program)} failed\n{done.stderr}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compile_all([int(arch) for arch in sys.argv[1:]] or [80, 90])) + "\n")
