"""What the processes of tests/parallel/test_clip.py do: from a video file to responses, one path."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.model.test_families import LINE
from tests.parallel import shared_run
from vrlt_fast.config import PromptConfig, RolloutConfig, VideoConfig
from vrlt_fast.data.readers import read_jsonl
from vrlt_fast.model.prompt import encode_prompt
from vrlt_fast.model.vision import Encoded, VisionEmbeds, encode_media
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.rollout.engine import GroupEngine
from vrlt_fast.rollout.group import RolloutRequest
from vrlt_fast.rollout.joint import JointEngine
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.video.preprocess import Clip
from vrlt_fast.video.source import ClipSource

N, LENGTH = 3, 6


@dataclass
class Seen:
    """Of one process: the clip, frames that its decoder gave, embeddings, tokens."""

    clip: Clip
    decoded: int
    again: int
    embeds: VisionEmbeds
    tokens: list[tuple[int, ...]]


def see(peers: Peers, folder: Path, film: Path, decoder: Any, seed: int) -> Seen:
    lm = shared_run.open_model(folder, freeze=True, recompute=False)
    sizes: dict[str, Any] = {"min_frames": 2, "max_frames": 256, "min_pixels": 784, "max_pixels": 3136}
    video = VideoConfig(sampling="fps", fps=4.0, decoder=decoder, workers=1, prefetch=1, cache_gb=0.1, **sizes)
    with ClipSource(video, lm.info.geometry, part=(peers.rank, peers.size)) as source:
        source.expect([film])
        clip = source.load(film)
        decoded = source.decoder.counts["frames decoded"]
        source.load(film)
        again = source.decoder.counts["frames decoded"] - decoded
    (folder.parent / f"{peers.rank}-{peers.size}.jsonl").write_text(json.dumps(LINE) + "\n")
    sample = read_jsonl(folder.parent / f"{peers.rank}-{peers.size}.jsonl", check_files=False)[0]
    prompt = encode_prompt(lm.info, sample, clip, PromptConfig(), reserve=LENGTH)
    with torch.no_grad():
        found, _ = encode_media(lm, [clip], None, peers)
    engine = GroupEngine(lm) if peers.size == 1 else JointEngine(lm, RolloutConfig(), peers=peers)
    groups, _ = engine.generate([RolloutRequest(prompt, N, Sampling(LENGTH, 1.0), seed)], vision=Encoded(found))
    tokens = [c.tokens for c in groups[0].completions]
    clip = replace(clip, patches=clip.patches.clone())  # it is in memory that the decoders share
    return Seen(clip, decoded, again, found[clip.key], tokens)
