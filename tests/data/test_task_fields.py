"""The fields of the tasks beyond questions with options and spans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vrlt_fast.data.readers import read_jsonl, to_json, write_jsonl
from vrlt_fast.data.sample import Box, Instance
from vrlt_fast.errors import DataError

BOX = {"time": 1.0, "x0": 0.1, "y0": 0.2, "x1": 0.5, "y1": 1.0}
LINES = {
    "several": {"task": "videoqa", "options": ["x", "y", "z"], "answer": "A,C"},
    "number": {"task": "number", "answer": "1,200"},
    "regression": {"task": "regression", "answer": "-2.5e1"},
    "ocr": {"task": "ocr", "answer": "EXIT"},
    "open": {"task": "open", "answer": "a dog barks", "difficulty": 0.5, "source": "set/group"},
    "boxes": {"task": "boxes", "boxes": [BOX]},
    "instance": {"task": "instance", "object_id": 2, "spans": [[1, 2]], "instances": [{"id": 2, "boxes": [BOX]}]},
    "progress": {"task": "progress", "progress": 0.0},
}


def dump(folder: Path, **lines: dict) -> Path:
    (folder / "a.mp4").write_bytes(b"x")
    common = {"video": "a.mp4", "duration": 8.0, "question": "What?"}
    text = "".join(json.dumps({"id": name, **common, **line}) + "\n" for name, line in lines.items())
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    return folder / "train.jsonl"


def test_every_task_is_read_and_written(tmp_path: Path):
    samples = {s.id: s for s in read_jsonl(dump(tmp_path, **LINES))}
    assert samples["several"].letters == {"A", "C"}
    assert samples["instance"].instances == (Instance(2, (Box(**BOX),)),)
    assert (samples["instance"].wants_spans, samples["instance"].object_id) == (True, 2)
    assert (samples["progress"].progress, samples["progress"].letters) == (0.0, frozenset())
    assert (samples["open"].difficulty, samples["open"].source) == (0.5, "set/group")
    write_jsonl(samples.values(), tmp_path / "copy.jsonl")
    assert [to_json(s) for s in read_jsonl(tmp_path / "copy.jsonl")] == [to_json(s) for s in samples.values()]


WRONG = [
    ("several", {"answer": "C,A"}, "D06"),
    ("several", {"answer": "A,A"}, "D06"),
    ("several", {"answer": "A, C"}, "D06"),
    ("several", {"answer": "A,D"}, "D06"),
    ("several", {"answer": ","}, "D06"),
    ("number", {"answer": 12}, "D03"),
    ("number", {"answer": "twelve"}, "D03"),
    ("number", {"answer": "nan"}, "D03"),
    ("number", {"answer": "1_000"}, "D03"),
    ("number", {"answer": "\u0661"}, "D03"),
    ("number", {"answer": "1e999"}, "D03"),
    ("number", {"options": ["x", "y"]}, "D11"),
    ("regression", {"answer": None}, "D03"),
    ("ocr", {"answer": " "}, "D03"),
    ("open", {"answer": "a <answer>dog</answer>"}, "D03"),
    ("open", {"answer": "<|im_end|>"}, "D09"),
    ("open", {"difficulty": 2}, "D03"),
    ("open", {"source": 3}, "D03"),
    ("open", {"spans": [[1, 2]]}, "D11"),
    ("boxes", {"boxes": []}, "D03"),
    ("boxes", {"boxes": None}, "D03"),
    ("instance", {"object_id": None}, "D03"),
    ("instance", {"spans": []}, "D05"),
    ("instance", {"instances": 3}, "D03"),
    ("instance", {"instances": [{"id": 2}]}, "D03"),
    ("instance", {"instances": [{"id": None, "boxes": []}]}, "D03"),
    ("instance", {"instances": [{"id": 2, "boxes": [{"time": 1}]}]}, "D03"),
    ("instance", {"instances": [{"id": 2, "boxes": [BOX]}] * 2}, "D03"),
    ("progress", {"progress": None}, "D03"),
    ("progress", {"progress": 50}, "D03"),
]


@pytest.mark.parametrize(("name", "change", "code"), WRONG)
def test_each_mistake_has_its_code_and_line(tmp_path: Path, name: str, change: dict, code: str):
    line = {key: value for key, value in {**LINES[name], **change}.items() if value is not None or key == "id"}
    with pytest.raises(DataError) as caught:
        read_jsonl(dump(tmp_path, good=LINES["ocr"], bad=line))
    assert {(p.code, p.where) for p in caught.value.problems} == {(f"VRLT-{code}", "train.jsonl:2")}
