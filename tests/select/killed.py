"""Scores in child processes that are killed: ``killed.py RECIPE OUT LINES...``, a SIGKILL at each count of lines.

A parent that has everything imported forks the children, so that ten of them take seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from vrlt_fast.config_load import load_config
from vrlt_fast.select import score


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def child(recipe: Path, out: Path) -> int:
    """A process that scores."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            score.score_samples(load_config([recipe], verb="train"), out)
            code = 0
        finally:
            os._exit(code)
    return pid


def main() -> None:
    recipe, out, moments = Path(sys.argv[1]), Path(sys.argv[2]), [int(word) for word in sys.argv[3:]]
    score.BATCH = 2
    killed = 0
    for moment in moments:
        pid = child(recipe, out)
        while lines(out) < moment and os.waitpid(pid, os.WNOHANG)[0] == 0:
            time.sleep(0.002)
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            killed += 1
        except (ProcessLookupError, ChildProcessError):
            break
    status = os.waitpid(child(recipe, out), 0)[1]
    sys.stdout.write(f"killed {killed} status {status}\n")


if __name__ == "__main__":
    main()
