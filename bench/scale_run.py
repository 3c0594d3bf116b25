"""The cells of ``bench/cases/scale.py``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import av
import numpy as np

from bench.harness import ROOT, BenchError, Record, summarize
from bench.scale_model import H100, predicted
from vrlt_fast.model.tiny import build_tiny

LIMIT_S = 3600.0
GATHERED = {"keys and values": 2, "keys and values, backward": 1}
"""How often they are received in an update whose layers are computed twice, forward."""


def label(cell: Mapping[str, Any]) -> str:
    """Names a cell in records, without the number of processes."""
    return f"{cell['size']}, {cell['frames']} frames, {cell['rows']} x {cell['length']}"


def arm(cell: Mapping[str, Any]) -> str:
    return f"{cell['processes']} processes" + (", shards" if cell["shard"] else "")


def measure(cell: Mapping[str, Any]) -> list[Record]:
    """Run a cell's processes; of seconds the slowest process's, of bytes the largest.

    Raises:
        BenchError: one of them failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        _run(cell, folder)
        found = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(cell["processes"])]
    one, name = found[0], arm(cell)
    records = [
        summarize(name, label(cell), metric, unit, [max(values)])
        for metric, unit, values in [
            ("tokens of the prompt", "tokens", [one["tokens"]]),
            ("rollout", "s", [f["rollout"] for f in found]),
            *(
                (phase, "s", [f["phases"].get(phase, 0.0) for f in found])
                for phase in ("encode", "prefill", "generate")
            ),
            ("keys and values of the rollout", "B", [f["kv"] for f in found]),
            ("peak memory of the update", "B", [f["peak"] for f in found]),
        ]
    ]
    updates = [max(times) for times in zip(*(f["update"] for f in found), strict=True)]
    records.append(summarize(name, label(cell), "update", "s", updates))
    if cell["processes"] > 1:
        records += _received(found, name, label(cell))
    if cell["device"] == "cuda" and cell["processes"] == 1:
        records += _foretold(one, label(cell))
    return records


def _received(found: list[dict[str, Any]], name: str, shape: str) -> list[Record]:
    """Bytes that the process with most received in a pass over the layers, over those of the formula."""
    size, one = len(found), found[0]
    formula = (size - 1) / size * one["tokens"] * one["kv_bytes"] * one["layers"]
    return [
        summarize(
            name, shape, f"received: {why}", "of the formula", [max(f["received"][why] for f in found) / formula / n]
        )
        for why, n in GATHERED.items()
    ]


def _foretold(one: dict[str, Any], shape: str) -> list[Record]:
    figures = {phase: one["phases"].get(phase, 0.0) for phase in ("encode", "prefill", "generate")}
    figures |= {"update": median(one["update"]), "steps": one["length"] - 1}
    figures |= {key: one[key] for key in ("tokens", "rows", "layers", "kv_bytes", "row_bytes", "attention")}
    told = predicted(figures, 8, H100)
    return [summarize("8 H100, predicted", shape, phase, "s", [seconds]) for phase, seconds in told.items()]


def _run(cell: Mapping[str, Any], folder: str) -> None:
    world = cell["processes"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(world):
        more = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{key: str(value) for key, value in more.items()}}
        command = [sys.executable, "-m", "bench.scale_worker", json.dumps(dict(cell)), folder]
        running.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=LIMIT_S)[1] for process in running]
    failed = [text for process, text in zip(running, told, strict=True) if process.returncode]
    if failed:
        cause = next((text for text in failed if "VRLT-S04" not in text), failed[0])
        raise BenchError(f"{label(cell)}, {world} processes: {cause.strip()[-500:]}")


def whole_run(frames: int, processes: int, work: Path) -> list[Record]:
    """``vrlt train`` with one GRPO step on a video of so many frames, in ``processes`` that share it."""
    work.mkdir(parents=True, exist_ok=True)
    duration = _film(work / "long.mp4", frames)
    line = {"id": "a", "video": "long.mp4", "duration": duration, "task": "grounding", "question": "When is it red?"}
    line |= {"spans": [[duration / 4, duration / 2]]}
    data = work / "train.jsonl"
    data.write_text(json.dumps(line) + "\n", encoding="utf-8")
    model = build_tiny(work / "model", train_jsonl=data, seed=0)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 16 * frames
    (model / "config.json").write_text(json.dumps(config))
    given = {
        "model.name": model,
        "model.dtype": "float32",
        "model.device": "cpu",
        "data.train": data,
        "video.sampling": "uniform",
        "video.max_frames": frames,
        "video.min_pixels": 784,
        "video.max_pixels": 3136,
        "video.deadline": 600,
        "train.out": work / "run",
        "train.stages": '["grpo"]',
        "train.recompute": "true",
        "train.threads": 1,
        "grpo.steps": 1,
        "rollout.prompts": 1,
        "rollout.group_size": 4,
        "rollout.max_new_tokens": 16,
        "parallel.sp": processes,
    }
    (work / "run.toml").write_text("", encoding="utf-8")
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    begin = perf_counter()
    command = [sys.executable, "-m", "vrlt_fast", "train", str(work / "run.toml"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = perf_counter() - begin
    if done.returncode:
        raise BenchError(f"the run of {frames} frames ended with {done.returncode}: {done.stderr[-500:]}")
    lines = (work / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record = next(r for r in map(json.loads, lines) if r["kind"] == "train")
    name, shape = f"{processes} processes", f"vrlt train, {frames} frames"
    return [
        summarize(name, shape, "minutes, start to end", "min", [seconds / 60]),
        summarize(name, shape, "peak memory of all processes", "B", [record["peak_gb"] * 1e9 * processes]),
        summarize(name, shape, "tokens trained", "tokens", [record["tokens_trained"]]),
    ]


def _film(path: Path, frames: int) -> float:
    """A video of small pictures that change slowly; its seconds."""
    rng, rate = np.random.default_rng(0), 8
    colours = rng.integers(0, 255, (frames // 64 + 2, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"g": "48"})
        stream.height, stream.width, stream.pix_fmt = 56, 56, "yuv420p"
        for number in range(frames):
            place = number / 64
            share = place - int(place)
            colour = colours[int(place)] * (1 - share) + colours[int(place) + 1] * share
            picture = np.broadcast_to(colour.astype(np.uint8), (56, 56, 3)).copy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return frames / rate
