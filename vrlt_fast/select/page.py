"""The page on a selection: one self-contained HTML file, in the run report's look. No request leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from vrlt_fast.files import write_atomic
from vrlt_fast.report.markup import esc
from vrlt_fast.report.numbers import DASH, TASK_NAMES, number
from vrlt_fast.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, ticks
from vrlt_fast.report.thumbs import NoThumbnails, thumbnails
from vrlt_fast.select.policies import BUCKETS, CLASSES, Choice, Columns, Flags, Numbers, Values, buckets
from vrlt_fast.select.scores import Table

_BINS = 24
_FRAMES = 6
_POLICY = {
    "variance": "highest deviation first",
    "sigma": "drawn in proportion to deviation^alpha",
    "buckets": "drawn from difficulty buckets in a fixed ratio, in each in proportion to deviation^alpha",
    "gauss": "drawn so that mean rewards follow a normal density",
    "random": "drawn at random",
}


@dataclass(frozen=True)
class Example:
    """A sample that the page shows; ``fields`` are those of its line in the data file."""

    task: str
    kind: str
    kept: bool
    fields: dict[str, Any]
    mean: float
    std: float
    rewards: list[float]


def write_page(
    path: Path,
    table: Table,
    found: Columns,
    kept: Flags,
    choice: Choice,
    *,
    examples: Sequence[Example],
    root: Path,
    parts: Sequence[str] = (),
) -> None:
    """Write the page of a selection to ``path``; pictures come from videos under ``root``, where there are any."""
    style = resources.files("vrlt_fast.report").joinpath("style.css").read_text("utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    sections = (
        ("tasks", "Tasks", _TASKS_NOTE, _tasks(table, found, kept)),
        ("histograms", "Means and deviations", _HISTOGRAMS_NOTE, _histograms(table, found, kept)),
        ("examples", "Examples", "Taken at random, of each task, class and fate.", _examples(examples, root)),
        ("settings", "How it was picked", "", _settings(table, choice, parts)),
    )
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _, _ in sections)
    body = "".join(
        f'<section id="{anchor}"><h2>{title}</h2>{f"<p class=note>{note}</p>" if note else ""}{content}</section>'
        for anchor, title, note, content in sections
    )
    failed = sum(table.failed.values())
    lost = f" {failed} videos or prompts couldn't be used." if failed else ""
    lead = (
        f"<b>{int(kept.sum())} of {len(kept)}</b> scored samples were kept: {_POLICY[choice.policy]}. "
        f"Their mean reward is <b>{_mean(found.mean[kept])}</b> of the highest, before {_mean(found.mean)}.{lost}"
    )
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>selection | vrlt_fast</title><style>{style}</style></head><body><main>"
        f'<header><p class="eyebrow">vrlt_fast data selection</p><h1>{esc(Path(table.header.data["name"]).name)}</h1>'
        f'<p class="lead">{lead}</p><nav>{links}</nav></header>{body}'
        "<footer>Written by vrlt select pick.</footer></main></body></html>\n"
    )
    write_atomic(path, [text.encode("utf-8")])


_TASKS_NOTE = (
    "Classes are by all rewards of a sample: informative where they differ, else wrong or right. The deviation is "
    "shrunk, in units of what is usual for the task (docs/select.md); median of all and of the kept."
)
_HISTOGRAMS_NOTE = (
    "Strong: kept; faint: dropped. The mean reward is a share of the highest that the task can earn; deviations are in "
    "units of the task's usual one."
)


def _name(task: str) -> str:
    return TASK_NAMES.get(task, task)


def _mean(values: Values) -> str:
    return f"{float(np.nanmean(values)):.2f}" if len(values) else DASH


def _share(part: Any, whole: Any) -> str:
    return f"{100 * float(part) / float(whole):.0f} %" if whole else DASH


def _tasks(table: Table, found: Columns, kept: Flags) -> str:
    heads = ["", "scored", "kept", *CLASSES, "kept: informative", "mean", "kept: mean", "deviation", "kept: deviation"]
    heads += [f"kept: {level}" for level in BUCKETS]
    rows = []
    groups = [("all", np.ones(len(kept), bool)), *((n, table.tasks == i) for i, n in enumerate(table.names))]
    levels = buckets(found)
    for name, mine in groups:
        ours = mine & kept
        shares = [_share((found.classes[mine] == kind).sum(), mine.sum()) for kind in range(3)]
        cells = [
            str(int(mine.sum())),
            f"{int(ours.sum())} ({_share(ours.sum(), mine.sum())})",
            *shares,
            _share((found.classes[ours] == 1).sum(), ours.sum()),
            _mean(found.mean[mine]),
            _mean(found.mean[ours]),
            _median(found.std[mine]),
            _median(found.std[ours]),
            *(_share((levels[ours] == kind).sum(), ours.sum()) for kind in range(3)),
        ]
        cells_html = "".join(f"<td>{esc(cell)}</td>" for cell in cells)
        rows.append(f"<tr><th>{esc(_name(name))}</th>{cells_html}</tr>")
    head = "".join(f"<th>{esc(title)}</th>" for title in heads)
    return (
        f'<div class="scroll"><table class="metrics"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _median(values: Values) -> str:
    known = values[np.isfinite(values)]
    return f"{float(np.median(known)):.2f}" if len(known) else DASH


def _histograms(table: Table, found: Columns, kept: Flags) -> str:
    figures = []
    widest = float(np.nanmax(found.std)) if np.isfinite(found.std).any() else 1.0
    for task, name in enumerate(table.names):
        mine = table.tasks == task
        for title, values, end in (("mean reward", found.mean, 1.0), ("deviation", found.std, max(widest, 1.0))):
            bins = np.clip((np.nan_to_num(values) / end * _BINS).astype(np.int64), 0, _BINS - 1)
            both = [np.bincount(bins[mine & flag], minlength=_BINS) for flag in (kept, ~kept)]
            figures.append(histogram(f"{_name(name)}: {title}", both[0], both[1], end))
    return f'<div class="charts">{"".join(figures)}</div>'


def histogram(title: str, kept: Numbers, dropped: Numbers, end: float) -> str:
    """A figure with one stacked bar a bin of [0, end]: kept below, dropped above."""
    top = max(int((kept + dropped).max()), 1)
    wide, high = (WIDTH - LEFT - RIGHT) / len(kept), HEIGHT - BOTTOM - TOP
    base = HEIGHT - BOTTOM
    parts = []
    for value in ticks(0.0, float(top)):
        y = base - high * value / top
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{value:g}</text>')
    for i, (low, more) in enumerate(zip(kept.tolist(), dropped.tolist(), strict=True)):
        x, floor = LEFT + wide * i + 0.5, base
        for count, style in ((low, "--c:var(--after)"), (more, "--c:var(--start);opacity:.45")):
            height = high * count / top
            if count:
                title_text = f"<title>{count}</title>"
                parts.append(
                    f'<rect class="area" style="{style}" x="{x:.1f}" y="{floor - height:.1f}" width="{wide - 1:.1f}" '
                    f'height="{height:.1f}">{title_text}</rect>'
                )
            floor -= height
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for value in ticks(0.0, end, 5):
        x = LEFT + (WIDTH - LEFT - RIGHT) * value / end
        parts.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="middle">{value:g}</text>')
    legend = "".join(
        f'<span class="key" style="--c:var(--{colour})"><i></i>{word} <b>{int(counts.sum())}</b></span>'
        for word, colour, counts in (("kept", "after", kept), ("dropped", "start", dropped))
    )
    return (
        f'<figure class="chart"><figcaption><b>{esc(title)}</b></figcaption><div class="plot">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(title)}">{"".join(parts)}</svg></div>'
        f'<div class="legend">{legend}</div></figure>'
    )


def _examples(examples: Sequence[Example], root: Path) -> str:
    return "".join(_card(example, root) for example in examples) or '<p class="empty">There are none.</p>'


def _card(example: Example, root: Path) -> str:
    fields = example.fields
    duration = number(fields.get("duration")) or 0.0
    fate = '<span class="chip improved">kept</span>' if example.kept else '<span class="chip">dropped</span>'
    options = fields.get("options") or []
    listed = "".join(
        f"<li><b>{letter}</b> {esc(text, 200)}</li>" for letter, text in zip("ABCDEFGH", options, strict=False)
    )
    truth = ", ".join(
        [esc(fields[key], 200) for key in ("answer", "spans") if fields.get(key)],
    )
    rewards = " ".join(f"{reward:.2f}" for reward in example.rewards)
    times = [duration * (i + 0.5) / _FRAMES for i in range(_FRAMES)]
    try:
        if duration <= 0:
            raise NoThumbnails("its line names no duration")
        pictures = "".join(
            f'<img src="{uri}" alt="frame at {at:.1f} s">'
            for uri, at in zip(thumbnails(root, str(fields.get("video")), times), times, strict=False)
        )
        strip = f'<div class="strip">{pictures}</div>'
    except NoThumbnails as reason:
        strip = f'<div class="strip none">No pictures of this video: {esc(reason)}.</div>'
    return (
        f'<article class="card"><div class="ask"><p class="chips"><span class="chip">{esc(_name(example.task))}</span>'
        f'<span class="chip">{esc(example.kind)}</span>{fate}</p><h3>{esc(fields.get("question", ""), 600)}</h3>'
        f'<ol class="options">{listed}</ol><p class="id">{esc(fields.get("id"), 80)} · {duration:.1f} s · '
        f'truth: {truth or DASH}</p></div><div class="show plain">{strip}<p class="note">rewards {rewards}; '
        f"mean {example.mean:.2f} of the highest, deviation {example.std:.2f}</p></div></article>"
    )


def _settings(table: Table, choice: Choice, parts: Sequence[str]) -> str:
    header = table.header
    said = {
        "model": f"{header.model['name']} ({header.model['digest'][:12]})",
        "data": f"{header.data['name']} ({header.data['file'][:12]})",
        "recipe": header.recipe["digest"][:12],
        "responses a sample": f"{header.repeats}" + (f", {header.first} first" if header.first else ""),
        "parts of the reward": ", ".join(parts) or "all",
        "weights": ", ".join(f"{k} {v:g}" for k, v in header.weights.items() if v),
        **{k: v for k, v in asdict(choice).items() if v not in (None, False)},
    }
    if table.failed:
        said["failed"] = ", ".join(f"{code} {count}" for code, count in sorted(table.failed.items()))
    rows = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in said.items())
    return f'<dl class="versions">{rows}</dl>'
