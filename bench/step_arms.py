"""Whole GRPO steps on videos of the demo: our stage, and the same step as replicated practice does it."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bench.harness import BenchError
from bench.rollout_arms import as_released, full_forward, hf_generate, make_model
from vrlt_fast.config import Config
from vrlt_fast.config_load import load_config
from vrlt_fast.data.readers import read_jsonl, resolve_video
from vrlt_fast.data.sample import Sample
from vrlt_fast.data.stream import BatchStream
from vrlt_fast.model.load import VideoLM, enable_recompute
from vrlt_fast.model.prompt import Prompt, encode_prompt
from vrlt_fast.recipe import recipe_path
from vrlt_fast.rewards.base import Parts, Response, Reward, total
from vrlt_fast.rewards.dual import make_reward, weights
from vrlt_fast.train.feed import Feed
from vrlt_fast.train.guard import Guard
from vrlt_fast.train.optim import SCHEDULES, MasterAdamW, apply_step, named_trainable
from vrlt_fast.train.stages import GrpoStage
from vrlt_fast.video.source import ClipSource

PHASES = ("decode", "encode and prefill", "generate", "reward", "reference", "update", "optimizer")
OURS, PRACTICE = "ours", "practice"


@dataclass(frozen=True)
class Shape:
    """Model as in :class:`bench.update_arms.Shape`, prompts of a step, responses of each, their tokens, pixels of a
    frame.
    """

    size: str
    prompts: int
    group: int
    length: int
    pixels: int

    def __str__(self) -> str:
        return f"{self.size}, {self.prompts} x {self.group}, R={self.length}, {self.pixels} pixels"

    @property
    def tokens(self) -> int:
        """Response tokens of a step."""
        return self.prompts * self.group * self.length


class TimedAdamW(MasterAdamW):
    """Counts the ``seconds`` of its updates.

    Args:
        in_place: optimize the parameters themselves, with moments in their dtype: fp32 copies and moments of a 7B leave
            no room on one GPU, and this phase is the same in both arms.
    """

    def __init__(self, lm: VideoLM, config: Config, *, in_place: bool):
        super().__init__(named_trainable(lm), config.optim, config.grpo.lr)
        self.seconds = 0.0
        if in_place:
            self.masters = dict(self.parameters)
            for group, wide in zip(self.param_groups, (True, False), strict=True):
                group["params"] = [p for p in self.parameters.values() if (p.ndim >= 2) is wide]

    def update(self) -> None:
        device = next(iter(self.parameters.values())).device
        begin = now(device)
        super().update()
        self.seconds += now(device) - begin


@dataclass
class Setting:
    """What both arms share: one model, its reference, one optimizer, and videos that are decoded anew in every step."""

    shape: Shape
    config: Config
    lm: VideoLM
    reference: VideoLM
    samples: list[Sample]
    source: ClipSource
    optimizer: TimedAdamW

    @property
    def root(self) -> Path:
        return Path(self.config.data.train).parent

    @property
    def reward(self) -> Reward:
        tasks = {sample.task for sample in self.samples}
        return told_apart(make_reward(self.config.reward, self.config.prompt, tasks=tasks))

    @property
    def weights(self) -> dict[str, float]:
        return weights(self.config.reward)

    def feed(self) -> Feed:
        """Prompts as the trainer makes them. Raises BenchError for a video that fails."""
        return Feed(self.lm.info, self.samples, self.source, self.config, root=self.root, warn=_fail)

    def stream(self) -> BatchStream:
        """The order of the samples, from its start."""
        return BatchStream(len(self.samples), self.shape.prompts, self.config.train.seed)


def make_setting(shape: Shape, device: torch.device, data: Path, folder: Path) -> Setting:
    """The demo's recipe on the videos of ``data`` (of ``vrlt data demo``), without caches of clips or decoding ahead,
    which would give a step work of another one. Where weights are random nothing is learnt: the reference is the
    model with 1 % noise, so that there is a KL.
    """
    keys: dict[str, Any] = {
        "data.train": str(data / "train.jsonl"),
        "data.eval": "",
        "train.stages": ["grpo"],
        "video.cache_gb": 0.0,
        "video.prefetch": 0,
        "video.min_pixels": shape.pixels * 2 // 3 if device.type == "cuda" else 784,
        "video.max_pixels": shape.pixels,
        "rollout.prompts": shape.prompts,
        "rollout.group_size": shape.group,
        "rollout.max_new_tokens": shape.length,
    }
    config = load_config([recipe_path("demo")], list(keys.items()))
    lm = make_model(shape.size, device, 32768, data=data / "train.jsonl")
    lm.module.train()
    if device.type == "cuda":
        enable_recompute(lm)
    frozen = copy.deepcopy(lm.module).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(1)
    for p in frozen.parameters():
        p.mul_(1 + 0.01 * torch.randn(p.shape, generator=generator, device=device, dtype=p.dtype))
    source = ClipSource(config.video, lm.info.geometry, folder=folder, device=device)
    samples = _one_a_video(read_jsonl(Path(config.data.train), data))
    optimizer = TimedAdamW(lm, config, in_place=device.type == "cuda")
    return Setting(shape, config, lm, VideoLM(lm.info, frozen), samples, source, optimizer)


def _one_a_video(samples: Sequence[Sample]) -> list[Sample]:
    """One question of each video, of all tasks in turn, so that a step decodes as many videos as it has prompts."""
    by_video: dict[str, list[Sample]] = {}
    for sample in samples:
        by_video.setdefault(sample.video, []).append(sample)
    return [asked[i % len(asked)] for i, asked in enumerate(by_video.values())]


def told_apart(reward: Reward) -> Reward:
    """A random model earns nothing: up to 0.7 by the checksum of the text, so that groups have something to learn."""

    def marked(response: Response, sample: Sample) -> Parts:
        parts = dict(reward(response, sample))
        return parts | {"format": parts["format"] + 0.1 * (zlib.crc32(response.text.encode()) % 8)}

    return marked


class OurStage(GrpoStage):
    """The trainer's own stage; logs go nowhere."""

    def __init__(self, setting: Setting, folder: Path):
        feed, kept = setting.feed(), Guard(folder, _fail)
        given = (setting.config, setting.lm, setting.reference, feed, setting.optimizer)
        super().__init__(*given, seed=setting.config.train.seed, guard=kept, keep=_ignore, say=_ignore, warn=_ignore)
        self._rollouts.earnings.each._reward = setting.reward
        self._timed, self._source = setting.optimizer, setting.source

    def timed(self, step: int) -> dict[str, float]:
        """Seconds by phase of one step, ``step`` of all of it, and ``clips decoded``.

        Raises:
            BenchError: nothing was trained.
        """
        self._timed.seconds, decoded = 0.0, self._source.decoded
        record = self.step(step)
        if record.get("skipped") or record["loss"] is None:
            raise BenchError(f"step {step} of ours trained nothing")
        found, optimizer = record["phases"], self._timed.seconds
        spent = {name: found.get(name, 0.0) for name in PHASES} | {"optimizer": optimizer}
        spent["encode and prefill"] = found["encode"] + found["prefill"]
        spent["update"] -= optimizer
        return spent | {"step": record["seconds"], "clips decoded": self._source.decoded - decoded}


@dataclass(frozen=True)
class PracticeRow:
    """One response behind its own prompt, and its advantage."""

    prompt: Prompt
    tokens: tuple[int, ...]
    advantage: float


class Practice:
    """The step as trainers built on transformers do it.

    Every row is an example of its own, as with TRL's repeating sampler: its video is decoded (by our decoder) and its
    prompt tokenized. transformers' ``generate`` runs ``together`` prompts a call, and expands videos with the rows, so
    the tower runs once a row. Reference and policy run row by row, tower included, with the logits of the whole row and
    their log_softmax [T, V], sdpa, and the released patch embedding; one backward pass a row.
    """

    def __init__(self, setting: Setting, together: int = 1):
        self.setting, self.together = setting, together
        self._stream, self._step = setting.stream(), 0
        self._spent: dict[str, float] = {}

    def timed(self, step: int) -> dict[str, float]:
        """As :meth:`OurStage.timed`."""
        setting, self._spent, self._step = self.setting, {}, step
        lm, begin, decoded = setting.lm, now(setting.lm.device), setting.source.decoded
        setting.optimizer.seconds = 0.0
        with self._phase("decode"):
            prompts = self.decode()
        tokens = self.rollout(prompts)
        with self._phase("reward"):
            rows = self.rows(prompts, tokens)
        loss = self.backward(rows)
        config = setting.config
        lr = SCHEDULES[config.grpo.schedule](step, config.grpo.steps, config.grpo.lr, config.optim.warmup)
        with self._phase("update"):
            apply_step(lm, setting.optimizer, loss, lr, config.optim.grad_clip)
        self._spent |= {"optimizer": setting.optimizer.seconds}
        self._spent["update"] -= setting.optimizer.seconds
        count = setting.source.decoded - decoded
        return self._spent | {"step": now(lm.device) - begin, "clips decoded": count}

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin = now(self.setting.lm.device)
        yield
        self._spent[name] = self._spent.get(name, 0.0) + now(self.setting.lm.device) - begin

    def decode(self) -> list[Prompt]:
        """The prompts of the next samples, each made once a row."""
        setting, made = self.setting, []
        for index in self._stream.next():
            sample, prompt = setting.samples[index], None
            path = resolve_video(sample, setting.root)
            for _ in range(setting.shape.group):
                prompt = None  # a clip that is still held isn't decoded again
                asked, reserve = setting.config.prompt, setting.shape.length
                prompt = encode_prompt(setting.lm.info, sample, setting.source.load(path), asked, reserve=reserve)
            made += [prompt] if prompt else []
        return made

    def rollout(self, prompts: Sequence[Prompt]) -> list[list[tuple[int, ...]]]:
        """Responses by prompt."""
        lm, shape, found = self.setting.lm, self.setting.shape, []
        lm.module.eval()
        for start in range(0, len(prompts), self.together):
            begin, first = now(lm.device), 0.0

            def watch(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                nonlocal first
                first = first or now(lm.device)
                return scores

            part, warmth = prompts[start : start + self.together], self.setting.config.rollout.temperature
            found += hf_generate(lm, part, shape.group, shape.length, warmth, watch=watch)
            for name, spent in (("encode and prefill", first - begin), ("generate", now(lm.device) - first)):
                self._spent[name] = self._spent.get(name, 0.0) + spent
        lm.module.train()
        return found

    def rows(self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[tuple[int, ...]]]) -> list[PracticeRow]:
        """Rewards, and advantages of ``grpo.scale = "none"``: what is over the group's mean."""
        setting, made = self.setting, []
        for prompt, group in zip(prompts, tokens, strict=True):
            texts = setting.lm.info.tokenizer.batch_decode([list(t) for t in group], skip_special_tokens=False)
            said = [Response(text, len(t), "length") for text, t in zip(texts, group, strict=True)]
            earned = torch.tensor([total(setting.reward(r, prompt.sample), setting.weights) for r in said])
            better = (earned - earned.mean()).tolist()
            made += [PracticeRow(prompt, t, a) for t, a in zip(group, better, strict=True)]
        return made

    def backward(self, rows: Sequence[PracticeRow]) -> float:
        """Add the gradient of the clipped loss with k3 KL, a mean over all tokens; returns the loss."""
        grpo, loss = self.setting.config.grpo, 0.0
        with self._phase("reference"), torch.no_grad():
            reference = [self._logprobs(self.setting.reference, row) for row in rows]
        count = sum(len(row.tokens) for row in rows)
        with self._phase("update"):
            for row, ref in zip(rows, reference, strict=True):
                logp = self._logprobs(self.setting.lm, row)
                ratio = (logp - logp.detach()).exp()
                clipped = ratio.clamp(1 - grpo.clip_low, 1 + grpo.clip_high)
                gap = ref - logp
                each = -torch.minimum(ratio * row.advantage, clipped * row.advantage)
                one = (each + grpo.beta * (gap.exp() - gap - 1)).sum() / count
                torch.autograd.backward(one)
                loss += float(one.detach())
        return loss

    def _logprobs(self, lm: VideoLM, row: PracticeRow) -> torch.Tensor:
        with as_released(lm):
            logits = full_forward(lm, row.prompt, row.tokens)[:-1]
        places = torch.arange(len(row.prompt) - 1, len(logits), device=logits.device)
        return logits.log_softmax(-1)[places, torch.tensor(row.tokens, device=logits.device)]


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _ignore(told: Any) -> None:
    """What a run would write or print."""


def _fail(message: str) -> None:
    raise BenchError(message)
