"""A file's error names what FFmpeg said about that file, whichever others are read meanwhile."""

from __future__ import annotations

import threading

import pytest

from vrlt_fast.errors import VideoError
from vrlt_fast.video.index import open_video

MKV = b"\x1a\x45\xdf\xa3\xff"  # an EBML header that doesn't go on


def _message(path) -> str:
    with pytest.raises(VideoError) as caught, open_video(path):
        pass
    return str(caught.value)


def test_the_reason_is_the_files_own(studio):
    paths = [studio.text("bad.mp4", b"\0\0\0\x10ftypisom\0\0\0\0" + b"no video"), studio.text("bad.mkv", MKV)]
    alone = [_message(path) for path in paths]
    assert "moov atom not found" in alone[0]
    assert "moov" not in alone[1]
    assert [_message(path) for path in paths] == alone
    wrong: list[str] = []
    start = threading.Barrier(4)

    def read(path, expected: str) -> None:
        start.wait(60)
        for _ in range(50):
            found = _message(path)
            if found != expected:
                wrong.append(found)

    workers = [threading.Thread(target=read, args=pair) for pair in 2 * list(zip(paths, alone, strict=True))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_nothing_reaches_the_terminal(studio, capfd):
    for path in 2 * [studio.text("bad.mkv", MKV)]:
        _message(path)
    assert capfd.readouterr() == ("", "")
