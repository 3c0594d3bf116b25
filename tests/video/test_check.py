from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vrlt_fast.config import VideoConfig
from vrlt_fast.data.draw import write_mp4, write_png
from vrlt_fast.video.check import check_dataset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), np.uint8)
    write_mp4(frames, tmp_path / "two_seconds.mp4")
    write_png(frames[0], tmp_path / "image.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(frames[0].tobytes())
    return tmp_path


def write(root: Path, **changes: object) -> Path:
    line = {
        "id": "a",
        "video": "two_seconds.mp4",
        "duration": 2,
        "task": "grounding",
        "question": "When?",
        "spans": [[0, 2]],
    }
    (root / "x.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "id": "b", **changes}) + "\n")
    return root / "x.jsonl"


def test_counts_of_a_good_file(root: Path):
    steps: list[tuple[int, int]] = []
    report = check_dataset(write(root), progress=lambda done, total: steps.append((done, total)))
    assert report.ok
    assert (report.samples, report.videos, report.per_task) == (2, 1, {"grounding": 2})
    assert (report.shortest, report.mean, report.longest) == (2, 2, 2)
    assert steps == [(1, 1)]
    assert "2 good samples" in report.summary()
    assert "no problems" in report.summary()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"video": "empty.mp4"}, "VRLT-V02"),
        ({"video": "noise.mp4"}, "VRLT-V02"),
        ({"video": "none.mp4"}, "VRLT-V01"),
        ({"duration": 9, "spans": [[1, 2.6]]}, "VRLT-D05"),
        ({"task": "none"}, "VRLT-D04"),
    ],
)
def test_problems_have_their_line(root: Path, changes: dict, code: str):
    report = check_dataset(write(root, **changes))
    assert [(problem.code, problem.where) for problem in report.problems] == [(code, "x.jsonl:2")]
    assert not report.ok


def test_rounding_of_durations_is_no_problem(root: Path):
    assert check_dataset(write(root, duration=9, spans=[[1, 2.4]])).ok


def test_headers_can_be_left_alone(root: Path):
    assert check_dataset(write(root, video="noise.mp4"), open_videos=False).ok


def test_one_problem_a_video_names_all_its_lines(root: Path):
    path = write(root, video="noise.mp4")
    path.write_text(path.read_text() + path.read_text().splitlines()[1].replace('"b"', '"c"') + "\n")
    report = check_dataset(path)
    assert [p.where for p in report.problems] == ["x.jsonl:2"]
    assert "also lines 3" in report.problems[0].what
    assert report.rejected == {2: ("VRLT-V02",), 3: ("VRLT-V02",)}


def test_decoding_finds_what_demuxing_does_not(root: Path):
    frames = np.random.default_rng(1).integers(0, 255, (40, 64, 64, 3), np.uint8)
    whole = root / "whole.mp4"
    write_mp4(frames, whole)
    content = bytearray(whole.read_bytes())
    start = content.index(b"mdat") + 4
    middle = start + (len(content) - start) // 3
    content[middle : middle + 4000] = bytes(4000)
    (root / "damaged.mp4").write_bytes(content)
    path = write(root, video="damaged.mp4", duration=5)
    assert check_dataset(path).ok
    steps: list[tuple[int, int]] = []
    video = VideoConfig(fps=8, min_frames=2, max_frames=40, workers=0)
    report = check_dataset(path, decode=video, progress=lambda done, total: steps.append((done, total)))
    assert [(p.code[:6], p.where) for p in report.problems] == [("VRLT-V", "x.jsonl:2")]
    assert (report.decoded, steps) == (2, [(1, 2), (2, 2)])
    tolerant = check_dataset(path, decode=video.model_copy(update={"on_error": "tolerant"}))
    assert tolerant.ok
    assert tolerant.substituted > 0


def test_a_playlist_is_not_followed(root: Path):
    (root / "list.mp4").write_text("ffconcat version 1.0\nfile http://127.0.0.1/secret.mp4\n")
    report = check_dataset(write(root, video="list.mp4"))
    assert [(p.code, p.where) for p in report.problems] == [("VRLT-V02", "x.jsonl:2")]


@pytest.mark.parametrize(("content", "code"), [(b"no picture", "VRLT-V04"), (b"", "VRLT-V02")])
def test_images_are_opened_too(root: Path, content: bytes, code: str):
    (root / "good.png").write_bytes((root / "image.mp4").read_bytes())
    (root / "bad.png").write_bytes(content)
    assert check_dataset(write(root, images=["good.png", "good.png"])).ok
    path = write(root, images=["good.png", "bad.png"])
    path.write_text(path.read_text() + path.read_text().splitlines()[1].replace('"b"', '"c"') + "\n")
    report = check_dataset(path)
    assert [(p.code, p.where) for p in report.problems] == [(code, "x.jsonl:2")]
    assert "bad.png: image" in report.problems[0].what
    assert "also lines 3" in report.problems[0].what
    assert report.rejected == {2: (code,), 3: (code,)}
    assert check_dataset(path, open_videos=False).ok


def test_decoding_finds_an_image_that_breaks_off(root: Path):
    whole = (root / "image.mp4").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    video = VideoConfig(min_frames=2, max_frames=2, workers=0)
    assert [p.code for p in check_dataset(write(root, images=["cut.png"]), decode=video).problems] == ["VRLT-V04"]
