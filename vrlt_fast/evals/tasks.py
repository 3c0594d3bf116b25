"""The benchmarks as suites: which task, whose metrics in which order, and how clips are sampled unless said otherwise.

Seven are the ones that papers quote for Temporal-R1 (arXiv 2506.01908); its eighth isn't named in what is public, and
TempCompass, which the reasoning systems since Video-R1 share, stands in for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from vrlt_fast.data.sample import Sample
from vrlt_fast.errors import ConfigError, Problem

QA_FRAMES = {
    "video.sampling": "qwen_utils",
    "video.fps": "2.0",
    "video.min_frames": "4",
    "video.max_frames": "32",
    "video.min_pixels": "100352",
    "video.max_pixels": "200704",
    "rollout.max_new_tokens": "1024",
    "eval.responses": "0",
}
"""Frames of Video-R1's evaluation: at most 32 (also run with 16 and 64) of 256 x 28 x 28 pixels. It samples answers at
temperature 0.1 with top-p 0.001; here there is one, greedy, of at most 1024 tokens.
"""
SPAN_FRAMES = {
    **QA_FRAMES,
    "video.max_frames": "64",
    "video.min_pixels": "3136",
    "video.max_pixels": "50176",
}
"""Temporal-R1's 2048 video tokens: 64 frames, two a token in time, of 64 tokens each. Its code bounds the pixels of the
whole video instead, so that long videos have more and smaller frames there.
"""
_MVBENCH = (
    "action_sequence", "action_prediction", "action_antonym", "fine_grained_action", "unexpected_action",
    "object_existence", "object_interaction", "object_shuffle", "moving_direction", "action_localization",
    "scene_transition", "action_count", "moving_count", "moving_attribute", "state_change", "fine_grained_pose",
    "character_order", "egocentric_navigation", "episodic_reasoning", "counterfactual_inference",
)  # fmt: skip
_TVG = ("r1@0.3", "r1@0.5", "r1@0.7", "miou")


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    ``columns``: metrics of the table, in the order of the official script or paper. ``convention``: whose IoU
    (:func:`vrlt_fast.evals.metrics.summarise`). ``groups``: sub-categories in their official order; a sample's is what
    follows the slash of its ``source`` ("mvbench/action_sequence"). ``frames``: values of the configuration, below what
    the command line says and above files. ``source``: where the definitions come from.
    """

    name: str
    title: str
    task: str
    columns: tuple[str, ...]
    source: str
    convention: Literal["plain", "nextgqa", "rextime"] = "plain"
    groups: tuple[str, ...] = ()
    frames: Mapping[str, str] = field(default_factory=lambda: QA_FRAMES)


_ALL = (
    Suite("charades_sta", "Charades-STA", "grounding", _TVG, "arXiv 1705.02101", frames=SPAN_FRAMES),
    Suite("activitynet_captions", "ActivityNet Captions", "grounding", _TVG, "arXiv 1705.00754", frames=SPAN_FRAMES),
    Suite(
        "nextgqa",
        "NExT-GQA",
        "grounded_qa",
        ("accuracy", "acc@gqa", "miop", "iop@0.3", "iop@0.5", "miou", "iou@0.3", "iou@0.5", "miou_merged"),
        "github.com/doc-doc/NExT-GQA, code/TempGQA/eval_ground.py",
        convention="nextgqa",
        frames=SPAN_FRAMES,
    ),
    Suite(
        "rextime",
        "ReXTime",
        "grounded_qa",
        ("miou", "r1@0.3", "r1@0.5", "accuracy", "gqa@0.5", "r1@0.7", "r1@0.95", "gqa@0.3", "gqa@0.7", "miou_merged"),
        "github.com/ReXTime/ReXTime, evaluation/rextime_eval.py",
        convention="rextime",
        frames=SPAN_FRAMES,
    ),
    Suite("videomme", "Video-MME", "videoqa", ("accuracy",), "arXiv 2405.21075", groups=("short", "medium", "long")),
    Suite("mvbench", "MVBench", "videoqa", ("accuracy",), "arXiv 2311.17005", groups=_MVBENCH),
    Suite("mmvu", "MMVU (multiple choice)", "videoqa", ("accuracy",), "arXiv 2501.12380"),
    Suite(
        "tempcompass",
        "TempCompass (multiple choice)",
        "videoqa",
        ("accuracy",),
        "arXiv 2403.00476",
        groups=("action", "direction", "speed", "order", "attribute_change"),
    ),
)
SUITES = {one.name: one for one in _ALL}


def suite(name: str) -> Suite:
    """The suite of this name. Raises ConfigError C01."""
    if name in SUITES:
        return SUITES[name]
    near = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.5)
    why = f"did you mean {near[0]}?" if near else f"suites: {', '.join(SUITES)}"
    raise ConfigError(Problem("VRLT-C01", f'unknown suite "{name}"', "command line", why, "vrlt eval --list"))


def group_of(source: str) -> str:
    """The sub-category in a sample's source; "" where it has none."""
    return source.partition("/")[2]


def check_tasks(chosen: Suite, samples: Iterable[Sample]) -> None:
    """Raises ConfigError C04 for samples of another task than the suite's."""
    other = next((sample for sample in samples if sample.task != chosen.task), None)
    if other is not None:
        what = f"suite {chosen.name} asks questions of the task {chosen.task}, this one is {other.task}"
        fix = f"keep the lines of {chosen.task} alone, or leave --suite out"
        raise ConfigError(Problem("VRLT-C04", what, other.line or other.id, fix=fix))


def listing() -> str:
    """A line a suite, for ``vrlt eval --list``."""
    lines = [
        f"{one.name:<21} {one.task:<12} {one.title:<30} {' '.join(one.columns)}\n{'':<21} after {one.source}"
        for one in SUITES.values()
    ]
    return "\n".join(lines) + "\n"
