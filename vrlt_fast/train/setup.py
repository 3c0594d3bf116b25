"""Everything that can be found wrong before a run starts, and the run folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vrlt_fast.config import Config, VideoConfig
from vrlt_fast.config_load import dump_toml, load_config
from vrlt_fast.data.prompts import user_text
from vrlt_fast.data.readers import resolve_images, resolve_video
from vrlt_fast.data.sample import Sample
from vrlt_fast.data.splits import data_root, read_split, training_samples
from vrlt_fast.errors import ConfigError, DataError, Problem, SetupError, VideoError
from vrlt_fast.evals.run import pick_samples
from vrlt_fast.files import storage_errors, write_text
from vrlt_fast.model.layers import check_layers
from vrlt_fast.model.load import ModelInfo, inspect_model, pick_device
from vrlt_fast.model.lora import check_lora
from vrlt_fast.model.prompt import render
from vrlt_fast.report.writers import check_writers
from vrlt_fast.rollout.vllm import check_vllm
from vrlt_fast.train.check_parallel import check_parallel
from vrlt_fast.train.check_rewards import check_rewards, check_services, check_tasks
from vrlt_fast.train.memory import Longest
from vrlt_fast.train.versions import versions
from vrlt_fast.video.cache import upright
from vrlt_fast.video.images import ImageLoader
from vrlt_fast.video.index import VideoIndex, probe
from vrlt_fast.video.preprocess import smart_resize
from vrlt_fast.video.sampling import TUBELET, choose, settings_of

PROBED = 2000
"""Training videos that are opened before the run; `vrlt data check` opens all."""
COUNTED = 32
"""Prompts among which the longest is found by counting their text's tokens."""
RESOLVED = "config.resolved.toml"
FREE_TO_CHANGE = {"log", "checkpoint", "eval", "embed_cache", "parallel"}
FREE_KEYS = {
    f"video.{key}"
    for key in VideoConfig.model_fields
    if key in ("workers", "deadline", "prefetch") or key.startswith("cache_")
} | {f"rollout.{key}" for key in ("kv_gb", "max_rows", "cuda_graphs", "prefill_chunk")}
FREE_KEYS |= {"train.verify_shared_prefix", "train.probe"}
"""What decides how fast videos and responses come, not what comes, and what is checked."""


@dataclass(frozen=True)
class Inputs:
    """What a run trains and evaluates on, checked."""

    info: ModelInfo
    train: list[Sample]
    heldout: list[Sample]
    fingerprint: str
    broken: tuple[Problem, ...]
    longest: Longest | None


def read_inputs(config: Config, *, open_videos: bool = True) -> Inputs:
    """Read and check model folder, annotations and, unless another process does that, videos. Loads no weights, writes
    nothing.

    ``broken`` lists probed videos that can't be used, when they are few enough for the run to go on without them;
    ``longest`` is known where a training video could be opened.

    Raises:
        VrltError: all problems of the annotation files at once; the model's; D10 for prompts that are too long; D12
        with
            all V codes when more than ``data.max_failed_share`` of the probed videos fail.
    """
    if not config.model.name or not config.data.train:
        key = "model.name" if not config.model.name else "data.train"
        raise ConfigError(
            Problem("VRLT-C04", f"{key} is empty", key, fix=f"set {key} in the TOML file, or pass --{key}")
        )
    info = inspect_model(config.model.name)
    check_layers(config.kernels.layers, pick_device(config.model.device))
    check_writers(config.log.to)
    check_lora(config.lora, config.rollout.engine)
    check_parallel(config, info)
    if config.rollout.engine == "vllm":
        check_vllm(info.family)
    check_rewards(config)
    train = training_samples(config)
    heldout: list[Sample] = []
    if config.data.eval:
        asked = [s for s in read_split(config, "eval") if not config.data.tasks or s.task in config.data.tasks]
        heldout = pick_samples(asked, config.eval.samples, config.train.seed)
    broken: list[Problem] = []
    longest: Longest | None = None
    if open_videos:
        broken, longest = _probe(config, info, train, data_root(config, "train"))
        broken += _probe(config, info, heldout, data_root(config, "eval"))[0] if heldout else []
    check_tasks(config, [*train, *heldout])
    if open_videos:
        check_services(config, {sample.task for sample in train}, logging.getLogger("vrlt_fast").warning)
    return Inputs(info, train, heldout, _fingerprint(config, info), tuple(broken), longest)


def _probe(
    config: Config, info: ModelInfo, samples: Sequence[Sample], root: Path
) -> tuple[list[Problem], Longest | None]:
    """Open the videos and measure the prompts. Returns the problems of videos that the run can do without, and the
    longest prompt.
    """
    by_video: dict[str, list[Sample]] = {}
    for sample in samples:
        by_video.setdefault(sample.video, []).append(sample)
    videos = list(by_video)[:PROBED]
    images = ImageLoader(config.video, info.geometry)
    failed: list[Problem] = []
    long: list[Problem] = []
    sizes: list[tuple[_Size, Sample]] = []
    for video in videos:
        try:
            index = probe(resolve_video(by_video[video][0], root))
            size = _resized(config, info, index)
        except DataError as error:
            failed += [_at(p, by_video[video][0]) for p in error.problems]
            continue
        for sample in by_video[video]:
            try:
                shown = resolve_images(sample, root) if config.prompt.images else ()
                measured = _measure(config, info, index, size, [images.n_tokens(path) for path in shown])
            except VideoError as error:
                failed += [_at(p, sample) for p in error.problems]
                continue
            sizes.append((measured, sample))
            problem = _too_long(config, info, sample, measured)
            long += [problem] if problem else []
    if long:
        raise DataError(long)
    if failed and len(failed) > config.data.max_failed_share * len(videos):
        what = f"{len(failed)} of {len(videos)} videos can't be used"
        head = Problem("VRLT-D12", what, str(root), fix="mend or remove them: vrlt data check FILE lists all")
        raise DataError([*failed, head])
    return failed, _longest(config, info, samples, sizes)


@dataclass(frozen=True)
class _Size:
    """Tokens of a prompt without its text: of its video (of which ``frames``), its images, and ``around`` the video."""

    video: int
    images: int
    around: int
    frames: str

    @property
    def tokens(self) -> int:
        return self.video + self.images + self.around


def _measure(config: Config, info: ModelInfo, index: VideoIndex, size: tuple[int, int], images: Sequence[int]) -> _Size:
    (height, width), factor = size, info.geometry.factor
    frames = len(choose(index, settings_of(config.video)).frames)
    tokens = frames // TUBELET * (height // factor) * (width // factor)
    blocks = info.frame_blocks or config.prompt.video_layout == "interleaved"
    around = 8 * frames // TUBELET if blocks else 2
    return _Size(tokens, sum(images), around, f"{frames} frames of {width} x {height}")


def _longest(
    config: Config, info: ModelInfo, samples: Sequence[Sample], sizes: Sequence[tuple[_Size, Sample]]
) -> Longest | None:
    """Of those that are longest with a token for four characters of text, the longest."""
    if not sizes:
        return None
    likely = sorted(sizes, key=lambda pair: -pair[0].tokens - len(user_text(pair[1], config.prompt)) // 4)[:COUNTED]
    counted = [(size.tokens + _text_tokens(config, info, sample), size, sample) for size, sample in likely]
    tokens, size, sample = max(counted, key=lambda found: found[0])
    place = next(i for i, other in enumerate(samples) if other is sample)
    return Longest(place, tokens, (size.video + size.images) * info.geometry.merge**2)


def _text_tokens(config: Config, info: ModelInfo, sample: Sample) -> int:
    shown = len(sample.images) if config.prompt.images else 0
    return len(info.tokenizer(render(info, sample, config.prompt, images=shown), add_special_tokens=False)["input_ids"])


def _at(problem: Problem, sample: Sample) -> Problem:
    return Problem(problem.code, f"{problem.what} ({problem.where})", sample.line, problem.why, problem.fix)


def _resized(config: Config, info: ModelInfo, index: VideoIndex) -> tuple[int, int]:
    """Height and width of the frames that the model gets. Raises VideoError V06."""
    video = config.video
    try:
        return smart_resize(*upright(index), info.geometry.factor, video.min_pixels, video.max_pixels)
    except ValueError as error:
        fix = "crop the video, or remove its lines"
        raise VideoError(Problem("VRLT-V06", "frames can't be resized", str(index.path), str(error), fix)) from None


def _too_long(config: Config, info: ModelInfo, sample: Sample, size: _Size) -> Problem | None:
    reserve = config.rollout.max_new_tokens
    characters = len(user_text(sample, config.prompt) + config.prompt.system)
    if size.tokens + reserve + 32 < info.context // 2 and characters < 2000:
        return None
    needed = size.tokens + _text_tokens(config, info, sample) + reserve
    if needed <= info.context:
        return None
    return Problem(
        "VRLT-D10",
        f"prompt and response need {needed} tokens, the model's context is {info.context}",
        where=sample.line,
        why=f"{size.video} tokens are video ({size.frames}), {size.images} images, {reserve} response",
        fix="lower video.max_frames, video.max_pixels, video.image_max_pixels or rollout.max_new_tokens",
    )


def _fingerprint(config: Config, info: ModelInfo) -> str:
    """Digest of the annotation files and of the model folder's configuration and weight sizes."""
    digest = hashlib.sha256(Path(config.data.train).read_bytes())
    if config.data.eval:
        digest.update(Path(config.data.eval).read_bytes())
    if config.data.quarantine:
        digest.update(Path(config.data.quarantine).read_bytes())
    digest.update((Path(info.path) / "config.json").read_bytes())
    for file in sorted(Path(info.path).glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()


def refuse_existing(out: Path) -> None:
    """Raises SetupError R01 when the run folder exists."""
    if out.exists():
        fix = "add --resume, or choose another --train.out"
        raise SetupError(Problem("VRLT-R01", "run folder exists already", str(out), fix=fix))


def with_absolute_paths(config: Config) -> Config:
    """The same configuration with absolute paths of data, model folder and run folder, so that it holds in any
    folder.
    """
    data = {
        key: str(Path(value).absolute()) if value else ""
        for key, value in config.data.model_dump(include={"train", "eval", "root", "quarantine"}).items()
    }
    model = str(Path(config.model.name).absolute()) if Path(config.model.name).is_dir() else config.model.name
    keep = str(Path(config.video.cache_dir).absolute()) if config.video.cache_dir else ""
    embeds = str(Path(config.embed_cache.folder).absolute()) if config.embed_cache.folder else ""
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "video": config.video.model_copy(update={"cache_dir": keep}),
            "model": config.model.model_copy(update={"name": model}),
            "embed_cache": config.embed_cache.model_copy(update={"folder": embeds}),
            "train": config.train.model_copy(update={"out": str(Path(config.train.out).absolute())}),
        }
    )


def lock_run_folder(run_dir: Path) -> IO[bytes]:
    """An open file that keeps other processes out of the run folder until it is closed. Raises SetupError R02."""
    file = (run_dir / ".lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise SetupError(
            Problem(
                "VRLT-R02", "another process trains in this run folder", str(run_dir), fix="wait for it, or stop it"
            )
        ) from None
    return file


def create_run_folder(config: Config) -> Path:
    """Make the run folder with its resolved configuration and versions, whole or not at all.

    Raises:
        SetupError: R01 it exists, R02 it can't be written, R03 no space.
    """
    out = Path(config.train.out)
    refuse_existing(out)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with storage_errors(out):
        try:
            aside.mkdir(parents=True)
            write_text(aside / RESOLVED, dump_toml(config))
            write_text(aside / "versions.json", json.dumps(versions(config), indent=1) + "\n")
            (aside / "eval").mkdir()
            (aside / "checkpoints").mkdir()
            aside.rename(out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return out


def open_run_folder(config: Config) -> Path:
    """The folder of a run to resume.

    Raises:
        SetupError: K02 nothing to resume, K03 the configuration differs in more than may change.
    """
    out = Path(config.train.out)
    if not (out / RESOLVED).is_file():
        raise SetupError(Problem("VRLT-K02", "no run to resume", str(out), fix="start it without --resume"))
    before = load_config([out / RESOLVED], [])
    changed = [
        f"{section}.{key}: {old[key]!r} -> {new[key]!r}"
        for section in set(Config.model_fields) - FREE_TO_CHANGE
        for old, new in [(getattr(before, section).model_dump(), getattr(config, section).model_dump())]
        for key in old
        if old[key] != new[key] and f"{section}.{key}" not in FREE_KEYS
    ]
    if changed:
        raise SetupError(
            Problem(
                "VRLT-K03",
                "the configuration isn't the run's",
                str(out / RESOLVED),
                "; ".join(sorted(changed)),
                f"resume with: vrlt train {out / RESOLVED} --resume",
            )
        )
    return out


def describe(config: Config, inputs: Inputs, memory: str) -> str:
    """What `vrlt train --dry-run` says after the resolved configuration; ``memory`` is the estimate in words."""
    lines = [
        f"model     {inputs.info.path} ({inputs.info.family}, context {inputs.info.context})",
        f"train     {len(inputs.train)} samples, {len({s.video for s in inputs.train})} videos",
        f"held out  {len(inputs.heldout)} questions",
        f"stages    {', '.join(config.train.stages)}",
        f"per step  {config.rollout.prompts} prompts x {config.rollout.group_size} responses",
        f"memory    {memory}",
    ]
    lines += [str(p) for p in inputs.broken]
    return "\n".join(lines)
