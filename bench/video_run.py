"""Measures the cells of the case ``video``: a process an arm and cell, parity first, then arms in turns."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from bench.harness import BenchError, Record, summarize
from bench.video_arm import Job
from bench.video_files import Clip, cartoon, make
from bench.video_ours import STD, frames_and_size
from bench.video_process import Process, Program, Programs

OURS, LIKE, CACHED = "ours", "ours, like for like", "ours, cached"
_NEEDED = 24e6  # bytes of memory that peers take for a frame of 720p, measured


@dataclass(frozen=True)
class Cell:
    """One thing that is measured. ``count`` frames spread over ``clip`` (None: the cartoon as it is), or drawn from it
    in random order; ``cached``: from the cache.
    """

    name: str
    text: str
    clip: Clip | None
    count: int
    in_order: bool = True
    stage: str = "pixels"
    cached: bool = False

    @property
    def shape(self) -> str:
        return f"{self.name} {self.text}"


def cells(*, quick: bool) -> list[Cell]:
    """All of them; ``quick``: on small files, to see whether it works."""
    hd, full, long, plain = (
        (Clip(180, 4), Clip(270, 4), Clip(180, 9), Clip(180, 4, 0))
        if quick
        else (Clip(720, 60), Clip(1080, 60), Clip(720, 400), Clip(720, 60, 0))
    )
    few, many = (8, 24) if quick else (32, 768)
    a, b, c = (f"{n} of {k.seconds} s {k.height}p" for n, k in ((few, hd), (few, full), (many, long)))
    d = f"{few} of {long.seconds} s {long.height}p"
    return [
        Cell("A", a, hd, few),
        Cell("B", b, full, few),
        Cell("C", c, long, many),
        Cell("D", d, long, few),
        Cell("E", f"{a} random order", hd, few, in_order=False),
        Cell("F", f"{c} cached", long, many, cached=True),
        Cell("G", f"{few} of bigbuckbunny", None, few),
        Cell("Gn", f"{a} no B-frames", plain, few),
        Cell("Df", f"{d} decoding alone", long, few, stage="frames"),
        Cell("Ef", f"{a} random order decoding alone", hd, few, in_order=False, stage="frames"),
    ]


def difference(one: Path, other: Path) -> tuple[float, int]:
    """Share of equal bytes of two saved results, and the largest difference.

    Raises:
        BenchError: they differ in shape.
    """
    a, b = (open_memmap(folder / "levels.npy", mode="r") for folder in (one, other))
    if a.shape != b.shape:
        raise BenchError(f"{one.name} gives {a.shape}, {other.name} gives {b.shape}")
    equal, worst, step = 0, 0, max(1, (1 << 24) // a.shape[1])
    for i in range(0, len(a), step):
        gap = np.abs(a[i : i + step].astype(np.int16) - b[i : i + step])
        equal += int((gap == 0).sum())
        worst = max(worst, int(gap.max()))
    return equal / a.size, worst


def parity(cell: Cell, ours: list[str], peers: list[str], folder: Path) -> list[Record]:
    """Hold the saved results against each other: how many of the values are equal.

    Ours must be plain decoding and torch's native resize, bit for bit, and so transformers' own resize; a level at most
    from the peers' resampler on one value in a thousand, like for like; and decoded frames the same everywhere.

    Raises:
        BenchError: they aren't.
    """
    exact = (1.0, 0)
    rows = [(OURS, "plain", exact)]
    if (folder / "transformers").is_dir():
        rows.append((OURS, "transformers", exact))
    if cell.stage == "frames":
        rows += [(OURS, peer, exact) for peer in peers]
    else:
        # The native resampler rounds between its passes: a level on 15 % of the values, rarely more.
        rows += [(OURS, peer, (0.6, 12)) for peer in peers]
        rows += [(LIKE, other, (0.999, 1) if other in peers else (0.6, 12)) for other in ("plain", *peers)]
    records = []
    for mine, other, (share, most) in rows:
        equal, worst = difference(folder / mine, folder / other)
        if equal < share or worst > most:
            raise BenchError(f"{cell.shape}: {mine} equals {other} on {equal:.5f} of the values, worst {worst} levels")
        records.append(summarize(mine, cell.shape, f"equal to {other}", "share", [equal]))
    if LIKE in ours:
        a = open_memmap(folder / LIKE / "head.npy", mode="r")
        for peer in peers:
            gap = float(np.abs(a - open_memmap(folder / peer / "head.npy", mode="r")).max())
            if gap > 1 / (255 * min(STD)) + 1e-5:
                raise BenchError(f"{cell.shape}: {LIKE} is {gap} from {peer} after normalisation")
    return records


def _times(arm: str, cell: Cell, answers: list[dict[str, Any]]) -> list[Record]:
    return [summarize(arm, cell.shape, metric, "s", [a[metric] for a in answers]) for metric in ("wall", "cpu")]


@contextmanager
def _scratch(work: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="scratch-", dir=work))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _enough_memory(cell: Cell, peers: list[Program]) -> None:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        available = next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), available)
    needed = cell.count * _NEEDED
    if peers and cell.clip is not None and cell.clip.height >= 720 and available < needed:
        raise BenchError(f"{cell.shape}: peers need {needed / 1e9:.0f} GB, {available / 1e9:.0f} GB are free")


class Runner:
    """Measures cells."""

    def __init__(self, programs: Programs, runs: int, seed: int):
        self.programs, self.runs, self.seed = programs, runs, seed
        self.work = programs.work

    def measure(self, cell: Cell) -> list[Record]:
        """All records of a cell.

        Raises:
            BenchError: an arm failed, or gave something else than the others.
        """
        path = cartoon() if cell.clip is None else make(cell.clip, self.work)
        frames, size = frames_and_size(path, cell.count)
        if not cell.in_order:
            frames = random.Random(self.seed).sample(range(max(frames) + 1), len(frames))
        job = Job("", str(path), frames, cell.in_order, size, cell.stage, self.programs.workers, str(self.work))
        records = [summarize("machine", cell.shape, "load", "1", [os.getloadavg()[0]])]
        return records + (self._cached(cell, job) if cell.cached else self._compared(cell, job))

    def _compared(self, cell: Cell, job: Job) -> list[Record]:
        ours = [self.programs.ours("default", OURS)]
        ours += [self.programs.ours("like", LIKE)] if cell.stage == "pixels" else []
        peers = self.programs.peers(cell.stage)
        _enough_memory(cell, peers)
        with ExitStack() as stack, _scratch(self.work) as scratch:
            arms: dict[str, Process] = {}
            peak: dict[str, float] = {}
            for program in (*ours, *peers):
                arms[program.name] = process = self._start(program, job, stack)
                _, peak[program.name] = process.run_watched()
                process.save(scratch / program.name)
            self._references(cell, job, scratch)
            records = parity(cell, [p.name for p in ours], [p.name for p in peers], scratch)
            found = self._in_turns(arms)
        records += [summarize(name, cell.shape, "peak", "B", [value]) for name, value in peak.items()]
        for name, answers in found.items():
            records += _times(name, cell, answers)
            for count, value in answers[-1]["counts"].items():
                records.append(summarize(name, cell.shape, count, "1", [value]))
        return records

    def _references(self, cell: Cell, job: Job, scratch: Path) -> None:
        """What parity is held against: plain decoding, and transformers' own resize."""
        programs = [self.programs.ours("plain", "plain")]
        other = self.programs.transformers() if cell.stage == "pixels" else None
        programs += [replace(other, name="transformers")] if other else []
        for program in programs:
            with ExitStack() as stack:
                process = self._start(program, job, stack)
                process.run(keep=True)
                process.save(scratch / program.name)

    def _in_turns(self, arms: dict[str, Process]) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
        names = list(arms)
        for turn in range(self.runs):
            for i in range(len(names)):
                name = names[(turn + i) % len(names)]
                found[name].append(arms[name].run())
        return found

    def _cached(self, cell: Cell, job: Job) -> list[Record]:
        """Hits in the process that filled the cache, and in new ones."""
        program = self.programs.ours("cache", CACHED)
        with _scratch(self.work) as scratch, ExitStack() as stack:
            job = replace(job, folder=str(scratch))
            process = self._start(program, job, stack)
            first = process.run(keep=True)
            process.save(scratch / "filled")
            again = [process.run() for _ in range(self.runs)]
            elsewhere = []
            for _ in range(self.runs):
                with ExitStack() as inner:
                    other = self._start(program, job, inner)
                    elsewhere.append(other.run(keep=True))
                    if not (scratch / "found").exists():
                        other.save(scratch / "found")
            same = difference(scratch / "filled", scratch / "found")
        hits = [a["counts"]["hit"] for a in (first, *again, *elsewhere)]
        if same != (1.0, 0) or hits != [0] + [1] * (2 * self.runs):
            raise BenchError(f"{cell.shape}: the cache gave something else, or missed: {same}, {hits}")
        records = [summarize("ours, filling", cell.shape, "wall", "s", [first["wall"]])]
        for name, answers in ((CACHED, again), (f"{CACHED}, new process", elsewhere)):
            records += _times(name, cell, answers)
        return records

    def _start(self, program: Program, job: Job, stack: ExitStack) -> Process:
        process = Process(program.name, program.command, program.env, replace(job, arm=program.arm))
        stack.callback(process.close)
        return process
