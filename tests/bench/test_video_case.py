"""The case ``video``: claims and tables from records, parity that fails, how processes are measured, small runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.cases.video import CACHED, LIKE, OURS, claims, notes, tables
from bench.harness import BenchError, Record, check_schema, read_result, records_of, summarize
from bench.video_arm import Job, below, cpu_seconds
from bench.video_process import Process, Programs
from bench.video_run import Cell, cells, difference, parity

ROOT = Path(__file__).parents[2]
PEERS = ("qwen-vl-utils 0.0.14 + torchcodec 0.13.0, 2 threads", "qwen-vl-utils 0.0.14 + decord 0.6.0")


def made_records(*, peers: bool) -> list[Record]:
    """Ours takes 1 s, 1 s of CPU and 1 GB; peers 2 and 3 s, 4 and 2.5 s of CPU, 12 and 14 GB."""
    records = []
    for cell in cells(quick=False):
        rows = [(OURS, 1.0, 1.0, 1e9), (LIKE, 1.2, 1.6, 2e9)]
        rows += [(PEERS[0], 2.0, 4.0, 12e9), (PEERS[1], 3.0, 2.5, 14e9)] if peers else []
        if cell.cached:
            rows = [("ours, filling", 1.1, 1.0, 1e9), (CACHED, 0.01, 0.01, 1e9)]
            rows += [(f"{CACHED}, new process", 0.025, 0.03, 1e9)]
        for arm, wall, cpu, peak in rows:
            records.append(summarize(arm, cell.shape, "wall", "s", [wall, wall * 1.1, wall * 0.9]))
            records.append(summarize(arm, cell.shape, "cpu", "s", [cpu]))
            records.append(summarize(arm, cell.shape, "peak", "B", [peak]))
        records.append(summarize("machine", cell.shape, "load", "1", [0.1]))
    return records


def test_each_claim_is_against_the_best_peer_of_its_metric():
    found = {claim.id.removeprefix("video.cpu."): claim for claim in claims(made_records(peers=True))}
    values = {name: round(claim.value, 4) for name, claim in found.items()}
    assert values == {
        **dict.fromkeys(["A", "B", "C", "G", "Gn"], 2.0),
        **dict.fromkeys(["A_cpu", "B_cpu", "C_cpu", "D", "E", "G_cpu", "Gn_cpu", "frames_D", "frames_E"], 2.5),
        **dict.fromkeys(["like_A", "like_B", "like_C"], round(2.5 / 1.6, 4)),
        "C_rss": 12.0,
        "F": 200.0,
        "F_process": 80.0,
    }
    assert not found["F_process"].holds
    assert all(claim.holds for name, claim in found.items() if name != "F_process")
    assert "like for like" in found["like_A"].statement
    assert "default" in found["A"].statement


def test_nothing_is_claimed_without_peers():
    assert claims(made_records(peers=False)) == []


def test_tables():
    records = made_records(peers=True)
    found = tables({"records": [vars(r) for r in records]})
    assert found["default"].splitlines()[2] == (
        "| A 32 of 60 s 720p | 1 | 1 | 1 | 2 | 2.5 | 12 | 2.00x | 2.50x | 12.00x |"
    )
    assert "| 1.2 | 1.6 | 2 | 2 | 2.5 | 12 | 1.67x | 1.56x | 6.00x |" in found["like-for-like"]
    assert [line.split()[1] for line in found["decoding"].splitlines()[2:]] == ["Df", "Ef"]
    assert found["cached"].splitlines()[-1] == "| F 768 of 400 s 720p cached | 1.1 | 10 | 25 |"
    assert len(found["arms"].splitlines()) == 2 + 9 * 4 + 3


def saved(folder: Path, name: str, levels: np.ndarray) -> None:
    (folder / name).mkdir()
    np.save(folder / name / "levels.npy", levels)
    np.save(folder / name / "head.npy", ((levels[:8] / 255 - 0.5) / 0.5).astype(np.float32))


def test_parity_refuses_what_differs(tmp_path, seed):
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 250, (64, 1176), dtype=np.uint8)
    near = levels + (rng.random(levels.shape) < 0.15)
    cell = Cell("A", "small", None, 2)
    for name, values in ((OURS, levels), ("plain", levels), (LIKE, near.astype(np.uint8)), (PEERS[0], near)):
        saved(tmp_path, name, values.astype(np.uint8))
    found = parity(cell, [OURS, LIKE], [PEERS[0]], tmp_path)
    shares = {(r.arm, r.metric): r.median for r in found}
    assert shares[OURS, "equal to plain"] == 1.0
    assert shares[LIKE, f"equal to {PEERS[0]}"] == 1.0
    assert shares[OURS, f"equal to {PEERS[0]}"] == pytest.approx(0.85, abs=0.01)

    saved(tmp_path, "shifted", np.roll(levels, 1, axis=0))
    with pytest.raises(BenchError, match="equals shifted"):
        parity(cell, [OURS, LIKE], ["shifted"], tmp_path)
    wrong = levels.copy()
    wrong[5, 7] ^= 1
    np.save(tmp_path / "plain" / "levels.npy", wrong)
    with pytest.raises(BenchError, match="equals plain"):
        parity(cell, [OURS, LIKE], [PEERS[0]], tmp_path)
    assert difference(tmp_path / OURS, tmp_path / "plain") == (1 - 1 / levels.size, 1)
    saved(tmp_path, "short", levels[:-1])
    with pytest.raises(BenchError, match="short"):
        difference(tmp_path / OURS, tmp_path / "short")


def test_cpu_of_processes_below_counts():
    code = "import sys, time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\nsys.stdin.read()"
    before = cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"done\n"
        assert child.pid in below(os.getpid())
        alive = cpu_seconds() - before
        assert child.stdin is not None
        child.stdin.close()
        child.wait()
    assert alive >= 0.25
    assert cpu_seconds() - before >= alive - 0.02


def test_the_peak_is_the_process_s_own():
    held = np.ones(400 << 20, np.uint8)  # more than a small process has
    code = "from bench.video_arm import largest_resident_set as f; a = f(); b = b'x' * (50 << 20); print(a, f())"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 200 << 20 < held.nbytes
    assert 50 << 20 <= after - before < 80 << 20


def test_a_failing_arm_is_named_with_its_complaint(tmp_path):
    programs = Programs(None, tmp_path, 1)
    job = Job("plain", str(tmp_path / "absent.mp4"), [0, 1], True, (28, 28), "pixels", 1, str(tmp_path))
    program = programs.ours("plain", "the plain way")
    process = Process(program.name, program.command, program.env, job)
    try:
        with pytest.raises(BenchError, match=r"(?s)the plain way on .*absent\.mp4 ended with 1.*FileNotFoundError"):
            process.run()
    finally:
        process.close()


def test_peers_that_are_not_installed_are_recorded(tmp_path):
    programs = Programs(Path(sys.executable), tmp_path, 2)
    if not programs.versions["qwen-vl-utils"].startswith("!"):
        pytest.skip("the peers are installed here")
    assert programs.peers("pixels") == []
    why = {r.arm: r.shape for r in notes(programs) if r.metric == "not run"}
    assert any("torchcodec" in arm for arm in why)
    assert all("qwen-vl-utils: ModuleNotFoundError" in reason for reason in why.values())
    with pytest.raises(BenchError, match="--peers"):
        Programs(tmp_path / "no-python", tmp_path, 2)


SLOW = [pytest.param(names, marks=pytest.mark.slow) for names in ("A,C,E,F", "B,D,Gn,Df,Ef")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("names", ["G", *SLOW])
def test_a_small_run(tmp_path, names):
    out = tmp_path / "video.cpu.json"
    words = ["video", "--quick", "--cells", names, "--work", str(tmp_path), "--workers", "2", "--out", str(out)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "bench", *words], env=env, cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    result = read_result(out)
    check_schema(json.loads(out.read_text()), out)
    assert result["claims"] == []
    medians = {(r.shape.split()[0], r.arm, r.metric): r.median for r in records_of(result)}
    for name in names.split(","):
        assert medians[name, CACHED if name == "F" else OURS, "wall"] > 0
        if name in ("A", "C", "D", "E", "G", "Gn"):
            assert medians[name, OURS, "equal to plain"] == 1.0
            assert medians[name, LIKE, "equal to plain"] > 0.6
            assert medians[name, OURS, "decoded"] >= 8
    assert not list(tmp_path.glob("scratch-*"))
