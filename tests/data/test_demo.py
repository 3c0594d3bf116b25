from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from vrlt_fast.data.demo import build_demo
from vrlt_fast.data.footage import HELDOUT, TRAIN, find_footage
from vrlt_fast.data.readers import read_jsonl
from vrlt_fast.errors import DataError, SetupError
from vrlt_fast.video.check import check_dataset

COUNTS = {"train_clips": 6, "heldout_clips": 4}
QUESTIONS = {TRAIN: ("train.jsonl", "tasks.jsonl"), HELDOUT: ("heldout.jsonl", "tasks_heldout.jsonl")}
DIGESTS = {"train": "32718065b762273d", "heldout": "4735e564d73d5773", "clips": "af0a3d15c10ed209"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    steps: list[tuple[int, int]] = []
    build_demo(out, seed=5, workers=1, progress=lambda done, total: steps.append((done, total)), **COUNTS)
    assert steps == [(i, 10) for i in range(1, 11)]
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_files(demo: Path):
    assert sorted(path.name for path in demo.parent.iterdir()) == ["data"]
    lines = ["clips.jsonl", "heldout.jsonl", "tasks.jsonl", "tasks_heldout.jsonl", "train.jsonl"]
    assert sorted(path.name for path in demo.iterdir()) == sorted([*lines, "LICENSES.txt", "images", "videos"])
    assert len(list((demo / "videos").iterdir())) == 10
    assert "Blender Foundation" in (demo / "LICENSES.txt").read_text()
    for split, names in QUESTIONS.items():
        for name in names:
            report = check_dataset(demo / name)
            assert report.ok
            assert report.samples > COUNTS[f"{split}_clips"]


def test_the_lines_that_published_results_were_made_of_stay_the_same(demo: Path):
    """bench/results has results of training on such files: a change of these digests makes them out of date."""
    digests = {name: hashlib.sha256((demo / f"{name}.jsonl").read_bytes()).hexdigest()[:16] for name in DIGESTS}
    assert digests == DIGESTS


def test_videos_have_exactly_the_planned_frames(demo: Path):
    durations = {s.video: s.duration for name in (TRAIN, HELDOUT) for s in read_jsonl(demo / f"{name}.jsonl")}
    for line in (demo / "clips.jsonl").read_text().splitlines():
        plan = json.loads(line)
        assert durations.get(plan["video"], plan["duration"]) == plan["duration"] == plan["frames"] / 8
        with av.open(str(demo / plan["video"])) as container:
            assert [stream.type for stream in container.streams] == ["video"]
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height, stream.average_rate) == (160, 120, 8)
            assert [frame.time for frame in container.decode(video=0)] == [k / 8 for k in range(plan["frames"])]


def test_training_and_heldout_clips_share_no_source_frame(demo: Path):
    footage = find_footage()
    used: dict[str, dict[str, set[int]]] = {key: {TRAIN: set(), HELDOUT: set()} for key in footage}
    for line in (demo / "clips.jsonl").read_text().splitlines():
        plan = json.loads(line)
        for shot in plan["shots"] + plan["inserts"]:
            used[shot["source"]][plan["split"]] |= set(range(shot["first"], shot["last"] + 1))
    for key, by_split in used.items():
        assert not by_split[TRAIN] & by_split[HELDOUT]
        for split, frames in by_split.items():
            low, high = footage[key].part(split)
            assert all(low <= frame <= high for frame in frames)
    assert sum(len(by_split[TRAIN]) for by_split in used.values()) > 50


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)


def test_images_are_the_frames_that_their_names_say_else_the_last_one(demo: Path):
    names = [name for some in QUESTIONS.values() for name in some]
    shown = {image for name in names for sample in read_jsonl(demo / name) for image in sample.images}
    assert {path.name for path in (demo / "images").iterdir()} == {Path(image).name for image in shown}
    assert {"-f" in image for image in shown} == {True, False}
    for image in shown:
        clip, _, frame = Path(image).stem.partition("-f")
        frames = frames_of(demo / "videos" / f"{clip}.mp4")
        away = np.abs(frames - frames_of(demo / image)).mean((1, 2, 3))
        place = int(frame) if frame else len(frames) - 1
        assert away[place] < 8
        assert away[place] < away.min() + 2


def test_workers_change_nothing_and_the_seed_everything(demo: Path, tmp_path: Path):
    build_demo(tmp_path / "two", seed=5, workers=2, **COUNTS)
    assert contents(tmp_path / "two") == contents(demo)
    build_demo(tmp_path / "other", seed=6, workers=1, train_clips=1, heldout_clips=0)
    assert (tmp_path / "other/videos/train-00000.mp4").read_bytes() != (demo / "videos/train-00000.mp4").read_bytes()


def test_refuses_to_overwrite(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="VRLT-D13"):
        build_demo(tmp_path / "out", **COUNTS)
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="VRLT-D13"):
        build_demo(tmp_path / "mine", **COUNTS)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "mine.partial",
        "mine.partial/thesis.tex",
        "out",
    ]


def test_a_killed_call_leaves_no_output_and_can_be_repeated(tmp_path: Path):
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from vrlt_fast.data.demo import build_demo\n"
        "build_demo(Path(sys.argv[1]), workers=1, train_clips=400, heldout_clips=0,"
        " progress=lambda done, total: print(done, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    build_demo(out, workers=1, train_clips=1, heldout_clips=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list((out / "videos").iterdir())) == 2


def test_without_the_footage_it_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(SetupError, match="pip install") as caught:
        build_demo(tmp_path / "out", **COUNTS)
    assert (caught.value.code, caught.value.exit_code) == ("VRLT-E01", 4)
    assert not list(tmp_path.iterdir())
