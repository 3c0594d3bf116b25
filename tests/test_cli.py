"""The command line: start-up cost, exit codes, error texts, what each command does."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from vrlt_fast.cli import main
from vrlt_fast.cli_args import parse
from vrlt_fast.cli_eval import eval_config
from vrlt_fast.config_load import dump_toml, load_config
from vrlt_fast.errors import ConfigError
from vrlt_kernels import availability

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**ENV, **env}, capture_output=True, text=True, timeout=60, cwd=ROOT
    )


def vrlt(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vrlt_fast", *words]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=100, cwd=cwd)


def codes(error: str) -> list[str]:
    return [word for line in error.splitlines() if line.startswith("error ") for word in line.split()[1:2]]


def test_help_is_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = vrlt("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "vrlt COMMAND" in done.stdout
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 2.5, "target 0.5 s; five times that is allowed on a busy machine"


@pytest.mark.parametrize(
    "module", ["vrlt_fast", "vrlt_fast.cli", "vrlt_fast.config_load", "vrlt_fast.errors", "vrlt_fast.data.readers"]
)
def test_imports_no_torch(module: str) -> None:
    done = run(f"import sys, {module}; print(sorted(m for m in sys.modules if m in ('torch', 'transformers', 'av')))")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_help_needs_no_pydantic() -> None:
    done = run("import sys; from vrlt_fast.cli import main; main(['--help']); print('pydantic' in sys.modules)")
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["trian", "demo"], "VRLT-C01", "vrlt train"),
        (["data"], "VRLT-C01", "demo, check"),
        (["data", "chekc", "x"], "VRLT-C01", "vrlt data check"),
        (["train"], "VRLT-C02", "required"),
        (["train", "demo", "--resum"], "VRLT-C01", "--resume"),
        (["train", "demo", "--lr", "3"], "VRLT-C01", "--sft.lr or --grpo.lr"),
        (["train", "demo", "--grpo.lr"], "VRLT-C02", "--grpo.lr VALUE"),
        (["train", "demo", "--grpo.lr", "--resume"], "VRLT-C02", "has no value"),
        (["train", "demo", "--grpo.lrr", "1"], "VRLT-C01", "grpo.lr"),
        (["train", "demo", "--grpo.lr", "-1"], "VRLT-C02", "greater than 0"),
        (["train", "demo", "--resume", "--dry-run"], "VRLT-C04", "exclude"),
        (["train", "deom"], "VRLT-C05", "did you mean demo?"),
        (["train", "nothing/here.toml"], "VRLT-C03", "nothing/here.toml"),
        (["recipe", "show", "xyz"], "VRLT-C05", "demo"),
        (["recipe", "ls", "more"], "VRLT-C01", "more"),
        (["data", "demo", "x", "--seed", "one"], "VRLT-C02", "--seed"),
        (["data", "demo", "x", "--train-clips", "0"], "VRLT-C02", "--train-clips"),
        (["report", "a", "--jsn"], "VRLT-C01", "--jsn"),
        (["eval", "model"], "VRLT-C04", "data.eval"),
    ],
)
def test_wrong_usage(words: list[str], code: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert codes(error) == [code]
    assert text in error


def test_exit_codes_of_the_process(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[grpo]\nlr = 'x'\nbeat = 1\n", encoding="utf-8")
    done = vrlt("train", str(config), "--rollout.group_siz", "4")
    assert done.returncode == 2
    assert sorted(codes(done.stderr)) == ["VRLT-C01", "VRLT-C01", "VRLT-C02"]
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr, "no colours into a pipe"
    (tmp_path / "bad.jsonl").write_text("{\n", encoding="utf-8")
    checked = vrlt("data", "check", str(tmp_path / "bad.jsonl"))
    assert checked.returncode == 3
    assert "VRLT-D02" in checked.stdout
    assert "bad.jsonl:1" in checked.stdout
    assert vrlt("report", str(tmp_path / "none")).returncode == 4


def test_missing_data_is_exit_3_and_missing_model_exit_4(tmp_path: Path, tiny_folder: Path) -> None:
    common = ["--data.train", str(tmp_path / "none.jsonl"), "--data.eval", "", "--train.out", str(tmp_path / "run")]
    no_data = vrlt("train", "demo", "--dry-run", "--model.name", str(tiny_folder), *common)
    assert (no_data.returncode, codes(no_data.stderr)) == (3, ["VRLT-D01"])
    no_model = vrlt("train", "demo", "--model.name", str(tmp_path / "none"), *common)
    assert (no_model.returncode, codes(no_model.stderr)) == (4, ["VRLT-M01"])
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_a_valid_configuration(
    demo: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "demo", "--dry-run", "--model.name", str(tiny_folder), "--grpo.steps=3"]
    words += ["--data.train", str(demo / "train.jsonl"), "--data.eval", str(demo / "heldout.jsonl")]
    words += ["--train.out", str(tmp_path / "run")]
    assert main(words) == 0
    out = capsys.readouterr().out
    path = tmp_path / "resolved.toml"
    path.write_text(out[: out.index("\nmodel  ")], encoding="utf-8")
    assert load_config([path]).grpo.steps == 3
    assert not (tmp_path / "run").exists()


def test_flags_and_overrides_in_any_order() -> None:
    words = ["train", "a.toml", "--grpo.lr=2", "--resume", "b.toml", "--train.deterministic", "c.toml"]
    command = parse([*words, "--model.freeze-vision", "false"])
    assert command.flags.files == ["a.toml", "b.toml", "c.toml"]
    assert command.flags.resume
    wanted = {"grpo.lr": "2", "train.deterministic": "true", "model.freeze_vision": "false"}
    assert command.overrides == wanted


def test_value_may_look_negative_or_hold_an_equals_sign() -> None:
    assert parse(["train", "a.toml", "--prompt.system", "x=--y"]).overrides == {"prompt.system": "x=--y"}
    assert parse(["train", "a.toml", "--prompt.system=--y"]).overrides == {"prompt.system": "--y"}
    assert parse(["train", "a.toml", "--grpo.lr", "-1"]).overrides == {"grpo.lr": "-1"}


def test_recipe_copy_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.toml"
    assert main(["recipe", "cp", "demo", str(out)]) == 0
    assert out.read_bytes() == (ROOT / "vrlt_fast" / "recipes" / "demo.toml").read_bytes()
    out.write_text("edited", encoding="utf-8")
    assert main(["recipe", "cp", "demo", str(out)]) == 2
    assert out.read_text("utf-8") == "edited"
    assert main(["recipe", "cp", "demo", str(tmp_path / "no" / "folder.toml")]) == 4
    assert codes(capsys.readouterr().err) == ["VRLT-C03", "VRLT-R02"]


def test_recipe_ls_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "ls"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"demo", "demo_long", "temporal_r1"} <= set(listed)
    for name in listed:
        assert main(["recipe", "show", name]) == 0
        assert "[model]" in capsys.readouterr().out


def test_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m vrlt_fast recipe show demo | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], env=ENV, capture_output=True, text=True)
    assert done.stderr == ""


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (4 if found["missing"] else 0)
    assert found["system"]["python"] == sys.version.split()[0]
    ways = {way["name"]: way for way in found["ways"]}
    import torch

    assert ways["device: cuda"]["active"] == torch.cuda.is_available()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    obstacles = availability(device)
    assert {b: ways[f"kernels: {b}"]["active"] for b in obstacles} == {b: not why for b, why in obstacles.items()}
    assert all(way["why"] for way in ways.values())
    assert main(["doctor"]) == code
    out = capsys.readouterr().out
    assert found["packages"]["torch"] in out


def test_eval_takes_the_configuration_of_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    folder = run_dir / "checkpoints" / "grpo-final"
    folder.mkdir(parents=True)
    held = str(tmp_path / "held.jsonl")
    own = {"video.max_frames": 11, "data.root": "/disk", "data.eval": held, "eval.responses": 2}
    (run_dir / "config.resolved.toml").write_text(dump_toml(load_config((), own)), encoding="utf-8")

    config = eval_config(str(folder), None, [], {})
    assert (config.video.max_frames, config.data.root, config.model.name) == (11, "/disk", str(folder))
    assert eval_config(str(folder), held, [], {}).data.root == "/disk"
    other = eval_config(str(folder), "other/x.jsonl", [], {"eval.responses": "7"})
    assert (other.data.eval, other.data.root, other.eval.responses) == ("other/x.jsonl", "", 7)
    assert eval_config(str(folder), "other/x.jsonl", [], {"data.root": "/d"}).data.root == "/d"
    elsewhere = tmp_path / "model"
    elsewhere.mkdir()
    with pytest.raises(ConfigError):
        eval_config(str(elsewhere), None, [], {})
    assert (
        eval_config(str(elsewhere), "x.jsonl", ["demo"], {}).video.sampling
        == load_config([ROOT / "vrlt_fast" / "recipes" / "demo.toml"]).video.sampling
    )


def test_data_demo_finishes_what_was_interrupted(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    shutil.copytree(demo, out)
    (out / "tiny-model.partial").mkdir()
    assert main(["data", "demo", str(out), "--seed", "3"]) == 0
    assert (out / "tiny-model" / "config.json").is_file()
    assert not (out / "tiny-model.partial").exists()
    capsys.readouterr()
    assert main(["data", "demo", str(out)]) == 3
    assert codes(capsys.readouterr().err) == ["VRLT-D13"]


def test_data_check_of_good_data(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(demo / "train.jsonl")]) == 0
    assert "no problems" in capsys.readouterr().out


# A damaged installation: a module of ours is gone.
FAULT = """
import sys
sys.modules["vrlt_fast.recipe"] = None
from vrlt_fast import cli
sys.exit(cli.main(["recipe", "ls"] + sys.argv[1:]))
"""


def test_unexpected_error_leaves_a_log(tmp_path: Path) -> None:
    done = run(FAULT, TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (log,) = tmp_path.glob("vrlt-*.log")
    assert str(log) in done.stderr
    assert "ModuleNotFoundError" in log.read_text("utf-8")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run(FAULT.replace("sys.argv[1:]", "['--debug']"), TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_package_names_the_command() -> None:
    done = run(
        "import sys; sys.modules['pydantic'] = None\nfrom vrlt_fast.cli import main; sys.exit(main(['train', 'demo']))"
    )
    assert done.returncode == 4
    assert codes(done.stderr) == ["VRLT-E01"]
    assert "vrlt-fast[train]" in done.stderr


def test_interrupt_is_75(tmp_path: Path) -> None:
    fifo = tmp_path / "slow.toml"
    os.mkfifo(fifo)  # reading it blocks until the signal
    command = [sys.executable, "-m", "vrlt_fast", "train", str(fifo)]
    # What a shell starts in the background ignores SIGINT, and so do its children.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    with fifo.open("w"):  # opens once the command reads; its end wakes a read that began after the signal
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert codes(error) == ["VRLT-S02"]


def test_bench_is_a_front(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "no_such_case", "--check"]) == 2
    assert "usage: python -m bench CASE" in capfd.readouterr().err
    assert main(["bench", "--help"]) == 0
    assert "kernels" in capfd.readouterr().out


def test_bench_of_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vrlt_fast.cli.__file__", str(tmp_path / "site" / "vrlt_fast" / "cli.py"))
    assert main(["bench", "claims"]) == 4
    assert codes(capsys.readouterr().err) == ["VRLT-E03"]
