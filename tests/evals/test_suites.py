"""The suites: their tables, groups, failed questions, and a run of one through the command line."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import pytest

from vrlt_fast.cli import main
from vrlt_fast.config import Config
from vrlt_fast.config_load import load_config
from vrlt_fast.data.readers import read_jsonl
from vrlt_fast.data.sample import TASKS, Sample
from vrlt_fast.errors import ConfigError, DataError, Problem
from vrlt_fast.evals.metrics import score, summarise
from vrlt_fast.evals.results import assess
from vrlt_fast.evals.run import Evaluation
from vrlt_fast.evals.tasks import SUITES, check_tasks, group_of, suite
from vrlt_fast.report.numbers import METRIC_NAMES
from vrlt_fast.rewards.base import Response

SMALL = [
    "--model.dtype", "float32", "--model.device", "cpu", "--video.sampling", "fps", "--video.fps", "1",
    "--video.min_frames", "2", "--video.max_frames", "4", "--video.min_pixels", "784", "--video.max_pixels", "1568",
    "--prompt.video_layout", "interleaved", "--prompt.think", "false", "--rollout.max_new_tokens", "6",
    "--video.workers", "0", "--kernels.layers", "torch",
]  # fmt: skip


def asked(task):
    spans = ((1.0, 2.0),) if task != "videoqa" else ()
    options = ("a", "b") if task != "grounding" else ()
    return Sample("s", "v.mp4", 9.0, task, "?", options, "A" if options else "", spans)


@pytest.mark.parametrize("name", SUITES)
def test_suite(name):
    chosen = SUITES[name]
    assert chosen.name == name
    assert chosen.task in TASKS
    found = summarise([score(Response("", 0, "stop"), asked(chosen.task), think=False)], chosen.convention)
    assert set(chosen.columns) <= set(found[chosen.task]), "every column is computed"
    assert set(chosen.columns) <= set(METRIC_NAMES)
    assert load_config([], dict(chosen.frames)) != Config()
    assert len(set(chosen.groups)) == len(chosen.groups)


def test_orders_of_the_official_tables():
    script = ["acc@gqa", "miop", "iop@0.3", "iop@0.5", "miou", "iou@0.3", "iou@0.5"]  # as eval_ground.py prints them
    assert [name for name in SUITES["nextgqa"].columns if name in script] == script
    assert SUITES["rextime"].columns[:5] == ("miou", "r1@0.3", "r1@0.5", "accuracy", "gqa@0.5")
    assert SUITES["charades_sta"].columns == SUITES["activitynet_captions"].columns
    assert len(SUITES["mvbench"].groups) == 20
    assert len(SUITES) == 8


def test_unknown_names_and_other_tasks_are_refused():
    with pytest.raises(ConfigError, match="did you mean videomme") as caught:
        suite("video_mme")
    assert caught.value.code == "VRLT-C01"
    check_tasks(SUITES["nextgqa"], [asked("grounded_qa")])
    with pytest.raises(ConfigError, match="this one is videoqa") as caught:
        check_tasks(SUITES["nextgqa"], [asked("grounded_qa"), asked("videoqa")])
    assert caught.value.code == "VRLT-C04"
    assert [group_of(source) for source in ("mvbench/a/b", "mvbench", "")] == ["a/b", "", ""]


def qa(number, source):
    return Sample(str(number), "v.mp4", 9.0, "videoqa", "?", ("a", "b"), "A", source=source)


def test_groups_and_failed_questions():
    sources = ["videomme/long", "videomme/short", "videomme/short", "videomme/other", "videomme"]
    samples = [qa(i, source) for i, source in enumerate(sources)]
    letters = "ABAA"  # the last question's video failed
    answers = [
        score(Response(f"<answer>{letter}</answer>", 5, "stop"), s, think=False)
        for letter, s in zip(letters, samples[:4], strict=True)
    ]
    lost = [DataError(Problem("VRLT-V02", "gone", "held.jsonl:5"))]
    evaluation = Evaluation({}, [{"id": s.id} for s in samples[:4]], lost, {"greedy": answers, "sampled": answers * 2})
    config = Config.model_validate({"eval": {"responses": 2}})
    left_out = assess(SUITES["videomme"], samples, evaluation, config, count_failed=False)
    assert (left_out.n, left_out.failed, left_out.failed_counted) == (5, 1, False)
    assert left_out.metrics["greedy"] == {"n": 4, "well_formed": 1, "accuracy": 0.75}
    assert {name: kinds["greedy"]["accuracy"] for name, kinds in left_out.groups.items()} == {
        "short": 0.5,
        "long": 1.0,
        "other": 1.0,
    }
    assert list(left_out.groups) == ["short", "long", "other"], "official order first"
    counted = assess(SUITES["videomme"], samples, evaluation, config, count_failed=True)
    assert counted.metrics["greedy"] == {"n": 5, "well_formed": 0.8, "accuracy": 0.6}
    assert counted.metrics["sampled"] == {"n": 10, "well_formed": 0.8, "accuracy": 0.6}
    assert counted.to_json()["failed"] == [{"code": "VRLT-V02", "where": "held.jsonl:5", "what": "gone"}]
    nothing = Evaluation({}, [], lost * 5, {})
    assert assess(SUITES["videomme"], samples, nothing, config, count_failed=True).metrics["greedy"]["accuracy"] == 0
    assert assess(SUITES["videomme"], samples, nothing, config, count_failed=False).metrics == {}


@pytest.fixture
def held(demo, tmp_path):
    """Grounded questions about four of the demo's held-out videos, in two groups, in a folder of their own."""
    data = shutil.copytree(demo, tmp_path / "data")
    by_video = {s.video: s for s in read_jsonl(data / "heldout.jsonl")}
    lines = [
        {
            "id": s.id,
            "video": s.video,
            "duration": s.duration,
            "task": "grounded_qa",
            "question": "What moves, and when?",
            "options": ["a square", "a circle"],
            "answer": "AB"[i % 2],
            "spans": [[0.5, s.duration / 2]],
            "source": f"demo/{'odd' if i % 2 else 'even'}",
        }
        for i, s in enumerate(list(by_video.values())[:4])
    ]
    path = data / "gqa.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_suite_from_the_command_line(held, tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["eval", "nextgqa", "--model", str(tiny_folder), "--data", str(held), "--out", str(out), *SMALL]
    assert main(words) == 0
    printed = capsys.readouterr().out
    heads = ("Acc@GQA", "mIoP", "IoP@0.3", "IoP@0.5", "mIoU", "IoU@0.3", "IoU@0.5")
    places = [re.search(rf"(?<!\S){head}(?!\S)", printed).start() for head in heads]
    assert places == sorted(places)
    assert "questions 4, failed 0\n" in printed
    result = json.loads((out / "results.json").read_text("utf-8"))
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert (result["suite"], result["n"], result["n_failed"], result["failed"]) == ("nextgqa", 4, 0, [])
    assert set(result["metrics"]) == {"greedy"}, "one answer a question"
    assert set(result["columns"]) <= set(result["metrics"]["greedy"])
    assert {name: kinds["greedy"]["n"] for name, kinds in result["groups"].items()} == {"even": 2, "odd": 2}
    assert result["data"]["sha256"] == hashlib.sha256(held.read_bytes()).hexdigest()
    assert result["model"] == str(tiny_folder)
    assert result["config"]["rollout"]["max_new_tokens"] == 6, "the command line stands above the suite"
    assert result["versions"]["torch"]
    assert [row["id"] for row in rows] == [s.id for s in read_jsonl(held)]
    right = sum(row["greedy"]["correct"] for row in rows)
    assert result["metrics"]["greedy"]["accuracy"] == right / 4


def test_a_failed_video_is_told_and_counts_where_asked(held, tiny_folder, tmp_path, capsys):
    (held.parent / read_jsonl(held)[0].video).write_bytes(b"not a video")
    words = ["eval", str(tiny_folder), "--suite", "rextime", "--data", str(held), *SMALL]
    assert main([*words, "--out", str(tmp_path / "left_out")]) == 3
    shown = capsys.readouterr()
    assert "questions 4, failed 1: left out;" in shown.out
    assert shown.err.count("VRLT-V02") == 1
    assert main([*words, "--out", str(tmp_path / "counted"), "--count-failed"]) == 0
    shown = capsys.readouterr()
    assert "questions 4, failed 1: counted as wrong" in shown.out
    assert shown.err.count("VRLT-V02") == 1
    results = [json.loads((tmp_path / name / "results.json").read_text("utf-8")) for name in ("left_out", "counted")]
    assert [each["metrics"]["greedy"]["n"] for each in results] == [3, 4]
    assert [each["n_failed"] for each in results] == [1, 1]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["eval"], "VRLT-C02", "MODEL_DIR"),
        (["eval", "mmvu", "--data", "x.jsonl"], "VRLT-C02", "mmvu --model"),
        (["eval", "m", "--model", "n", "--suite", "mmvu"], "VRLT-C04", "two models"),
        (["eval", "m", "--suite", "mmuv", "--data", "x.jsonl"], "VRLT-C01", "did you mean mmvu?"),
        (["eval", "mmuv", "--model", "m", "--data", "x.jsonl"], "VRLT-C01", "did you mean mmvu?"),
        (["eval", "mmvu", "--model", "m"], "VRLT-C04", "data.eval"),
        (["eval", "m", "--data", "x.jsonl", "--count-failed"], "VRLT-C04", "--suite"),
    ],
)
def test_wrong_usage(words, code, text, capsys):
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert code in shown.err
    assert text in shown.err


def test_the_list_of_suites(capsys):
    assert main(["eval", "--list"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[::2]] == list(SUITES)
