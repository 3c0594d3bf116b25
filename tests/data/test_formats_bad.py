"""Malformed variants of every format's file, each made from the good one: its code, and the line that it is in.

The second entry of the good file is damaged in one way; the others must still be read.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vrlt_fast.data.formats.base import Context, Output
from vrlt_fast.data.formats.convert import FORMATS, read_format

HERE = Path(__file__).parent / "formats"
Path_ = tuple[str | int, ...]
MISSING = object()
HALF = json.loads('"\\ud800 half"')
HUGE = 10**500
BOX = [0.1, 0.2, 0.3, 0.4]
D03, D05, D06, D08, D15 = "VRLT-D03", "VRLT-D05", "VRLT-D06", "VRLT-D08", "VRLT-D15"


class Shape:
    """What the fields of a format's second entry are, so that they can be damaged."""

    def __init__(self, file: str, kind: str, **fields: Any):
        self.file, self.kind = file, kind
        self.texts: list[Path_] = fields.get("texts", [])
        self.seconds: list[Path_] = fields.get("seconds", [])
        self.span: Path_ | None = fields.get("span")
        self.spans: Path_ | None = fields.get("spans")
        self.options: Path_ | None = fields.get("options")
        self.answer: Path_ | None = fields.get("answer")
        self.video: Path_ | None = fields.get("video")
        self.twice = fields.get("twice", True)
        self.fine: tuple[str, ...] = fields.get("fine", ())
        self.more: list[tuple[str, Path_, Any, str]] = fields.get("more", [])


def lists(*names: str) -> list[Path_]:
    return [(name,) for name in names]


CAPTIONS = {
    "texts": [("sentences", 0)], "seconds": lists("duration"), "span": ("timestamps", 0), "video": ("KEY",),
    "more": [
        ("timestamps missing", ("timestamps",), MISSING, D03), ("timestamps null", ("timestamps",), None, D03),
        ("sentences missing", ("sentences",), MISSING, D03), ("sentences a text", ("sentences",), "x", D03),
        ("a sentence too many", ("sentences",), ["a", "b", "c"], D03), ("no span", ("timestamps",), [], D03),
    ],
}  # fmt: skip

SHAPES: dict[str, Shape] = {
    "activitynet_captions": Shape("activitynet_captions.json", "object", **CAPTIONS),
    "mmvu": Shape(
        "mmvu.json", "list", texts=lists("question", "question_type"), video=("video",), answer=("answer",),
        more=[
            ("kind unknown", ("question_type",), "essay", "VRLT-D04"), ("choices missing", ("choices",), MISSING, D03),
            ("choices a list", ("choices",), ["a", "b"], D03), ("choices null", ("choices",), None, D03),
            ("choices of other letters", ("choices",), {"B": "x", "C": "y"}, D03),
            ("a choice is a number", ("choices", "B"), 4, D03), ("a choice is empty", ("choices", "B"), "", D03),
            ("a choice is there twice", ("choices", "B"), "lift", D06), ("one choice", ("choices",), {"A": "x"}, D06),
            ("id a list", ("id",), ["validation_1"], D03), ("id missing", ("id",), MISSING, D03),
        ],
    ),
    "mvbench": Shape(
        "mvbench.json", "list", texts=lists("question", "video", "answer"), options=("candidates",),
        answer=("answer",), video=("video",), twice=False,
        more=[("start a text", ("start",), "0", D03), ("end NaN", ("end",), math.nan, D03)],
    ),
    "primo_r1": Shape(
        "primo_r1.json", "list", texts=lists("problem", "problem_type", "solution", "video", "init_frame_path"),
        video=("video",),
        more=[
            ("a frame is missing", ("init_frame_path",), MISSING, D03),
            ("a frame elsewhere", ("current_frame_path",), "../b.png", D08),
            ("a frame of another disk", ("current_frame_path",), "/b.png", D08),
            ("neither yes nor no", ("solution",), "<answer>maybe</answer>", D06),
            ("type unknown", ("problem_type",), "poem", "VRLT-D04"), ("data unknown", ("data_type",), "sound", D03),
            ("solution empty", ("solution",), "<answer></answer>", D03), ("id a number", ("problem_id",), 1.5, D03),
        ],
    ),
    "rextime": Shape(
        "rextime.jsonl", "lines", texts=lists("question", "vid", "ans", "qid"), seconds=lists("duration"),
        spans=("relevant_windows",), options=("options",), answer=("ans",), video=("vid",),
        fine=("question missing", "options missing"),  # the query asks then, and for the time alone
    ),
    "seed_bench_r1": Shape(
        "seed_bench_r1.jsonl", "lines",
        texts=lists("question", "answer", "choice_b", "video_source", "video_basename", "current_observation_basename"),
        answer=("golden_choice_idx",),
        more=[
            ("another golden one", ("golden_choice_idx",), "C", D06),
            ("a choice twice", ("choice_b",), "pour tea", D06), ("video", ("video_basename",), "../../../x", D08),
            ("progress null", ("task_progress_metadata",), None, D03), ("image", ("video_source",), "../up", D08),
            ("progress missing", ("task_progress_metadata",), MISSING, D03),
        ],
    ),
    "stvg_r1": Shape(
        "stvg_r1.json", "object", texts=[("sentences", 0)], seconds=lists("duration"), span=("timestamps", 1),
        video=("KEY",),
        more=[
            ("ids missing", ("objectid",), MISSING, D03), ("an id too few", ("objectid",), [1], D03),
            ("id a text", ("objectid", 0), "3", D03), ("id below 0", ("objectid", 0), -1, D03),
            ("id a share", ("objectid", 0), 0.5, D03), ("id true", ("objectid", 0), True, D03),
            ("id huge", ("objectid", 0), HUGE, D03),
        ],
    ),
    "tempcompass": Shape(
        "tempcompass.json", "object", texts=[("order", 0, "question"), ("order", 0, "answer")], video=("KEY",),
        more=[
            ("no such answer", ("order", 0, "answer"), "Caption C: x", D06),
            ("another text", ("order", 0, "answer"), "Caption A: x", D06),
            ("aspect null", ("order",), None, D03), ("aspect an object", ("order",), {"question": "x"}, D03),
            ("question null", ("order", 0), None, D15), ("question a list", ("order", 0), ["a"], D15),
            ("letters jump", ("order", 0, "question"), "Q?\nA. x\nC. y", D06),
            ("options empty", ("order", 0, "question"), "Q?\nA. \nB. y", D06),
            ("a line too many", ("order", 0, "question"), "Q?\nA. x\nB. y\nmore", D06),
            ("one option", ("order", 0, "question"), "Q?\nCaption A: First a hen, then a dog.", D06),
            ("neither yes nor no", ("order", 0), {"question": "Is it?", "answer": "maybe"}, D06),
        ],
    ),
    "temporal_r1": Shape(
        "temporal_r1.json", "list", texts=lists("dataset", "video", "problem"), seconds=lists("video_length"),
        video=("video",), twice=False,
        more=[
            ("no solution", ("solution",), MISSING, D03), ("solution null", ("solution",), None, D03),
            ("in seconds", ("solution",), [3.0, 8.0], D05), ("turned round", ("solution",), [0.9, 0.2], D05),
            ("below 0", ("solution",), [-0.5, 0.2], D05), ("NaN", ("solution",), [math.nan, 0.2], D03),
            ("one border", ("solution",), [0.5], D03), ("texts", ("solution",), ["0.1", "0.2"], D03),
            ("nested", ("solution",), [[0.1, 0.2]], D03), ("huge", ("solution",), [0, HUGE], D03),
            ("no time at all", ("solution",), [0.5, 0.5], D05),
        ],
    ),
    "time_r1": Shape(
        "time_r1.json", "list", texts=lists("sentence", "video"), seconds=lists("duration"), span=("timestamp",),
        video=("video",),
        more=[
            ("too difficult", ("difficulty",), 101, D03), ("too easy", ("difficulty",), -0.5, D03),
            ("difficulty a text", ("difficulty",), "50", D03), ("qid a list", ("qid",), [1], D03),
            ("no timestamp", ("timestamp",), MISSING, D03), ("timestamp null", ("timestamp",), None, D03),
        ],
    ),
    "tw_grpo": Shape(
        "tw_grpo.json", "list", texts=lists("problem", "video", "solution", "problem_type"), options=("options",),
        video=("video",), fine=("problem_type missing",),
        more=[("letters beyond", ("solution",), "<answer>B,C</answer>", D06)],
    ),
    "video_r1": Shape(
        "video_r1.json", "list", texts=lists("problem", "path", "solution", "problem_type"), video=("path",),
        more=[
            ("not a number", ("solution",), "<answer>many</answer>", D03),
            ("NaN", ("solution",), "<answer>nan</answer>", D03), ("nothing", ("solution",), "<answer> </answer>", D03),
            ("type unknown", ("problem_type",), "guess", "VRLT-D04"),
            ("data unknown", ("data_type",), "sound", D03), ("data null", ("data_type",), None, D03),
            ("id an object", ("problem_id",), {}, D03), ("tags", ("process",), "<answer>5</answer>", D03),
        ],
    ),
    "videochat_r1": Shape(
        "videochat_r1.json", "list", texts=lists("path", "object"), video=("path",), twice=False,
        more=[
            ("seven boxes", ("gt",), [BOX] * 7, D03), ("nine boxes", ("gt",), [BOX] * 9, D03),
            ("no boxes", ("gt",), [], D03), ("gt null", ("gt",), None, D03), ("three corners", ("gt", 2), BOX[:3], D03),
            ("turned round", ("gt", 2), [0.3, 0.2, 0.1, 0.4], D03), ("in pixels", ("gt", 2), [10, 20, 30, 40], D03),
            ("below 0", ("gt", 2), [-0.1, 0.2, 0.3, 0.4], D03), ("NaN", ("gt", 2), [math.nan, 0.2, 0.3, 0.4], D03),
            ("a text", ("gt", 2), ["0.1", 0.2, 0.3, 0.4], D03), ("huge", ("gt", 2), [0.1, 0.2, HUGE, 0.4], D03),
            ("neither kind", ("gt",), MISSING, D15), ("a box is null", ("gt", 2), None, D03),
        ],
    ),
    "videomme": Shape(
        "videomme.json", "list", texts=lists("question", "answer", "videoID", "question_id"), options=("options",),
        answer=("answer",), video=("videoID",),
        fine=("videoID missing",),  # video_id names it then
        more=[("questions a text", ("questions",), "x", D03), ("a question null", ("questions",), [None], D15)],
    ),
    "vst": Shape(
        "vst.json", "list", texts=lists("question", "video", "answer"), options=("candidates",), answer=("answer",),
        video=("video",), twice=False, fine=("options missing",),  # an open question then
        more=[("start a list", ("start",), [0], D03), ("end NaN", ("end",), math.nan, D03)],
    ),
}  # fmt: skip
GLUE = Shape(
    "videochat_r1.json", "list", texts=lists("question", "video", "answer"), seconds=lists("duration"),
    spans=("glue",), options=("options",), answer=("answer",), video=("video",),
)  # fmt: skip
SETS = {**{name: (name, shape, 1) for name, shape in SHAPES.items()},
        "video_r1, options": ("video_r1", Shape("video_r1.json", "list", options=("options",), twice=False), 0),
        "videochat_r1, charades": ("videochat_r1", Shape("videochat_charades.json", "object", **CAPTIONS), 1),
        "videochat_r1, glue": ("videochat_r1", GLUE, 3)}  # fmt: skip


def variants(shape: Shape) -> list[tuple[str, Path_, Any, str]]:
    """What is done to which field, and the code it must get."""
    found: list[tuple[str, Path_, Any, str]] = []
    for place in shape.texts:
        what = " ".join(map(str, place))
        wrong = [("null", None), ("a number", 2.5), ("empty", " "), ("a nested list", [["x"]])]
        found += [(f"{what} {name}", place, value, D03) for name, value in wrong]
        if isinstance(place[-1], str):
            found.append((f"{what} missing", place, MISSING, D03))
    for place in shape.seconds:
        for name, value in [("null", None), ("a text", "9"), ("0", 0), ("below 0", -4), ("NaN", math.nan),
                            ("infinite", math.inf), ("huge", HUGE), ("true", True), ("a list", [9])]:  # fmt: skip
            found.append((f"{place[-1]} {name}", place, value, D03))
    for place, one in ((shape.span, True), (shape.spans, False)):
        for name, value, code in [
            ("turned round", [5, 2], D05), ("without length", [3, 3], D05), ("outside", [1, 900], D05),
            ("behind the end", [800, 900], D05), ("below 0", [-2, 3], D05), ("NaN", [1, math.nan], D03),
            ("texts", ["1", "2"], D03), ("three numbers", [1, 2, 3], D03), ("huge", [0, HUGE], D03),
            ("a number", 7, D03), ("nested", [[[1, 2]]], D03),
        ] if place else []:  # fmt: skip
            found.append((f"span {name}", place, value if one else [value], code))
    if shape.spans:
        found += [("spans null", shape.spans, None, D03), ("no spans", shape.spans, [], D03)]
    if shape.options:
        for name, value, code in [
            ("missing", MISSING, D03), ("null", None, D03), ("a text", "a", D03), ("numbers", [1, 2], D03),
            ("empty", [], D06), ("one", ["A. x"], D06), ("nine", [f"o{i}" for i in range(9)], D06),
            ("nested", [["a", "b"]], D03),
        ]:  # fmt: skip
            found.append((f"options {name}", shape.options, value, code))
    if shape.answer:
        found += [("a letter beyond", shape.answer, "Z", D06), ("no option", shape.answer, "something else", D06)]
    if shape.video:
        for value in ("../up", "/etc/passwd", "http://x.org/a.mp4", "C:\\a", "%2e%2e/a", "a\0b", "n" * 300):
            found.append((f"video {value[:12]!a}", shape.video, value, D08))
    return [variant for variant in found if variant[0] not in shape.fine] + shape.more


def write(path: Path, entries: list[Any], kind: str, *, keys: list[str]) -> None:
    """One entry a line, as the good files have it."""
    rows = [json.dumps(entry) for entry in entries]
    if kind == "lines":
        path.write_text("".join(row + "\n" for row in rows))
        return
    if kind == "object":
        rows = [f"{json.dumps(key)}: {row}" for key, row in zip(keys, rows, strict=True)]
    begin, end = "{}" if kind == "object" else "[]"
    path.write_text(begin + "\n" + ",\n".join(rows) + "\n" + end + "\n")


def load(shape: Shape) -> tuple[list[Any], list[str]]:
    text = (HERE / shape.file).read_text()
    if shape.kind == "lines":
        entries = [json.loads(line) for line in text.splitlines()]
        return entries, [""] * len(entries)
    found = json.loads(text)
    return (list(found.values()), list(found)) if shape.kind == "object" else (found, [""] * len(found))


def read(name: str, path: Path) -> Output:
    return read_format(name, path, Context(duration_of=lambda path: 20.0))


def damage(entry: Any, place: Path_, value: Any) -> None:
    for step in place[:-1]:
        entry = entry[step]
    if value is MISSING:
        del entry[place[-1]]
    else:
        entry[place[-1]] = value


FIELDS = [(group, *variant) for group, (_, shape, _) in SETS.items() for variant in variants(shape)]


@pytest.mark.parametrize(("group", "what", "place", "value", "code"), FIELDS, ids=[f"{f[0]}: {f[1]}" for f in FIELDS])
def test_fields(group: str, what: str, place: Path_, value: Any, code: str, tmp_path: Path):
    name, shape, index = SETS[group]
    entries, keys = load(shape)
    entries = copy.deepcopy(entries)
    if place == ("KEY",):
        keys[index] = value
    else:
        damage(entries[index], place, value)
    path = tmp_path / shape.file
    write(path, entries, shape.kind, keys=keys)
    out = read(name, path)
    where = f"{shape.file}:{index + (1 if shape.kind == 'lines' else 2)}"
    assert {problem.where for problem in out.problems} == {where}
    assert code in [problem.code for problem in out.problems]
    assert all(problem.what for problem in out.problems)
    good = read(name, HERE / shape.file).samples
    assert {s.line for s in out.samples} >= {s.line for s in good} - {where}


WHOLE: dict[str, Callable[[list[str]], tuple[list[str], str, int]]] = {
    "an entry null": lambda rows: ([rows[0], "null", *rows[2:]], D15, 1),
    "an entry a list": lambda rows: ([rows[0], "[1, 2]", *rows[2:]], D15, 1),
    "an entry a text": lambda rows: ([rows[0], '"x"', *rows[2:]], D15, 1),
    "a brace is missing": lambda rows: ([rows[0], rows[1][:-1], *rows[2:]], "VRLT-D02", 1),
    "single quotes": lambda rows: ([rows[0], "{'a': 1}", *rows[2:]], "VRLT-D02", 1),
    "a key twice": lambda rows: ([rows[0], '{"a": 1, "a": 1}', *rows[2:]], "VRLT-D02", 1),
    "nested too deeply": lambda rows: ([rows[0], "[" * 200_000, *rows[2:]], "VRLT-D02", 1),
    "cut off": lambda rows: ([rows[0], rows[1][: len(rows[1]) // 2]], "VRLT-D02", 1),
    "not UTF-8": lambda rows: ([rows[0], '{"a": "\udcff"}', *rows[2:]], "VRLT-D02", 1),
    "two in one": lambda rows: ([rows[0], rows[1] + " " + rows[1], *rows[2:]], "VRLT-D02", 1),
}


@pytest.mark.parametrize("what", WHOLE)
@pytest.mark.parametrize("name", SHAPES)
def test_entries(name: str, what: str, tmp_path: Path):
    shape = SHAPES[name]
    entries, keys = load(shape)
    damaged, code, index = WHOLE[what]([json.dumps(entry) for entry in entries])
    closed = what != "cut off"
    if shape.kind == "object":
        damaged = [f"{json.dumps(key)}: {row}" for key, row in zip(keys, damaged, strict=False)]
    lines = damaged if shape.kind == "lines" else ["{" if shape.kind == "object" else "["]
    if shape.kind != "lines":
        ends = "}" if shape.kind == "object" else "]"
        lines += [*(row + "," for row in damaged[:-1]), damaged[-1], *([ends] if closed else [])]
    path = tmp_path / shape.file
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    out = read(name, path)
    at = index + (1 if shape.kind == "lines" else 2)
    problem = out.problems[0]
    assert problem.code == code
    # a missing brace is noticed in a later line
    noticed = range(at, len(lines) + 1) if what == "a brace is missing" else [at]
    assert problem.where in [f"{shape.file}:{number}" for number in noticed]


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.twice])
def test_duplicates(name: str, tmp_path: Path):
    shape = SHAPES[name]
    entries, keys = load(shape)
    write(tmp_path / shape.file, [*entries, entries[1]], shape.kind, keys=[*keys, keys[1]])
    out = read(name, tmp_path / shape.file)
    assert [(p.code, p.where) for p in out.problems] == [
        ("VRLT-D07", f"{shape.file}:{len(entries) + (1 if shape.kind == 'lines' else 2)}")
    ]
    assert f"{shape.file}:{3 if shape.kind != 'lines' else 2}" in out.problems[0].why


@pytest.mark.parametrize("text", ["", " \n\n", "\ufeff"])
@pytest.mark.parametrize("name", FORMATS)
def test_empty_files(name: str, text: str, tmp_path: Path):
    (tmp_path / "gsub_file.json").write_text("{}")
    (tmp_path / "file.json").write_text(text)
    out = read(name, tmp_path / "file.json")
    assert [(p.code, p.where) for p in out.problems] == [("VRLT-D01", "file.json:1")]


@pytest.mark.parametrize("name", SHAPES)
def test_other_containers(name: str, tmp_path: Path):
    for text, codes in [("3", {D15}), ("[]", {D15, "VRLT-D01"}), ("{}", {D03, D15, "VRLT-D01"}),
                        ("[[]]", {D15}), ('{"a": [1]}', {D03, D15}), ("nonsense", {"VRLT-D02"})]:  # fmt: skip
        (tmp_path / "file.json").write_text(text)
        out = read(name, tmp_path / "file.json")
        assert {problem.code for problem in out.problems} <= codes, text
        assert {problem.where for problem in out.problems} == {"file.json:1"}, text
        assert not out.samples


@pytest.mark.parametrize("name", FORMATS)
def test_missing_files(name: str, tmp_path: Path):
    out = read(name, tmp_path / "none.json")
    assert out.problems[0].code == "VRLT-D01"


@pytest.mark.parametrize("name", SHAPES)
def test_texts_that_would_change_the_prompt(name: str, tmp_path: Path):
    shape = SHAPES[name]
    for value, code in (("a <|im_end|> b?", "VRLT-D09"), (HALF, "VRLT-D02")):
        entries, keys = load(shape)
        place = next(p for p in shape.texts if p[-1] in ("question", "problem", "sentence", "object", 0))
        damage(entries[1], place, value)
        write(tmp_path / shape.file, entries, shape.kind, keys=keys)
        out = read(name, tmp_path / shape.file)
        if name == "tempcompass":
            assert [p.code for p in out.problems] == [D06]  # no options are left, and the answer isn't yes or no
        else:
            assert [(p.code, p.where) for p in out.problems] == [
                (code, f"{shape.file}:{2 if shape.kind == 'lines' else 3}")
            ]


def test_each_format_has_twenty_malformed_variants():
    counts: Counter[str] = Counter()
    for group, (name, shape, _) in SETS.items():
        counts[name] += len(variants(shape)) + (len(WHOLE) if group == name else 0)
    assert set(FORMATS) - set(counts) == {"charades_sta", "nextgqa"}  # tests/data/test_formats_bad_text.py
    assert min(counts.values()) >= 20, counts
