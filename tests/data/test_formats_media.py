"""Where the files of another format are found, and how long they last."""

from __future__ import annotations

from pathlib import Path

import pytest

from vrlt_fast.data.formats.media import Media, read_durations
from vrlt_fast.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """videos/ with files that are looked up by their names alone."""
    for name in ("a.mp4", "b.MKV", "x_1.0_2.0.webm", "one/c.avi", "two/d.mp4", "one/d.mkv", "one/e.mp4", "e.mp4",
                 "pic.png", "notes.txt"):  # fmt: skip
        file = tmp_path / "videos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    return tmp_path / "videos"


@pytest.mark.parametrize(
    ("name", "found"),
    [("a", "a.mp4"), ("a.mp4", "a.mp4"), ("./a.mp4", "a.mp4"), ("a.avi", "a.mp4"), ("b", "b.MKV"),
     ("x_1.0_2.0", "x_1.0_2.0.webm"), ("c", "one/c.avi"), ("elsewhere/c.mp4", "one/c.avi"), ("two/d", "two/d.mp4"),
     ("one/d.webm", "one/d.mkv"), ("e", "e.mp4"), ("one/e", "one/e.mp4"), ("front/a", "a.mp4")],
)  # fmt: skip
def test_finds_videos(name: str, found: str, folder: Path):
    assert Media(folder, strip="front/").video(name) == found
    assert Media(folder, folder.parent).video(name) == f"videos/{found}"


@pytest.mark.parametrize(
    ("name", "code"),
    [("d", "VRLT-V01"), ("z", "VRLT-V01"), ("notes", "VRLT-V01"), ("pic", "VRLT-V01"), ("../a.mp4", "VRLT-D08"),
     ("/etc/a.mp4", "VRLT-D08"), ("http://x.org/a.mp4", "VRLT-D08"), ("C:\\a.mp4", "VRLT-D08"),
     ("one/../../a", "VRLT-D08"), ("%2e%2e/a", "VRLT-D08"), ("a\0b", "VRLT-D08"), ("./", "VRLT-D08"),
     ("n" * 300, "VRLT-D08")],
)  # fmt: skip
def test_refuses_videos(name: str, code: str, folder: Path):
    with pytest.raises(DataError) as caught:
        Media(folder).video(name)
    assert caught.value.code == code
    assert caught.value.problems[0].fix


def test_absolute_paths_inside_the_folder_become_relative(folder: Path):
    media = Media(folder)
    assert media.video(f"{folder}/one/c.avi") == "one/c.avi"
    assert media.image(f"{folder}/pic.png") == "pic.png"
    for path in (f"{folder}/../videos/a.mp4", f"{folder}2/a.mp4"):
        with pytest.raises(DataError, match="VRLT-D08"):
            media.video(path)
    with pytest.raises(DataError, match="VRLT-V01"):
        media.image("pic.jpg")


def test_without_a_folder_names_stay(tmp_path: Path):
    media = Media(root=None)
    assert [media.video(name) for name in ("a", "b.webm", "c.0", "d/e")] == ["a.mp4", "b.webm", "c.0.mp4", "d/e.mp4"]
    with pytest.raises(ConfigError, match="VRLT-C04"):
        Media(tmp_path, tmp_path / "other")


@pytest.mark.parametrize(
    ("file", "text"),
    [("d.csv", "a,3\nv/b.mp4, 4.5 \n"), ("d.csv", "video_id,fps,duration\na,9,3\nv/b.mp4,9,4.5\n\n"),
     ("d.json", '{"a": 3, "v/b.mp4": {"duration": 4.5, "fps": 2}}')],
)  # fmt: skip
def test_reads_durations(file: str, text: str, tmp_path: Path):
    (tmp_path / file).write_text(text)
    assert read_durations(tmp_path / file) == {"a": 3.0, "v/b.mp4": 4.5}


@pytest.mark.parametrize(
    ("file", "text", "code", "line"),
    [("d.csv", "a,3\nb,x\n", "VRLT-D03", 2), ("d.csv", "a,3\nb\n", "VRLT-D03", 2), ("d.csv", "a,nan\n", "VRLT-D03", 1),
     ("d.csv", "a,0\n", "VRLT-D03", 1), ("d.csv", "a,-1\n", "VRLT-D03", 1), ("d.csv", "", "VRLT-D01", 1),
     ("d.json", '{"a": 3,\n"b": "4"}', "VRLT-D03", 2), ("d.json", '{"a": 3,\n"b": 4', "VRLT-D02", 2),
     ("d.json", "[1]", "VRLT-D03", 1), ("d.json", '{"a": true}', "VRLT-D03", 1)],
)  # fmt: skip
def test_reports_bad_durations(file: str, text: str, code: str, line: int, tmp_path: Path):
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError) as caught:
        read_durations(tmp_path / file)
    assert [(p.code, p.where) for p in caught.value.problems] == [(code, f"{file}:{line}")]
