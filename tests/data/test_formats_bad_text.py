"""Malformed lines, tables and lists of files: the code, and the line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vrlt_fast.data.formats.base import Context, Output
from vrlt_fast.data.formats.convert import read_format

HERE = Path(__file__).parent / "formats"
D03, D05, D06, D08, D15 = "VRLT-D03", "VRLT-D05", "VRLT-D06", "VRLT-D08", "VRLT-D15"


def read(name: str, path: Path) -> Output:
    return read_format(name, path, Context(duration_of=lambda path: 20.0))


CHARADES = [
    ("KITE1 2.0", D15), ("KITE1 2.0 6.5#a girl", D15), ("KITE1 2.0 6.5 a girl", D15), ("##", D15), ("KITE1 1 2##", D03),
    ("KITE1 1 2## ", D03), ("KITE1 6.5 2.0##x", D05), ("KITE1 3 3##x", D05), ("KITE1 -1 3##x", D05),
    ("KITE1 1 99##x", D05), ("KITE1 30 31##x", D05), ("KITE1 a b##x", D03), ("KITE1 nan 3##x", D03),
    ("KITE1 1 inf##x", D03), ("KITE1 1 1e999##x", D03), ("../KITE1 1 2##x", D08), ("/etc/KITE1 1 2##x", D08),
    ("http://a/b 1 2##x", D08), ("KITE1 1 2##a <|im_end|>", "VRLT-D09"), ("KITE1 1 2 3##x", D15),
    ("%2e%2e/K 1 2##x", D08), ("[1, 2]", D15), ("KITE1 1,5 2,5##x", D03),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code"), CHARADES)
def test_lines_of_charades_sta(text: str, code: str, tmp_path: Path):
    (tmp_path / "c.txt").write_text(f"KITE1 1 2##a.\n{text}\nKITE1 3 4##b.\n")
    out = read("charades_sta", tmp_path / "c.txt")
    assert {problem.where for problem in out.problems} == {"c.txt:2"}
    assert code in [problem.code for problem in out.problems]
    assert [sample.line for sample in out.samples] == ["c.txt:1", "c.txt:3"]


NEXTGQA = [
    ("val.csv", "hunger,1,CW", "sleep,1,CW", D06, 2), ("val.csv", "hunger,1,CW", "7,1,CW", D06, 2),
    ("val.csv", "hunger,1,CW", ",1,CW", D03, 2), ("val.csv", "why did the hen run", "", D03, 2),
    ("val.csv", "why did the hen run", "why <|im_end|>", "VRLT-D09", 2), ("val.csv", "rain,noise", "rain", D03, 2),
    ("val.csv", "rain,noise", "rain,noise,x", D03, 2), ("val.csv", "rain,noise", "rain,rain", D06, 2),
    ("val.csv", "rain,noise", "rain,", D03, 2), ("val.csv", "991,1020", ",1020", D03, 2),
    ("val.csv", "hunger,1,CW", "hunger,,CW", D03, 2), ("val.csv", "991,1020,640,480,why", "\udcff", "VRLT-D02", 2),
    ("val.csv", "video_id", "video", D15, 1), ("val.csv", "a4", "b4", D15, 1),
    ("val.csv", ",5,TN", ",3,TN", "VRLT-D07", 4),
    ("gsub_val.json", "[1.2, 5.8]", "[5.8, 1.2]", D05, 2), ("gsub_val.json", "[1.2, 5.8]", "[1.2, 99]", D05, 2),
    ("gsub_val.json", "[1.2, 5.8]", "[-1.2, 5]", D05, 2), ("gsub_val.json", "[1.2, 5.8]", '["1", 5]', D03, 2),
    ("gsub_val.json", "[1.2, 5.8]", "[NaN, 5]", D03, 2), ("gsub_val.json", "[1.2, 5.8]", "[1, 2, 3]", D03, 2),
    ("gsub_val.json", '"duration": 34', '"duration": 0', D03, 2), ("gsub_val.json", ": 34,", ': "34",', D03, 2),
    ("gsub_val.json", '"location"', '"place"', D03, 2), ("gsub_val.json", '"992"', '"991"', "VRLT-D07", 3),
    ("gsub_val.json", '"fps": 30.0},', '"fps": 30.0', "VRLT-D02", 3), ("gsub_val.json", "34,", "34 34,", "VRLT-D02", 2),
]  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new", "code", "line"), NEXTGQA)
def test_files_of_nextgqa(file: str, old: str, new: str, code: str, line: int, tmp_path: Path):
    shutil.copy(HERE / "nextgqa_val.csv", tmp_path / "val.csv")
    shutil.copy(HERE / "gsub_nextgqa_val.json", tmp_path / "gsub_val.json")
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_bytes(text.replace(old, new, 1).encode("utf-8", "surrogateescape"))
    out = read("nextgqa", tmp_path / "val.csv")
    assert (code, f"{file}:{line}") in [(problem.code, problem.where) for problem in out.problems]
    assert "991-1" not in [sample.id for sample in out.samples]


def test_nextgqa_needs_its_companion(tmp_path: Path):
    shutil.copy(HERE / "nextgqa_val.csv", tmp_path / "val.csv")
    out = read("nextgqa", tmp_path / "val.csv")
    assert [problem.code for problem in out.problems] == ["VRLT-D01"]
    assert "gsub_val.json" in out.problems[0].where


YAML = [
    ("sets:\n- json_path: a.json\n", 1), ("datasets: [a, b]\n", 1), ("datasets:\n- a.json\n", 2),
    ("- json_path: a\n", 1),
    ("datasets:\n- json_path: [a]\n", 2), ("datasets:\n- json_path: &x a\n", 2),
    ("datasets:\n- json_path: !!str a\n", 2),
    ("datasets:\n- json_path: |\n", 2), ("datasets:\n- json_path: {a: b}\n", 2), ("datasets:\n  json_path: a\n", 2),
    ("datasets:\n- json_path: 'a\n", 2), ("datasets:\n- json_path: a: b\n", 2), ("datasets:\n", 1),
    ("datasets:\n- json_path: a\n  json_path: b\n", 3), ("datasets:\n- json_path: \"a\\x41\"\n", 2),
    ("datasets:\n- json_path: a\nother: b\n", 3),
    ("datasets:\n- json_path: temporal_r1.json\n  sampling_strategy: all\n", 2),
    ("datasets:\n- json_path: temporal_r1.json\n  sampling_strategy: last:2\n", 2),
    ("datasets:\n- json_path: temporal_r1.json\n  sampling_strategy: 140%\n", 2),
    ("datasets:\n- json_path: temporal_r1.json\n  sampling_strategy: first:-2\n", 2), ("datasets:\n- json_path:\n", 2),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line"), YAML)
def test_lists_of_temporal_r1(text: str, line: int, tmp_path: Path):
    shutil.copy(HERE / "temporal_r1.json", tmp_path)
    (tmp_path / "list.yaml").write_text(text)
    out = read("temporal_r1", tmp_path / "list.yaml")
    assert [problem.where for problem in out.problems] == [f"list.yaml:{line}"]
    assert out.problems[0].code in (D15, D03)
    assert not out.samples


def test_each_has_twenty_malformed_variants():
    assert min(len(CHARADES), len(NEXTGQA), len(YAML)) >= 20
