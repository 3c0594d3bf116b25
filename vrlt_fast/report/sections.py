"""The words and tables of the report: summary, headline numbers, metrics, training responses, settings."""

from __future__ import annotations

from collections.abc import Sequence

from vrlt_fast.report.charts import LABEL_COLOURS
from vrlt_fast.report.markup import esc
from vrlt_fast.report.metrics import Record
from vrlt_fast.report.numbers import (
    DASH,
    LABELS,
    METRIC_NAMES,
    TASK_NAMES,
    accuracy,
    change,
    clock,
    is_share,
    metric_of,
    number,
    score,
    tasks_of,
    tone,
)
from vrlt_fast.report.run_folder import RunFolder
from vrlt_fast.report.svg import slope

STAGES = {"sft": "SFT warm-up", "grpo": "GRPO"}
_SINCE = {"start": "the start", "sft": "SFT", "grpo": "GRPO"}
_HEADLINES = (
    ("Mean tIoU, sampled", "tiou", "sampled"),
    ("Mean tIoU, greedy", "tiou", "greedy"),
    ("Accuracy, greedy", "accuracy", "greedy"),
    ("Well-formed, sampled", "well_formed", "sampled"),
)


def _headline(record: Record, metric: str, kind: str) -> float | None:
    return accuracy(record, kind) if metric == "accuracy" else metric_of(record, kind, "all", metric)


def summary(run: RunFolder) -> str:
    """One paragraph: how far the run came, what it took, what the held-out questions say."""
    sentences = []
    for stage, records in run.train.items():
        done, steps = records[-1]["step"], int(number(records[-1].get("steps")) or 0)
        seconds = sum(number(record.get("seconds")) or 0.0 for record in records)
        progress = f"{done} of {steps} steps, not finished" if done < steps else f"{done} steps"
        sentences.append(f"{STAGES.get(stage, stage)}: {progress} in {clock(seconds)}.")
    counts = [int(number(r.get("failed_videos")) or 0) for records in run.train.values() for r in records]
    if failed := max(counts, default=0):  # the records count from the start of the run
        sentences.append(f"{failed} times a video failed and was left out.")
    if not run.evals:
        return esc(" ".join([*sentences, "There are no evaluations in this run."]))
    last = list(run.evals.values())[-1]
    count = metric_of(last, "greedy", "all", "n") or metric_of(last, "sampled", "all", "n")
    path = " → ".join(LABELS.get(label, label) for label in run.evals)
    sentences.append(f"On {count:.0f} held-out questions" if count else "On the held-out questions")
    sentences[-1] += f" ({path}):" if len(run.evals) > 1 else f" ({path} only):"
    facts = [
        f"{name} " + " → ".join(f"<b>{score(metric, value)}</b>" for value in values)
        for name, metric, kind in (
            ("mean tIoU of sampled answers", "tiou", "sampled"),
            ("of greedy ones", "tiou", "greedy"),
            ("accuracy", "accuracy", "greedy"),
            ("well-formed", "well_formed", "sampled"),
        )
        if any(values := [_headline(record, metric, kind) for record in run.evals.values()])
    ]
    return f"{esc(' '.join(sentences))} {'; '.join(facts)}."


def tiles(run: RunFolder) -> str:
    """The headline numbers, each with its path over the evaluations and the last change."""
    cells = []
    for title, metric, kind in _HEADLINES:
        values = [_headline(record, metric, kind) for record in run.evals.values()]
        if not values or values[-1] is None:
            continue
        colours = [LABEL_COLOURS.get(label, "after") for label in run.evals]
        path = " → ".join(score(metric, value) for value in values[:-1])
        labels = list(run.evals)
        chip = _chip(metric, values[-2], values[-1], f"since {_SINCE.get(labels[-2], labels[-2])}") if path else ""
        cells.append(
            f'<div class="tile"><h3>{title}</h3><p class="big">{score(metric, values[-1])}</p>'
            f'{slope(values, colours)}<p class="path">{path}{" →" if path else "&nbsp;"}</p>{chip}</div>'
        )
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


def _chip(metric: str, before: float | None, after: float | None, what: str = "") -> str:
    if before is None or after is None:
        return ""
    text = change(metric, after - before)
    if is_share(metric) and text != "±0":
        text += " pp"
    return f'<span class="delta {tone(metric, text)}">{text}</span>' + (f" <small>{esc(what)}</small>" if what else "")


def metrics_table(run: RunFolder) -> str:
    """Tasks and metrics down, greedy and sampled answers of each evaluation across, the last change marked."""
    labels = list(run.evals)
    if not labels:
        return '<p class="empty">No evaluation was logged: set data.eval to a file of held-out questions.</p>'
    deltas = len(labels) > 1
    span = len(labels) + deltas
    heads = "".join(f"<th>{esc(LABELS.get(label, label))}</th>" for label in labels) + "<th>change</th>" * deltas
    body = []
    for task, metrics in tasks_of(run.evals.values()):
        count = next((n for e in run.evals.values() if (n := metric_of(e, "greedy", task, "n"))), None)
        note = f" <small>{count:.0f} questions</small>" if count else ""
        body.append(f'<tr class="task"><th colspan="{1 + 2 * span}">{esc(TASK_NAMES.get(task, task))}{note}</th></tr>')
        for metric in metrics:
            cells = []
            for kind in ("greedy", "sampled"):
                values = [metric_of(run.evals[label], kind, task, metric) for label in labels]
                cells += [
                    f'<td class="{"first" if i == 0 else ""}">{score(metric, v)}</td>' for i, v in enumerate(values)
                ]
                if deltas:
                    cells.append(f'<td class="change">{_chip(metric, values[-2], values[-1])}</td>')
            body.append(f"<tr><th>{esc(METRIC_NAMES.get(metric, metric))}</th>{''.join(cells)}</tr>")
    return (
        '<div class="scroll"><table class="metrics"><thead>'
        f'<tr><th></th><th colspan="{span}" class="kind">greedy</th><th colspan="{span}" class="kind">sampled</th></tr>'
        f"<tr><th></th>{heads * 2}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def completions(records: Sequence[Record], groups: int = 6, rows: int = 8) -> str:
    """The last groups of responses of the training set: text, reward parts and advantage."""
    by_group: dict[tuple[str, int, str], list[Record]] = {}
    for record in records:
        key = (str(record.get("stage")), int(number(record.get("step")) or 0), str(record.get("id")))
        by_group.setdefault(key, []).append(record)
    if not by_group:
        return '<p class="empty">No responses were logged: this run has no GRPO steps.</p>'
    return "".join(_group(key, by_group[key][:rows]) for key in list(by_group)[-groups:][::-1])


def _group(key: tuple[str, int, str], records: Sequence[Record]) -> str:
    names = list(dict.fromkeys(name for record in records for name in record.get("parts") or {}))
    task = str(records[0].get("task"))
    heads = "".join(f"<th>{esc(name, 40)}</th>" for name in [*names, "reward", "advantage", "tokens"])
    widest = max((abs(number(record.get("advantage")) or 0.0) for record in records), default=0.0) or 1.0
    body = []
    for record in sorted(records, key=lambda r: -(number(r.get("reward")) or 0.0)):
        parts = [number((record.get("parts") or {}).get(name)) for name in names]
        numbers = [*parts, number(record.get("reward"))]
        cells = "".join(f"<td>{DASH if value is None else f'{value:.2f}'}</td>" for value in numbers)
        cut = ' <small class="bad">cut</small>' if record.get("finish_reason") == "length" else ""
        body.append(
            f'<tr><td class="text">{esc(record.get("response", ""), 1500)}{cut}</td>{cells}'
            f"{_advantage(number(record.get('advantage')) or 0.0, widest)}"
            f"<td>{esc(record.get('n_tokens', DASH), 12)}</td></tr>"
        )
    return (
        f'<div class="group"><h3>Step {key[1]} <span class="chip">{esc(TASK_NAMES.get(task, task))}</span> '
        f'<span class="id">{esc(key[2], 80)}</span></h3>'
        f"<details><summary>Prompt</summary><pre>{esc(records[0].get('prompt', ''), 1500)}</pre></details>"
        f'<div class="scroll"><table class="responses"><thead><tr><th class="text">response</th>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></div>"
    )


def _advantage(value: float, widest: float) -> str:
    width = 50 * abs(value) / widest
    left = 50 - width if value < 0 else 50
    tone = "bad" if value < 0 else "good"
    bar = f'<i class="{tone}" style="left:{left:.1f}%;width:{width:.1f}%"></i>'
    return f'<td class="adv"><span>{value:+.2f}</span><span class="meter">{bar}</span></td>'.replace("+0.00", "0.00")


def settings(run: RunFolder) -> str:
    """Versions as a list, the resolved configuration folded away."""
    versions = "".join(f"<div><dt>{esc(k, 60)}</dt><dd>{esc(v, 200)}</dd></div>" for k, v in run.versions.items())
    versions = f'<dl class="versions">{versions}</dl>' if versions else '<p class="empty">versions.json is missing.</p>'
    if not run.config_text:
        return versions + '<p class="empty">config.resolved.toml is missing.</p>'
    return (
        f"{versions}<details><summary>Resolved configuration (TOML)</summary>"
        f'<pre class="config">{esc(run.config_text, 60_000)}</pre></details>'
    )
