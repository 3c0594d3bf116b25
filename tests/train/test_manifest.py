"""Checkpoint folders: complete or absent under SIGKILL, full disks and missing rights; found and pruned by name.

The children save real models with the helpers of test_checkpoint.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vrlt_fast.errors import SetupError
from vrlt_fast.train.manifest import checkpoint_name, latest_checkpoint, prune, publish, verify

ROOT = Path(__file__).parents[2]


def publish_text(folder: Path, text: str | None) -> None:
    with publish(folder, 100) as tmp:
        (tmp / "trainer").mkdir()
        (tmp / "trainer" / "file").write_text(text)


def test_latest_prune_and_leftovers(tmp_path):
    folder = tmp_path / "checkpoints"
    assert latest_checkpoint(folder, ("sft", "grpo")) is None
    for name in ("sft-000050", "sft-final", "grpo-000050", "grpo-000100", "grpo-1000000"):
        (folder / name).mkdir(parents=True)
        (folder / name / "COMMIT.json").write_text("{}")
    for name in ("grpo-000150", "grpo-final", ".tmp-grpo-000150-77", "other-000001", "notes"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    (folder / "other-000001" / "COMMIT.json").write_text("{}")
    assert latest_checkpoint(folder, ("sft", "grpo")) == folder / "grpo-1000000"
    assert not (folder / ".tmp-grpo-000150-77").exists()
    assert latest_checkpoint(folder, ("grpo", "sft")) == folder / "sft-final"
    prune(folder, "grpo", 2)
    prune(folder, "sft", 1)
    assert sorted(p.name for p in folder.iterdir() if (p / "COMMIT.json").exists()) == [
        "grpo-000100",
        "grpo-1000000",
        "other-000001",
        "sft-000050",
        "sft-final",
    ]
    assert checkpoint_name("grpo", 100) == "grpo-000100"
    assert checkpoint_name("sft", None) == "sft-final"


def test_a_replaced_checkpoint_survives_a_stop_between_the_renames(tmp_path):
    folder = tmp_path / "checkpoints" / "sft-000001"
    publish_text(folder, "old")
    folder.rename(folder.with_name(".old-sft-000001"))
    assert latest_checkpoint(folder.parent, ("sft",)) == folder
    verify(folder)
    publish_text(folder, "new")
    verify(folder)
    assert (folder / "trainer" / "file").read_text() == "new"
    assert [p.name for p in folder.parent.iterdir()] == ["sft-000001"]


def test_a_failure_leaves_the_replaced_checkpoint_and_no_other_trace(tmp_path):
    folder = tmp_path / "checkpoints" / "sft-000001"
    publish_text(folder, "old")
    with pytest.raises(TypeError):
        publish_text(folder, None)
    verify(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["sft-000001"]


def test_space_is_compared_with_the_need(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(SetupError, match="MB are free") as caught, publish(tmp_path / "sft-000001", 2 * free):
        pass
    assert caught.value.code == "VRLT-R03"
    assert list(tmp_path.iterdir()) == []


def child(code: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``code`` after the helpers of test_checkpoint.py in a fresh interpreter."""
    start = "import json, os, shutil, subprocess, sys\n"
    start += f"sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_checkpoint import *\n"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [*prefix, sys.executable, "-c", start + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False)


KILL_AT_EVERY_FILE_OPERATION = """
import signal
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
source = folder.parent / "source"
source.mkdir()
(source / "tokenizer.json").write_text("{}")
old, new, probe = tiny_model(seed), tiny_model(seed + 1), tiny_model(seed + 2)
save(folder / "sft-000001", old, state={"step": 1})
operations = 0
limit = 0

def operation(*_):
    global operations
    operations += 1
    if limit and operations == limit:
        os.kill(os.getpid(), signal.SIGKILL)

def hook(event, args):
    if limit and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.copyfile"):
        operation()

real_fsync = os.fsync
def fsync(handle):
    operation()
    real_fsync(handle)
    operation()
os.fsync = fsync
sys.addaudithook(hook)

for name in ("sft-000002", "sft-000001"):
    seen = []
    for limit in range(1, 400):
        operations, pid = 0, os.fork()
        if pid == 0:
            try:
                save(folder / name, new, state={"step": 2})
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        ended, limit = os.waitstatus_to_exitcode(status), 0
        latest = ck.latest_checkpoint(folder, ("sft",))
        step = ck.load_checkpoint(latest).state["step"]
        ck.load_weights_into(latest, probe, verified=True)
        assert same_weights(probe, old if step == 1 else new), (ended, latest)
        assert all(not p.name.startswith(".") for p in folder.iterdir())
        seen.append((ended, step))
        if step == 2:
            shutil.rmtree(latest)
            save(folder / "sft-000001", old, state={"step": 1})
        if ended >= 0:
            break
    print(json.dumps(seen))
"""


def test_sigkill_at_every_file_operation_leaves_the_old_or_the_new_one(tmp_path, seed):
    """Once with the new checkpoint beside the old one, once replacing it."""
    result = child(KILL_AT_EVERY_FILE_OPERATION, tmp_path / "checkpoints", seed)
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines()[-2:]:
        seen = json.loads(line)
        assert seen[-1] == [0, 2]
        assert {ended for ended, _ in seen[:-1]} == {-9}
        assert len(seen) > 60
        steps = [step for _, step in seen]
        assert steps == sorted(steps)
        assert steps[0] == 1


REFUSED_SAVES = """
import resource
torch.set_num_threads(1)
old, new = tiny_model(0), tiny_model(1)

def refused(name, start, disk=False):
    folder = Path(sys.argv[1]) / name
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    options = f"size={'64m,nr_inodes=30' if name == 'inodes' else '1m'},mode=755"
    if disk:
        mount = ["mount", "-t", "tmpfs", "-o", options, "small", folder]
        if subprocess.run(mount, capture_output=True).returncode:
            return
        source_folder(folder)
        checkpoints.mkdir()
    else:
        save(checkpoints / "sft-000001", old)
    if os.fork() == 0:
        start(checkpoints)
        try:
            save(checkpoints / "sft-000002", new, state={"step": 2})
            print(json.dumps(["saved", ""]), flush=True)
        except SetupError as error:
            print(json.dumps([error.code, str(error)]), flush=True)
        finally:
            os._exit(0)
    os.wait()
    left = sorted(p.name for p in checkpoints.iterdir())
    print(json.dumps([name, left, [ck.load_checkpoint(checkpoints / x).state["step"] for x in left]]), flush=True)

def limit(size):
    return lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

def forbid(checkpoints):
    checkpoints.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)

refused("small files", limit(3_000))
refused("large files", limit(60_000))
refused("forbidden", forbid)
if sys.argv[2] == "alone":
    refused("full", lambda _: None, disk=True)
    refused("inodes", lambda _: None, disk=True)
"""


@pytest.fixture(scope="module")
def refused_saves(tmp_path_factory) -> dict[str, tuple[str, str, list[str], list[int]]]:
    """(error code, message, checkpoints left, their steps) of saves that can't work, by reason."""
    folder = tmp_path_factory.mktemp("refused")
    # One of the children becomes nobody and has to get there.
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.getuid() and "pytest" in str(parent):
            parent.chmod(0o755)
    # Mounts are seen by the children only and go with them.
    alone = ("unshare", "-m")
    able = shutil.which("unshare") and not subprocess.run([*alone, "true"], capture_output=True, check=False).returncode
    result = child(REFUSED_SAVES, folder, "alone" if able else "", prefix=alone if able else ())
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {
        name: (code, text, left, steps)
        for (code, text), (name, left, steps) in zip(lines[::2], lines[1::2], strict=True)
    }


@pytest.mark.parametrize("name", ["small files", "large files"])
def test_file_size_limit_is_no_space(refused_saves, name):
    code, text, left, steps = refused_saves[name]
    assert (code, left, steps) == ("VRLT-R03", ["sft-000001"], [1])
    assert "File too large" in text


def test_folder_without_permission(refused_saves):
    code, text, left, steps = refused_saves["forbidden"]
    assert (code, left, steps) == ("VRLT-R02", ["sft-000001"], [1])
    assert "Permission denied" in text


@pytest.mark.parametrize(("name", "words"), [("full", "MB are free"), ("inodes", "No space left on device")])
def test_full_disk(refused_saves, name, words):
    """``inodes``: bytes enough, but the last files find no inode: ENOSPC comes in the middle of the save."""
    if name not in refused_saves:
        pytest.skip("needs the right to mount a tmpfs")
    code, text, left, _ = refused_saves[name]
    assert (code, left) == ("VRLT-R03", [])
    assert words in text


def test_path_through_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(SetupError) as caught:
        publish_text(tmp_path / "checkpoints" / "sft-000001", "new")
    assert caught.value.code == "VRLT-R02"
