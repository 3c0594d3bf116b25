"""report.html: one self-contained file about a run. No request leaves it; the content security policy forbids any."""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from vrlt_fast.files import write_atomic
from vrlt_fast.report.charts import recall_charts, stage_charts
from vrlt_fast.report.choose import KINDS
from vrlt_fast.report.markup import esc
from vrlt_fast.report.numbers import number
from vrlt_fast.report.run_folder import RunFolder, load_run
from vrlt_fast.report.samples import sample_cards
from vrlt_fast.report.sections import STAGES, completions, metrics_table, settings, summary, tiles


def write_report(run_dir: Path) -> Path:
    """Writes ``run_dir/report.html`` from what the run folder holds and returns its path.

    Works for unfinished runs and without evaluations, completions or videos. Raises SetupError VRLT-R04 when
    metrics.jsonl is missing, R02 and R03 when the file can't be written; an older report then stays.
    """
    path = run_dir / "report.html"
    write_atomic(path, [page(load_run(run_dir)).encode("utf-8")])
    return path


def page(run: RunFolder) -> str:
    """The whole HTML document."""
    style, script = (
        resources.files("vrlt_fast.report").joinpath(name).read_text("utf-8") for name in ("style.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = [(anchor, title, note, content) for anchor, title, note, content in _sections(run) if content]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _, _ in sections)
    body = "".join(
        f'<section id="{anchor}"><h2>{title}</h2>{f"<p class=note>{note}</p>" if note else ""}{content}</section>'
        for anchor, title, note, content in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{esc(run.name)} | vrlt_fast run report</title><style>{style}</style></head><body><main>"
        f'<header><p class="eyebrow">vrlt_fast run report</p><h1>{esc(run.name)}</h1>'
        f'<p class="lead">{summary(run)}</p>{tiles(run)}<nav>{links}</nav></header>{body}'
        f"<footer>Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by vrlt report.</footer></main>"
        f'<div id="tip" hidden></div><script>{script}</script></body></html>\n'
    )


def _sections(run: RunFolder) -> list[tuple[str, str, str, str]]:
    """Anchor, title, note and content of each section, in reading order."""
    parts = [
        (
            "metrics",
            "Held-out metrics",
            f"Greedy answers, and {_sampling(run)}. The change compares the last two evaluations.",
            metrics_table(run) + _grid(recall_charts(run), " pair"),
        )
    ]
    if cards := sample_cards(run):
        parts.append(("samples", "Held-out questions", _SAMPLES_NOTE, _filter() + cards))
    else:
        parts.append(("samples", "Held-out questions", "", '<p class="empty">This run has no eval/*.jsonl files.</p>'))
    for stage, records in run.train.items():
        note = (
            "Faint: every step. Strong: a running average. The legend gives its last value and the range of the steps."
        )
        parts.append(
            (f"train-{esc(stage, 20)}", esc(STAGES.get(stage, stage)), note, _grid(stage_charts(stage, records)))
        )
    note = "The last groups of training responses, best first. The advantage compares a response with its group."
    parts.append(("responses", "Training responses", note, completions(run.completions)))
    parts.append(("settings", "Configuration and versions", "", settings(run)))
    return parts


_SAMPLES_NOTE = (
    "Chosen by rule and seed, not by hand: of each task, questions from the largest gains, around the median, and from "
    "the lowest scores. Solid bars are greedy answers, thin ones sampled; the shaded band is the truth. At an option, "
    "a filled tag is the greedy answer and the fraction counts sampled ones."
)


def _grid(figures: str, layout: str = "") -> str:
    return f'<div class="charts{layout}">{figures}</div>' if figures else ""


def _filter() -> str:
    buttons = "".join(f'<button data-show="{kind}">{name}</button>' for kind, name in KINDS.items())
    return f'<div class="filter" hidden><button data-show="" class="on">all</button>{buttons}</div>'


def _sampling(run: RunFolder) -> str:
    section = run.config.get("eval")
    temperature = number(section.get("temperature")) if isinstance(section, dict) else None
    return "sampled ones" if temperature is None else f"ones sampled at temperature {temperature:g}"
