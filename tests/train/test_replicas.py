"""Several processes: the run of one process but for rounding, whatever the number, and one end for all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vrlt_fast.config import ParallelConfig
from vrlt_fast.config_load import dump_toml
from vrlt_fast.errors import ConfigError, Stopped
from vrlt_fast.parallel import launch
from vrlt_fast.parallel.mesh import check_shard, join
from vrlt_fast.parallel.replicas import Replicas
from vrlt_fast.train.setup import read_inputs
from vrlt_fast.train.trainer import train

REPOSITORY = Path(__file__).parents[2]
RUN = {
    "sft": {"steps": 2, "batch": 3, "lr": 1e-3, "narration": 0.5},
    "rollout": {"group_size": 3, "prompts": 3, "max_new_tokens": 6},
    "grpo": {"steps": 2, "lr": 1e-3, "beta": 0.05, "updates": 2},
    "reward": {"shuffle": True},
    "optim": {"weight_decay": 10.0, "warmup": 1},
}


@pytest.fixture
def start(make_config, tmp_path):
    """``start(name, replicas, *words, sp, shard, **changes)``: the command line in a process of its own."""

    def run(name, replicas, *words, sp=1, shard=1, **changes):
        config = make_config(**{**RUN, "parallel": {"replicas": replicas, "sp": sp, "shard": shard}, **changes})
        config = config.model_copy(update={"train": config.train.model_copy(update={"out": str(tmp_path / name)})})
        file = tmp_path / f"{name}-{replicas}-{sp}-{shard}.toml"
        file.write_text(dump_toml(config), encoding="utf-8")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])}
        command = [sys.executable, "-m", "vrlt_fast", "train", str(file), *words]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return run


def done(process, code=0):
    out, told = process.communicate(timeout=380)
    assert process.returncode == code, told
    return out, told


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(run, stage):
    return load_file(next((run / "checkpoints" / f"{stage}-final").glob("model-*.safetensors")))


def assert_close(ours, theirs):
    """Adam divides: where a gradient is next to nothing, rounding decides on a whole step of a number."""
    for name, tensor in theirs.items():
        error = float((ours[name] - tensor).norm())
        assert error < 1e-4 * float(tensor.norm()) + 3e-6 * tensor.numel() ** 0.5, (name, error)


ONE = {"replicas": 1}
FOUR = {"replicas": 2, "sp": 2, "shard": 4}
MESHES = [
    ({"replicas": 2}, ONE),
    ({"replicas": 1, "sp": 2, "shard": 2}, ONE),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in [
            ({"replicas": 1, "sp": 2}, ONE),
            ({"replicas": 2, "sp": 2}, ONE),
            ({"replicas": 2, "shard": 2}, FOUR),
            (FOUR, {"replicas": 2, "shard": 2}),
            ({"replicas": 2, "sp": 2, "shard": 2}, {"replicas": 3, "shard": 3}),
        ]
    ),
]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("mesh", "later"), MESHES, ids=str)
def test_several_processes_train_as_one_does(start, tmp_path, mesh, later):
    """Uneven shares (two prompts and one), and a resume with another number of processes; in stages where they share
    sequences, with a frozen tower: nothing is earned here, and Adam makes whole steps of what a trained one rounds.
    """
    sp = mesh.get("sp", 1)
    more = {"train": {"micro_tokens": 60 // sp}, "model": {"freeze_vision": True}} if sp > 1 else {}
    one, two = start("one", 1, **more), start("two", **mesh, **more)
    done(one)
    out, _ = done(two)
    assert out.count("report:") == 1
    alone, both = tmp_path / "one", tmp_path / "two"
    for stage in ("sft", "grpo"):
        assert_close(weights(both, stage), weights(alone, stage))
    assert len(records(both)) == len(records(alone))
    for ours, theirs in zip(records(both), records(alone), strict=True):
        for key in ("loss", "reward", "kl", "grad_norm", "tokens_trained", "responses", "length"):
            assert (key in ours) == (key in theirs)
            assert ours.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-3, abs=1e-6), key
        assert ours.get("metrics") == theirs.get("metrics")
    lines = [(r / "completions.jsonl").read_text(encoding="utf-8").splitlines() for r in (alone, both)]
    told = [{(d["step"], d["id"], d["response"]) for d in map(json.loads, text)} for text in lines]
    assert told[0] == told[1]
    assert len(lines[0]) == len(lines[1]) == 2 * 3 * 3
    evals = [[json.loads(x)["id"] for x in (r / "eval" / "sft.jsonl").read_text().splitlines()] for r in (alone, both)]
    assert evals[0] == evals[1]
    for name in ("grpo-final", "grpo-000001"):
        shutil.rmtree(both / "checkpoints" / name, ignore_errors=True)
    done(start("two", later["replicas"], "--resume", **{k: n for k, n in later.items() if k != "replicas"}, **more))
    assert_close(weights(both, "grpo"), weights(alone, "grpo"))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_shards_of_bf16_weights_resume_bit_by_bit(start, tmp_path):
    """With the probe before the first step, which leaves nothing; states in bf16, in host memory."""
    more = {"model": {"dtype": "bfloat16"}, "checkpoint": {"every": 1, "keep": 5}, "eval": {"start": False}}
    more |= {"optim": {**RUN["optim"], "states": "bfloat16", "offload": True}}
    probed = {**more, "train": {"probe": "on"}}
    one, two = start("one", 2, shard=2, **more), start("two", 2, shard=2, **probed)
    done(one)
    out, _ = done(two)
    assert "probe: 3 responses of 6 tokens" in out
    whole, other = tmp_path / "one", tmp_path / "two"
    for name in ("grpo-final", "sft-final", "sft-000002"):
        shutil.rmtree(other / "checkpoints" / name, ignore_errors=True)
    for path in (other / "checkpoints").glob("grpo-*"):
        shutil.rmtree(path)
    done(start("two", 2, "--resume", shard=2, **probed))
    for stage in ("sft", "grpo"):
        ours, theirs = weights(other, stage), weights(whole, stage)
        assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_one_group_is_rolled_out_by_all(start, tmp_path):
    """Fewer prompts than processes: the prompt's keys and values are shared, and the run is that of one process."""
    more = {"rollout": {**RUN["rollout"], "prompts": 1}, "model": {"freeze_vision": True}}
    one, two = start("one", 1, **more), start("two", 1, sp=3, **more)
    done(one)
    done(two)
    alone, every = tmp_path / "one", tmp_path / "two"
    assert_close(weights(every, "grpo"), weights(alone, "grpo"))
    lines = [(r / "completions.jsonl").read_text(encoding="utf-8").splitlines() for r in (alone, every)]
    told = [[(d["step"], d["id"], d["response"]) for d in map(json.loads, text)] for text in lines]
    assert told[0] == told[1]
    for ours, theirs in zip(records(every), records(alone), strict=True):
        for key in ("responses", "tokens_generated", "prefills", "clips_encoded"):
            assert ours.get(key) == theirs.get(key), key


@pytest.mark.timeout(300)
def test_a_signal_ends_all_with_one_checkpoint(start, tmp_path):
    process = start("run", 2, sft={"steps": 500, "batch": 2, "lr": 1e-3}, eval={"start": False, "samples": 3})
    metrics = tmp_path / "run" / "metrics.jsonl"
    limit = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text()) and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = done(process, 75)
    assert "VRLT-S02" in told
    step = records(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"sft-{step:06d}" / "COMMIT.json").is_file()


@pytest.mark.timeout(200)
def test_the_exit_code_is_that_of_what_went_wrong(start, tmp_path):
    (tmp_path / "run").mkdir()
    _, told = done(start("run", 2), 4)
    head, _, last = told.rpartition("failed first, with exit code 4:\n")
    assert "process 0 of 2" in head
    assert "VRLT-R01" in last


def test_processes_without_work_are_refused(make_config):
    with pytest.raises(ConfigError, match="some would have nothing to do"):
        read_inputs(make_config(**RUN, parallel={"replicas": 4}))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("rollout", "engine", "vllm"), ("train", "prefix", "replicated"), ("train", "verify_shared_prefix", "first_step")],
)
@pytest.mark.parametrize("parallel", [{"sp": 2}, {"replicas": 2, "shard": 2}], ids=str)
def test_what_does_not_share_passes_is_refused(make_config, parallel, section, key, value):
    with pytest.raises(ConfigError, match=f"goes with {section}.{key} = ") as caught:
        read_inputs(make_config(parallel=parallel, **{section: {key: value}}))
    assert caught.value.problems[0].where == f"{section}.{key}"


def test_adapters_have_no_shards(make_config):
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=r"parallel\.shard = 2 goes with lora\.rank = 0 only"):
        read_inputs(make_config(parallel={"replicas": 2, "shard": 2}, lora={"rank": 2}))


@pytest.mark.parametrize(
    ("replicas", "sp", "shard", "fits"),
    [(2, 2, 3, "1, 2, 4"), (3, 1, 2, "1, 3"), (2, 3, 2, "1, 3, 6"), (1, 4, 2, "1, 4"), (1, 1, 2, "1")],
)
def test_numbers_that_share_no_weights_are_refused_with_those_that_do(replicas, sp, shard, fits):
    with pytest.raises(ConfigError) as caught:
        check_shard(replicas, sp, shard)
    assert caught.value.problems[0].fix == f"set parallel.shard to one of {fits}"
    for number in map(int, fits.split(", ")):
        check_shard(replicas, sp, number)


def test_a_process_that_never_comes_is_waited_for_as_long_as_said(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(Stopped, match=r"VRLT-S04 .*didn't come to: the start of all processes"):
        join("cpu", ParallelConfig(replicas=2, wait=0.01))


@pytest.mark.timeout(300)
def test_a_process_that_is_killed_ends_all_under_its_name(start, tmp_path):
    """And the run goes on from its checkpoint, with fewer."""
    changes = {"sft": {"steps": 12, "batch": 2, "lr": 1e-3}, "eval": {"start": False, "samples": 3}}
    changes |= {"checkpoint": {"every": 1}, "train": {"stages": ["sft"]}}
    process = start("run", 2, shard=2, **changes)
    run, limit = tmp_path / "run" / "checkpoints", time.monotonic() + 120
    while not list(run.glob("sft-0*/COMMIT.json")) and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = (pid for pid in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(second), signal.SIGKILL)
    begin = time.monotonic()
    _, told = process.communicate(timeout=100)
    assert time.monotonic() - begin < 5 * 15
    assert process.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 failed first, with signal 9 (SIGKILL):\nit left no message\n" in told[-200:]
    assert "VRLT-S04" in told
    done(start("run", 1, "--resume", **changes))
    assert [r["step"] for r in records(tmp_path / "run") if r["kind"] == "train"] == list(range(1, 13))


def test_what_the_launcher_kills_is_no_cause(monkeypatch, tmp_path):
    """One has stopped in order, the other doesn't end by itself."""
    monkeypatch.setattr(launch, "GRACE", 0.0)
    stopped = subprocess.Popen([sys.executable, "-c", "raise SystemExit(75)"])
    stopped.wait()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert launch._end([stopped, other], [75, None], tmp_path) == 75
    assert other.returncode == -signal.SIGKILL


@pytest.mark.usefixtures("one_thread")
def test_another_number_of_processes_than_configured_is_refused(make_config):
    with pytest.raises(ConfigError, match=r"parallel\.sp = 2, but there are 1 processes"):
        train(make_config(**RUN, parallel={"sp": 2}))


def test_alone_everything_is_as_given():
    alone = Replicas()
    assert alone.share([3, 4]) == [3, 4]
    assert alone.sum([1.5, 2.0]) == [1.5, 2.0]
    assert alone.gather("x") == ["x"]
    assert alone.place(7) == 7
    assert [Replicas(1, 3).share(range(7)), Replicas(1, 3).place(1)] == [[1, 4], 4]
