"""Claims and table of the select case; what is done to the demo's samples."""

from __future__ import annotations

import json

from bench.cases import select
from bench.harness import summarize
from bench.select_gain import DATA, Seed, spoiled
from vrlt_fast.data.readers import read_jsonl


def test_parts_are_kept_apart(tmp_path):
    out = tmp_path / "select.cpu.json"
    select.run(["--parts", "pick", "--samples", "600", "--seeds", "1", "--out", str(out)])
    first = json.loads(out.read_text())
    assert {r["arm"] for r in first["records"]} == {"pick: command"}
    assert first["claims"] == []  # not of 490 000 samples
    records = [select.Record(**r) for r in first["records"]]
    records += [
        summarize("stop: 4 + 4", select.REAL, metric, "share", [v]) for metric, v in (("saved", 0.4), ("changed", 0.03))
    ]
    claims = {c.id: (c.value, c.holds) for c in select.claims(records)}
    assert claims == {
        "select.cpu.stop": (0.4, True),
        "select.cpu.stop_changed": (0.03, False),
        "select.cpu.stop_worst": (0.03, False),
    }
    table = select.tables({"records": [vars(r) for r in records]})["stop"].splitlines()
    assert table[2] == f"| {select.REAL} | 40.0% | 3.00% |"


def test_gain_is_claimed_of_three_seeds_only():
    def arm(name: str, seed: int, value: float, what: str = DATA[0]):
        return summarize(f"gain: {name}", f"{what}, seed={seed}", "sampled_tiou", "share", [value])

    records = [arm("picked", 0, 0.5), arm("random", 0, 0.4), arm("picked", 1, 0.5), arm("random", 1, 0.45)]
    records += [arm("picked", 2, 0.4), arm("random", 0, 0.1, DATA[1]), arm("picked", 0, 0.1, DATA[1])]
    assert select.claims(records) == []
    records += [arm("random", 2, 0.42)]
    for seed in range(3):
        for metric, value in (("saved", 0.35), ("changed", 0.01)):
            records.append(summarize("gain: scoring", f"{DATA[0]}, seed={seed}", metric, "share", [value]))
    claims = {c.id: (round(c.value, 6), c.holds) for c in select.claims(records)}
    assert claims == {
        "select.cpu.gain": (-0.02, False),
        "select.cpu.demo_stop": (0.35, True),
        "select.cpu.demo_changed": (0.01, True),
    }


def test_spoiled_samples_are_valid_and_as_many_as_said(demo, tmp_path):
    rows = [json.loads(line) for line in (demo / "train.jsonl").read_text("utf-8").splitlines()]
    for what, share in zip(DATA, (0.5, 0.25), strict=True):
        found, ids = spoiled(rows, what, seed=3)
        assert len(ids) == round(share * len(rows))
        path = tmp_path / f"{what}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        samples = read_jsonl(path, demo)
        assert [s.id for s in samples] == [row["id"] for row in rows]
        changed = {row["id"] for row, other in zip(rows, found, strict=True) if row != other}
        assert changed == ids
        for row, other in zip(rows, found, strict=True):
            if what == "useless" and row["video"] != other["video"]:
                events = {moment["text"] for moment in row["timeline"]}
                assert events.isdisjoint(moment["text"] for moment in other["timeline"])
            elif what == "noise" and row["id"] in ids:
                assert (row.get("answer"), row.get("spans")) != (other.get("answer"), other.get("spans"))


def test_nothing_begins_after_the_time_is_over(demo, tmp_path):
    (tmp_path / "data").symlink_to(demo)
    assert Seed(tmp_path, 0, "useless", "demo", {}, until=0.0).run() == {}
    assert (tmp_path / "useless-0" / "train.jsonl").is_file()
