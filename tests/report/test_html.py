"""report.html: self-contained, escaped, honest about what is missing."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vrlt_fast.errors import SetupError
from vrlt_fast.report.choose import choose, score
from vrlt_fast.report.html import write_report
from vrlt_fast.report.markup import esc
from vrlt_fast.report.metrics import read_jsonl_tolerant
from vrlt_fast.report.run_folder import load_run
from vrlt_fast.report.svg import Series, line_chart, smoothed, stacked_chart, thinned, ticks
from vrlt_fast.report.thumbs import NoThumbnails, thumbnails

VOID = {"meta", "img", "br", "link", "input"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'<svg onload=x>&\u202e\x00\ud800"


class Page(HTMLParser):
    """Elements with their attributes; fails on tags that don't nest."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def having(self, name: str, value: str) -> list[dict[str, str]]:
        return [attrs for _, attrs in self.elements if value in attrs.get(name, "").split()]


def report(run: Path) -> tuple[str, Page]:
    text = write_report(run).read_text("utf-8")
    return text, Page(text)


def edit_lines(path: Path, change: Any) -> None:
    records = read_jsonl_tolerant(path)
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def test_whole_run(make_run: Any) -> None:
    run = make_run()
    text, page = report(run)
    assert (run / "report.html").stat().st_size < 5_000_000
    assert not list(run.glob(".*"))
    assert "\ufffd" not in text
    cards = page.having("class", "card")
    assert len(cards) >= 12
    assert {card["data-kind"] for card in cards} == {"improved", "typical", "failed"}
    pictures = [attrs for tag, attrs in page.elements if tag == "img"]
    assert len(pictures) == 8 * len(cards)
    titles = re.findall(r"<figcaption><b>([^<]*)</b>", text)
    for title in ("Reward", "Reward parts", "KL", "Response length", "Clipped and truncated", "Entropy", "Loss"):
        assert title in titles
    for title in ("Gradient norm", "Throughput", "Where the time goes"):
        assert titles.count(title) == 2
    final = load_run(run).evals["grpo"]["metrics"]
    assert f"<b>{final['sampled']['all']['tiou']:.3f}</b>" in text
    assert f">{final['greedy']['grounding']['miou']:.3f}</td>" in text
    assert "5ca1ab1e" in text
    assert "ones sampled at temperature 0.7." in text
    assert "[grpo]" in text


def test_self_contained(make_run: Any) -> None:
    text, page = report(make_run(questions=12))
    for tag, attrs in page.elements:
        assert tag not in ("link", "iframe", "object", "base", "form")
        for name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            if name in attrs:
                assert attrs[name].startswith(("data:image/jpeg;base64,", "#")), (tag, attrs[name][:80])
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in re.sub(r'http-equiv="|base64,[^"]*', "", text)


def test_hostile_text_stays_text(make_run: Any) -> None:
    run = make_run(questions=12)
    clean = len([tag for tag, _ in report(run)[1].elements if tag == "script"])

    def poison(record: dict[str, Any]) -> None:
        record.update(id=HOSTILE + str(record["id"]), question=HOSTILE, video=HOSTILE, options=[HOSTILE] * 4)
        for answer in [record["greedy"], *record["sampled"]]:
            answer.update(text=HOSTILE, spans=[[1e308, float("inf")], ["x", 1], [3, 1], [-5, 99], 7], tiou="x")

    for path in (run / "eval").iterdir():
        edit_lines(path, poison)
    edit_lines(run / "completions.jsonl", lambda r: r.update(response=HOSTILE, prompt=HOSTILE, parts={HOSTILE: 1.0}))
    edit_lines(run / "metrics.jsonl", lambda r: r.update({"phases": {HOSTILE: 1.0}, "parts": {HOSTILE: 0.5}}))
    (run / "config.resolved.toml").write_text(f"x = '''{HOSTILE[:-2]}'''", "utf-8")
    (run / "versions.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    text, page = report(run)
    assert len([tag for tag, _ in page.elements if tag == "script"]) == clean == 1
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert "\u202e" not in text
    assert "\x00" not in text
    assert "alert(1)" in "".join(page.text)
    assert all(tag != "svg" or "viewbox" in attrs for tag, attrs in page.elements)


def test_long_texts_do_not_blow_it_up(make_run: Any) -> None:
    run = make_run(questions=24)
    for path in (run / "eval").iterdir():
        edit_lines(path, lambda r: [a.update(text="<" * 50_000) for a in (r["greedy"], *r["sampled"])])
    edit_lines(run / "completions.jsonl", lambda r: r.update(response="<" * 20_000, prompt="&" * 20_000))
    write_report(run)
    assert (run / "report.html").stat().st_size < 5_000_000


@pytest.mark.parametrize(
    ("gone", "word"),
    [
        (("completions.jsonl",), "No responses were logged"),
        (("eval",), "no eval/*.jsonl files"),
        (("versions.json", "config.resolved.toml"), "config.resolved.toml is missing"),
        (("../demo-data",), "the file is not there any more"),
        (("eval/sft.jsonl", "eval/start.jsonl"), "after GRPO"),
    ],
)
def test_missing_parts_are_named(make_run: Any, gone: tuple[str, ...], word: str) -> None:
    run = make_run(questions=12)
    for name in gone:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert word in report(run)[0]


def test_sft_only_and_unfinished_and_empty_runs(make_run: Any) -> None:
    run = make_run(questions=12)
    records = read_jsonl_tolerant(run / "metrics.jsonl")
    for stem in ("sft", "grpo"):
        (run / f"eval/{stem}.jsonl").unlink()
    part = [r for r in records if r["kind"] == "train" and r["stage"] == "sft"][:30]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [records[0], *part]) + '{"kind": "tr')
    text, page = report(run)
    assert "30 of 60 steps, not finished" in text
    assert 'id="train-grpo"' not in text
    assert len(page.having("class", "card")) == 12
    (run / "metrics.jsonl").write_text("")
    assert "There are no evaluations" in report(run)[0]


def test_no_metrics_is_r04_and_keeps_the_older_report(make_run: Any) -> None:
    run = make_run(questions=4)
    older = write_report(run).read_bytes()
    (run / "metrics.jsonl").unlink()
    with pytest.raises(SetupError, match="VRLT-R04"):
        write_report(run)
    assert (run / "report.html").read_bytes() == older


def test_choice_is_repeatable_spread_and_honest(make_run: Any) -> None:
    run = load_run(make_run())
    chosen = choose(run)
    ids = [shown.after["id"] for shown in chosen]
    assert ids == [shown.after["id"] for shown in choose(run)]
    assert len(set(ids)) == len(ids) >= 12
    assert {shown.after["task"] for shown in chosen} == {"grounding", "grounded_qa", "videoqa"}
    for task in ("grounding", "grounded_qa", "videoqa"):
        scores = sorted(score(line) for line in run.answers["grpo"].values() if line["task"] == task)
        failed = [shown.score for shown in chosen if shown.kind == "failed" and shown.after["task"] == task]
        assert max(failed) <= scores[len(scores) // 2]
    assert all(shown.gain > 0 for shown in chosen if shown.kind == "improved")


def test_thumbnails_show_the_frame_of_their_time(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    levels = [rng.randrange(20, 236) for _ in range(320)]
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast", "g": "16", "qp": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in levels:
            picture = np.full((48, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    times = [*sorted(rng.uniform(0, 39.8) for _ in range(4)), 40.5]
    uris = thumbnails(tmp_path, "v.mp4", times)
    assert len(uris) == 5
    for at, uri in zip(times, uris, strict=True):
        data = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
        with av.open(io.BytesIO(data), format="mjpeg") as picture:
            level = next(picture.decode(video=0)).to_ndarray(format="rgb24").mean()
        assert abs(level - levels[min(319, int(at * 8))]) < 6, at


@pytest.mark.parametrize(
    "video", ["../outside.mp4", "/etc/hostname", "no.mp4", "text.mp4", "a\0b", "http://x/y", "n" * 999]
)
def test_unusable_videos_have_a_reason(tmp_path: Path, video: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside.mp4").write_bytes(b"x")
    (tmp_path / "root/text.mp4").write_bytes(b"not a video")
    with pytest.raises(NoThumbnails, match=r"path|file"):
        thumbnails(tmp_path / "root", video, [0.0])


def test_charts_hold_any_finite_values(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        size = 10.0 ** rng.randrange(-9, 9)
        points = [
            (float(x), rng.choice([0.0, size, rng.gauss(0, size)])) for x in range(1, rng.choice([2, 3, 30, 1500]))
        ]
        chart = line_chart("x", [Series("a", "c1", points)], bounds=rng.choice([(None, None), (0.0, None)]))
        Page(chart)
        assert "nan" not in chart
        assert "inf" not in chart
        if points:
            assert set(thinned(points)) <= set(points)
            assert max(points, key=lambda p: p[1])[1] == max(p[1] for p in thinned(points))
            low, high = min(p[1] for p in points), max(p[1] for p in points)
            assert all(low - 1e-6 * size <= y <= high + 1e-6 * size for _, y in smoothed(points))
    assert line_chart("x", [Series("a", "c1", [])]) == ""
    assert stacked_chart("x", []) == ""
    assert ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(0.0, 9.5, 8) == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_escape_cuts_long_text_and_unsafe_characters() -> None:
    assert esc("<a href='x'>") == "&lt;a href=&#x27;x&#x27;&gt;"
    assert esc("a\x1b[31m\ud800\u202eb\n") == "a\ufffd[31m\ufffd\ufffdb\n"
    assert esc("x" * 30, 10) == "x" * 10 + " … (20 more characters)"


def test_report_imports_without_torch() -> None:
    script = "import sys, vrlt_fast.report.html, vrlt_fast.report.console; print(*({'torch', 'av'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_failed_videos_are_counted_from_the_start_of_the_run(make_run: Any) -> None:
    run = make_run()
    records = read_jsonl_tolerant(run / "metrics.jsonl")
    lines = [json.dumps({**r, "failed_videos": 3} if r["kind"] == "train" else r) for r in records]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "3 times a video failed" in write_report(run).read_text("utf-8")
