"""Formats of temporal grounding: when does a described thing happen?"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vrlt_fast.data.fields import as_number
from vrlt_fast.data.formats.base import Output, Row, asked_when, unlabelled
from vrlt_fast.data.formats.entries import decoded
from vrlt_fast.data.formats.plain_yaml import Node, read_list
from vrlt_fast.data.paths import shorten

_CHARADES = re.compile(r"(\S+)\s+(\S+)\s+(\S+?)##(.*)", re.ASCII)
_STRATEGY = re.compile(r"(?:(first|end|random):)?([0-9]{1,9})(%?)", re.ASCII)


def charades_sta(path: Path, out: Output) -> None:
    """Charades-STA (jiyanggao/TALL): lines ``VIDEO START END##sentence.``, seconds. It has no durations."""
    counts: Counter[str] = Counter()
    for number, line in enumerate(decoded(path, out.problems).split("\n"), 1):
        if not line.strip():
            continue
        row = Row(out, {"line": line}, f"{path.name}:{number}")
        match = _CHARADES.fullmatch(line.strip())
        if match is None:
            row.report("VRLT-D15", f"the line is {shorten(line)}", "it must be VIDEO START END##sentence")
            continue
        name, start, end, sentence = match.groups()
        try:
            borders: list[Any] = [float(start), float(end)]
        except ValueError:
            borders = [start, end]
        if not sentence.strip():
            row.report("VRLT-D03", "the sentence is empty", "it must be VIDEO START END##sentence")
        counts[name] += 1
        _grounding(row, f"{name}-{counts[name]}", name, asked_when(sentence), [borders])


def activitynet_captions(path: Path, out: Output) -> None:
    """ActivityNet-Captions (Krishna et al. 2017): ``{video: {duration, timestamps, sentences}}``, seconds."""
    for row in out.members(path):
        captions(row)


def captions(row: Row) -> None:
    """A member ``video: {duration, timestamps[[s, e]], sentences[]}``: a sample for each sentence."""
    times, sentences = row.items("timestamps"), row.texts("sentences")
    if row.failed:
        return
    if len(times) != len(sentences):
        row.report("VRLT-D03", f"{len(times)} timestamps, {len(sentences)} sentences", "they belong together")
        return
    for index, (span, sentence) in enumerate(zip(times, sentences, strict=True)):
        part = Row(row.out, row.fields, row.where, row.key)
        if not sentence:
            part.report("VRLT-D03", f"sentences[{index}] is empty")
        key = f"{row.key}-{index + 1}"
        _grounding(part, key, row.key, asked_when(sentence), [span], field_name="duration")


def time_r1(path: Path, out: Output) -> None:
    """Time-R1 (xiaomi-research/time-r1): a list with video, duration, timestamp, sentence, qid, difficulty (0..100,
    the IoU of one inference times 100: high is easy), video_start and video_end.

    The last two say which part of the source the video was cut from; times count from the cut, so they aren't needed.
    """
    for index, row in enumerate(out.rows(path), 1):
        more = {}
        if row.fields.get("difficulty") is not None:
            iou = row.number("difficulty")
            more = {"difficulty": 1.0 - iou / 100.0}
            if not 0 <= iou <= 100:
                row.wrong("difficulty", "a number from 0 to 100")
        name, question = row.text("video"), asked_when(row.text("sentence"))
        key = row.name("qid", otherwise=str(index))
        _grounding(row, key, name, question, [row.fields.get("timestamp")], field_name="duration", more=more)


def rextime(path: Path, out: Output) -> None:
    """ReXTime (ReXTime/ReXTime): JSON lines with qid, vid, duration, query and relevant_windows.

    The file in the repository has no options, so that its rows ask for the time alone; with ``options`` and ``ans`` (a
    letter) they ask for both. ``question`` stands in for ``query`` where it is there.
    """
    for row in out.rows(path):
        key, name, question = row.name("qid"), row.name("vid"), row.text("question", "query")
        if "options" not in row.fields:
            _windows(row, key, name, asked_when(question), "grounding", {})
            continue
        options = unlabelled(row.texts("options"))
        more = {"options": options, "answer": row.letter(row.text("ans"), options)}
        _windows(row, key, name, question, "grounded_qa", more)


def _windows(row: Row, key: str, name: str, question: str, task: str, more: dict[str, Any]) -> None:
    video = row.video(name)
    seconds = row.duration(video, name, field_name="duration")
    spans = row.spans(row.fields.get("relevant_windows"), seconds, '"relevant_windows"')
    fields = {"video": video, "duration": seconds, "task": task, "question": question, "spans": _lists(spans)}
    row.out.add(row, key, {**fields, **more})


def stvg_r1(path: Path, out: Output) -> None:
    """STVG-R1 (XiaowZhang00/stvg-r1): ``{video: {duration, timestamps, sentences, objectid, ...}}``; which numbered
    object a sentence is about, and when. Its fps, img_num, st_frame and st_time aren't needed.
    """
    for row in out.members(path):
        times, sentences, ids = row.items("timestamps"), row.texts("sentences"), row.items("objectid")
        if row.failed:
            continue
        if not len(times) == len(sentences) == len(ids):
            what = f"{len(times)} timestamps, {len(sentences)} sentences, {len(ids)} objectid"
            row.report("VRLT-D03", what, "they belong together")
            continue
        for index, (span, sentence) in enumerate(zip(times, sentences, strict=True)):
            part = Row(out, row.fields, row.where, row.key)
            if not sentence:
                part.report("VRLT-D03", f"sentences[{index}] is empty")
            more = {"task": "instance", "object_id": ids[index]}
            question = f"Which numbered object is this about, and when does it happen: {sentence}"
            _grounding(part, f"{row.key}-{index + 1}", row.key, question, [span], field_name="duration", more=more)


def temporal_r1(path: Path, out: Output) -> None:
    """Temporal-R1 (appletea233/Temporal-R1): a JSON list with dataset, video, problem, solution ([start, end] as shares
    of the video) and video_length (seconds), or a YAML list of such files:
    ``datasets: [{json_path, data_folder, sampling_strategy}]``, the strategy one of first:N, end:N, random:N and N%
    (a number may be a share everywhere; N% alone takes the first ones).
    """
    if path.suffix.lower() not in (".yaml", ".yml"):
        _shares(path, out, "", lambda rows: rows)
        return
    for item in read_list(path, "datasets", out.problems):
        row = Row(out, {key: node.text for key, node in item.items()}, f"{path.name}:{_line(item)}")
        name = row.text("json_path")
        pick = _picker(row, out.context.seed)
        folder = str(row.fields.get("data_folder", ""))
        if not row.failed and pick:
            _shares(path.parent / name, out, folder.rstrip("/"), pick)


def _line(item: dict[str, Node]) -> int:
    return min((node.line for node in item.values()), default=1)


def _picker(row: Row, seed: int) -> Callable[[list[Row]], list[Row]] | None:
    """Which rows of a file a sampling strategy takes."""
    said = row.fields.get("sampling_strategy", "100%")
    match = _STRATEGY.fullmatch(str(said).strip())
    if match is None or (match[3] and int(match[2]) > 100):
        row.report("VRLT-D15", f"sampling_strategy is {shorten(said)}", "it must be first:N, end:N, random:N or N%")
        return None
    how, count, share = match[1] or "first", int(match[2]), bool(match[3])

    def pick(rows: list[Row]) -> list[Row]:
        wanted = -(-len(rows) * count // 100) if share else min(count, len(rows))
        if how == "random":
            return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), wanted))]
        return rows[len(rows) - wanted :] if how == "end" else rows[:wanted]

    return pick


def _shares(path: Path, out: Output, folder: str, pick: Callable[[list[Row]], list[Row]]) -> None:
    rows = list(out.rows(path))
    numbers = {row.where: index for index, row in enumerate(rows, 1)}
    for row in pick(rows):
        source, name, question = row.text("dataset"), row.text("video"), asked_when(row.text("problem"))
        name = f"{folder}/{name}" if folder and name else name
        solution = row.fields.get("solution")
        borders = [as_number(x) for x in solution] if isinstance(solution, list) else []
        if len(borders) != 2 or borders[0] is None or borders[1] is None:
            row.wrong("solution", "[start, end], two shares of the video")
            continue
        video = row.video(name)
        seconds = row.duration(video, name, field_name="video_length")
        spans = row.spans([[borders[0] * seconds, borders[1] * seconds]], seconds, '"solution"')
        fields = {"video": video, "duration": seconds, "task": "grounding", "question": question, "source": source}
        out.add(row, f"{path.stem}-{numbers[row.where]}", {**fields, "spans": _lists(spans)})


def _grounding(
    row: Row,
    key: str,
    name: str,
    question: str,
    spans: list[Any],
    *,
    field_name: str = "",
    more: dict[str, Any] | None = None,
) -> None:
    """Add a sample of task grounding, or of that in ``more``; ``field_name`` has the duration, if the format does."""
    video = row.video(name)
    seconds = row.duration(video, name, field_name=field_name)
    found = row.spans(spans, seconds, "the timestamp")
    fields = {"video": video, "duration": seconds, "task": "grounding", "question": question, "spans": _lists(found)}
    row.out.add(row, key, {**fields, **(more or {})})


def _lists(spans: list[tuple[float, float]]) -> list[list[float]]:
    return [list(span) for span in spans]
