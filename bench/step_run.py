"""The cells of ``bench/cases/step.py``."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.harness import BenchError, Record, summarize
from bench.step_arms import OURS, PRACTICE, OurStage, Practice, PracticeRow, Setting, Shape, make_setting, now
from bench.update_run import TOLERANCE, gap_of
from vrlt_fast.data.demo import build_demo
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.vision import StepVision
from vrlt_fast.rewards.base import Response
from vrlt_fast.rollout.group import Completion, Group, RolloutRequest
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.train.passes import How
from vrlt_fast.train.scored import ScoredGroup, from_parts
from vrlt_fast.train.step import grpo_backward

REWARD_GAP = 1e-5  # fp32 against fp64


def cell(shape: Shape, device: torch.device, rounds: int, seed: int, data: Path | None, clips: int) -> list[Record]:
    """Seconds a step, and of its phases, of both arms, after their rewards, loss and gradients were found to agree.

    Args:
        data: of ``vrlt data demo``; None: ``clips`` videos are made.

    Raises:
        BenchError: the arms don't agree, or a step failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            data = Path(folder) / "data"
            build_demo(data, seed=seed, train_clips=clips, heldout_clips=1, workers=1)
        setting = make_setting(shape, device, data, Path(folder))
        if device.type == "cpu":
            torch.set_num_threads(setting.config.train.threads)
        with setting.source:
            return _measured(setting, rounds, seed, Path(folder))


def _measured(setting: Setting, rounds: int, seed: int, folder: Path) -> list[Record]:
    label = str(setting.shape)
    records = agree(setting, seed)
    practice = Practice(setting, _best_together(setting))
    records.append(summarize(PRACTICE, label, "prompts of a call of generate", "prompts", [practice.together]))
    ours = OurStage(setting, folder)
    arms: dict[str, Callable[[int], dict[str, float]]] = {OURS: ours.timed, PRACTICE: practice.timed}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name in list(arms)[:: 1 if turn % 2 else -1]:
            found[name].append(arms[name](turn + 1))
    ours.close()
    for name, steps in found.items():
        for metric in steps[0]:
            unit = "clips" if metric == "clips decoded" else "s"
            records.append(summarize(name, label, metric, unit, [s[metric] for s in steps[1:]]))
        rates = [setting.shape.tokens / s["step"] for s in steps[1:]]
        records.append(summarize(name, label, "rate", "tokens/s", rates))
    return records


def _best_together(setting: Setting) -> int:
    """How many prompts a call of generate is fastest with: one, or all of a step."""
    lm, every = setting.lm, setting.shape.prompts
    if every == 1:
        return 1
    times = {}
    prompts = setting.feed().next(setting.stream())
    for together in (1, every):
        arm = Practice(setting, together)
        arm.rollout(prompts)
        begin = now(lm.device)
        arm.rollout(prompts)
        times[together] = now(lm.device) - begin
    return min(times, key=lambda n: times[n])


def agree(setting: Setting, seed: int) -> list[Record]:
    """Rewards, advantages, loss and every gradient of both arms on the same ragged responses of random tokens.

    Raises:
        BenchError: they differ.
    """
    label, limit = str(setting.shape), TOLERANCE[setting.lm.dtype]
    prompts = setting.feed().next(setting.stream())
    rng, scored = random.Random(seed), list[ScoredGroup]()
    while not scored or not all(s.has_signal for s in scored):  # else gradients would be little but rounding
        tokens = _responses(setting, len(prompts), rng)
        scored = _scored(setting, prompts, tokens)
    arm = Practice(setting)
    rows = arm.rows(prompts, tokens)
    right = [a for s in scored for a in s.advantages]
    worst = max(abs(row.advantage - a) for row, a in zip(rows, right, strict=True))
    if worst > REWARD_GAP:
        raise BenchError(f"{label}: advantages differ by {worst:.2g}")
    loss, expected = _gradients(setting, lambda: arm.backward(_exact(rows, right)))
    other, found = _gradients(setting, lambda: _our_backward(setting, scored))
    if found.keys() != expected.keys():
        raise BenchError(f"{label}: the arms have gradients of other parameters")
    apart = max(gap_of(found[name], g) for name, g in expected.items())
    if apart > limit or abs(other - loss) > limit * max(abs(loss), 1e-3):
        raise BenchError(f"{label}: ours differs from practice: gradient {apart:.2g}, loss {other} for {loss}")
    return [
        summarize("both", label, "prompt tokens", "tokens", [len(p) for p in prompts]),
        summarize(OURS, label, "largest difference of an advantage", "absolute", [worst]),
        summarize(OURS, label, "largest difference of a gradient", "relative", [apart]),
    ]


def _exact(rows: Sequence[PracticeRow], advantages: Sequence[float]) -> list[PracticeRow]:
    """The rows with ours, so that rounding of rewards is not taken for a difference of gradients."""
    return [PracticeRow(row.prompt, row.tokens, a) for row, a in zip(rows, advantages, strict=True)]


def _responses(setting: Setting, prompts: int, rng: random.Random) -> list[list[tuple[int, ...]]]:
    shape = setting.shape
    most = len(setting.lm.info.tokenizer) - 20  # visual tokens come last
    lengths = [max(1, shape.length * (i + 1) // shape.group) for i in range(shape.group)]
    return [[tuple(rng.randrange(9, most) for _ in range(n)) for n in lengths] for _ in range(prompts)]


def _scored(
    setting: Setting, prompts: Sequence[Prompt], tokens: Sequence[Sequence[tuple[int, ...]]]
) -> list[ScoredGroup]:
    """Ours, from the given responses on."""
    groups = []
    for prompt, group in zip(prompts, tokens, strict=True):
        request = RolloutRequest(prompt, len(group), Sampling(max(map(len, group)), 1.0), 0)
        texts = [setting.lm.info.tokenizer.decode(list(t), skip_special_tokens=False) for t in group]
        made = [
            Completion(Response(text, len(t), "length"), t, torch.full((len(t),), -6.0))
            for text, t in zip(texts, group, strict=True)
        ]
        groups.append(Group(request, tuple(made)))
    reward = setting.reward
    parts = [[reward(c.response, g.request.prompt.sample) for c in g.completions] for g in groups]
    return from_parts(groups, parts, setting.weights, setting.config.grpo)


def _our_backward(setting: Setting, scored: Sequence[ScoredGroup]) -> float:
    config, lm = setting.config, setting.lm
    how = How(config.rollout.temperature, config.train.micro_rows)
    return grpo_backward(lm, setting.reference, scored, config.grpo, how, held=StepVision(lm)).loss


def _gradients(setting: Setting, run: Callable[[], float]) -> tuple[float, dict[str, torch.Tensor]]:
    """On a GPU the gradients wait in host memory; the parameters keep none."""
    module = setting.lm.module
    module.zero_grad(set_to_none=True)
    loss = run()
    found = {name: p.grad.cpu() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return loss, found
