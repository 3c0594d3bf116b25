"""The case ``video_gpu``: what it claims from records, and a cell of it for real, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.cases import dali, video_gpu
from bench.harness import BenchError, Record, read_result, records_of, summarize


def values(device: str) -> list[Record]:
    rows = [
        ("device", device, "memory", 1e9),
        ("dali", "H1 1080p sessions=1 elide", "rate", 900),
        ("dali", "H1 1080p sessions=7 elide", "rate", 6000),
        ("dali", "H1 1080p sessions=7", "rate", 3000),
        ("dali", "H1 1080p sessions=1", "rate", 600),
        ("patchify NV12", "H2 32 frames 1080p", "time", 0.2),
        ("copy of patchify NV12", "H2 32 frames 1080p", "time", 0.12),
        ("torchcodec + transformers", "H3 32 frames 1080p", "time", 0.9),
        ("ours, dali", "H3 32 frames 1080p", "time", 0.3),
        ("ours, torchcodec", "H3 32 frames 1080p", "time", 0.4),
        ("NVDEC", "H4 48 clips 1080p", "rate", 20),
        ("CPU", "H4 48 clips 1080p", "rate", 10),
        ("both", "H4 48 clips 1080p", "rate", 28),
        ("cached", "H5 1080p", "time", 1.0),
        ("decoded ahead", "H5 1080p", "time", 1.1),
    ]
    return [summarize(arm, shape, metric, "", [value]) for arm, shape, metric, value in rows]


def test_claims_of_a_gpu() -> None:
    found = {claim.id: claim for claim in video_gpu.claims(values("h200"))}
    assert {name: round(claim.value, 3) for name, claim in found.items()} == {
        "video_gpu.H1.dali": 2.0,
        "video_gpu.H2.patchify_NV12": 0.6,
        "video_gpu.H3": 3.0,
        "video_gpu.H4": 1.4,
        "video_gpu.H5": 1.1,
    }
    assert [name for name, claim in found.items() if not claim.holds] == ["video_gpu.H4", "video_gpu.H5"]
    assert video_gpu.claims(values("cpu")) == []


def test_a_cell_runs_on_the_cpu(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--small", "--work", str(tmp_path / "films"), "--out", str(tmp_path)]
    video_gpu.run([*arguments, "--cells", "h2"])
    result = read_result(tmp_path / "video_gpu.cpu.json")
    arms = {r.arm for r in records_of(result) if r.metric == "time"}
    assert {"patchify NV12", "patchify RGB bf16", "eager RGB bf16", "copy of patchify RGB"} <= arms
    assert "patchify NV12" in video_gpu.tables(result)["cells"]
    with pytest.raises(BenchError):
        video_gpu.run([*arguments, "--cells", "h9"])
    with pytest.raises(BenchError, match="no cell"):
        video_gpu.run([*arguments, "--cells", "h2", "--minutes", "-1"])


def test_claims_of_dali() -> None:
    rows = [
        ("a", "frames asked for", 50),
        ("a", "frames right", 49),
        ("a", "difference from PyAV", 1.5),
        ("gone", "refused", 2),
        ("damaged", "refused", 1),
        ("after", "same bits", 1),
    ]
    claims = dali.claims([summarize(dali.ARM, shape, metric, "", [value]) for shape, metric, value in rows])
    assert [claim.id for claim in claims if not claim.holds] == ["dali.cpu.right"]
