"""A card per chosen held-out question: frames over a timeline of true and predicted intervals, and the answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vrlt_fast.report.charts import LABEL_COLOURS
from vrlt_fast.report.choose import Shown, choose, verdict
from vrlt_fast.report.markup import esc
from vrlt_fast.report.metrics import Record
from vrlt_fast.report.numbers import DASH, LABELS, TASK_NAMES, number, short
from vrlt_fast.report.run_folder import RunFolder
from vrlt_fast.report.svg import ticks
from vrlt_fast.report.thumbs import NoThumbnails, thumbnails

_FRAMES = 8
_MOST_SPANS = 12
_MOST_SAMPLED = 8

Side = tuple[str, Record]


def sample_cards(run: RunFolder) -> str:
    """The cards of the questions that :func:`choose` takes, or "" when the run has no answers."""
    labels = [label for label, lines in run.answers.items() if lines][-2:]
    cards = []
    for shown in choose(run):
        lines = (shown.after,) if shown.before is None else (shown.before, shown.after)
        cards.append(_card(shown, list(zip(labels[-len(lines) :], lines, strict=True)), run.video_root))
    return "".join(cards)


def _card(shown: Shown, sides: Sequence[Side], root: Path) -> str:
    line = shown.after
    word = verdict(shown)
    duration = number(line.get("duration")) or 0.0
    task = str(line.get("task"))
    return (
        f'<article class="card" data-kind="{esc(shown.kind)}"><div class="ask">'
        f'<p class="chips"><span class="chip">{esc(TASK_NAMES.get(task, task))}</span>'
        f'<span class="chip {esc(word.split()[0])}">{esc(word)}</span></p>'
        f"<h3>{esc(line.get('question', ''), 600)}</h3>{_options(line, sides)}"
        f'<p class="id">{esc(line.get("id"), 80)} · {esc(line.get("video"), 120)} · {duration:.1f} s</p></div>'
        f'<div class="show{"" if line.get("spans") else " plain"}">{_strip(root, str(line.get("video")), duration)}'
        f"{_timeline(line, sides, duration)}{_axis(duration)}{_texts(line, sides)}</div></article>"
    )


def _strip(root: Path, video: str, duration: float) -> str:
    times = [duration * (index + 0.5) / _FRAMES for index in range(_FRAMES)]
    try:
        if duration <= 0:
            raise NoThumbnails("the evaluation names no duration")
        pictures = thumbnails(root, video, times)
    except NoThumbnails as reason:
        return f'<span class="row"></span><div class="strip none">No pictures of this video: {esc(reason)}.</div>'
    images = "".join(
        f'<img src="{uri}" alt="frame at {at:.1f} s" title="{at:.1f} s">'
        for uri, at in zip(pictures, times, strict=True)
    )
    return f'<span class="row"></span><div class="strip">{images}</div>'


def _spans(value: Any, duration: float) -> list[tuple[float, float]]:
    """Spans as shares of the duration, clamped to it; whatever isn't a pair of ascending numbers is left out."""
    found = []
    for span in value[:_MOST_SPANS] if isinstance(value, list) and duration > 0 else ():
        if isinstance(span, list) and len(span) == 2:
            start, end = number(span[0]), number(span[1])
            if start is not None and end is not None and start < end:
                left, right = max(0.0, start / duration), min(1.0, end / duration)
                if left < right:
                    found.append((left, right))
    return found


def _bars(spans: Sequence[tuple[float, float]], kind: str, colour: str, title: str) -> str:
    return "".join(
        f'<i class="{kind}" title="{esc(title)}" style="left:{100 * left:.2f}%;width:{100 * (right - left):.2f}%;'
        f'--c:var(--{colour})"></i>'
        for left, right in spans
    )


def _seconds(value: Any) -> str:
    spans = value if isinstance(value, list) else []
    texts = [
        f"{short(start)}{DASH}{short(end)} s"
        for span in spans[:_MOST_SPANS]
        if isinstance(span, list) and len(span) == 2
        if (start := number(span[0])) is not None and (end := number(span[1])) is not None
    ]
    return ", ".join(texts)


def _timeline(line: Record, sides: Sequence[Side], duration: float) -> str:
    truth = _spans(line.get("spans"), duration)
    if not truth:
        return ""
    band = _bars(truth, "band", "truth", "")
    rows = [
        f'<span class="row">truth <small>{esc(_seconds(line.get("spans")))}</small></span>'
        f'<div class="track">{band}<div class="lane">{_bars(truth, "bar", "truth", "truth")}</div></div>'
    ]
    for label, answers in sides:
        colour = LABEL_COLOURS.get(label, "after")
        greedy = _answer(answers)
        spans = _spans(greedy.get("spans"), duration)
        note = "" if spans else '<em class="none">greedy answer without an interval</em>'
        bars = _bars(spans, "bar", colour, f"greedy {_seconds(greedy.get('spans'))}")
        lanes = "".join(
            f'<div class="lane thin">{_bars(_spans(answer.get("spans"), duration), "bar", colour, "sampled")}</div>'
            for answer in _sampled(answers)
        )
        tiou = number(greedy.get("tiou"))
        value = f"<small>tIoU {tiou:.2f}</small>" if tiou is not None else ""
        rows.append(
            f'<span class="row">{esc(LABELS.get(label, label))} {value}{_malformed(greedy)}</span>'
            f'<div class="track">{band}<div class="lane">{bars}{note}</div>{lanes}</div>'
        )
    return "".join(rows)


def _axis(duration: float) -> str:
    if duration <= 0:
        return ""
    marks = "".join(
        f'<span style="left:{100 * at / duration:.2f}%">{short(at)}{" s" if at == 0 else ""}</span>'
        for at in ticks(0.0, duration, 8)
    )
    return f'<span class="row"></span><div class="seconds">{marks}</div>'


def _answer(line: Record) -> Record:
    greedy = line.get("greedy")
    return greedy if isinstance(greedy, dict) else {}


def _sampled(line: Record) -> list[Record]:
    return [answer for answer in line.get("sampled") or [] if isinstance(answer, dict)][:_MOST_SAMPLED]


def _letters(record: Record) -> list[str]:
    """Letters of a line or of an answer: "B", or several as "A,C"."""
    return str(record.get("answer") or "").split(",")


def _malformed(answer: Record) -> str:
    return "" if answer.get("well_formed") in (True, None) else ' <small class="bad">malformed</small>'


def _options(line: Record, sides: Sequence[Side]) -> str:
    options = line.get("options") or []
    if not isinstance(options, list) or not options:
        return ""
    items = []
    for letter, option in zip("ABCDEFGH", options, strict=False):
        picks = "".join(_pick(label, answers, letter) for label, answers in sides)
        right = letter in _letters(line)
        mark = ' <span class="tick" title="right answer">✓</span>' if right else ""
        items.append(
            f'<li class="{"right" if right else ""}"><b>{letter}</b> <span>{esc(option, 300)}{mark}</span>'
            f'<span class="picks">{picks}</span></li>'
        )
    none = "".join(
        f'<p class="none">{esc(LABELS.get(label, label))}: no readable option in the greedy answer</p>'
        for label, answers in sides
        if _answer(answers).get("answer") is None
    )
    return f'<ol class="options">{"".join(items)}</ol>{none}'


def _pick(label: str, answers: Record, letter: str) -> str:
    sampled = _sampled(answers)
    votes = sum(letter in _letters(answer) for answer in sampled)
    greedy = letter in _letters(_answer(answers))
    if not greedy and not votes:
        return ""
    style = f'style="--c:var(--{LABEL_COLOURS.get(label, "after")})"'
    count = f" {votes}/{len(sampled)}" if sampled else ""
    return f'<span class="pick{" greedy" if greedy else ""}" {style}>{esc(label.upper(), 12)}{count}</span>'


def _truth(line: Record) -> str:
    """The right answer where neither options nor the timeline show it."""
    said = [] if line.get("options") else [str(line.get("answer") or "")]
    if (object_id := number(line.get("object_id"))) is not None and line.get("task") == "instance":
        said.append(f"object {object_id:.0f}")
    if (progress := number(line.get("progress"))) is not None and line.get("task") == "progress":
        said.append(f"{100 * progress:.0f} %")
    text = ", ".join(part for part in said if part)
    return f"<dt>right</dt><dd>{esc(text, 600)}</dd>" if text else ""


def _texts(line: Record, sides: Sequence[Side]) -> str:
    rows = _truth(line) + "".join(
        f"<dt>{esc(LABELS.get(label, label))}, {kind}</dt><dd>{esc(answer.get('text', ''))}</dd>"
        for label, answers in sides
        for kind, answer in [("greedy", _answer(answers)), *(("sampled", each) for each in _sampled(answers)[:2])]
    )
    return (
        '<span class="row"></span><details class="texts"><summary>Answers as written</summary>'
        f"<dl>{rows}</dl></details>"
    )
