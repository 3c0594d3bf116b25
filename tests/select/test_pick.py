"""Picking: policies by hand, the files that come out, what is refused, and a large file."""

from __future__ import annotations

import dataclasses
import json
import resource
from html.parser import HTMLParser
from time import perf_counter

import numpy as np
import pytest

from bench.select_files import write_large
from vrlt_fast.cli import main
from vrlt_fast.errors import ConfigError, DataError
from vrlt_fast.select.fingerprint import file_digest
from vrlt_fast.select.pick import pick_file
from vrlt_fast.select.policies import Choice, buckets, columns, gauss_weights, pick, rounded, shared_out, uniforms
from vrlt_fast.select.scores import Header, Table, read_tables
from vrlt_fast.select.summary import summarise

WEIGHTS = {"semantic": 1.0, "temporal": 1.0, "format": 0.5}


def table_of(rewards: dict[str, list[list[float]]], k: int = 4) -> Table:
    """Samples a0, a1, ... of each task."""
    header = Header(
        {"digest": "m", "name": "m"},
        {"digest": "r", "keys": {}},
        {"digest": "d", "name": "d"},
        0,
        (1, 1),
        k,
        0,
        WEIGHTS,
    )
    rows = [(task, row) for task, found in rewards.items() for row in found]
    shares = np.array([row + [np.nan] * (k - len(row)) for _, row in rows])
    names = list(rewards)
    return Table(
        header,
        [f"{task}-{i}" for i, (task, _) in enumerate(rows)],
        names,
        np.array([names.index(task) for task, _ in rows], np.int16),
        np.arange(1, len(rows) + 1),
        shares,
        shares,
    )


BINARY = [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0]]


def test_top_variance():
    table = table_of({"videoqa": BINARY})
    assert pick(table, Choice(size=2)).tolist() == [3, 5]
    assert pick(table, Choice(size=4)).tolist() == [2, 3, 4, 5]
    assert set(pick(table, Choice(size=0.5)).tolist()) > {3, 5}
    assert pick(table, Choice()).tolist() == list(range(6))


def test_filters():
    table = table_of({"videoqa": BINARY})
    assert pick(table, Choice(drop_flat=True)).tolist() == [2, 3, 4, 5]
    assert pick(table, Choice(mean=(0.01, 0.6))).tolist() == [2, 3, 5]
    std = columns(table, 0.5).std
    assert pick(table, Choice(least_std=float(std[3]) - 1e-9)).tolist() == [3, 5]
    with pytest.raises(DataError, match="L03"):
        pick(table, Choice(mean=(0.6, 0.7)))


def test_buckets_are_those_of_rita():
    """k = 10, tau = 0.5: hard with at most 2 hits, easy with at least 8, dropped without one."""
    rows = [[1.0] * hits + [0.4] * (10 - hits) for hits in range(11)]
    table = table_of({"grounding": rows}, k=10)
    assert buckets(columns(table, 0.5)).tolist() == [-1, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    many = table_of({"grounding": [row for row in rows for _ in range(40)]}, k=10)
    found = pick(many, Choice("buckets", size=100))
    counts = np.bincount(buckets(columns(many, 0.5))[found], minlength=3)
    assert counts.tolist() == [10, 60, 30]
    assert 0 not in found // 40
    # 80 hard ones hold at most 800 at 1:6:3, 200 medium ones 333, 120 easy ones 400
    assert len(pick(many, Choice("buckets", size=440))) == 333


def test_drawing_in_proportion_to_deviation():
    """With alpha, samples of twice the deviation come 2^alpha times as often."""
    low, high = [0.25, 0.25, 0.75, 0.75], [0.0, 0.0, 1.0, 1.0]
    table = table_of({"grounding": [low] * 2000 + [high] * 2000})
    std = columns(table, 0.5).std
    assert std[-1] / std[0] == pytest.approx(2.0, rel=1e-3)
    for alpha, ratio in ((0.0, 1.0), (1.0, 2.0), (2.0, 4.0)):
        found = pick(table, Choice("sigma", size=200, alpha=alpha, seed=3))
        odds = (found >= 2000).mean()
        assert odds == pytest.approx(ratio / (1 + ratio), abs=0.1)
    flat = table_of({"grounding": [[0.5] * 4] * 3 + [high] * 3})
    assert pick(flat, Choice("sigma", size=4)).tolist()[-3:] == [3, 4, 5]


def test_gauss_follows_the_target(seed):
    mean = np.random.default_rng(seed).random(40_000)
    table = table_of({"grounding": [[m] * 4 for m in mean.tolist()]})
    found = pick(table, Choice("gauss", size=2000, target=0.3, width=0.1, seed=seed))
    assert mean[found].mean() == pytest.approx(0.3, abs=0.02)
    assert mean[found].std() == pytest.approx(0.1, abs=0.015)
    uneven = np.concatenate([np.full(900, 0.32), np.full(100, 0.28)])
    weight = gauss_weights(uneven, np.ones(1000, bool), 0.3, 0.1)
    assert weight[:900].sum() == pytest.approx(weight[900:].sum())


def test_quotas():
    table = table_of({"videoqa": BINARY, "grounding": [[0.1 * i, 0.5, 0.9, 0.2] for i in range(9)]})
    found = pick(table, Choice(quotas={"grounding": 2, "videoqa": 3}))
    assert (found < 6).sum() == 3
    assert len(found) == 5
    assert len(pick(table, Choice(quotas={"grounding": 20}))) == 9
    equal = pick(table, Choice(size=14, equal=True))
    assert ((equal < 6).sum(), (equal >= 6).sum()) == (6, 8)
    with pytest.raises(DataError, match=r"L03.*ocr"):
        pick(table, Choice(quotas={"ocr": 1}))
    assert shared_out(10, {0: 2, 1: 100, 2: 3}) == {0: 2, 1: 5, 2: 3}
    assert shared_out(7, {0: 9, 1: 9}) == {0: 4, 1: 3}
    assert shared_out(9, {0: 1, 1: 2}) == {0: 1, 1: 2}
    assert rounded([1.6, 1.2, 1.2]) == [2, 1, 1]


def test_choice_is_that_of_the_seed_whatever_the_order(seed):
    rng = np.random.default_rng(seed)
    table = table_of({"grounding": rng.random((300, 4)).tolist()})
    order = rng.permutation(300)
    mixed = dataclasses.replace(
        table, ids=[table.ids[i] for i in order], shares=table.shares[order], rewards=table.rewards[order]
    )
    for policy in ("variance", "sigma", "buckets", "gauss", "random"):
        choice = Choice(policy, size=50, seed=seed)
        ids = {table.ids[i] for i in pick(table, choice)}
        assert ids == {mixed.ids[i] for i in pick(mixed, choice)}
        if policy != "variance":
            other = pick(table, dataclasses.replace(choice, seed=seed + 1))
            assert ids != {table.ids[i] for i in other}
    u = uniforms([str(i) for i in range(20_000)], seed)
    assert u.mean() == pytest.approx(0.5, abs=0.01)
    assert 0 < u.min() < u.max() < 1


@pytest.mark.parametrize(
    "bad", [{"size": 0}, {"ratio": (0, 0, 0)}, {"width": 0.0}, {"alpha": -1.0}, {"mean": (0.5, 0.2)}]
)
def test_what_cannot_be_is_refused(bad):
    with pytest.raises(ConfigError, match="C02"):
        pick(table_of({"videoqa": BINARY}), Choice(**bad))


@pytest.fixture
def files(demo, tmp_path):
    """Scores of the demo's samples, made by hand: the n-th of four responses earns by n and the sample's place."""
    data = tmp_path / "train.jsonl"
    raw = (demo / "train.jsonl").read_bytes()
    data.write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n", 3).rstrip(b"\n"))
    samples = [json.loads(line) for line in raw.splitlines()]
    digest = file_digest(data)
    header = Header(
        {"digest": "m" * 64, "name": "<model>"}, {"digest": "r" * 64, "keys": {}},
        {"digest": digest, "file": digest, "name": str(data)}, len(samples), (1, 1), 4, 0, WEIGHTS,
    )  # fmt: skip
    lines = [header.to_json()]
    for i, s in enumerate(samples):
        rewards = [((i * 7 + j * j * i) % 5) / 4 for j in range(4)]
        parts = {"temporal": rewards, "format": [0.0] * 4}
        line = {"id": s["id"], "task": s["task"], "line": i + 1, "rewards": rewards, "parts": parts}
        lines.append(line if i != 5 else {"id": s["id"], "task": s["task"], "line": 6, "failed": "VRLT-V02", "why": ""})
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return scores, data


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "img", "line"):
            assert self.open.pop() == tag


def test_files_that_come_out(files, demo, tmp_path, capsys):
    scores, data = files
    out, report = tmp_path / "picked.jsonl", tmp_path / "page.html"
    words = ["select", "pick", str(scores), "--data", str(data), "--out", str(out), "--report", str(report)]
    assert main([*words, "--root", str(demo), "--share", "0.5"]) == 0
    told = capsys.readouterr().out
    lines, chosen = data.read_bytes().splitlines(keepends=True), out.read_bytes().splitlines(keepends=True)
    assert f"{out}: {len(chosen)} of 25 samples" in told
    assert len(chosen) == 12
    wanted = pick(read_tables([scores]), Choice(size=0.5))
    places = [int(read_tables([scores]).lines[i]) - 1 for i in wanted]
    assert chosen == [lines[i] if lines[i].endswith(b"\n") else lines[i] + b"\n" for i in places]
    text = report.read_text("utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.tags.count("figure") == 2 * 3
    assert page.tags.count("article") > 6
    assert page.tags.count("img") > 20
    assert all(source.startswith(("data:image/jpeg", "#")) for source in page.sources)
    assert "12 of 25" in text
    assert "1 videos or prompts" in text
    assert "<model>" not in text
    again = tmp_path / "again.jsonl"
    pick_file([scores], data, again, Choice(size=0.5))
    assert again.read_bytes() == out.read_bytes()


def test_page_without_videos(files, tmp_path):
    scores, data = files
    pick_file([scores], data, tmp_path / "p.jsonl", Choice(drop_flat=True), report=tmp_path / "p.html")
    assert "No pictures of this video" in (tmp_path / "p.html").read_text("utf-8")


def test_parts_alone(files):
    scores, _ = files
    whole, part = read_tables([scores]), read_tables([scores], parts=["temporal"])
    np.testing.assert_allclose(part.shares, np.clip(whole.shares * 1.5, 0, 1))
    assert (read_tables([scores], parts=["format"]).shares == 0).all()


def test_samples_without_the_parts_leave(files):
    """A question without spans isn't one whose spans were always wrong."""
    scores, _ = files
    lines = [json.loads(line) for line in scores.read_text("utf-8").splitlines()]
    told = [line for line in lines[1:] if "failed" not in line]
    for line in told[:5]:
        line["parts"] = {"semantic": line["parts"].pop("temporal"), **line["parts"]}
    scores.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    whole, part = read_tables([scores]), read_tables([scores], parts=["temporal"])
    assert set(whole.ids) - set(part.ids) == {line["id"] for line in told[:5]}
    assert part.failed == whole.failed | {"no temporal": 5}


def test_what_is_refused(files, tmp_path, capsys):
    scores, data = files
    out = tmp_path / "picked.jsonl"
    words = ["select", "pick", str(scores), "--data", str(data), "--out", str(out)]
    for more, code, said in (
        (["--tau", "0.3"], 2, "VRLT-C04"),
        (["--quota", "videoqa"], 2, "VRLT-C02"),
        (["--quota", "videoqa=3", "--count", "4"], 2, "VRLT-C04"),
        (["--count", "0"], 2, "VRLT-C02"),
        (["--share", "1.5"], 2, "VRLT-C02"),
        (["--policy", "best"], 2, "VRLT-C02"),
        (["--parts", "temperal"], 3, "VRLT-L03"),
        (["--min-std", "99"], 3, "VRLT-L03"),
        (["--out", str(data)], 3, "VRLT-D13"),
        (["--out", str(tmp_path / "no" / "x.jsonl")], 4, "VRLT-R02"),
    ):
        assert main([*words, *more]) == code, more
        assert said in capsys.readouterr().err
    raw = scores.read_bytes()
    for damaged, said in (
        (raw[: raw.rindex(b"{")], "VRLT-L02"),
        (raw[:-9], "VRLT-L02"),
        (raw.replace(b'"scores"', b'"other"', 1), "VRLT-L02"),
        (raw.replace(b'"format": 1', b'"format": 2', 1), "VRLT-L02"),
    ):
        scores.write_bytes(damaged)
        assert main(words) == 3
        assert said in capsys.readouterr().err
    scores.write_bytes(raw)
    assert not out.exists()
    data.write_bytes(data.read_bytes() + b"\n")
    assert main(words) == 3
    assert "VRLT-L01" in capsys.readouterr().err


def test_a_large_file(tmp_path):
    """A twentieth of 490 000 samples: within a twentieth of the time and memory (beyond the process's own)."""
    scores, data = write_large(tmp_path, 24_500, seed=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = perf_counter()
    picked = pick_file([scores], data, tmp_path / "picked.jsonl", Choice(size=1600), report=tmp_path / "page.html")
    assert perf_counter() - begin < 30 / 20 * 3  # the machine may be busy
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6 < 2 / 20
    assert (picked.kept, picked.scored) == (1600, 24_500)
    assert len((tmp_path / "picked.jsonl").read_bytes().splitlines()) == 1600


def test_summary_by_hand():
    table = table_of({"videoqa": [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0], [1, 1, 0, 0]]})
    cells = summarise(table).splitlines()[1].split()
    assert cells[:3] == ["videoqa", "4", "0.500"]
    assert cells[-8:] == ["25.0", "%", "50.0", "%", "25.0", "%", "12.5", "%"]
