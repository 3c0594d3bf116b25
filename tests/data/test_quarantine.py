"""The list of bad lines: found by content, wherever they stand; written whole; refused when it isn't one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vrlt_fast.data.quarantine import read_quarantine, write_quarantine
from vrlt_fast.data.readers import AnnotationError, read_jsonl
from vrlt_fast.errors import DataError

LINE = {"video": "v.mp4", "duration": 4, "task": "grounding", "question": "When?", "spans": [[0, 1]]}


def lines(*ids: str) -> list[str]:
    return [json.dumps({"id": name, **LINE}) for name in ids]


def test_listed_lines_are_left_out_wherever_they_stand(tmp_path: Path) -> None:
    good, broken = lines("a", "b", "c"), "{not json"
    data, listed = tmp_path / "x.jsonl", tmp_path / "bad.jsonl"
    (tmp_path / "v.mp4").touch()
    data.write_text("\n".join([good[0], broken, good[1]]) + "\n")
    with pytest.raises(AnnotationError):
        read_jsonl(data)
    assert write_quarantine(listed, data, {2: ("VRLT-D02",), 3: ("VRLT-V02",)}) == 2
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(row["line"], row["codes"]) for row in rows] == [(2, ["VRLT-D02"]), (3, ["VRLT-V02"])]

    data.write_text("\ufeff" + "\r\n".join([good[1], good[2], broken, good[0]]), encoding="utf-8")
    out = read_quarantine(listed)
    assert [sample.id for sample in read_jsonl(data, leave_out=out)] == ["c", "a"]
    mended = good[1].replace('"b"', '"b2"')
    data.write_text(mended + "\n")
    assert [sample.id for sample in read_jsonl(data, leave_out=out)] == ["b2"]


def test_lines_of_another_list_are_kept(tmp_path: Path) -> None:
    """Also those of another file, and where the new list takes the old one's place."""
    first, second, listed = tmp_path / "x.jsonl", tmp_path / "y.jsonl", tmp_path / "bad.jsonl"
    first.write_text("\n".join(lines("a", "b")))
    second.write_text("\n".join(lines("c", "d")))
    write_quarantine(listed, first, {2: ("VRLT-V02",)})
    before = listed.read_text()
    assert write_quarantine(listed, second, {1: ("VRLT-L04",)}, kept=listed) == 2
    assert listed.read_text().startswith(before)
    assert len(read_quarantine(listed)) == 2
    whole = listed.read_text()
    (tmp_path / "no.jsonl").write_text("[1]")
    with pytest.raises(DataError, match="VRLT-D02"):
        write_quarantine(listed, second, {}, kept=tmp_path / "no.jsonl")
    assert listed.read_text() == whole


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "VRLT-D01"),
        (b"\xff\xfe", "VRLT-D01"),
        (b"{", "VRLT-D02"),
        (b"[1]", "VRLT-D02"),
        (b'{"line": 1}', "VRLT-D02"),
    ],
)
def test_what_is_no_list(tmp_path: Path, content: bytes | None, code: str) -> None:
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_quarantine(path)
    assert caught.value.code == code
    assert str(path) in str(caught.value)
