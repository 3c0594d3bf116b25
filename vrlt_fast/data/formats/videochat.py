"""VideoChat-R1's annotations and those of NExT-GQA itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vrlt_fast.data.fields import as_number
from vrlt_fast.data.formats.base import Output, Row, unlabelled
from vrlt_fast.data.formats.entries import Entry, decoded, scan
from vrlt_fast.data.formats.media import numbered_csv
from vrlt_fast.data.formats.spans import captions
from vrlt_fast.data.paths import shorten
from vrlt_fast.errors import Problem

_BOXES = 8
_CSV = ("video_id", "question", "answer", "qid", "a0", "a1", "a2", "a3", "a4")


def videochat_r1(path: Path, out: Output) -> None:
    """VideoChat-R1 (OpenGVLab/VideoChat-R1): every shape of its annotations.

    An object of videos is Charades or ActivityNet: ``{video: {duration, timestamps, sentences}}``. In a list, a row
    with ``glue`` is NExT-GQA (id, video, question, options, duration, glue, answer), one with ``gt`` GOT tracking
    (path, object, eight boxes as shares), one with ``instruction`` quality assessment (video, instruction, answer).
    The times of the eight boxes aren't in the file: they are taken as equally spaced from the start. GOT's folders of
    pictures must be made into videos first.
    """
    kind, entries = scan(path, [])
    if kind == "object" and entries and isinstance(entries[0].value, dict) and "glue" not in entries[0].value:
        for row in out.members(path):
            captions(row)
        return
    for index, row in enumerate(out.rows(path), 1):
        if "glue" in row.fields:
            _glue(row, index)
        elif "gt" in row.fields:
            _tracking(row, index)
        elif "instruction" in row.fields:
            name = row.text("video")
            video = row.video(name)
            fields = {"video": video, "duration": row.duration(video, name), "task": "open"}
            more = {"question": row.text("instruction"), "answer": row.text("answer")}
            out.add(row, str(index), {**fields, **more})
        else:
            row.report("VRLT-D15", f"the entry has {shorten(list(row.fields))}", "it needs glue, gt or instruction")


def _glue(row: Row, index: int) -> None:
    key, name, question = row.name("id", otherwise=str(index)), row.text("video"), row.text("question")
    options = unlabelled(row.texts("options"))
    answer = row.letter(row.text("answer"), options)
    video = row.video(name)
    seconds = row.duration(video, name, field_name="duration")
    spans = row.spans(row.fields["glue"], seconds, '"glue"')
    fields = {"video": video, "duration": seconds, "task": "grounded_qa", "question": question}
    more = {"options": options, "answer": answer, "spans": [list(span) for span in spans]}
    row.out.add(row, key, {**fields, **more})


def _tracking(row: Row, index: int) -> None:
    name, thing, boxes = row.text("path"), row.text("object"), row.items("gt")
    if not row.failed and len(boxes) != _BOXES:
        row.report("VRLT-D03", f'"gt" has {len(boxes)} boxes', f"tracking has {_BOXES}")
    video = row.video(name)
    seconds = row.duration(video, name)
    found: list[dict[str, Any]] = []
    for place, box in enumerate(boxes):
        numbers = [as_number(x) for x in box] if isinstance(box, list) else []
        x0, y0, x1, y1 = numbers if len(numbers) == 4 else [None] * 4
        if x0 is None or y0 is None or x1 is None or y1 is None:
            row.report("VRLT-D03", f'"gt" has {shorten(box)}', "a box is [x0, y0, x1, y1], shares of the frame")
            break
        time = seconds * place / _BOXES
        found.append({"time": time, "x0": x0, "y0": y0, "x1": x1, "y1": y1})
    question = f"Where is this object: {thing}"
    row.out.add(
        row, str(index), {"video": video, "duration": seconds, "task": "boxes", "question": question, "boxes": found}
    )


def nextgqa(path: Path, out: Output) -> None:
    """NExT-GQA as released (doc-doc/NExT-GQA): SPLIT.csv with video_id, question, answer, qid and a0 .. a4, and beside
    it gsub_SPLIT.json, ``{video: {duration, location: {qid: [[s, e]]}}}``, durations rounded to whole seconds.

    The split is the context's, or the name of the CSV file. The answer is an option, or its number from 0. Questions
    that have no location are skipped. Videos may lie in folders, as the official map of NExT-QA has them.
    """
    companion = path.with_name(f"gsub_{out.context.split or path.stem}.json")
    problems: list[Problem] = []
    text = decoded(path, problems)
    kind, entries = scan(companion, problems)
    if entries and kind != "object":
        problems.append(Problem("VRLT-D15", "the file isn't a JSON object", f"{companion.name}:1", "it needs videos"))
    rows = list(numbered_csv(text))
    head = rows[0][1] if rows else []
    missing = [name for name in _CSV if name not in head]
    if rows and missing:
        why = f"the first line has {shorten(head)}"
        problems.append(Problem("VRLT-D15", f"no column {missing[0]}", f"{path.name}:{rows[0][0]}", why))
    out.problems += problems
    if problems:
        return
    located = _locations(companion, entries, out)
    if not rows[1:]:
        out.problems.append(Problem("VRLT-D01", "the annotation file has no entries", f"{path.name}:1"))
    for number, cells in rows[1:]:
        row = Row(out, dict(zip(head, cells, strict=False)), f"{path.name}:{number}")
        if len(cells) != len(head):
            row.report("VRLT-D03", f"the line has {len(cells)} cells", f"the first one has {len(head)}")
            continue
        _question(row, located)


def _locations(path: Path, entries: list[Entry], out: Output) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for entry in entries:
        row = Row(out, entry.value, f"{path.name}:{entry.line}", entry.key)
        if not isinstance(entry.value, dict) or not isinstance(entry.value.get("location"), dict):
            row.report("VRLT-D03", f"{shorten(entry.key)} has no location", "it must be an object of spans by qid")
        elif entry.key in found:
            row.report("VRLT-D07", f"{shorten(entry.key)} is there already", f"first in {found[entry.key].where}")
        else:
            found[entry.key] = row
    return found


def _question(row: Row, located: dict[str, Row]) -> None:
    name, qid, question, answer = (row.text(key) for key in ("video_id", "qid", "question", "answer"))
    options = [row.text(f"a{index}") for index in range(5)]
    if row.failed:
        return
    place = located.get(name)
    if place is None or qid not in place.fields["location"]:
        row.skip("no location")
        return
    if answer not in options and answer.isascii() and answer.isdigit() and int(answer[:3]) < len(options):
        answer = options[int(answer[:3])]
    letter = row.option(answer, options)
    spot = Row(row.out, place.fields, place.where, name)
    video = row.video(name)
    seconds = spot.duration(video, name, field_name="duration")
    spans = spot.spans(place.fields["location"][qid], seconds, f"location {shorten(qid)}")
    row.failed = row.failed or spot.failed
    fields = {"video": video, "duration": seconds, "task": "grounded_qa", "question": question}
    more = {"options": options, "answer": letter, "spans": [list(span) for span in spans]}
    row.out.add(row, f"{name}-{qid}", {**fields, **more})
