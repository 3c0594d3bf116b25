"""A synthetic run folder in the format that the trainer writes, with small real MP4 files."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

Record = dict[str, Any]
TASKS = ("grounding", "grounded_qa", "videoqa")
COLOURS = {"red": (214, 60, 48), "blue": (52, 96, 210), "green": (46, 150, 84), "yellow": (232, 196, 60)}
SKILL = {"start": 0.0, "sft": 0.5, "grpo": 0.8}


def write_video(path: Path, seconds: float, span: tuple[float, float], colour: str, rng: np.random.Generator) -> None:
    """160 x 120 at 8 fps: a drifting gradient, a square of the colour during the span."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tint, phase = rng.integers(60, 200, 3), float(rng.uniform(0, 6))
    y, x = np.mgrid[0:120, 0:160]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for index in range(round(seconds * 8)):
            wave = 0.6 + 0.3 * np.sin(x / 23 + y / 31 + index / 6 + phase)
            picture = (wave[..., None] * tint).clip(0, 255).astype(np.uint8)
            if span[0] <= index / 8 < span[1]:
                left = 10 + (index * 5) % 110
                picture[40:80, left : left + 40] = COLOURS[colour]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    inner = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return inner / (max(a[1], b[1]) - min(a[0], b[0])) if inner else 0.0


def _answer(question: Record, skill: float, rng: random.Random) -> Record:
    wants_spans, wants_option = bool(question["spans"]), bool(question["options"])
    if rng.random() > 0.15 + 1.7 * skill:
        text = "the the 2 of <time> picture"
        tiou = 0.0 if wants_spans else None
        correct = False if wants_option else None
        return {"text": text, "answer": None, "spans": None, "well_formed": False, "tiou": tiou, "correct": correct}
    spans, tiou, letter, correct, text = None, None, None, None, ""
    if wants_option:
        letter = question["answer"] if rng.random() < skill + 0.1 else rng.choice("ABCD")
        correct = letter == question["answer"]
        text += f"<answer>{letter}</answer>"
    if wants_spans:
        start, end = question["spans"][0]
        noise = 2.2 * (1 - skill)
        start = min(max(0.0, start + rng.gauss(0, noise)), question["duration"] - 0.5)
        end = min(max(start + 0.5, end + rng.gauss(0, noise)), question["duration"])
        spans = [[round(start, 1), round(end, 1)]]
        tiou = round(_overlap((start, end), tuple(question["spans"][0])), 4)
        text += f"<time>{spans[0][0]} to {spans[0][1]}</time>"
    return {"text": text, "answer": letter, "spans": spans, "well_formed": True, "tiou": tiou, "correct": correct}


def _questions(root: Path, count: int, rng: random.Random, arrays: np.random.Generator) -> list[Record]:
    clips = []
    for index in range(max(4, count // 4)):
        seconds = rng.choice((6.0, 8.0, 9.5))
        start = rng.randrange(0, round(2 * seconds) - 6) / 2
        span, colour = (start, start + rng.choice((1.5, 2.0, 3.0))), rng.choice(list(COLOURS))
        write_video(root / f"videos/held-{index:03d}.mp4", seconds, span, colour, arrays)
        clips.append((f"videos/held-{index:03d}.mp4", seconds, span, colour))
    questions = []
    for index in range(count):
        video, seconds, span, colour = clips[index % len(clips)]
        task = TASKS[index // len(clips) % 3]
        options = [f"a {name} square" for name in rng.sample(list(COLOURS), 4)] if task != "grounding" else []
        answer = "ABCD"[options.index(f"a {colour} square")] if options else ""
        text = {
            "grounding": f"When does a {colour} square move through the picture?",
            "grounded_qa": "What moves through the picture, and when?",
            "videoqa": "What moves through the picture?",
        }[task]
        spans = [list(span)] if task != "videoqa" else []
        question = {"id": f"held-{index:04d}", "task": task, "video": video, "duration": seconds, "question": text}
        questions.append({**question, "options": options, "answer": answer, "spans": spans})
    return questions


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 5)


def _metrics(lines: list[Record]) -> Record:
    result: Record = {}
    for kind in ("greedy", "sampled"):
        tasks: Record = {}
        for task in ("all", *TASKS):
            answers = [
                answer
                for line in lines
                if task in ("all", line["task"])
                for answer in ([line["greedy"]] if kind == "greedy" else line["sampled"])
            ]
            if not answers:
                continue
            values: Record = {"n": sum(task in ("all", line["task"]) for line in lines)}
            overlaps = [answer["tiou"] for answer in answers if answer["tiou"] is not None]
            if overlaps:
                values["tiou" if task == "all" else "miou"] = _mean(overlaps)
            if overlaps and task == "grounding":
                values |= {f"r1@{t}": _mean([float(o >= t) for o in overlaps]) for t in (0.3, 0.5, 0.7)}
            if task in ("videoqa", "grounded_qa"):
                values["accuracy"] = _mean([float(answer["correct"]) for answer in answers])
            values["well_formed"] = _mean([float(answer["well_formed"]) for answer in answers])
            tasks[task] = values
        result[kind] = tasks
    return result


def _phases(rng: random.Random, **seconds: float) -> Record:
    return {name: round(value * rng.uniform(0.85, 1.15), 4) for name, value in seconds.items()}


def sft_record(step: int, steps: int, rng: random.Random) -> Record:
    phases = _phases(rng, decode=0.05 if step > 8 else 0.4, encode=0.08, update=0.35)
    return {
        "kind": "train",
        "stage": "sft",
        "step": step,
        "steps": steps,
        "loss": 0.25 + 8 * math.exp(-step / 18) * rng.uniform(0.8, 1.2),
        "grad_norm": 0.6 + 6 * math.exp(-step / 20) * rng.uniform(0.7, 1.5),
        "lr": 3e-4 * min(1, step / 10),
        "tokens_s": rng.uniform(8500, 9900),
        "seconds": sum(phases.values()) * 1.03,
        "phases": phases,
        "peak_gb": 1.6,
        "failed_videos": 0,
    }


def grpo_record(step: int, steps: int, rng: random.Random) -> Record:
    done = step / steps
    parts = {
        "semantic": min(1.0, 0.55 + 0.2 * done + rng.gauss(0, 0.06)),
        "temporal": min(1.0, 0.38 + 0.25 * done + rng.gauss(0, 0.05)),
        "format": min(1.0, 0.97 + 0.02 * done + rng.gauss(0, 0.006)),
    }
    if rng.random() < 0.04:
        del parts["semantic"]
    phases = _phases(rng, decode=0.02, encode=0.12, prefill=0.2, generate=1.0, reward=0.01, reference=0.25, update=1.1)
    return {
        "kind": "train",
        "stage": "grpo",
        "step": step,
        "steps": steps,
        "reward": sum(parts.values()) / 1.6,
        "reward_std": 0.31 + rng.gauss(0, 0.03),
        "parts": parts,
        "kl": 0.006 * done + abs(rng.gauss(0, 0.0006)),
        "clip_share": abs(rng.gauss(0, 0.002)),
        "entropy": 0.95 - 0.45 * done + rng.gauss(0, 0.03),
        "length": 14 + rng.gauss(0, 0.6),
        "truncated": max(0.0, rng.gauss(0, 0.004)),
        "loss": rng.gauss(0.004, 0.012),
        "grad_norm": 0.45 + abs(rng.gauss(0, 0.1)),
        "lr": 2e-5,
        "tokens_s": rng.uniform(8800, 9300),
        "seconds": sum(phases.values()) * 1.02,
        "phases": phases,
        "peak_gb": 2.1,
        "failed_videos": 0,
        "zero_signal_groups": rng.randrange(3),
        "mismatch": {"mean": 2e-7, "max": 3e-6, "kl": 1e-13, "outside": 0.0},
        "frames_encoded": 384,
        "prefix_tokens_prefilled": 9000,
        "tokens_trained": 11000,
        "tokens_logical": 56000,
    }


def _completions(steps: range, rng: random.Random) -> Iterator[Record]:
    for step in steps:
        for prompt in range(3):
            task = TASKS[prompt]
            group = []
            for _ in range(6):
                parts = {"format": 1.0}
                if task != "grounding":
                    parts["semantic"] = float(rng.random() < 0.7)
                if task != "videoqa":
                    parts["temporal"] = round(rng.random(), 3)
                group.append(parts)
            rewards = [sum(parts.values()) for parts in group]
            mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards) + 1e-4
            for parts, reward in zip(group, rewards, strict=True):
                yield {
                    "stage": "grpo",
                    "step": step,
                    "id": f"train-{step}-{prompt}",
                    "task": task,
                    "prompt": "<|im_start|>user\n…",
                    "response": f"<answer>{rng.choice('ABCD')}</answer><time>{rng.uniform(0, 4):.1f} to 5.0</time>",
                    "n_tokens": rng.randrange(8, 16),
                    "finish_reason": "stop",
                    "parts": parts,
                    "reward": reward,
                    "advantage": round((reward - mean) / spread, 3),
                }


def _lines(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def write_run(folder: Path, seed: int, *, questions: int = 48, sft: int = 60, grpo: int = 40) -> Path:
    """Writes a finished run with its data set beside it (folder-data) and returns the folder."""
    rng, root = random.Random(seed), folder.with_name(folder.name + "-data")
    held = _questions(root, questions, rng, np.random.default_rng(seed))
    folder.mkdir(parents=True)
    records: list[Record] = []
    for label, stage, step in (("start", "sft", 0), ("sft", "sft", sft), ("grpo", "grpo", grpo)):
        if label == "sft":
            records += [sft_record(step, sft, rng) for step in range(1, sft + 1)]
        elif label == "grpo":
            records += [grpo_record(step, grpo, rng) for step in range(1, grpo + 1)]
        lines = [
            {
                **q,
                "greedy": _answer(q, SKILL[label], rng),
                "sampled": [_answer(q, SKILL[label] - 0.1, rng) for _ in range(4)],
            }
            for q in held
        ]
        _lines(folder / "eval" / f"{label}.jsonl", lines)
        records.append(
            {"kind": "eval", "label": label, "stage": stage, "step": step, "seconds": 21.5, "metrics": _metrics(lines)}
        )
    _lines(folder / "metrics.jsonl", records)
    _lines(folder / "completions.jsonl", list(_completions(range(1, grpo + 1), rng)))
    data = f'[data]\nroot = "{root}"\neval = "{root}/heldout.jsonl"\n'
    config = f'[model]\nname = "tiny-model"\n\n{data}\n[grpo]\nsteps = {grpo}\n\n[eval]\ntemperature = 0.7\n'
    (folder / "config.resolved.toml").write_text(config, "utf-8")
    versions = {
        "vrlt_fast": "0.1.0",
        "torch": "2.13.0+cpu",
        "transformers": "5.23.0",
        "python": "3.11.7",
        "git": "5ca1ab1e",
        "device": "cpu",
    }
    (folder / "versions.json").write_text(json.dumps(versions), "utf-8")
    return folder


@pytest.fixture
def make_run(tmp_path: Path, seed: int) -> Callable[..., Path]:
    """``make_run(**sizes)``: a run folder under tmp_path."""
    return lambda **sizes: write_run(tmp_path / "demo", seed, **sizes)


@pytest.fixture
def train_records() -> Callable[[str], Callable[[int, int, random.Random], Record]]:
    """The maker of ``train`` records of a stage."""
    return {"sft": sft_record, "grpo": grpo_record}.__getitem__
