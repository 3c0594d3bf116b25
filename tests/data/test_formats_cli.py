"""vrlt data convert: the words of the command line, the files that it writes, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from vrlt_fast.cli import main
from vrlt_fast.data.readers import read_jsonl

HERE = Path(__file__).parent / "formats"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data root with clips/KITE1.avi (2.5 s) and clips/OVEN2.mp4, which is no video."""
    clips = tmp_path / "root" / "clips"
    clips.mkdir(parents=True)
    with av.open(str(clips / "KITE1.avi"), "w") as file:
        stream = file.add_stream("mpeg4", rate=8, width=32, height=32, pix_fmt="yuv420p")
        for level in range(20):
            picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, dtype=np.uint8), format="rgb24")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    (clips / "OVEN2.mp4").write_bytes(b"no video")
    (tmp_path / "c.txt").write_text("KITE1 0 1.5##a girl lets go.\nOVEN2 1 2##x.\nLOST 1 2##y.\nKITE1 2 3##it lands.\n")
    return tmp_path


def test_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.jsonl"
    words = ["data", "convert", "charades_sta", str(HERE / "charades_sta.txt"), str(out)]
    assert main([*words, "--durations", str(HERE / "durations.csv"), "--split", "train"]) == 0
    said = capsys.readouterr().out
    assert "grounding: 4 samples" in said
    assert "spans cut at the border of their video: 1" in said
    assert f"{out}: 4 samples" in said
    samples = read_jsonl(out, check_files=False)
    assert [sample.id for sample in samples][:2] == ["charades_sta-train-KITE1-1", "charades_sta-train-KITE1-2"]
    assert main([*words, "--durations", str(HERE / "durations.csv")]) == 3
    assert "VRLT-D13" in capsys.readouterr().err


def test_finds_and_measures_the_videos(folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ["data", "convert", "charades_sta", str(folder / "c.txt"), str(folder / "out.jsonl")]
    words += ["--videos", str(folder / "root" / "clips"), "--root", str(folder / "root")]
    assert main(words) == 3
    said = capsys.readouterr().out
    for what in ("VRLT-V02 c.txt:2", "VRLT-V01 c.txt:3", "problems VRLT-V01: 1", "nothing is written"):
        assert what in said
    assert not (folder / "out.jsonl").exists()
    assert main([*words, "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert f"2 samples; data.root is {folder / 'root'}" in said
    assert "problems VRLT-V02: 1" in said
    samples = read_jsonl(folder / "out.jsonl", folder / "root")
    assert [(sample.video, sample.duration) for sample in samples] == [("clips/KITE1.avi", 2.5)] * 2
    assert [sample.spans for sample in samples] == [((0.0, 1.5),), ((2.0, 2.5),)]


def test_strip_and_seed(tmp_path: Path):
    rows = (HERE / "seed_bench_r1.jsonl").read_text().splitlines()[:1]
    (tmp_path / "a.jsonl").write_text(rows[0] + "\n")
    (tmp_path / "d.json").write_text(json.dumps({"g1": 9}))
    answers = set()
    for seed in range(8):
        out = tmp_path / f"{seed}.jsonl"
        words = ["data", "convert", "seed_bench_r1", str(tmp_path / "a.jsonl"), str(out), "--seed", str(seed)]
        assert main([*words, "--durations", str(tmp_path / "d.json"), "--strip", "videos/"]) == 0
        (sample,) = read_jsonl(out, check_files=False)
        assert (sample.video, sample.duration) == ("Galley/g1.mp4", 9.0)
        answers.add(sample.answer)
    assert len(answers) > 1


def test_nothing_good_is_never_written(folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ["data", "convert", "charades_sta", str(folder / "c.txt"), str(folder / "out.jsonl"), "--skip-bad"]
    assert main(words) == 3
    assert capsys.readouterr().out.count("VRLT-D15 c.txt:") == 4
    assert not (folder / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["charades", "c.txt", "o.jsonl"], 2, "charades_sta"),
        (["charades_sta", "c.txt", "o.jsonl", "--videos", "none"], 2, "--videos none"),
        (["charades_sta", "c.txt", "o.jsonl", "--root", "none"], 2, "--root none"),
        (["charades_sta", "c.txt", "o.jsonl", "--videos", "root", "--root", "root/clips"], 2, "VRLT-C04"),
        (["charades_sta", "c.txt", "o.jsonl", "--durations", "c.txt"], 3, "VRLT-D03 c.txt:1"),
        (["charades_sta", "c.txt", "o.jsonl", "--durations", "none.csv"], 3, "VRLT-D01"),
        (["charades_sta", "c.txt", "o.jsonl", "--seed", "x"], 2, "VRLT-C02"),
        (["charades_sta", "c.txt"], 2, "VRLT-C02"),
    ],
)
def test_refuses(
    words: list[str],
    code: int,
    said: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(folder)
    assert main(["data", "convert", *words]) == code
    assert said in capsys.readouterr().err
    assert not (folder / "o.jsonl").exists()
