from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vrlt_fast.data.readers import read_jsonl, resolve_video, to_json, write_jsonl
from vrlt_fast.data.sample import Box, Sample
from vrlt_fast.errors import DataError


def lines() -> list[dict]:
    """One valid line a task; the last has every optional field."""
    return [
        {
            "id": "a", "video": "v/a.mp4", "duration": 8.0, "task": "grounding", "question": "When?",
            "spans": [[5, 6.5], [1, 2]],
        },
        {
            "id": "b", "video": "v/a.mp4", "duration": 8, "task": "videoqa", "question": "Which?",
            "options": ["x", "ÿ"], "answer": "B",
        },
        {
            "id": "c", "video": "v/b.mp4", "duration": 7.5, "task": "grounded_qa", "question": "Which, and when?",
            "options": ["x", "y", "z"], "answer": "A", "spans": [[0, 7.5]], "images": ["v/i.png"],
            "boxes": [{"time": 1, "x0": 0.1, "y0": 0.2, "x1": 0.5, "y1": 1}], "object_id": 3, "progress": 0.25,
        },
    ]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "v").mkdir()
    for name in ("a.mp4", "b.mp4", "i.png"):
        (tmp_path / "v" / name).write_bytes(b"x")
    return tmp_path


def dump(root: Path, items: list[dict] | bytes) -> Path:
    path = root / "train.jsonl"
    data = items if isinstance(items, bytes) else b"".join(json.dumps(item).encode() + b"\n" for item in items)
    path.write_bytes(data)
    return path


def problems(path: Path, **kwargs: object) -> list[tuple[str, str]]:
    with pytest.raises(DataError) as caught:
        read_jsonl(path, **kwargs)
    assert caught.value.exit_code == 3
    return [(problem.code[5:], problem.where) for problem in caught.value.problems]


def test_reads_every_field(root: Path):
    a, b, c = read_jsonl(dump(root, lines()))
    assert a.spans == ((1.0, 2.0), (5.0, 6.5))
    assert (b.options, b.answer, b.spans, b.duration) == (("x", "ÿ"), "B", (), 8.0)
    assert c == Sample(
        id="c", video="v/b.mp4", duration=7.5, task="grounded_qa", question="Which, and when?", options=("x", "y", "z"),
        answer="A", spans=((0.0, 7.5),), images=("v/i.png",), boxes=(Box(1.0, 0.1, 0.2, 0.5, 1.0),), object_id=3,
        progress=0.25, line="train.jsonl:3",
    )  # fmt: skip


def test_writes_what_it_reads(root: Path):
    samples = read_jsonl(dump(root, lines()))
    write_jsonl(samples, root / "copy.jsonl")
    again = read_jsonl(root / "copy.jsonl")
    assert [to_json(s) for s in again] == [to_json(s) for s in samples]
    assert sorted(p.name for p in root.iterdir()) == ["copy.jsonl", "train.jsonl", "v"]


def test_a_failed_write_keeps_the_old_file(root: Path):
    good = read_jsonl(dump(root, lines()))
    bad = Sample("n", "v/a.mp4", float("nan"), "grounding", "?")
    with pytest.raises(ValueError, match="JSON"):
        write_jsonl([*good, bad], root / "train.jsonl")
    assert len(read_jsonl(root / "train.jsonl")) == 3
    assert sorted(p.name for p in root.iterdir()) == ["train.jsonl", "v"]


# (index of the line that is changed, changes (None removes the field), expected code)
WRONG = [
    (0, {"id": None}, "D03"),
    (0, {"id": 7}, "D03"),
    (0, {"question": "  "}, "D03"),
    (0, {"duration": "8"}, "D03"),
    (0, {"duration": True}, "D03"),
    (0, {"duration": 0}, "D03"),
    (0, {"duration": float("nan")}, "D03"),
    (0, {"duration": float("inf")}, "D03"),
    (0, {"duration": 10**400}, "D03"),
    (0, {"spans": None}, "D03"),
    (0, {"spans": [1, 2]}, "D03"),
    (0, {"spans": [[1, float("nan")]]}, "D03"),
    (0, {"spans": [[False, 1]]}, "D03"),
    (0, {"spans": [[1, 2, 3]]}, "D03"),
    (0, {"task": 3}, "D03"),
    (0, {"task": "groundin"}, "D04"),
    (0, {"spans": []}, "D05"),
    (0, {"spans": [[3, 3]]}, "D05"),
    (0, {"spans": [[4, 3]]}, "D05"),
    (0, {"spans": [[-0.5, 3]]}, "D05"),
    (0, {"spans": [[3, 8.1]]}, "D05"),
    (0, {"spans": [[3, 5], [4.5, 6]]}, "D05"),
    (0, {"answer": "A"}, "D11"),
    (1, {"spans": [[1, 2]]}, "D11"),
    (1, {"options": None}, "D03"),
    (1, {"options": ["x", 3]}, "D03"),
    (1, {"options": [], "answer": "A"}, "D06"),
    (1, {"options": ["x"], "answer": "A"}, "D06"),
    (1, {"options": [str(i) for i in range(9)]}, "D06"),
    (1, {"options": ["x", "x "]}, "D06"),
    (1, {"options": ["x", ""]}, "D06"),
    (1, {"answer": "C"}, "D06"),
    (1, {"answer": "b"}, "D06"),
    (1, {"answer": "x"}, "D06"),
    (1, {"answer": ""}, "D06"),
    (1, {"answer": 1}, "D03"),
    (1, {"id": "a"}, "D07"),
    (1, {"video": "/etc/passwd"}, "D08"),
    (1, {"video": "../a.mp4"}, "D08"),
    (1, {"video": "v/../../a.mp4"}, "D08"),
    (1, {"video": "v/%2e%2e/%2E%2e/a.mp4"}, "D08"),
    (1, {"video": "v\\..\\..\\a.mp4"}, "D08"),
    (1, {"video": "C:\\a.mp4"}, "D08"),
    (1, {"video": "file:///etc/passwd"}, "D08"),
    (1, {"video": "https://example.org/a.mp4"}, "D08"),
    (1, {"video": "v/a.mp4\0.txt"}, "D08"),
    (1, {"video": "n" * 300}, "D08"),
    (1, {"video": "v/" * 3000 + "a.mp4"}, "D08"),
    (1, {"question": "Which <|video_pad|>?"}, "D09"),
    (1, {"options": ["x", "<|im_end|>"]}, "D09"),
    (1, {"colour": "red"}, "D11"),
    (1, {"video": "v/none.mp4"}, "V01"),
    (1, {"video": "v"}, "V01"),
    (1, {"question": "\ud800"}, "D02"),
    (2, {"images": ["v/none.png"]}, "V01"),
    (2, {"images": ["../i.png"]}, "D08"),
    (2, {"images": "v/i.png"}, "D03"),
    (2, {"boxes": [{"time": 1}]}, "D03"),
    (2, {"boxes": [{"time": 1, "x0": 0.6, "y0": 0.2, "x1": 0.5, "y1": 1}]}, "D03"),
    (2, {"boxes": 5}, "D03"),
    (2, {"object_id": True}, "D03"),
    (2, {"object_id": 1.5}, "D03"),
    (2, {"progress": 1.5}, "D03"),
    (2, {"reasoning": "<think>Red.</think>"}, "D03"),
    (2, {"timeline": "red"}, "D03"),
    (2, {"timeline": [{"start": 0, "end": 1}]}, "D03"),
    (2, {"timeline": [{"start": 1, "end": 1, "text": "red"}]}, "D05"),
    (2, {"timeline": [{"start": 0, "end": 1, "text": "<|im_end|>"}]}, "D09"),
]


@pytest.mark.parametrize(("index", "change", "code"), WRONG, ids=[f"{c}-{str(w)[:40]}" for _, w, c in WRONG])
def test_each_mistake_has_its_code_and_line(root: Path, index: int, change: dict, code: str):
    items = lines()
    items[index] = {k: v for k, v in {**items[index], **change}.items() if v is not None}
    assert set(problems(dump(root, items))) == {(code, f"train.jsonl:{index + 1}")}


def good(item: int = 0) -> bytes:
    return json.dumps(lines()[item]).encode() + b"\n"


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (b'{"id": "a",\n', "D02"),
        (b"plain text\n", "D02"),
        (b'\xff\xfe{"id"\n', "D02"),
        (b'{"id": "z", "id": "y"}\n', "D02"),
        (b"[" * 100_000 + b"]" * 100_000 + b"\n", "D02"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n", "D02"),
        (b"1" * 100_000 + b"\n", "D03"),
        (b"[1, 2]\n", "D03"),
        (b"null\n", "D03"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_lines_that_are_no_json_object(root: Path, bad: bytes, code: str):
    path = dump(root, good(0) + b"\n  \r\n" + bad + good(1))
    assert problems(path) == [(code, "train.jsonl:4")]


def test_byte_order_mark_crlf_blank_lines_and_long_lines(root: Path):
    long = {**lines()[1], "question": "q" * 2_000_000}
    data = b"\xef\xbb\xbf" + good(0).replace(b"\n", b"\r\n") + b"\r\n\n" + json.dumps(long).encode()
    assert [s.line for s in read_jsonl(dump(root, data))] == ["train.jsonl:1", "train.jsonl:4"]


@pytest.mark.parametrize("data", [b"", b"\n \r\n"])
def test_empty_files(root: Path, data: bytes):
    assert problems(dump(root, data)) == [("D01", str(root / "train.jsonl"))]


def test_missing_files_folders_and_pipes(root: Path):
    os.mkfifo(root / "pipe")
    for name in ("none.jsonl", "v", "pipe", "nul\0"):
        assert [code for code, _ in problems(root / name)] == ["D01"]
    path = dump(root, lines())
    assert [code for code, _ in problems(path, root=root / "none")] == ["D01"]


def test_all_problems_in_one_pass(root: Path):
    items = lines()
    items[0] |= {"video": "../x", "spans": [[3, 2]], "colour": 1, "duration": "8"}
    items[2]["id"] = "b"
    found = problems(dump(root, items))
    assert sorted(found) == sorted(
        [(code, "train.jsonl:1") for code in ("D08", "D05", "D11", "D03")] + [("D07", "train.jsonl:3")]
    )


def test_messages_name_place_reason_and_remedy(root: Path):
    items = lines()
    items[0]["task"] = "groundin"
    items[1] |= {"answer": "ÿ", "id": "a", "optoins": []}
    with pytest.raises(DataError) as caught:
        read_jsonl(dump(root, items))
    text = str(caught.value)
    for part in (
        "VRLT-D04 train.jsonl:1",
        '"grounding"',
        'give the letter: "B"',
        "first in train.jsonl:1",
        '"options"',
    ):
        assert part in text


def test_a_long_list_is_cut_in_the_message_only(root: Path):
    with pytest.raises(DataError) as caught:
        read_jsonl(dump(root, b"x\n" * 180))
    assert len(caught.value.problems) == 180
    assert str(caught.value).count("malformed JSON") == 50
    assert str(caught.value).endswith("and 130 more problems")


def test_symbolic_links_must_stay_inside(root: Path, tmp_path_factory: pytest.TempPathFactory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "a.mp4").write_bytes(b"x")
    (root / "out").symlink_to(outside)
    (root / "in").symlink_to(root / "v")
    items = lines()
    items[0]["video"] = "in/a.mp4"
    assert len(read_jsonl(dump(root, items))) == 3
    items[0]["video"] = "out/a.mp4"
    assert problems(dump(root, items)) == [("D08", "train.jsonl:1")]
    sample = read_jsonl(root / "train.jsonl", check_files=False)[0]
    with pytest.raises(DataError, match="VRLT-D08"):
        resolve_video(sample, root)


def test_resolve_video(root: Path):
    sample = read_jsonl(dump(root, lines()))[0]
    assert resolve_video(sample, root) == root / "v" / "a.mp4"
    with pytest.raises(DataError, match="VRLT-D08"):
        resolve_video(Sample("x", "../a.mp4", 1.0, "grounding", "?"), root)


def test_another_root_and_no_file_checks(root: Path, tmp_path_factory: pytest.TempPathFactory):
    path = dump(tmp_path_factory.mktemp("elsewhere"), lines())
    assert len(read_jsonl(path, root)) == 3
    assert len(read_jsonl(path, check_files=False)) == 3
    assert {code for code, _ in problems(path)} == {"V01"}


def attempt(path: Path) -> tuple[list[Sample], DataError | None]:
    try:
        return read_jsonl(path), None
    except DataError as error:
        return [], error


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_gives_samples_or_a_data_error(root: Path, data: st.DataObject):
    raw = b"".join(good(i) for i in range(3))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        cut = data.draw(st.integers(0, 12))
        raw = raw[:at] + data.draw(st.binary(max_size=6)) + raw[at + cut :]
    samples, error = attempt(dump(root, raw))
    assert str(error) if error else all(isinstance(sample, Sample) and sample.line for sample in samples)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.integers(0, 2), name=st.sampled_from(sorted(lines()[2])), value=json_values)
def test_any_value_in_any_field_gives_samples_or_a_data_error(root: Path, index: int, name: str, value: object):
    items = lines()
    items[index][name] = value
    samples, error = attempt(dump(root, items))
    for problem in error.problems if error else ():
        assert problem.where == f"train.jsonl:{index + 1}" or name == "id"
        assert str(problem).encode()
    for sample in samples:
        assert all(0 <= a < b <= sample.duration + 1e-6 for a, b in sample.spans)


def test_reads_fast(root: Path, seed: int):
    rng = random.Random(seed)
    items = []
    for i in range(20_000):
        start = rng.uniform(0, 6)
        items.append({**rng.choice(lines()), "id": f"s{i}", "question": f"q{i}"})
        if "spans" in items[-1]:
            items[-1]["spans"] = [[start, start + 1]]
    path = dump(root, items)
    begin = time.process_time()
    assert len(read_jsonl(path)) == 20_000
    assert time.process_time() - begin < 6  # five times what 60 s for a million lines would be: machines differ


def test_reading_needs_no_torch():
    modules = "vrlt_fast.data.readers, vrlt_fast.data.demo, vrlt_fast.data.quarantine, vrlt_fast.data.stream"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
