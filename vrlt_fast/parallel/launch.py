"""Starts the processes of a run on this machine, and ends all when one fails.

torchrun would do it too, but exits with 1 whatever the reason was, and prints a table of tracebacks. The environment is
its own, so ``torchrun -m vrlt_fast train ...`` works as well, also over several nodes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

GRACE = 10.0
"""Seconds that the others get to end by themselves."""
TOLD = "VRLT_ERROR_FILE"
"""Names the file in which a process of a run leaves what it ended with, for the launcher."""


def started() -> bool:
    """Whether this process is one of several already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(words: Sequence[str], world: int) -> int:
    """Run ``vrlt`` with these words in ``world`` processes; returns the exit code of the first that failed, else 0.

    SIGTERM and SIGINT go on to all of them. The last thing that is printed is what the first one failed with.
    """
    with tempfile.TemporaryDirectory(prefix="vrlt-") as folder:
        return _launch(words, world, Path(folder))


def _launch(words: Sequence[str], world: int, folder: Path) -> int:
    port = _free_port()
    running = [_start(words, rank, world, port, folder) for rank in range(world)]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            codes = [process.poll() for process in running]
            if any(codes):
                return _end(running, codes, folder)
            if None not in codes:
                return 0
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in running:
            process.kill()


def _start(words: Sequence[str], rank: int, world: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    more = {
        TOLD: folder / str(rank),
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    environment = {**os.environ, **{name: str(value) for name, value in more.items()}}
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // world, 1)))
    # signals of the terminal reach the launcher alone, which passes them on
    return subprocess.Popen([sys.executable, "-m", "vrlt_fast", *words], env=environment, start_new_session=True)


def tell(text: str) -> None:
    """Leave what this process ends with to the launcher, where there is one."""
    if TOLD in os.environ:
        with suppress(OSError):  # the launcher has gone; it was printed all the same
            Path(os.environ[TOLD]).write_text(text, encoding="utf-8")


def _end(running: Sequence[subprocess.Popen[bytes]], codes: Sequence[int | None], folder: Path) -> int:
    """Give the others a moment, then end them. The cause has a code of its own, what it causes in others is 75.

    Args:
        codes: as they were when the first had ended.
    """
    limit = time.monotonic() + GRACE
    while time.monotonic() < limit and any(process.poll() is None for process in running):
        time.sleep(0.05)
    ended = [process.poll() for process in running]  # what is killed here isn't a cause
    for process in running:
        process.kill()
        process.wait()
    causes = [rank for found in (codes, ended) for rank, code in enumerate(found) if code not in (None, 0, 75)]
    if not causes:
        return next(code for code in codes if code)
    first = causes[0]
    code = codes[first] or ended[first] or 1
    file = folder / str(first)
    how = f"exit code {code}" if code > 0 else f"signal {-code} ({signal.Signals(-code).name})"
    told = file.read_text(encoding="utf-8") if file.is_file() else "it left no message\n"
    sys.stderr.write(f"process {first} of {len(running)} failed first, with {how}:\n{told}")
    return code if code > 0 else 128 - code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
