"""metrics.jsonl and completions.jsonl: whole lines, coded errors, cutting back for a resume."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vrlt_fast.errors import SetupError
from vrlt_fast.report.metrics import RunLog, read_jsonl_tail, read_jsonl_tolerant, truncate_after

STAGES = ("sft", "grpo")


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def whole_run(makers: Any, rng: random.Random) -> list[tuple[str, dict[str, Any]]]:
    """Every call that a trainer makes in order: (method, record)."""
    calls: list[tuple[str, dict[str, Any]]] = [("eval", {"label": "start", "stage": "sft", "step": 0})]
    for stage, steps in (("sft", 5), ("grpo", 7)):
        for step in range(1, steps + 1):
            if stage == "grpo":
                response = {"stage": stage, "step": step, "response": "snow\u2028\u00e9\n" * rng.randrange(1, 4)}
                calls.append(("completions", response))
            calls.append(("train", makers(stage)(step, steps, rng)))
        calls.append(("eval", {"label": stage, "stage": stage, "step": steps}))
    return calls


def write(log: RunLog, calls: list[tuple[str, dict[str, Any]]]) -> None:
    for method, record in calls:
        getattr(log, method)([record] if method == "completions" else record)


def test_lines_are_whole_strict_json(tmp_path: Path) -> None:
    before = time.time()
    with RunLog(tmp_path / "run") as log:
        log.train({"stage": "sft", "step": 1, "loss": math.nan, "phases": {"update": math.inf}, "lr": 1e-5})
        log.completions([{"response": "lone \ud800 surrogate, Gr\u00fc\u00dfe\n"}, {"response": ""}])
        log.completions([])
    line, end = (tmp_path / "run/metrics.jsonl").read_text("utf-8").split("\n")
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert end == ""
    assert before - 1 <= record.pop("time") <= time.time() + 1
    assert record == {"kind": "train", "stage": "sft", "step": 1, "loss": None, "phases": {"update": None}, "lr": 1e-5}
    responses = [r["response"] for r in read_jsonl_tolerant(tmp_path / "run/completions.jsonl")]
    assert responses == ["lone \ud800 surrogate, Gr\u00fc\u00dfe\n", ""]


def test_every_record_is_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(1, 4):
        log.train({"stage": "sft", "step": step})
        assert [r["step"] for r in read_jsonl_tolerant(tmp_path / "metrics.jsonl")] == list(range(1, step + 1))
    log.close()


def test_full_disk_is_r03_and_leaves_whole_lines(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
from vrlt_fast.errors import SetupError
from vrlt_fast.report.metrics import RunLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
log = RunLog(Path(sys.argv[1]))
try:
    for step in range(100):
        log.train({"stage": "sft", "step": step})
except SetupError as error:
    assert sys.argv[1] in error.problems[0].where
    print(error.code)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "VRLT-R03"
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert 500 < len(content) <= 1000
    assert content.endswith(b"\n")
    assert [json.loads(line)["step"] for line in content.splitlines()] == list(range(content.count(b"\n")))


def test_unwritable_folder_is_r02(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SetupError, match="VRLT-R02") as caught:
        RunLog(tmp_path / "file" / "run")
    assert str(tmp_path / "file") in caught.value.problems[0].where


def test_missing_writer_stops_before_anything_is_written(tmp_path: Path) -> None:
    missing = [name for name in ("wandb", "trackio") if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("all writers are installed")
    with pytest.raises(SetupError, match=f"pip install {missing[0]}") as caught:
        RunLog(tmp_path / "run", writers=missing)
    assert caught.value.code == "VRLT-E01"
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_back(tmp_path: Path, seed: int, train_records: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rng = random.Random(seed)
    records = [train_records("grpo")(step, 3, rng) for step in (1, 2, 3)]
    with RunLog(tmp_path, writers=("tensorboard",)) as log:
        for record in records:
            log.train(record)
        log.eval({"label": "grpo", "stage": "grpo", "step": 3, "metrics": {"greedy": {"all": {"n": 5, "tiou": 0.5}}}})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    got = [(event.step, event.value) for event in events.Scalars("grpo/parts/temporal")]
    assert got == [(r["step"], pytest.approx(r["parts"]["temporal"], rel=1e-6)) for r in records]
    assert [(event.step, event.value) for event in events.Scalars("grpo/eval/greedy/all/tiou")] == [(3, 0.5)]
    assert "grpo/step" not in events.Tags()["scalars"]


def test_kill_and_resume_log_the_same_records(tmp_path: Path, seed: int, train_records: Any) -> None:
    rng = random.Random(seed)
    calls = whole_run(train_records, rng)
    with RunLog(tmp_path / "whole") as log:
        write(log, calls)
    for trial in range(20):
        run = tmp_path / f"killed-{trial}"
        stage, step = rng.choice([("sft", 0), ("sft", 3), ("sft", 5), ("grpo", 2), ("grpo", 6)])
        place = (STAGES.index(stage), step)
        done = sum((STAGES.index(record["stage"]), record["step"]) <= place for _, record in calls)
        with RunLog(run) as log:
            write(log, calls[: rng.randrange(done, len(calls) + 1)])
        for name in ("metrics.jsonl", "completions.jsonl"):
            with open(run / name, "ab") as file:
                file.write(rng.choice([b"", b'{"stage": "grpo", "st', b"\xff\x00", b"{}"[:1]]))
        truncate_after(run, STAGES, stage, step)
        with RunLog(run) as log:
            write(log, calls[done:])
        for name in ("metrics.jsonl", "completions.jsonl"):
            whole = read_jsonl_tolerant(tmp_path / "whole" / name)
            assert untimed(read_jsonl_tolerant(run / name)) == untimed(whole), (trial, stage, step, name)
            assert not list(run.glob(".*"))


def test_truncation_returns_the_evals_that_stay_and_removes_the_answers_of_others(make_run: Any) -> None:
    run = make_run(questions=4, sft=6, grpo=4)
    before = (run / "metrics.jsonl").read_bytes()
    assert truncate_after(run, STAGES, "grpo", 2) == {"start", "sft"}
    assert sorted(path.stem for path in (run / "eval").iterdir()) == ["sft", "start"]
    kept = (run / "metrics.jsonl").read_bytes()
    assert before.startswith(kept)
    assert read_jsonl_tolerant(run / "metrics.jsonl")[-1]["step"] == 2
    assert {r["step"] for r in read_jsonl_tolerant(run / "completions.jsonl")} == {1, 2}


def test_truncation_mends_a_last_line_without_its_newline(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind":"train","stage":"sft","step":1}')
    assert truncate_after(tmp_path, STAGES, "sft", 1) == set()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"kind":"train","stage":"sft","step":1}\n'


def test_only_the_last_line_may_be_broken(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n{"step": 2}\n{"st')
    assert read_jsonl_tolerant(path) == [{"step": 1}, {"step": 2}]
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(SetupError, match="VRLT-R04") as caught:
        read_jsonl_tolerant(path)
    assert caught.value.problems[0].where.endswith("metrics.jsonl:2")


def test_tail_starts_at_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps({"step": step, "text": "x" * 90}) + "\n" for step in range(100)))
    assert [r["step"] for r in read_jsonl_tail(path, max_bytes=1000)] == list(range(92, 100))
    assert len(read_jsonl_tail(path)) == 100
