"""What the processes of tests/parallel/test_feed.py do: read all samples, each from a folder of its own."""

from __future__ import annotations

from pathlib import Path

from vrlt_fast.config import Config
from vrlt_fast.data.readers import read_jsonl
from vrlt_fast.data.sample import Sample
from vrlt_fast.model.load import inspect_model
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.train.feed import Feed
from vrlt_fast.video.cache import ClipLoader


def samples_of(folder: Path) -> list[Sample]:
    return read_jsonl(folder / "train.jsonl")


def prompts(peers: Peers, folders: list[Path], model: Path, seed: int) -> tuple[list[str], int, list[str]]:
    """Ids of the prompts that there are, samples that failed, and what was told."""
    video = {"sampling": "fps", "fps": 1.0, "min_frames": 2, "min_pixels": 784, "max_pixels": 1568}
    config = Config.model_validate({"video": video, "data": {"max_failed_share": 1.0}})
    info, told, root = inspect_model(str(model)), [], folders[peers.rank]
    loader = ClipLoader(config.video, info.geometry)
    feed = Feed(info, samples_of(root), loader, config, root=root, warn=told.append, peers=peers)
    found = feed.next(feed.questions(len(feed.samples), seed))
    return [p.sample.id for p in found], feed.failed, told
