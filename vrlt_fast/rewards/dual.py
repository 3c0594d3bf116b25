"""The dual reward of Temporal-R1: discrete for what a video means, continuous for when it happens, and format; made for
every task from the parts that a recipe names.

VideoQA earns semantic + format, temporal grounding temporal + format, grounded VideoQA all three. The weights are the
recipe's; the paper does not state those of grounded VideoQA, ours are the sum of the two others'.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from vrlt_fast.config import PromptConfig
from vrlt_fast.config_rl import RewardConfig
from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.grammars.named import grammar
from vrlt_fast.data.sample import LETTER_TASKS, SPAN_TASKS, TASKS, TEXT_TASKS, Sample, Span
from vrlt_fast.errors import ConfigError, Problem
from vrlt_fast.rewards import answers
from vrlt_fast.rewards.base import Parts, Response, Reward
from vrlt_fast.rewards.boxes import mean_iou, right_instance
from vrlt_fast.rewards.choice import exact, soft
from vrlt_fast.rewards.progress import progress
from vrlt_fast.rewards.spans import boundary_iou, hull_iou, iop, merged_iou, tiou

OpenAnswer = Callable[[str, Sample], float]
"""What an answer in own words to a question earns, 0..1."""
PARTS = ("semantic", "temporal", "spatial", "instance", "progress", "format", "length", "overlong", "shuffled")
"""The names of all parts but the user's own; each is a weight of the section ``reward``."""
MATHEMATICAL = ("boxed",)
"""Grammars of systems that ask math-verify whether a number is right (VerIPO); elsewhere Video-R1's rule says so."""

_Part = Callable[[Parsed, Sample], float]


def make_reward(
    reward: RewardConfig,
    prompt: PromptConfig,
    *,
    tasks: Collection[str] = TASKS,
    open_answer: OpenAnswer | None = None,
) -> Reward:
    """The reward function of a recipe: reads the response by the grammar of ``prompt`` and gives parts by task.

    ======================================  ==================================
    videoqa                                 semantic, format
    grounding                               temporal, format
    grounded_qa                             semantic, temporal, format
    number, regression, ocr, open           semantic, format
    boxes                                   spatial, format
    instance                                instance, temporal, format
    progress                                progress, format
    ======================================  ==================================

    All are in 0..1. ``format`` is 1.0 where the whole response follows the grammar and wasn't cut off. What wasn't said
    earns 0. Of ``instance`` both are 0 where number or span is missing, as in STVG-R1's code.

    Args:
        tasks: what will be asked; packages that only other tasks need aren't loaded.
        open_answer: scores answers in own words, for ``reward.open`` other than "rouge".

    Raises:
        SetupError: E01 without a package that a task needs.
        ConfigError: C04 where ``reward.open`` needs an ``open_answer``.
    """
    parts = {task: _parts(task, reward, prompt, open_answer) for task in tasks}
    read, think = grammar(prompt.grammar).read, prompt.think

    def score(response: Response, sample: Sample) -> Parts:
        parsed = read(response.text, sample, think=think)
        earned = {name: part(parsed, sample) for name, part in parts[sample.task].items()}
        earned["format"] = float(parsed.well_formed and response.finish_reason == "stop")
        return earned

    return score


def weights(reward: RewardConfig) -> dict[str, float]:
    """The weight of every part that rewards and shapers of a recipe can give, the user's own included
    (``user:module:function``).
    """
    own = dict(zip(reward.user, reward.user_weights or (1.0,) * len(reward.user), strict=True))
    return reward.model_dump(include=set(PARTS)) | {f"user:{name}": weight for name, weight in own.items()}


def _parts(task: str, reward: RewardConfig, prompt: PromptConfig, open_answer: OpenAnswer | None) -> dict[str, _Part]:
    made: dict[str, _Part] = {}
    if task in LETTER_TASKS:
        choice = soft if reward.choice == "soft" else exact
        made["semantic"] = lambda parsed, sample: choice(parsed.answer, sample.letters)
    if task in TEXT_TASKS:
        made["semantic"] = _text_part(task, reward, prompt, open_answer)
    if task == "boxes":
        made["spatial"] = lambda parsed, sample: mean_iou(parsed.boxes, sample.boxes)
    if task == "instance":
        made["instance"] = lambda parsed, sample: right_instance(
            parsed.object_id if parsed.spans else None, sample.object_id
        )
    if task == "progress":
        made["progress"] = lambda parsed, sample: progress(parsed.progress, sample.progress)
    if task in SPAN_TASKS:
        made["temporal"] = _span_part(task, reward)
    return made


def _span_part(task: str, reward: RewardConfig) -> _Part:
    if reward.overlap == "boundary":

        def overlap(spans: tuple[Span, ...], sample: Sample) -> float:
            return boundary_iou(spans, sample.spans, sample.duration)

    else:
        measure = {"tiou": tiou, "merged": merged_iou, "hull": hull_iou, "iop": iop}[reward.overlap]

        def overlap(spans: tuple[Span, ...], sample: Sample) -> float:
            return measure(spans, sample.spans)

    def part(parsed: Parsed, sample: Sample) -> float:
        said = parsed.spans is not None and (task != "instance" or parsed.object_id is not None)
        return overlap(parsed.spans or (), sample) if said else 0.0

    return part


def _text_part(task: str, reward: RewardConfig, prompt: PromptConfig, open_answer: OpenAnswer | None) -> _Part:
    if task == "open" and reward.open != "rouge":
        if open_answer is None:
            what = f'reward.open = "{reward.open}" has nothing that scores answers here'
            fix = 'set reward.open = "rouge", or give make_reward an open_answer'
            raise ConfigError(Problem("VRLT-C04", what, "reward.open", fix=fix))
        given = open_answer
        return lambda parsed, sample: given(parsed.answer, sample) if parsed.answer else 0.0
    if task == "number":
        right = answers.mathematics() if prompt.grammar in MATHEMATICAL else answers.number
    elif task == "regression":
        right = answers.regression
    else:
        right = answers.word_accuracy() if task == "ocr" else answers.rouge()
    return lambda parsed, sample: right(parsed.answer, sample.answer) if parsed.answer else 0.0
