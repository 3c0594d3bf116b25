"""The grammars of responses, by the names of ``prompt.grammar`` (docs/rewards.md)."""

from __future__ import annotations

from vrlt_fast.data.grammars.base import Grammar
from vrlt_fast.data.grammars.boxed import Boxed
from vrlt_fast.data.grammars.plain import Plain
from vrlt_fast.data.grammars.primo_r1 import PrimoR1
from vrlt_fast.data.grammars.scene_r1 import SceneR1
from vrlt_fast.data.grammars.seed_bench_r1 import SeedBenchR1
from vrlt_fast.data.grammars.sole_r1 import SoleR1
from vrlt_fast.data.grammars.stvg_r1 import StvgR1
from vrlt_fast.data.grammars.temporal_r1 import TemporalR1
from vrlt_fast.data.grammars.tw_grpo import TwGrpo
from vrlt_fast.data.grammars.video_r1 import VideoR1
from vrlt_fast.data.grammars.video_thinker import VideoThinker
from vrlt_fast.data.grammars.videochat_r1 import VideoChatR1

GRAMMARS: dict[str, Grammar] = {
    "plain": Plain(),
    "temporal_r1": TemporalR1(),
    "video_r1": VideoR1(),
    "videochat_r1": VideoChatR1(),
    "tw_grpo": TwGrpo(),
    "seed_bench_r1": SeedBenchR1(),
    "video_thinker": VideoThinker(),
    "primo_r1": PrimoR1(),
    "sole_r1": SoleR1(),
    "stvg_r1": StvgR1(),
    "scene_r1": SceneR1(),
    "boxed": Boxed(),
}


def grammar(name: str) -> Grammar:
    """The grammar of this name. Raises KeyError for others, which the configuration refuses."""
    return GRAMMARS[name]
