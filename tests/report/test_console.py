"""The step line, the table of metrics, progress with and without a terminal."""

from __future__ import annotations

import io
import random
import re
from typing import Any

from vrlt_fast.report.console import Console, step_line
from vrlt_fast.report.metrics import read_jsonl_tolerant

GRPO = {
    "kind": "train", "stage": "grpo", "step": 12, "steps": 100, "reward": 1.412, "reward_std": 0.312,
    "parts": {"semantic": 0.62, "temporal": 0.41, "format": 0.99}, "kl": 0.00412, "clip_share": 0.001, "entropy": 0.83,
    "length": 14.2, "truncated": 0.0, "loss": 0.0181, "grad_norm": 0.43, "tokens_s": 9100.0, "seconds": 2.0,
    "phases": {"decode": 0.01, "encode": 0.1, "generate": 0.76, "reference": 0.18, "update": 0.82}, "peak_gb": 2.11,
    "failed_videos": 0, "zero_signal_groups": 0, "tokens_trained": 1000, "tokens_logical": 5100,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_step_line_of_grpo() -> None:
    assert step_line(GRPO, 192.4).split("  loss ") == [
        "grpo  12/100  rwd 1.412±0.31 (sem 0.62 tmp 0.41 fmt 0.99)  kl 0.0041  clip  0%  ent 0.83  len  14  trunc  0%",
        "0.018  gnorm 0.43   9.1k tok/s  peak 2.1G  gen 38% ref  9% upd 41% enc  5% dec  0%  shared 5.1x  ETA 3m12s",
    ]


def test_step_line_of_sft_is_shorter_and_aligned(seed: int, train_records: Any) -> None:
    rng = random.Random(seed)
    lines = [step_line(train_records("sft")(step, 200, rng), 30) for step in (1, 20, 200)]
    assert re.fullmatch(
        r"sft   1/200  loss \d+\.\d{3}  gnorm \d+\.\d\d  lr \d\.\de-\d\d  +[\d.]+k tok/s  peak 1\.6G  "
        r"upd +\d+% enc +\d+% dec +\d+%  ETA 30s",
        lines[0],
    )
    assert len({line.index("loss") for line in lines}) == 1


def test_step_line_leaves_out_what_is_missing_and_names_trouble() -> None:
    line = step_line({"stage": "grpo", "step": 1, "steps": 9, "kl": None, "loss": float("nan"), "failed_videos": 2}, 0)
    assert line == "grpo 1/9  failed videos 2  ETA 0s"


def test_eta_follows_the_recent_steps_of_the_stage() -> None:
    out = io.StringIO()
    console = Console(out)
    for step in range(1, 41):
        console.step({"stage": "sft", "step": step, "steps": 100, "seconds": 60.0 if step <= 20 else 2.0})
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("ETA 1h39m")
    assert lines[-1].endswith("ETA 2m00s")


def test_plain_progress_speaks_every_ten_seconds_and_at_the_end() -> None:
    out, now = io.StringIO(), [0.0]
    with Console(out, clock=lambda: now[0]).progress("evaluating", 100) as advance:
        for _ in range(100):
            now[0] += 0.25
            advance(1)
    assert out.getvalue().splitlines() == [
        "evaluating 40/100 (40 %)  ETA 15s",
        "evaluating 80/100 (80 %)  ETA 5s",
        "evaluating 100/100  took 25s",
    ]


def test_progress_can_keep_quiet_without_a_terminal() -> None:
    out = io.StringIO()
    with Console(out).progress("training", 3, plain=False) as advance:
        advance(3)
    assert out.getvalue() == ""


def test_terminal_bars_nest_and_leave_step_lines_behind(monkeypatch: Any) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    console = Console(out)
    with console.progress("[outer]", 2) as outer:
        with console.progress("inner", 5) as inner:
            inner(5)
            console.message("between [bold]markup[/bold]")
        outer(2)
    text = out.getvalue()
    assert "[outer]" in text
    assert "inner" in text
    assert "ETA" in text
    assert "between [bold]markup[/bold]" in text


def test_warnings_go_to_stderr() -> None:
    out, errors = io.StringIO(), io.StringIO()
    Console(out, errors).warn("3 videos failed [red]")
    assert out.getvalue() == ""
    assert errors.getvalue() == "warning 3 videos failed [red]\n"


def test_eval_table_has_every_number(make_run: Any) -> None:
    records = [r for r in read_jsonl_tolerant(make_run(questions=12) / "metrics.jsonl") if r["kind"] == "eval"]
    out = io.StringIO()
    Console(out).eval_table(records)
    text = out.getvalue()
    for kind in ("greedy", "sampled"):
        for record in records:
            assert f"{record['metrics'][kind]['all']['tiou']:.3f}" in text
            assert f"{100 * record['metrics'][kind]['videoqa']['accuracy']:.1f} %" in text
    gain = records[2]["metrics"]["greedy"]["all"]["tiou"] - records[1]["metrics"]["greedy"]["all"]["tiou"]
    assert f"{gain:+.3f}".replace("-", "\u2212") in text
    assert text.index("grounding") < text.index("R1@0.5")


def test_eval_table_of_one_evaluation_and_of_none() -> None:
    out = io.StringIO()
    Console(out).eval_table([{"label": "start", "metrics": {"greedy": {"all": {"n": 3, "well_formed": None}}}}])
    Console(out).eval_table([])
    assert "change" not in out.getvalue()
