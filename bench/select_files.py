"""Made-up scores of many samples, and the data file that they are of."""

from __future__ import annotations

import json
import random
from pathlib import Path

from vrlt_fast.select.fingerprint import file_digest
from vrlt_fast.select.scores import Header

TASKS = ("videoqa", "grounding", "grounded_qa")


def write_large(folder: Path, samples: int, *, seed: int) -> tuple[Path, Path]:
    """``scores.jsonl`` and ``data.jsonl`` of so many samples of three tasks: half with 4 responses, half with 8, lines
    as long as those of real files.
    """
    rng = random.Random(seed)
    data, scores = folder / "data.jsonl", folder / "scores.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for i in range(samples):
            file.write(json.dumps(_sample(i)) + "\n")
    digest = file_digest(data)
    weights = {"semantic": 1.0, "temporal": 1.0, "format": 0.5}
    said = {"digest": digest, "file": digest, "name": str(data)}
    header = Header({"digest": "m", "name": "m"}, {"digest": "r", "keys": {}}, said, samples, (1, 1), 8, 4, weights)
    with scores.open("w", encoding="utf-8") as file:
        file.write(json.dumps(header.to_json()) + "\n")
        for i in range(samples):
            file.write(json.dumps(_line(i, rng, weights), separators=(",", ":")) + "\n")
    return scores, data


def _sample(i: int) -> dict[str, object]:
    return {
        "id": f"s-{i:07d}",
        "video": f"videos/{i // 3}.mp4",
        "duration": 30.0,
        "task": TASKS[i % 3],
        "question": "When does the person in the red coat open the door of the shop?",
        "options": [] if i % 3 == 1 else ["a", "b", "c", "d"],
        "answer": "" if i % 3 == 1 else "B",
        "spans": [] if i % 3 == 0 else [[1.0, 5.0]],
        "source": "made up",
    }


def _line(i: int, rng: random.Random, weights: dict[str, float]) -> dict[str, object]:
    k, task = 4 if rng.random() < 0.5 else 8, TASKS[i % 3]
    p, reach = rng.random(), rng.random()
    parts: dict[str, list[float]] = {}
    if task != "grounding":
        parts["semantic"] = [float(rng.random() < p) for _ in range(k)]
    if task != "videoqa":
        parts["temporal"] = [reach * rng.random() for _ in range(k)]
    parts["format"] = [float(rng.random() < 0.98) for _ in range(k)]
    rewards = [sum(weights[name] * values[j] for name, values in parts.items()) for j in range(k)]
    seed, tokens = rng.getrandbits(63), [rng.randrange(50, 700) for _ in range(k)]
    line = {"id": f"s-{i:07d}", "task": task, "line": i + 1, "seed": seed, "waves": [4] * (k // 4)}
    return {**line, "rewards": rewards, "parts": parts, "n_tokens": tokens}
