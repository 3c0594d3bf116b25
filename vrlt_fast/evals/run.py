"""Evaluation of a model on held-out questions: greedy and sampled answers, metrics, per-question predictions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrlt_fast.config import Config
from vrlt_fast.data.readers import resolve_images, resolve_video, to_json
from vrlt_fast.data.sample import TASKS, Sample
from vrlt_fast.data.splits import data_root, read_split
from vrlt_fast.errors import ConfigError, DataError, Problem, VrltError
from vrlt_fast.evals.metrics import Metrics, Scored, score, summarise
from vrlt_fast.files import write_lines
from vrlt_fast.model.embed_cache import EmbeddingCache
from vrlt_fast.model.load import VideoLM, inspect_model, load_model
from vrlt_fast.model.prompt import Prompt, encode_prompt, read_by_all
from vrlt_fast.parallel.replicas import Replicas
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.rollout.engine import GroupEngine
from vrlt_fast.rollout.group import Group, RolloutRequest
from vrlt_fast.rollout.peers import PeerEngine
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.video.images import ImageLoader
from vrlt_fast.video.labels import with_ids
from vrlt_fast.video.preprocess import Clip
from vrlt_fast.video.source import Clips, ClipSource

_TRUTH = ("object_id", "progress", "source")  # of a line of predictions, where the sample has them


@dataclass(frozen=True)
class Evaluation:
    """``metrics`` for greedy and sampled answers, ``rows`` of eval/LABEL.jsonl, ``failed`` questions whose video
    can't be read; ``scored`` are the answers that the metrics are made of, in the order of the rows.
    """

    metrics: dict[str, Metrics]
    rows: list[dict[str, Any]]
    failed: list[VrltError]
    scored: dict[str, list[Scored]]


def pick_samples(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """``count`` samples spread evenly over the tasks (all when 0), the same for the same seed, in file order."""
    if count == 0 or count >= len(samples):
        return list(samples)
    rng = random.Random(f"eval-{seed}")
    piles = [[i for i, s in enumerate(samples) if s.task == task] for task in TASKS]
    for pile in piles:
        rng.shuffle(pile)
    chosen: list[int] = []
    while len(chosen) < count:
        for pile in piles:
            if pile and len(chosen) < count:
                chosen.append(pile.pop())
    return [samples[i] for i in sorted(chosen)]


def evaluate(
    lm: VideoLM,
    samples: Sequence[Sample],
    loader: Clips,
    config: Config,
    *,
    root: Path,
    temperatures: Sequence[float] | None = None,
    alter: Callable[[Clip], Clip] | None = None,
    progress: Callable[[int], None] | None = None,
    cache: EmbeddingCache | None = None,
    replicas: Replicas | None = None,
    peers: Peers | None = None,
) -> Evaluation:
    """Answer every question greedily and ``eval.responses`` times sampled.

    Args:
        temperatures: of the sampled answers, default ``eval.temperature``; the keys of ``metrics`` are "greedy", then
            "sampled" (for the first) and "sampled@T" for further ones.
        alter: changes each clip first, videos and images, for example to grey pictures.
        progress: called with the number of questions done since the last call.
        cache: embeddings of a frozen tower.
        replicas: each of them answers its share, and all get the whole evaluation.
        peers: processes that share the clips that ``loader`` gives, and answer the same questions together.
    """
    replicas, peers = replicas or Replicas(), peers or Peers()
    temps = list(temperatures or [config.eval.temperature])
    names = ["sampled", *(f"sampled@{t}" for t in temps[1:])]
    failed: list[VrltError] = []
    own: list[tuple[int, list[list[Scored]]]] = []
    engine: GroupEngine | PeerEngine = GroupEngine(lm.whole, config.rollout, cache)
    if peers.size > 1:
        engine = PeerEngine(lm, config.rollout, cache, peers=peers)
    share = replicas.share(list(enumerate(samples)))
    loader.expect(root / sample.video for _, sample in share)
    batches = _batches(lm, share, loader, config, root=root, alter=alter, failed=failed)
    for places, prompts in (_read_by_all(*batch, peers, failed) for batch in batches):
        if not prompts:
            continue
        by_temperature = _answers(engine, prompts, config, [0.0, *temps], places=places)
        own += zip(places, map(list, zip(*by_temperature, strict=True)), strict=True)
        if progress:
            progress(len(prompts))
    told = replicas.gather((own, [e.problems for e in failed]))
    kept = sorted((answered for part, _ in told for answered in part), key=lambda answered: answered[0])
    others = [DataError(p) for rank, (_, lost) in enumerate(told) if rank != replicas.rank for p in lost]
    scored = {name: [one for _, a in kept for one in a[i]] for i, name in enumerate(["greedy", *names])}
    scored = {name: answers for name, answers in scored.items() if answers}
    metrics = {name: summarise(answers) for name, answers in scored.items()}
    rows = [_row(samples[place], answers[0], answers[1]) for place, answers in kept]
    return Evaluation(metrics, rows, [*failed, *others], scored)


def _batches(
    lm: VideoLM,
    samples: Sequence[tuple[int, Sample]],
    loader: Clips,
    config: Config,
    *,
    root: Path,
    alter: Callable[[Clip], Clip] | None,
    failed: list[VrltError],
) -> Iterator[tuple[list[int], list[Prompt]]]:
    """Prompts with the places of their samples."""
    loads = ImageLoader(config.video, lm.info.geometry).load
    for start in range(0, len(samples), config.eval.prompts):
        places, prompts = [], []
        for place, sample in samples[start : start + config.eval.prompts]:
            try:
                clip = loader.load(resolve_video(sample, root))
                clip = with_ids(clip, sample.instances) if config.prompt.draw_ids else clip
                images = [loads(path) for path in resolve_images(sample, root) if config.prompt.images]
                if alter:
                    clip, images = alter(clip), [alter(image) for image in images]
                reserve = config.rollout.max_new_tokens
                prompts.append(encode_prompt(lm.info, sample, clip, config.prompt, images=images, reserve=reserve))
                places.append(place)
            except DataError as error:
                failed.append(error)
        yield places, prompts


def _read_by_all(
    places: list[int], prompts: list[Prompt], peers: Peers, failed: list[VrltError]
) -> tuple[list[int], list[Prompt]]:
    """What all peers could read of a batch."""
    same = read_by_all(prompts, peers)
    for lost in (prompt.sample for i, prompt in enumerate(prompts) if i not in same):
        what = "question left out: another process couldn't read its video"
        failed.append(DataError(Problem("VRLT-V02", what, lost.line or lost.id)))
    return [places[i] for i in same], list(same.values())


def _answers(
    engine: GroupEngine | PeerEngine,
    prompts: Sequence[Prompt],
    config: Config,
    temperatures: Sequence[float],
    *,
    places: Sequence[int],
) -> list[list[list[Scored]]]:
    """By temperature and prompt: one greedy answer at temperature 0, ``eval.responses`` at others. One rollout, so that
    all answers to a prompt share its prefill.
    """
    base = config.train.seed * 1_000_003
    requests = []
    for temperature in temperatures:
        sampling = Sampling(config.rollout.max_new_tokens, temperature)
        n = config.eval.responses if temperature else 1
        requests += [RolloutRequest(p, n, sampling, seed=base + i) for i, p in zip(places, prompts, strict=True) if n]
    groups = iter(engine.generate(requests)[0])
    return [
        [_scored(next(groups), config) if config.eval.responses or not temperature else [] for _ in prompts]
        for temperature in temperatures
    ]


def _scored(group: Group, config: Config) -> list[Scored]:
    sample = group.request.prompt.sample
    how = config.prompt
    return [score(c.response, sample, think=how.think, grammar=how.grammar) for c in group.completions]


def _row(sample: Sample, greedy: Sequence[Scored], sampled: Sequence[Scored]) -> dict[str, Any]:
    fields = to_json(sample)
    truth = {name: fields[name] for name in _TRUTH if name in fields}
    return {
        "id": sample.id,
        "task": sample.task,
        "video": sample.video,
        "duration": sample.duration,
        "question": sample.question,
        "options": list(sample.options),
        "answer": sample.answer,
        "spans": [list(s) for s in sample.spans],
        **truth,
        "greedy": greedy[0].to_json(),
        "sampled": [s.to_json() for s in sampled],
    }


def evaluate_folder(
    config: Config, out: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Metrics]:
    """Evaluate the model folder ``config.model.name`` on ``config.data.eval``; write the predictions to ``out`` if
    given.

    Raises:
        VrltError: as the readers and the loader; V codes when videos can't be read (after the predictions are written).
    """
    result = answer_all(config, held_out(config), progress)
    if out is not None:
        write_lines(out, result.rows)
    raise_failed(result)
    return result.metrics


def held_out(config: Config) -> list[Sample]:
    """The questions of ``config.data.eval`` that an evaluation takes. Raises ConfigError C04 where there is no file,
    and as the readers.
    """
    if not config.data.eval:
        raise ConfigError(Problem("VRLT-C04", "nothing to evaluate on", "data.eval", fix="pass --data FILE.jsonl"))
    return pick_samples(read_split(config, "eval"), config.eval.samples, config.train.seed)


def answer_all(
    config: Config,
    samples: Sequence[Sample],
    progress: Callable[[int, int], None] | None = None,
    *,
    split: str = "eval",
) -> Evaluation:
    """:func:`evaluate` the model folder ``config.model.name`` on samples of ``data.eval``, or ``data.train``."""
    lm = load_model(config.model, inspect_model(config.model.name), config.kernels.layers)
    count = 0

    def tick(n: int) -> None:
        nonlocal count
        count += n
        if progress:
            progress(count, len(samples))

    with ClipSource(config.video, lm.info.geometry, device=lm.device) as clips:
        return evaluate(lm, samples, clips, config, root=data_root(config, split), progress=tick)


def raise_failed(result: Evaluation) -> None:
    """Raises DataError with a problem for each question whose video couldn't be read, where there are some."""
    if result.failed:
        raise DataError([p for error in result.failed for p in error.problems])
