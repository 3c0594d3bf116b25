"""Claims, table and arithmetic of the scale case; the cells themselves in make test-full."""

from __future__ import annotations

import json

import pytest

from bench.cases import scale
from bench.harness import summarize
from bench.scale_model import Links, predicted

ONE = {"encode": 2.0, "prefill": 4.0, "generate": 8.0, "update": 16.0, "attention": 0.5, "steps": 4.0}
ONE |= {"tokens": 1000.0, "rows": 8.0, "layers": 2.0, "kv_bytes": 10.0, "row_bytes": 5.0}


def test_what_is_predicted_by_hand():
    assert predicted(ONE, 1, Links(1.0, 1.0)) == {"encode": 2.0, "prefill": 4.0, "generate": 8.0, "update": 16.0}
    found = predicted(ONE, 4, Links(100.0, 0.25))
    gathered = 0.75 * 1000 * 10 * 2 / 100
    assert found["encode"] == pytest.approx(0.5 + 0.25)
    assert found["prefill"] == pytest.approx(1.0 + gathered + 0.5)
    assert found["update"] == pytest.approx(4.0 + 3 * gathered + 1.5)
    assert found["generate"] == pytest.approx(4 * (1.0 + 0.25 + 2 * (0.25 + 3 * 8 * 5 / 100)))


def test_claims_and_table():
    shape = f"demo, {scale.LONG} frames, 8 x 32"
    records = [summarize("device", "cpu", "memory", "B", [1])]
    for arm, memory, kv in (("1 processes", 100.0, 40.0), ("2 processes", 60.0, 22.0)):
        values = {"tokens of the prompt": 10, "encode": 1, "prefill": 1, "generate": 1, "rollout": 3, "update": 4}
        values |= {"keys and values of the rollout": kv, "peak memory of the update": memory}
        records += [summarize(arm, shape, metric, "", [value]) for metric, value in values.items()]
    records.append(summarize("2 processes", shape, "received: keys and values", "of the formula", [1.02]))
    whole = f"vrlt train, {scale.LONG} frames"
    records.append(summarize("2 processes", whole, "peak memory of all processes", "B", [21e9]))
    claims = {c.id: (c.value, c.holds) for c in scale.claims(records)}
    assert claims == {
        "scale.received": (1.02, True),
        "scale.memory_2": (1.2, True),
        "scale.kv_2": (1.1, True),
        "scale.run": (21.0, False),
    }
    table = scale.tables({"records": [vars(r) for r in records]})["cells"].splitlines()
    assert len(table) == 4
    assert table[3] == f"| {shape} | 2 | 10 | 1 s | 1 s | 1 s | 4 s | 2.2e-05 MB | 6e-05 MB |"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_cells_run(tmp_path):
    scale.run(["--small", "--device", "cpu", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "scale.cpu.json").read_text())
    assert {r["arm"] for r in result["records"]} == {"device", "1 processes", "2 processes"}
    assert [c["holds"] for c in result["claims"] if c["id"] == "scale.received"] == [True]
