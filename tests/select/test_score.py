"""Scoring with a tiny model: kills, resumption, shards, waves, broken videos, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.select.commands import environment, vrlt
from vrlt_fast.cli import main
from vrlt_fast.config_load import load_config
from vrlt_fast.errors import ConfigError, DataError, Stopped
from vrlt_fast.rollout.group import RolloutRequest
from vrlt_fast.rollout.rows import row_seeds
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.select import score
from vrlt_fast.select.scores import ScoreFile, read_header, read_tables
from vrlt_fast.select.stopping import INFORMATIVE, class_of

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def read(path: Path) -> dict[str, dict]:
    """Lines by id; none is there twice."""
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()[1:]]
    assert len({line["id"] for line in found}) == len(found)
    return {line["id"]: line for line in found}


def config_of(workplace: Path, **overrides: object):
    return load_config([workplace / "recipe.toml"], {k.replace("__", "."): v for k, v in overrides.items()})


@pytest.fixture(scope="module")
def scored(workplace, one_torch_thread) -> Path:
    """Scores that nobody disturbed."""
    patch = pytest.MonkeyPatch()
    patch.setattr(score, "BATCH", 2)
    patch.chdir(workplace)
    score.score_samples(config_of(workplace), workplace / "undisturbed.jsonl")
    patch.undo()
    return workplace / "undisturbed.jsonl"


def test_what_a_line_says(scored, demo):
    samples = [json.loads(line) for line in (demo / "train.jsonl").read_text("utf-8").splitlines()]
    lines = read(scored)
    assert sorted(lines) == sorted(s["id"] for s in samples)
    for number, sample in enumerate(samples, 1):
        line = lines[sample["id"]]
        assert (line["task"], line["line"]) == (sample["task"], number)
        assert line["rewards"] == line["parts"]["user:worth:worth"]
        assert len(line["rewards"]) == len(line["n_tokens"]) == sum(line["waves"])
        assert {"format", "user:worth:worth"} < set(line["parts"])
        if line["waves"] == [2, 2]:
            assert class_of(line["rewards"][:2], 4) != INFORMATIVE
    kinds = {tuple(line["waves"]) for line in lines.values()}
    assert kinds == {(2,), (2, 2)}
    assert len({tuple(line["rewards"]) for line in lines.values()}) > 8


def test_ten_kills(workplace, scored, seed):
    """SIGKILL at ten random counts of lines: each sample is scored once, and as if nothing had been."""
    rng = random.Random(seed)
    moments = sorted(rng.sample(range(1, 26), 10))
    out = workplace / "killed.jsonl"
    words = [sys.executable, str(Path(__file__).with_name("killed.py")), str(workplace / "recipe.toml"), str(out)]
    run = subprocess.run(
        [*words, *map(str, moments)], cwd=workplace, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert run.stdout.split()[-1] == "0", run.stderr
    assert int(run.stdout.split()[1]) >= 6, f"{run.stdout}: too few of the kills met a running process"
    assert read(out) == read(scored)


def test_a_torn_line_is_cut(workplace, scored, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(score, "BATCH", 2)
    raw = scored.read_bytes()
    keep = raw[: raw.index(b"\n", len(raw) // 2) + 40]  # 39 bytes of the next line
    out = workplace / "torn.jsonl"
    for start in (keep, raw[:-1], raw[:30], b""):
        out.write_bytes(start)
        before = start.count(b"\n")
        found = score.score_samples(config_of(workplace), out)
        assert found.done == len(read(scored)) - max(before - 1, 0)
        assert read(out) == read(scored)
    assert score.score_samples(config_of(workplace), out).done == 0


def test_waves_draw_what_one_would_have_drawn(workplace, scored, monkeypatch):
    monkeypatch.chdir(workplace)
    out = workplace / "whole.jsonl"
    score.score_samples(config_of(workplace, select__first=0), out)
    whole = read(out)
    for name, line in read(scored).items():
        n = len(line["rewards"])
        assert line["rewards"] == whole[name]["rewards"][:n]
        assert line["n_tokens"] == whole[name]["n_tokens"][:n]
        assert whole[name]["waves"] == [4]


def test_seeds_of_the_second_wave_go_on_from_the_first():
    sampling = Sampling(4)
    for seed in (0, 12345, 2**63 - 1):
        whole = row_seeds([RolloutRequest(None, 8, sampling, seed)])
        later = row_seeds([RolloutRequest(None, 5, sampling, score.later_seed(seed, 3))])
        assert later == whole[3:]
    assert score.seed_of("a", 1) != score.seed_of("b", 1) != score.seed_of("b", 2)


def test_shards_are_one_set(workplace, scored, monkeypatch):
    monkeypatch.chdir(workplace)
    config = config_of(workplace, select__first=0)
    out = workplace / "parts.jsonl"
    for part in (1, 2, 3):
        score.score_samples(config, out, shard=(part, 3))
    paths = [workplace / f"parts.{i}-of-3.jsonl" for i in (1, 2, 3)]
    table = read_tables(paths)
    assert sorted(table.ids) == sorted(read(scored))
    assert [len(read(path)) for path in paths] == [8, 9, 9]
    with pytest.raises(DataError, match=r"L02.*shards \[1, 3\] of 3"):
        read_tables([paths[0], paths[2]])
    assert len(read_tables([paths[0], paths[2]], partial=True).ids) == 17
    with pytest.raises(DataError, match=r"L02.*twice"):
        read_tables([*paths, paths[0]])
    with pytest.raises(DataError, match=r"L01.*first.*shard"):
        read_tables([scored, paths[0]])


def test_mixing_is_refused(workplace, scored, tmp_path, tiny_folder, demo, monkeypatch):
    monkeypatch.chdir(workplace)
    before = scored.read_bytes()
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = next(model.glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    data = tmp_path / "train.jsonl"
    data.write_bytes((demo / "train.jsonl").read_bytes().replace(b"When", b"when", 1))
    for overrides, named in (
        ({"model.name": str(model)}, "another model"),
        ({"data.train": str(data), "data.root": str(demo)}, "another data"),
        ({"rollout.temperature": 0.9}, "rollout.temperature: 1.0 there, 0.9 here"),
        ({"reward.user_weights": (2.0,)}, "weights"),
        ({"select.repeats": 8}, "repeats"),
        ({"train.seed": 8}, "train.seed"),
    ):
        with pytest.raises(DataError, match="L01") as caught:
            score.score_samples(load_config([workplace / "recipe.toml"], overrides), scored)
        assert named in str(caught.value)
    moved = shutil.copytree(tiny_folder, tmp_path / "moved")
    faster = {"model.name": str(moved), "video.prefetch": 1, "rollout.max_rows": 16, "eval.prompts": 3}
    assert score.score_samples(load_config([workplace / "recipe.toml"], faster), scored).done == 0
    assert scored.read_bytes() == before
    with pytest.raises(DataError, match="L02"):
        score.score_samples(config_of(workplace), demo / "train.jsonl")
    with pytest.raises(ConfigError, match="C04"):
        score.score_samples(config_of(workplace, select__first=4), workplace / "x.jsonl")
    with (
        ScoreFile(scored, read_header(scored)),
        pytest.raises(DataError, match="another process"),
        ScoreFile(scored, read_header(scored)),
    ):
        pass


def test_broken_videos_are_noted_and_tried_again_when_asked(workplace, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(workplace)
    data = shutil.copytree(demo, tmp_path / "data")
    video = sorted((data / "videos").glob("train*"))[1]
    whole = video.read_bytes()
    video.write_bytes(b"not a video")
    config = config_of(workplace, data__train=str(data / "train.jsonl"), select__first=0)
    out = tmp_path / "scores.jsonl"
    assert score.score_samples(config, out).done == 26
    lost = [line for line in read(out).values() if "failed" in line]
    assert lost
    assert {line["failed"] for line in lost} == {"VRLT-V02"}
    table = read_tables([out])
    assert table.failed == {"VRLT-V02": len(lost)}
    assert len(table.ids) == 26 - len(lost)
    video.write_bytes(whole)
    assert score.score_samples(config, out).done == 0
    assert score.score_samples(config, out, retry_failed=True).done == len(lost)
    assert len(read_tables([out]).ids) == 26
    assert read_tables([out]).failed == {}


def test_a_signal_ends_it_resumably(workplace, scored, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(score, "BATCH", 2)
    out = workplace / "signalled.jsonl"
    ours = signal.getsignal(signal.SIGTERM)

    def stop(progress: score.Progress) -> None:
        if progress.done == 5:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="S02 stopped by SIGTERM") as caught:
        score.score_samples(config_of(workplace), out, progress=stop)
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is ours
    assert len(read(out)) == 5
    score.score_samples(config_of(workplace), out)
    assert read(out) == read(scored)


def test_command_line(workplace, scored, capsys, monkeypatch, tmp_path):
    run = vrlt(workplace, "select", "score", "recipe.toml", "--out", str(tmp_path / "cli.jsonl"), "--shard", "2/2")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert any("samples/s" in line and "saved" in line for line in lines)
    summary = (tmp_path / "cli.2-of-2.summary.txt").read_text("utf-8")
    assert "13 of 26 samples scored, 4 responses each, 2 of them first" in summary
    assert summary in run.stdout
    monkeypatch.chdir(workplace)
    assert main(["select", "score", "recipe.toml", "--out", str(tmp_path / "no" / "x.jsonl")]) == 4
    assert main(["select", "score", "recipe.toml", "--out", str(tmp_path / "x.jsonl"), "--shard", "3/2"]) == 2
    assert main(["select", "score", "recipe.toml", "--out", str(scored), "--rollout.temperature", "0.5"]) == 3
    told = capsys.readouterr().err
    assert "VRLT-R02" in told
    assert "VRLT-C02" in told
    assert "VRLT-L01" in told


@pytest.mark.slow
def test_replicas_score_a_shard_each(workplace, tmp_path):
    words = ("select", "score", "recipe.toml", "--out", str(tmp_path / "two.jsonl"), "--parallel.replicas", "2")
    run = vrlt(workplace, *words)
    assert run.returncode == 0, run.stderr
    assert len(read_tables([tmp_path / f"two.{i}-of-2.jsonl" for i in (1, 2)]).ids) == 26
    assert "26 of 26" in (tmp_path / "two.summary.txt").read_text("utf-8")
