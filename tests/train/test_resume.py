"""Killed runs: ``--resume`` ends with the weights and logs of the run that nobody disturbed, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from vrlt_fast.config import Config
from vrlt_fast.config_load import dump_toml

REPOSITORY = Path(__file__).parents[2]
TIMES = {"time", "seconds", "cpu_seconds", "tokens_s", "phases", "peak_gb"}
SFT, GRPO = 3, 4


@pytest.fixture(scope="module")
def runs(demo, tiny_folder, tmp_path_factory):
    """A folder with a recipe a run; one video of the data is broken, so that there is a count of failures to keep."""
    folder = tmp_path_factory.mktemp("resume")
    data = shutil.copytree(demo, folder / "data")
    sorted((data / "videos").glob("train*"))[1].write_bytes(b"not a video")
    return Runs(folder, data, tiny_folder)


class Runs:
    def __init__(self, folder: Path, data: Path, model: Path):
        self.folder, self.data, self.model = folder, data, model
        self._undisturbed: Path | None = None

    def recipe(self, name: str) -> Path:
        config = Config.model_validate(
            {
                "model": {"name": str(self.model), "dtype": "float32", "device": "cpu", "freeze_vision": False},
                "data": {
                    "train": str(self.data / "train.jsonl"),
                    "eval": str(self.data / "heldout.jsonl"),
                    "max_failed_share": 1.0,
                },
                "video": {"sampling": "fps", "fps": 1.0, "min_frames": 2, "min_pixels": 784, "max_pixels": 1568},
                "prompt": {"video_layout": "interleaved", "think": False},
                "sft": {"steps": SFT, "batch": 6, "lr": 1e-3},
                "rollout": {"group_size": 3, "prompts": 3, "max_new_tokens": 8},
                "reward": {"shuffle": True},
                "grpo": {"steps": GRPO, "lr": 1e-3, "beta": 0.05},
                # An untrained model earns nothing: the decay leads away from the reference, so the KL has a gradient.
                "optim": {"weight_decay": 10.0, "warmup": 1},
                "train": {"out": str(self.folder / name), "seed": 5, "deterministic": True, "threads": 1},
                "checkpoint": {"every": 2},
                "eval": {"samples": 3, "responses": 1},
            }
        )
        path = self.folder / f"{name}.toml"
        path.write_text(dump_toml(config), encoding="utf-8")
        return path

    def start(self, name: str, *, resume: bool) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")])
        words = [sys.executable, "-m", "vrlt_fast", "train", str(self.recipe(name)), *(["--resume"] if resume else [])]
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def finish(self, name: str, *, resume: bool) -> Path:
        process = self.start(name, resume=resume)
        _, told = process.communicate(timeout=100)
        assert process.returncode == 0, told
        return self.folder / name

    @property
    def undisturbed(self) -> Path:
        if self._undisturbed is None:
            self._undisturbed = self.finish("undisturbed", resume=False)
        return self._undisturbed

    def stop_when(self, name: str, reached: Callable[[Path], bool], number: int, *, resume: bool) -> int | None:
        """Send a signal at the first moment when ``reached(run folder)`` holds; None when the run ended before it."""
        process = self.start(name, resume=resume)
        limit = time.monotonic() + 100
        try:
            while process.poll() is None and time.monotonic() < limit:
                if reached(self.folder / name):
                    process.send_signal(number)
                    break
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.002)
            _, told = process.communicate(timeout=100)
        finally:
            process.kill()
        assert process.returncode in (0, 75, -number), told
        return None if process.returncode == 0 else process.returncode


def trained(run: Path) -> list[tuple[str, int]]:
    """Stage and step of the train records so far."""
    with suppress(FileNotFoundError):
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]
        return [(r["stage"], r["step"]) for r in records if r["kind"] == "train"]
    return []


def at_step(stage: str, step: int) -> Callable[[Path], bool]:
    return lambda run: (stage, step) in trained(run)


def while_saving(stage: str) -> Callable[[Path], bool]:
    return lambda run: any((run / "checkpoints").glob(f".tmp-{stage}-*/*"))


def without_times(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def assert_same(run: Path, expected: Path) -> None:
    for stage in ("sft", "grpo"):
        ours, theirs = (
            {f.name: load_file(f) for f in (r / "checkpoints" / f"{stage}-final").glob("*.safetensors")}
            for r in (run, expected)
        )
        assert ours.keys() == theirs.keys()
        assert ours
        for name, tensors in theirs.items():
            assert ours[name].keys() == tensors.keys()
            assert [k for k, t in tensors.items() if t.tobytes() != ours[name][k].tobytes()] == []
    assert without_times(run) == without_times(expected)
    for name in ("completions.jsonl", "eval/start.jsonl", "eval/sft.jsonl", "eval/grpo.jsonl"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == sorted(
        p.name for p in (expected / "checkpoints").iterdir()
    )


def test_the_undisturbed_run_learns_and_counts(runs):
    """What the comparisons below rest on: weights move in both stages, and a video failed in each."""
    records = [r for r in without_times(runs.undisturbed) if r["kind"] == "train"]
    assert [(r["stage"], r["step"]) for r in records] == [
        *(("sft", i + 1) for i in range(SFT)),
        *(("grpo", i + 1) for i in range(GRPO)),
    ]
    assert records[SFT - 1]["failed_videos"] >= 1
    assert all(r["kl"] > 0 and r["grad_norm"] > 0 for r in records[-2:])
    folder = runs.undisturbed / "checkpoints"
    states = [load_file(next((folder / f"{s}-final").glob("model*.safetensors"))) for s in ("sft", "grpo")]
    start = load_file(runs.model / "model.safetensors")
    for a, b in ((start, states[0]), (states[0], states[1])):
        assert all((a[k] != b[k]).any() for k in a if k.endswith("q_proj.weight"))


@pytest.mark.timeout(400)
def test_kill_9_and_resume(runs, seed):
    expected, rng = runs.undisturbed, random.Random(seed)
    moments = [at_step("sft", rng.randint(1, SFT)), while_saving("grpo"), at_step("grpo", rng.randint(3, GRPO))]
    killed = [runs.stop_when("killed", moment, signal.SIGKILL, resume=i > 0) for i, moment in enumerate(moments)]
    assert killed[0] == -signal.SIGKILL
    assert_same(runs.finish("killed", resume=True), expected)


@pytest.mark.timeout(400)
def test_sigterm_stops_after_a_checkpoint_and_resumes(runs, seed):
    expected, rng = runs.undisturbed, random.Random(seed)
    stage, step = rng.choice([("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2)])
    assert runs.stop_when("stopped", at_step(stage, step), signal.SIGTERM, resume=False) == 75
    last = trained(runs.folder / "stopped")[-1]
    names = {p.name for p in (runs.folder / "stopped" / "checkpoints").iterdir()}
    final = last[1] == {"sft": SFT, "grpo": GRPO}[last[0]]
    assert (f"{last[0]}-final" if final else f"{last[0]}-{last[1]:06d}") in names
    run = runs.finish("stopped", resume=True)
    for extra in set((run / "checkpoints").iterdir()) - {
        run / "checkpoints" / p.name for p in (expected / "checkpoints").iterdir()
    }:
        shutil.rmtree(extra)  # the signal's own checkpoint, which the undisturbed run has no reason to write
    for name in {p.name for p in (expected / "checkpoints").iterdir()} - {
        p.name for p in (run / "checkpoints").iterdir()
    }:
        assert not name.endswith("-final")
        shutil.copytree(expected / "checkpoints" / name, run / "checkpoints" / name)
    assert_same(run, expected)


def test_resume_after_the_training_file_has_changed(runs):
    shutil.copytree(runs.undisturbed, runs.folder / "changed")
    file = runs.data / "train.jsonl"
    before = file.read_bytes()
    file.write_bytes(before + b"\n")
    try:
        process = runs.start("changed", resume=True)
        _, told = process.communicate(timeout=100)
    finally:
        file.write_bytes(before)
    assert process.returncode == 4
    assert "VRLT-K03" in told
    assert "train.jsonl" in told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifteen_kills(runs, seed):
    expected, rng = runs.undisturbed, random.Random(seed)
    kills = 0
    for attempt in range(15):
        stage, step = rng.choice([*(("sft", i + 1) for i in range(SFT)), *(("grpo", i + 1) for i in range(GRPO))])
        moment = rng.choice([at_step(stage, step), while_saving("sft"), while_saving("grpo")])
        kills += runs.stop_when("often", moment, signal.SIGKILL, resume=attempt > 0) is not None
    assert kills >= 3
    assert_same(runs.finish("often", resume=True), expected)
