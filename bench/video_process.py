"""The processes of the case ``video``: how arms are started, asked and watched, and which can run here."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.harness import ROOT, BenchError
from bench.video_arm import Job, below

_PATIENCE = 1800.0  # seconds for one answer


class Process:
    """An arm's process."""

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str], job: Job):
        self.name, self.what = name, f"{name} on {job.video}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [*command, json.dumps(asdict(job))],
            env=env,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            self.answer()
        except BenchError:
            self.close()
            raise

    def ask(self, **command: Any) -> None:
        pipe = self._process.stdin
        if pipe is None:
            raise BenchError(f"{self.what}: no pipe")
        with suppress(OSError):  # a process that ended says so in its answer
            pipe.write(json.dumps(command).encode() + b"\n")
            pipe.flush()

    def answer(self, seconds: float = _PATIENCE) -> dict[str, Any]:
        pipe = self._process.stdout
        if pipe is None or not select.select([pipe], [], [], seconds)[0]:
            raise BenchError(f"{self.what}: no answer in {seconds:.0f} s")
        line = pipe.readline()
        if not line:
            self._log.seek(0)
            tail = self._log.read().decode(errors="replace").strip().splitlines()[-12:]
            raise BenchError("\n".join([f"{self.what} ended with {self._process.wait()}", *tail]))
        return dict(json.loads(line))

    def save(self, folder: Path) -> None:
        """Write the result of the last run, which it has kept, to a new folder; see `bench.video_arm.Arm.save`."""
        folder.mkdir()
        self.ask(do="save", path=str(folder))
        self.answer()

    def run(self, *, keep: bool = False) -> dict[str, Any]:
        self.ask(do="run", keep=keep)
        return self.answer()

    def run_watched(self) -> tuple[dict[str, Any], float]:
        """A run, kept, and the largest resident set of the process and all below it so far, shared pages counted once:
        sampled every 10 ms where there are processes below, exact where there are none.
        """
        self.ask(do="run", keep=True)
        peak, family = 0.0, False
        while not select.select([pipe for pipe in (self._process.stdout,) if pipe], [], [], 0.01)[0]:
            pids = [self._process.pid, *below(self._process.pid)]
            family = family or len(pids) > 1
            if family:
                peak = max(peak, sum(map(_proportional, pids)))
        answer = self.answer()
        return answer, max(peak, float(answer["peak"]))

    def close(self) -> None:
        """End it: at the end of its input, or else by force."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


def _proportional(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0.0)


@dataclass(frozen=True)
class Program:
    """An arm: how it is started, and its name in the records."""

    name: str
    arm: str
    command: tuple[str, ...]
    env: dict[str, str]


class Programs:
    """All arms that can run here. ``missing``: why others can't, by name."""

    def __init__(self, peers: Path | None, work: Path, workers: int):
        self.work, self.workers = work, workers
        self.missing: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self._peers = peers
        quiet = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self._env = quiet | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        self._our_env = self._env | {"PYTHONPATH": path}
        self._peer_env = self._env | {"PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": _ffmpeg_links(work)}
        if peers is not None:
            self.versions = self._ask_versions(peers)

    def ours(self, arm: str, name: str) -> Program:
        return Program(name, arm, (sys.executable, "-m", "bench.video_ours"), self._our_env)

    def peers(self, stage: str) -> list[Program]:
        """The peers for this stage."""
        whole = ("torch", "torchvision", "transformers", "qwen-vl-utils") if stage == "pixels" else ("torch",)
        found: list[Program] = []
        for reader, threads in (("torchcodec", self.workers), ("torchcodec", 1), ("decord", 0)):
            name = " + ".join(self._named(p) for p in ((*whole[3:], reader)))
            name += f", {threads} thread{'s' * (threads > 1)}" if threads else ""
            if not self._lacks((*whole, reader), name) and name not in [p.name for p in found]:
                found.append(self._peer(name, reader, threads))
        return found

    def transformers(self) -> Program | None:
        """transformers' own resize of torchcodec's frames; for parity alone."""
        name = f"{self._named('transformers')}, its own resize"
        needed = ("torch", "torchvision", "transformers", "torchcodec")
        return None if self._lacks(needed, name) else self._peer(name, "transformers", self.workers)

    def _peer(self, name: str, arm: str, threads: int) -> Program:
        env = {"FORCE_QWENVL_VIDEO_READER": arm, "TORCHCODEC_NUM_THREADS": str(max(threads, 1))}
        return Program(name, arm, (str(self._peers), "-m", "bench.video_peers"), self._peer_env | env)

    def _named(self, package: str) -> str:
        version = self.versions.get(package, "")
        return package if not version or version.startswith("!") else f"{package} {version}"

    def _lacks(self, packages: Sequence[str], name: str) -> bool:
        if self._peers is None:
            return True
        faults = [f"{p}: {self.versions[p][1:]}" for p in packages if self.versions[p].startswith("!")]
        if faults:
            self.missing[name] = "; ".join(faults)
        return bool(faults)

    def _ask_versions(self, peers: Path) -> dict[str, str]:
        command = [str(peers), "-m", "bench.video_peers"]
        try:
            done = subprocess.run(command, env=self._peer_env, cwd=ROOT, capture_output=True, text=True, check=True)
            return dict(json.loads(done.stdout.strip().splitlines()[-1]))
        except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
            why = getattr(error, "stderr", "") or str(error)
            raise BenchError(f"--peers {peers}: {why.strip()}") from error


def _ffmpeg_links(work: Path) -> str:
    """A search path on which torchcodec finds FFmpeg under its usual names: the libraries inside PyAV's wheel."""
    import av

    libraries = Path(av.__file__).parent.with_name("av.libs")
    folder = work / "ffmpeg"
    folder.mkdir(parents=True, exist_ok=True)
    for library in libraries.glob("lib*.so.*"):
        name, _, version = library.name.partition(".so.")
        link = folder / f"{name.rpartition('-')[0]}.so.{version.split('.')[0]}"
        if name.startswith(("libav", "libsw")) and not link.is_symlink():
            link.symlink_to(library)
    return os.pathsep.join([str(folder), str(libraries), os.environ.get("LD_LIBRARY_PATH", "")]).rstrip(os.pathsep)
