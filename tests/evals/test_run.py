"""Evaluation of a tiny model on real clips."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from vrlt_fast.config import Config
from vrlt_fast.data.readers import read_jsonl
from vrlt_fast.errors import ConfigError, DataError
from vrlt_fast.evals.run import evaluate, evaluate_folder
from vrlt_fast.model.load import load_model
from vrlt_fast.video.cache import ClipLoader


@pytest.fixture
def config(demo, tiny_folder):
    return Config.model_validate(
        {
            "model": {"name": str(tiny_folder), "dtype": "float32", "device": "cpu"},
            "data": {"eval": str(demo / "heldout.jsonl")},
            "video": {"sampling": "fps", "fps": 1.0, "min_frames": 2, "min_pixels": 784, "max_pixels": 1568},
            "prompt": {"video_layout": "interleaved", "think": False},
            "rollout": {"max_new_tokens": 6},
            "eval": {"samples": 5, "responses": 2, "prompts": 2},
        }
    )


@pytest.fixture
def lm(config):
    opened = load_model(config.model)
    with torch.no_grad():
        for p in opened.module.parameters():
            p.mul_(2.0)  # sharper than a fresh initialisation, so that pictures make a difference
    return opened


def texts(evaluation):
    return [[row["greedy"]["text"], *(s["text"] for s in row["sampled"])] for row in evaluation.rows]


def test_rows_and_metrics(lm, config, demo):
    samples = read_jsonl(demo / "heldout.jsonl")[:5]
    ticks = []
    loader = ClipLoader(config.video, lm.info.geometry)
    found = evaluate(lm, samples, loader, config, root=demo, temperatures=[1.0, 0.25], progress=ticks.append)
    assert [row["id"] for row in found.rows] == [s.id for s in samples]
    assert ticks == [2, 2, 1]
    assert {k: v["all"]["n"] for k, v in found.metrics.items()} == {"greedy": 5, "sampled": 10, "sampled@0.25": 10}
    for row, sample in zip(found.rows, samples, strict=True):
        assert row["spans"] == [list(s) for s in sample.spans]
        assert len(row["sampled"]) == 2
        assert (row["greedy"]["tiou"] is None) is not sample.wants_spans
        assert (row["greedy"]["correct"] is None) is not sample.wants_answer
    assert found.failed == []
    again = evaluate(lm, samples, loader, config, root=demo)
    assert texts(again) == texts(found)
    assert len({tuple(t) for t in texts(found)}) == 5


def test_no_two_questions_share_their_random_numbers(lm, config, demo):
    """Five times one question, in batches of two: equal seeds would give equal samples."""
    sample = read_jsonl(demo / "heldout.jsonl")[0]
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"temperature": 3.0})})
    found = evaluate(lm, [sample] * 5, ClipLoader(config.video, lm.info.geometry), config, root=demo)
    assert len({row["greedy"]["text"] for row in found.rows}) == 1
    sampled = [s["text"] for row in found.rows for s in row["sampled"]]
    assert len(set(sampled)) == len(sampled) == 10


def test_without_sampled_answers_there_are_no_sampled_metrics(lm, config, demo):
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"responses": 0})})
    samples = read_jsonl(demo / "heldout.jsonl")[:2]
    found = evaluate(lm, samples, ClipLoader(config.video, lm.info.geometry), config, root=demo)
    assert set(found.metrics) == {"greedy"}
    assert [row["sampled"] for row in found.rows] == [[], []]


def test_grey_frames_reach_the_model(lm, config, demo):
    samples = read_jsonl(demo / "heldout.jsonl")[:4]
    seen = []

    def grey(clip):
        seen.append(clip.key)
        return dataclasses.replace(clip, patches=torch.full_like(clip.patches, 127), key=f"grey {clip.key}")

    loader = ClipLoader(config.video, lm.info.geometry)
    blind = evaluate(lm, samples, loader, config, root=demo, alter=grey)
    assert len(seen) == 4 + sum(len(s.images) for s in samples)
    assert texts(blind) != texts(evaluate(lm, samples, loader, config, root=demo))


def test_a_folder_is_evaluated_and_its_predictions_written(config, demo, tmp_path):
    out, ticks = tmp_path / "predictions.jsonl", []
    metrics = evaluate_folder(config, out, lambda done, total: ticks.append((done, total)))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == metrics["greedy"]["all"]["n"] == 5
    assert metrics["greedy"]["all"]["well_formed"] == sum(r["greedy"]["well_formed"] for r in rows) / 5
    assert {r["id"] for r in rows} <= {s.id for s in read_jsonl(demo / "heldout.jsonl")}
    assert ticks == [(2, 5), (4, 5), (5, 5)]


def test_videos_that_fail_are_told_after_the_predictions_are_written(config, demo, tmp_path):
    data = shutil.copytree(demo, tmp_path / "data")
    samples = read_jsonl(data / "heldout.jsonl")
    lost = samples[0].video
    (data / lost).write_bytes(b"not a video")
    changes = {"data": {"eval": str(data / "heldout.jsonl")}, "eval": {**config.eval.model_dump(), "samples": 0}}
    config = Config.model_validate({**config.model_dump(), **changes})
    out = tmp_path / "predictions.jsonl"
    with pytest.raises(DataError) as caught:
        evaluate_folder(config, out)
    assert {p.code for p in caught.value.problems} == {"VRLT-V02"}
    assert caught.value.exit_code == 3
    kept = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert kept == [s.id for s in samples if s.video != lost]


def test_nothing_to_evaluate_on(config):
    with pytest.raises(ConfigError) as caught:
        evaluate_folder(Config.model_validate({**config.model_dump(), "data": {}}))
    assert caught.value.code == "VRLT-C04"
