"""Bad input of every kind through the command line: the right code, the right exit code, and no run folder."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import safetensors.torch

from vrlt_fast.cli import main
from vrlt_fast.config_load import dump_toml
from vrlt_fast.data.readers import read_jsonl
from vrlt_fast.errors import DataError, SetupError
from vrlt_fast.train.setup import create_run_folder, lock_run_folder, open_run_folder, read_inputs
from vrlt_fast.video.index import probe


@pytest.fixture
def data(demo, tmp_path):
    """A copy of the demo data that a test may break."""
    return shutil.copytree(demo, tmp_path / "data")


@pytest.fixture
def vrlt_train(tmp_path, make_config, data, capsys):
    """Runs ``vrlt train`` on the copy; returns exit code, standard error and the run folder."""

    def run(*words, **changes):
        changes["data"] = {
            "train": str(data / "train.jsonl"),
            "eval": str(data / "heldout.jsonl"),
            **changes.get("data", {}),
        }
        config = make_config(**changes)
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(dump_toml(config), encoding="utf-8")
        code = main(["train", str(recipe), *words])
        return code, capsys.readouterr().err

    return run


def leftovers(tmp_path):
    return sorted(p.name for p in tmp_path.iterdir() if p.name not in ("data", "recipe.toml", "model"))


def edit_line(file, number, **fields):
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **fields})
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def line_of(file, task):
    return next(i for i, s in enumerate(read_jsonl(file)) if s.task == task)


def missing_video(data):
    (data / read_jsonl(data / "train.jsonl")[0].video).unlink()


def corrupt_videos(data):
    for path in sorted((data / "videos").iterdir()):
        path.write_bytes(path.read_bytes()[:300])


def span_outside(data):
    edit_line(data / "train.jsonl", line_of(data / "train.jsonl", "grounding"), spans=[[1.0, 1e4]])


def span_reversed(data):
    edit_line(data / "train.jsonl", line_of(data / "train.jsonl", "grounding"), spans=[[2.0, 1.0]])


def no_options(data):
    edit_line(data / "heldout.jsonl", line_of(data / "heldout.jsonl", "videoqa"), options=[])


def answer_elsewhere(data):
    edit_line(data / "train.jsonl", line_of(data / "train.jsonl", "videoqa"), answer="H")


def unknown_task(data):
    edit_line(data / "train.jsonl", 0, task="captioning")


def duplicate_id(data):
    edit_line(data / "train.jsonl", 3, id=read_jsonl(data / "train.jsonl")[0].id)


def malformed_json(data):
    with (data / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": \n')


def empty_file(data):
    (data / "train.jsonl").write_text("")


@pytest.mark.parametrize(
    ("breaks", "code"),
    [
        (missing_video, "VRLT-V01"),
        (corrupt_videos, "VRLT-V02"),
        (span_outside, "VRLT-D05"),
        (span_reversed, "VRLT-D05"),
        (no_options, "VRLT-D06"),
        (answer_elsewhere, "VRLT-D06"),
        (unknown_task, "VRLT-D04"),
        (duplicate_id, "VRLT-D07"),
        (malformed_json, "VRLT-D02"),
        (empty_file, "VRLT-D01"),
    ],
)
def test_bad_data(vrlt_train, data, tmp_path, breaks, code):
    breaks(data)
    exit_code, told = vrlt_train()
    assert exit_code == 3, told
    assert code in told
    assert "Traceback" not in told
    assert leftovers(tmp_path) == []


def test_a_prompt_that_is_too_long(vrlt_train, tmp_path):
    exit_code, told = vrlt_train(rollout={"max_new_tokens": 4000})
    assert exit_code == 3
    assert "VRLT-D10" in told
    assert "train.jsonl:1" in told
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("where", "code", "exit_code"),
    [
        ("no weights", "VRLT-M01", 4),
        ("no folder", "VRLT-M01", 4),
        ("other weights", "VRLT-M04", 4),
        ("cut", "VRLT-M04", 4),
    ],
)
def test_bad_model(vrlt_train, tiny_folder, tmp_path, where, code, exit_code):
    folder = tmp_path / "model"
    if where != "no folder":
        shutil.copytree(tiny_folder, folder)
    weights = folder / "model.safetensors"
    if where == "no weights":
        weights.unlink()
    elif where == "other weights":
        tensors = safetensors.torch.load_file(weights)
        tensors.pop(sorted(tensors)[0])
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    elif where == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    found, told = vrlt_train(model={"name": str(folder)})
    assert found == exit_code, told
    assert code in told
    assert leftovers(tmp_path) == []


def test_run_folder_that_cannot_be_made(vrlt_train, tmp_path):
    blocker = tmp_path / "recipe.toml"  # a file where a folder would have to be; permissions don't stop root
    exit_code, told = vrlt_train(train={"out": str(blocker / "run")})
    assert exit_code == 4
    assert "VRLT-R02" in told
    assert leftovers(tmp_path) == []


def test_run_folder_that_exists_stays_as_it_is(vrlt_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    exit_code, told = vrlt_train()
    assert exit_code == 4
    assert "VRLT-R01" in told
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_resume_of_nothing(vrlt_train, tmp_path):
    exit_code, told = vrlt_train("--resume")
    assert exit_code == 4
    assert "VRLT-K02" in told
    assert leftovers(tmp_path) == []


def test_resume_with_another_configuration(vrlt_train, make_config, data, tmp_path):
    files = {"train": str(data / "train.jsonl"), "eval": str(data / "heldout.jsonl")}
    out = create_run_folder(make_config(data=files))
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    exit_code, told = vrlt_train("--resume", grpo={"lr": 5e-4})
    assert exit_code == 4
    assert "VRLT-K03" in told
    assert "grpo.lr: 0.001 -> 0.0005" in told
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    free = make_config(data=files, checkpoint={"every": 7}, eval={"samples": 2}, log={"project": "other"})
    assert open_run_folder(free) == out


def test_dry_run_checks_and_writes_nothing(vrlt_train, data, tmp_path):
    assert vrlt_train("--dry-run")[0] == 0
    missing_video(data)
    assert vrlt_train("--dry-run")[0] == 3
    assert leftovers(tmp_path) == []


def test_dry_run_knows_what_the_layers_need(vrlt_train, tmp_path):
    exit_code, told = vrlt_train("--dry-run", kernels={"layers": "liger"})
    assert exit_code == 4
    assert "kernels.layers" in told
    assert leftovers(tmp_path) == []


def test_few_corrupt_videos_are_reported_and_the_run_goes_on(make_config, data):
    config = make_config(data={"train": str(data / "train.jsonl"), "eval": "", "max_failed_share": 0.2})
    samples = read_jsonl(data / "train.jsonl")
    videos = list(dict.fromkeys(s.video for s in samples))
    for name in videos[:2]:
        (data / name).write_bytes(b"")
    inputs = read_inputs(config)
    assert [p.code for p in inputs.broken] == ["VRLT-V02"] * 2
    assert all(v in p.what for v, p in zip(videos, inputs.broken, strict=False))
    assert len(inputs.train) == len(samples)
    (data / videos[2]).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        read_inputs(config)
    assert [p.code for p in caught.value.problems] == ["VRLT-V02"] * 3 + ["VRLT-D12"]


def test_a_video_that_cannot_be_resized_is_a_data_problem(make_config, data):
    import av
    import numpy as np

    name = read_jsonl(data / "train.jsonl")[0].video
    with av.open(str(data / name), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 2050, 10, "yuv420p"
        for _ in range(100):
            frame = av.VideoFrame.from_ndarray(np.zeros((10, 2050, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert probe(data / name).width == 2050
    files = {"train": str(data / "train.jsonl"), "eval": "", "max_failed_share": 0.5}
    assert [p.code for p in read_inputs(make_config(data=files)).broken] == ["VRLT-V06"]


def test_run_folder_has_configuration_and_versions(make_config):
    config = make_config()
    out = create_run_folder(config)
    assert sorted(p.name for p in out.iterdir()) == ["checkpoints", "config.resolved.toml", "eval", "versions.json"]
    assert open_run_folder(config) == out
    versions = json.loads((out / "versions.json").read_text())
    assert {"vrlt_fast", "torch", "transformers", "python", "git", "device"} <= versions.keys()
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []


def test_two_processes_do_not_share_a_run_folder(tmp_path):
    with lock_run_folder(tmp_path):
        with pytest.raises(SetupError) as caught:
            lock_run_folder(tmp_path)
        assert caught.value.code == "VRLT-R02"
    lock_run_folder(tmp_path).close()


def test_a_missing_log_package_leaves_no_run_folder(vrlt_train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    exit_code, told = vrlt_train(log={"to": ["trackio"]})
    assert exit_code == 4
    assert "VRLT-E01" in told
    assert not leftovers(tmp_path)
