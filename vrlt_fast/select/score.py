"""``vrlt select score``: k responses to each training sample, their rewards into a file that a kill can't hurt.

A sample's responses follow from ``train.seed`` and its id alone, so they are the same in any order, shard or resumed
run (to the last bit on a CPU in fp32, to rounding elsewhere). With ``select.first`` they come in two waves; what the
first ones decide is learnt batch by batch in the order of the data (:mod:`vrlt_fast.select.stopping`), so that a run
that was stopped decides as one that wasn't.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

import torch

from vrlt_fast.config import Config
from vrlt_fast.data.readers import resolve_images, resolve_video
from vrlt_fast.data.sample import Sample
from vrlt_fast.data.splits import data_root, training_samples
from vrlt_fast.errors import DataError, Problem, Stopped
from vrlt_fast.model.embed_cache import from_config
from vrlt_fast.model.load import VideoLM, inspect_model, load_model
from vrlt_fast.model.prompt import Prompt, encode_prompt
from vrlt_fast.rewards.base import total
from vrlt_fast.rewards.dual import weights
from vrlt_fast.rewards.earned import Earned
from vrlt_fast.rollout.engines import RolloutEngine, open_engine
from vrlt_fast.rollout.group import Group, RolloutRequest
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.select.fingerprint import file_digest, model_digest, recipe_digest, recipe_keys
from vrlt_fast.select.scores import Header, ScoreFile, highest, lines_of
from vrlt_fast.select.stopping import Stopping
from vrlt_fast.video.images import ImageLoader
from vrlt_fast.video.labels import with_ids
from vrlt_fast.video.source import Clips, ClipSource

BATCH = 32
"""Samples in one call of the engine, and between two changes of what the stopping rule knows."""
_STEP = 1_000_003
_SEEDS = 2**63


@dataclass
class Progress:
    """``done`` of ``todo`` samples of this process, with ``drawn`` responses of ``possible``, in ``seconds``."""

    todo: int
    done: int = 0
    drawn: int = 0
    possible: int = 0
    seconds: float = 0.0


def seed_of(sample: str, seed: int) -> int:
    """The seed of a sample's responses, from its id and ``train.seed``."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest(), "little") % _SEEDS


def later_seed(seed: int, first: int) -> int:
    """The seed with which a request's rows are those that ``seed`` would have had from number ``first`` on
    (:func:`vrlt_fast.rollout.rows.row_seeds` counts on from seed times a constant).
    """
    return (seed + first * pow(_STEP, -1, _SEEDS)) % _SEEDS


def shard_path(out: Path, shard: tuple[int, int]) -> Path:
    """SCORES.jsonl, or SCORES.2-of-4.jsonl where there are several."""
    return out if shard[1] == 1 else out.with_name(f"{out.stem}.{shard[0]}-of-{shard[1]}{out.suffix}")


def score_samples(
    config: Config,
    out: Path,
    *,
    shard: tuple[int, int] = (1, 1),
    retry_failed: bool = False,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> Progress:
    """Score the samples of ``data.train`` that ``out`` (:func:`shard_path` of it) lacks.

    Args:
        shard: part i of n, i from 1: a stretch of the data, so that questions about a video stay together.
        retry_failed: also those whose video couldn't be read before.

    Raises:
        VrltError: as the readers; L01 ``out`` is of another model, recipe or data; L02 it isn't a file of scores.
        Stopped: S02 by SIGTERM or SIGINT; the same call goes on.
    """
    samples = training_samples(config)
    with _ends_by_signal(), ScoreFile(shard_path(out, shard), _header(config, samples, shard)) as file:
        own = samples[(shard[0] - 1) * len(samples) // shard[1] : shard[0] * len(samples) // shard[1]]
        job = _Job(config, own, file, retry_failed, progress)
        if job.progress.todo:
            _run(config, job, warn)
        return job.progress


def _header(config: Config, samples: Sequence[Sample], shard: tuple[int, int]) -> Header:
    folder, data = Path(inspect_model(config.model.name).path), Path(config.data.train)
    keys, content = recipe_keys(config), file_digest(data)
    left_out = file_digest(Path(config.data.quarantine)) if config.data.quarantine else ""
    return Header(
        model={"digest": model_digest(folder), "name": config.model.name},
        recipe={"digest": recipe_digest(keys), "keys": keys},
        data={"digest": f"{content} {left_out}".strip(), "file": content, "name": str(data)},
        samples=len(samples),
        shard=shard,
        repeats=config.select.repeats,
        first=config.select.first,
        weights=weights(config.reward),
    )


def _run(config: Config, job: _Job, warn: Callable[[str], None]) -> None:
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    lm = load_model(config.model, inspect_model(config.model.name), config.kernels.layers)
    cache = from_config(config, lm, None, warn)
    engine = open_engine(config, lm, cache)
    try:
        engine.sync(lm)
        tasks = {sample.task for sample in job.samples}
        with (
            ClipSource(config.video, lm.info.geometry, device=lm.device, warn=warn) as clips,
            Earned(config, device=lm.device, warn=warn, tasks=tasks) as earned,
        ):
            earned.check()
            job.run(lm, engine, clips, earned)
    finally:
        engine.close()


class _Job:
    """The samples of one file, batch by batch."""

    def __init__(
        self,
        config: Config,
        samples: Sequence[Sample],
        file: ScoreFile,
        retry_failed: bool,
        progress: Callable[[Progress], None] | None,
    ):
        self.config, self.samples, self.file, self._tell = config, samples, file, progress
        self._weights = weights(config.reward)
        keys = config.select
        self._rule = Stopping(keys.repeats, keys.first, keys.error)
        self._shares: dict[str, list[float]] = {}
        self._done: set[str] = set()
        for line in lines_of(file.path):
            if "failed" in line and retry_failed:
                continue
            self._done.add(line["id"])
            if self._rule.waves and "failed" not in line:
                self._shares[line["id"]] = self._as_shares(line)
        self.progress = Progress(sum(s.id not in self._done for s in samples))
        self._begin = perf_counter()
        self._root = data_root(config, "train")

    def run(self, lm: VideoLM, engine: RolloutEngine, clips: Clips, earned: Earned) -> None:
        self._begin = perf_counter()
        clips.expect(self._root / s.video for s in self.samples if s.id not in self._done)
        images = ImageLoader(self.config.video, lm.info.geometry)
        for start in range(0, len(self.samples), BATCH):
            batch = self.samples[start : start + BATCH]
            todo = [sample for sample in batch if sample.id not in self._done]
            prompts = [p for sample in todo if (p := self._prompt(lm, sample, clips, images)) is not None]
            if prompts:
                self._waves(engine, prompts, earned)
            if self._rule.waves:
                for sample in batch:
                    if shares := self._shares.pop(sample.id, None):
                        self._rule.learn(sample.task, shares)

    def _prompt(self, lm: VideoLM, sample: Sample, clips: Clips, images: ImageLoader) -> Prompt | None:
        config = self.config
        try:
            clip = clips.load(resolve_video(sample, self._root))
            clip = with_ids(clip, sample.instances) if config.prompt.draw_ids else clip
            shown = [images.load(path) for path in resolve_images(sample, self._root) if config.prompt.images]
            reserve = config.rollout.max_new_tokens
            return encode_prompt(lm.info, sample, clip, config.prompt, images=shown, reserve=reserve)
        except DataError as error:
            what = {"failed": error.code, "why": error.problems[0].what}
            self._write({"id": sample.id, "task": sample.task, "line": _number(sample), **what}, 0)
            return None

    def _waves(self, engine: RolloutEngine, prompts: Sequence[Prompt], earned: Earned) -> None:
        repeats, first = self.config.select.repeats, self.config.select.first or self.config.select.repeats
        unclear: list[_Drawn] = []

        def ended(group: Group) -> None:
            drawn = self._drawn(group, earned)
            ticket = seed_of(drawn.prompt.sample.id, -1)
            if first == repeats or self._rule.clear(drawn.prompt.sample.task, self._as_shares(drawn.line), ticket):
                self._write(drawn.line, first)
            else:
                unclear.append(drawn)

        engine.generate([self._request(p, first, 0) for p in prompts], on_group=ended)
        if not unclear:
            return
        by_prompt = {id(drawn.prompt): drawn for drawn in unclear}

        def completed(group: Group) -> None:
            before = by_prompt[id(group.request.prompt)]
            self._write(before.joined(self._drawn(group, earned)), repeats)

        engine.generate([self._request(d.prompt, repeats - first, first) for d in unclear], on_group=completed)

    def _request(self, prompt: Prompt, n: int, drawn: int) -> RolloutRequest:
        r = self.config.rollout
        sampling = Sampling(r.max_new_tokens, r.temperature, r.top_p, r.top_k, r.min_p, r.stop)
        return RolloutRequest(prompt, n, sampling, later_seed(seed_of(prompt.sample.id, self.config.train.seed), drawn))

    def _drawn(self, group: Group, earned: Earned) -> _Drawn:
        prompt = group.request.prompt
        parts = earned([c.response for c in group.completions], prompt.sample)
        names = list(dict.fromkeys(name for each in parts for name in each))
        line = {
            "id": prompt.sample.id,
            "task": prompt.sample.task,
            "line": _number(prompt.sample),
            "seed": group.request.seed,
            "waves": [len(parts)],
            "rewards": [total(each, self._weights) for each in parts],
            "parts": {name: [each.get(name, 0.0) for each in parts] for name in names},
            "n_tokens": [c.response.n_tokens for c in group.completions],
        }
        return _Drawn(prompt, line)

    def _as_shares(self, line: dict[str, Any]) -> list[float]:
        top = highest(tuple(line["parts"]), self._weights) or 1.0
        return [min(max(reward / top, 0.0), 1.0) for reward in line["rewards"]]

    def _write(self, line: dict[str, Any], drawn: int) -> None:
        self.file.append(line)
        if "rewards" in line:
            if self._rule.waves:
                self._shares[line["id"]] = self._as_shares(line)
            self.progress.possible += self.config.select.repeats
        self.progress.done += 1
        self.progress.drawn += drawn
        self.progress.seconds = perf_counter() - self._begin
        if self._tell:
            self._tell(self.progress)


@dataclass(frozen=True)
class _Drawn:
    """A prompt and the line of the responses that it has so far."""

    prompt: Prompt
    line: dict[str, Any] = field(default_factory=dict)

    def joined(self, later: _Drawn) -> dict[str, Any]:
        """The line of both waves."""
        a, b = self.line, later.line
        names = list(dict.fromkeys([*a["parts"], *b["parts"]]))
        n, m = len(a["rewards"]), len(b["rewards"])
        parts = {name: a["parts"].get(name, [0.0] * n) + b["parts"].get(name, [0.0] * m) for name in names}
        both = {key: a[key] + b[key] for key in ("waves", "rewards", "n_tokens")}
        return {**a, **both, "parts": parts}


def _number(sample: Sample) -> int:
    return int(sample.line.rpartition(":")[2])


@contextmanager
def _ends_by_signal() -> Iterator[None]:
    """SIGTERM and SIGINT raise Stopped, wherever the run is: what is written is whole, the rest is drawn again."""

    def stop(number: int, _: FrameType | None) -> None:
        what = f"stopped by {signal.Signals(number).name}; all finished samples are in the file"
        raise Stopped(Problem("VRLT-S02", what, fix="run the same command again: it goes on where it was"))

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
