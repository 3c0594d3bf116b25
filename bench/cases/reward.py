"""reward: responses a second that the dual reward scores, reading included, in one process.

Responses have a thought of 20 to 200 words before the answer; of each group some are right, some in part, and some
malformed in the ways that policies are: tags missing, open or twice, text behind the answer, spans reversed, cut off.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from bench.harness import Claim, Record, median_of, records_of, summarize, write_result
from vrlt_fast.config import PromptConfig
from vrlt_fast.config_rl import RewardConfig
from vrlt_fast.data.grammars.named import grammar
from vrlt_fast.data.sample import LETTERS, Sample, Span
from vrlt_fast.rewards.base import Response, total
from vrlt_fast.rewards.dual import make_reward, weights

GRAMMARS = ("plain", "temporal_r1")
TASKS = ("videoqa", "grounding", "grounded_qa")
GROUP = 8
ALL = "both grammars"
TARGET = 5000.0
_TEXT = "the video shows a person who opens door then walks to table so event starts at about seconds and ends"
Scorable = tuple[Response, Sample]


def run(argv: Sequence[str]) -> None:
    """Write bench/results/reward.cpu.json."""
    parser = argparse.ArgumentParser(prog="python -m bench reward", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--responses", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(argv)
    records = measure(options.responses, options.turns, options.seed)
    write_result("reward", "cpu", records, claims, options.seed, options.out)


def measure(count: int, turns: int, seed: int) -> list[Record]:
    """Score ``count`` responses, half in each grammar, ``turns`` times: rates, and what they earned on average."""
    share = count // len(GRAMMARS)
    given = {name: responses(name, share, seed) for name in GRAMMARS}
    rates: dict[str, list[float]] = {name: [] for name in (*GRAMMARS, ALL)}
    earned: dict[str, dict[str, float]] = {}
    for _ in range(turns):
        spent = 0.0
        for name, scorable in given.items():
            seconds, earned[name] = score(name, scorable)
            rates[name].append(share / seconds)
            spent += seconds
        rates[ALL].append(share * len(GRAMMARS) / spent)
    found = [summarize("dual reward", name, "rate", "responses/s", values) for name, values in rates.items()]
    length = [sum(len(r.text) for r, _ in scorable) / len(scorable) for scorable in given.values()]
    found += [summarize("responses", name, "length", "characters", [n]) for name, n in zip(given, length, strict=True)]
    return found + [
        summarize("responses", name, f"mean {part}", "0..1", [value])
        for name, parts in earned.items()
        for part, value in parts.items()
    ]


def score(name: str, scorable: Sequence[Scorable]) -> tuple[float, dict[str, float]]:
    """Seconds for parts and weighted sums of all responses, and the parts' means over those that have them."""
    config = RewardConfig()
    reward, weight = make_reward(config, PromptConfig.model_validate({"grammar": name}), tasks=TASKS), weights(config)
    begin = perf_counter()
    parts = [reward(response, sample) for response, sample in scorable]
    for one in parts:
        total(one, weight)
    seconds = perf_counter() - begin
    names = dict.fromkeys(part for one in parts for part in one)
    return seconds, {part: _mean([one[part] for one in parts if part in one]) for part in names}


def responses(name: str, count: int, seed: int) -> list[Scorable]:
    """Groups of responses to random questions of all tasks in turn."""
    rng = random.Random(f"{name} {seed}")
    found: list[Scorable] = []
    while len(found) < count:
        sample = _sample(rng, len(found) // GROUP)
        found += [(_response(rng, name, sample), sample) for _ in range(min(GROUP, count - len(found)))]
    return found


def _sample(rng: random.Random, number: int) -> Sample:
    task, duration = TASKS[number % len(TASKS)], round(rng.uniform(10, 180), 1)
    sample = Sample(f"s{number}", f"v{number}.mp4", duration, task, "What happens, and when?")
    if sample.wants_answer:
        options = tuple(f"option {letter}" for letter in LETTERS[: rng.randint(2, 6)])
        sample = replace(sample, options=options, answer=LETTERS[rng.randrange(len(options))])
    if sample.wants_spans:
        pieces = rng.randint(1, 3) if task == "grounded_qa" else 1
        sample = replace(sample, spans=_spans(rng, duration, pieces))
    return sample


def _spans(rng: random.Random, duration: float, pieces: int) -> tuple[Span, ...]:
    borders = sorted(round(x * duration, 1) for x in (rng.random() for _ in range(2 * pieces)))
    return tuple((s, max(e, s + 0.1)) for s, e in zip(borders[::2], borders[1::2], strict=True))


def _response(rng: random.Random, name: str, sample: Sample) -> Response:
    thought = " ".join(rng.choices(_TEXT.split(), k=rng.randint(20, 200)))
    said, kind = replace(sample, reasoning=thought), rng.random()
    if kind > 0.3 and sample.wants_answer:
        said = replace(said, answer=rng.choice(LETTERS[: len(sample.options)]))
    if kind > 0.3 and sample.wants_spans:
        said = replace(said, spans=_spans(rng, sample.duration, len(sample.spans)))
    text, reason = grammar(name).write(said, think=True), "stop"
    if kind > 0.7:
        text, reason = _malformed(rng, text)
    return Response(text, len(text) // 4, reason)


def _malformed(rng: random.Random, text: str) -> tuple[str, str]:
    kind = rng.randrange(6)
    if kind == 0:
        return text[: rng.randrange(len(text))], "length"
    if kind == 1:
        return text.replace("</answer>", "", 1), "stop"
    if kind == 2:
        return text + " That is what I think.", "stop"
    if kind == 3:
        return text.replace("<answer>", "<answer><answer>", 1), "stop"
    if kind == 4:
        return text.replace("</think>", "", 1), "stop"
    return text.replace("(", "[").replace(" to ", " - ").replace('"', ""), "stop"


def claims(records: list[Record]) -> list[Claim]:
    """100,000 responses in 20 s."""
    rate = median_of(records, metric="rate", arm="dual reward", shape=ALL)
    return [Claim("reward.cpu.rate", "responses a second, read and scored with the dual reward", rate, TARGET)]


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``rates``: responses a second by grammar."""
    records = records_of(result)
    value = {(r.arm, r.shape, r.metric): r for r in records}
    rows = []
    for name in GRAMMARS:
        rate, length = value["dual reward", name, "rate"], value["responses", name, "length"].median
        form = value["responses", name, "mean format"].median
        rows.append(
            f"| `{name}` | {rate.median:,.0f} | {rate.p20:,.0f} to {rate.p80:,.0f} | {length:.0f} | {form:.2f} |"
        )
    head = [
        "| grammar | responses a second | 20 % to 80 % | characters each | well-formed |",
        "|---|---:|---:|---:|---:|",
    ]
    return {"rates": "\n".join([*head, *rows])}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
