"""A video that one process can't read: none of those that share its prompt takes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.parallel import shared_feed

pytestmark = pytest.mark.xdist_group("processes")


def test_what_one_cannot_read_all_leave_out(demo, tiny_folder, tmp_path, pool, seed):
    folders = [Path(shutil.copytree(demo, tmp_path / str(rank))) for rank in range(2)]
    sample = shared_feed.samples_of(folders[0])[0]
    (folders[1] / sample.video).write_bytes(b"not a video")
    (first, failed, told), (second, others, _) = pool(2).run(shared_feed.prompts, folders, tiny_folder, seed)
    every = [s.id for s in shared_feed.samples_of(folders[0])]
    assert first == second
    assert set(every) - set(first) == {s.id for s in shared_feed.samples_of(folders[0]) if s.video == sample.video}
    assert failed == others == 1
    assert len(told) == 1
    assert "another process couldn't read it" in told[0]
