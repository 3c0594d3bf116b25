"""What FFmpeg says about a failure, kept apart by thread.

PyAV gives an exception the last error line of any thread: another file's, where several are read at once, or none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

Line = tuple[int, str, str]
"""Level, FFmpeg's component, text."""


def quiet() -> None:
    """Keep FFmpeg's own lines from the terminal; `ffmpeg_log` still sees its thread's errors."""
    import av

    logging.getLogger("libav").setLevel(logging.CRITICAL + 1)
    av.logging.set_skip_repeated(False)  # a line like the one before, of any file, would be left out
    av.logging.set_level(av.logging.ERROR)


@contextmanager
def ffmpeg_log() -> Iterator[list[Line]]:
    """The error lines that FFmpeg writes in this thread within the block, as they come."""
    import av

    quiet()
    with av.logging.Capture(local=True) as lines:
        yield lines


def reason_of(error: Exception, lines: list[Line] | None = None) -> str:
    """FFmpeg's reason, without the path, and the last of these lines."""
    reason = getattr(error, "strerror", None) or str(error)
    return f"{reason}: {lines[-1][2].strip()}" if lines else reason
