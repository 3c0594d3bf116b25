"""Samples to prompts for a step. A video that fails is reported, counted and left out; too many stop the run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vrlt_fast.config import Config, PromptConfig
from vrlt_fast.data.readers import resolve_images, resolve_video
from vrlt_fast.data.sample import Sample
from vrlt_fast.data.stream import BatchStream, Stream
from vrlt_fast.errors import DataError, Problem, VideoError
from vrlt_fast.model.load import ModelInfo
from vrlt_fast.model.prompt import Prompt, encode_prompt, read_by_all
from vrlt_fast.parallel.replicas import Replicas
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.video.images import ImageLoader
from vrlt_fast.video.labels import with_ids
from vrlt_fast.video.preprocess import Clip
from vrlt_fast.video.source import Clips

Change = Callable[[int, Sample, Clip], tuple[Sample, Clip]]
"""What becomes of a sample, by its index, and of its clip, before they are made a prompt."""
WINDOW = 500
"""Videos over which the share of failures is taken."""
FEWEST = 3
"""Failures below which a run never stops."""


class Feed:
    """The training samples in seeded order, as prompts.

    Args:
        warn: called with one line for each failure.
        replicas: of every batch this process takes its share.
        peers: processes with the same share; they take what all of them could read.
    """

    def __init__(
        self,
        info: ModelInfo,
        samples: Sequence[Sample],
        loader: Clips,
        config: Config,
        *,
        root: Path,
        warn: Callable[[str], None],
        replicas: Replicas | None = None,
        peers: Peers | None = None,
    ):
        self.samples, self.failed = samples, 0
        self._info, self._loader, self._config, self._root, self._warn = info, loader, config, root, warn
        self._replicas, self._peers = replicas or Replicas(), peers or Peers()
        self._images = ImageLoader(config.video, info.geometry)
        self._outcomes: deque[bool] = deque(maxlen=WINDOW)
        self._followed: Stream | None = None
        by_video: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            if config.sft.reasoned and not sample.reasoning:
                continue
            by_video.setdefault(sample.video, []).append(index)
        self._by_video = list(by_video.values())

    def questions(self, batch: int, seed: int) -> BatchStream:
        """An order over the samples, for :meth:`next`."""
        return BatchStream(len(self.samples), batch, seed)

    def videos(self, batch: int, seed: int) -> BatchStream:
        """An order over the videos, for :meth:`next_videos`; with ``sft.reasoned`` over those with a reasoning."""
        return BatchStream(len(self._by_video), batch, seed)

    def next(self, stream: Stream, change: Change | None = None) -> list[Prompt]:
        """The prompts of the next samples: fewer than the batch when videos fail, never others in their place.

        Args:
            change: what becomes of each sample and clip first.

        Raises:
            DataError: D12 when more than ``data.max_failed_share`` of the last 500 videos failed.
        """
        self._follow(stream, map(self._replicas.share, stream.ahead()))
        return self._prompts(self._replicas.share(stream.next()), change=change)

    def next_videos(self, stream: Stream, thinks: Callable[[Sample], bool] | None = None) -> list[Prompt]:
        """The prompts of all samples about the next videos, with thinking where ``thinks``; raises as :meth:`next`."""
        self._follow(stream, map(self._questions_about, stream.ahead()))
        return self._prompts(self._questions_about(stream.next()), thinks)

    def _questions_about(self, videos: Sequence[int]) -> list[int]:
        return [index for video in self._replicas.share(videos) for index in self._by_video[video]]

    def _follow(self, stream: Stream, ahead: Iterable[Sequence[int]]) -> None:
        """Tell the loader what comes, once a stream."""
        if stream is not self._followed:
            self._followed = stream
            self._loader.expect(self._root / self.samples[index].video for batch in ahead for index in batch)

    def prompt(self, index: int) -> Prompt | None:
        """The prompt of one sample, out of order and uncounted; None, with a warning, where its video fails."""
        sample = self.samples[index]
        try:
            return self._encoded(sample, self._loader.load(resolve_video(sample, self._root)), self._config.prompt)
        except DataError as error:
            self._warn(f"{sample.line or sample.id}: {error}")
            return None

    def _encoded(self, sample: Sample, clip: Clip, asked: PromptConfig) -> Prompt:
        clip = with_ids(clip, sample.instances) if asked.draw_ids else clip
        images = [self._images.load(path) for path in resolve_images(sample, self._root) if asked.images]
        reserve = self._config.rollout.max_new_tokens
        return encode_prompt(self._info, sample, clip, asked, images=images, reserve=reserve)

    def _changed(self, index: int, sample: Sample, clip: Clip, asked: PromptConfig, change: Change | None) -> Prompt:
        """The prompt of a changed sample; of the sample as it is where a longer text doesn't fit."""
        other, shown = change(index, sample, clip) if change is not None else (sample, clip)
        try:
            return self._encoded(other, shown, asked)
        except DataError as error:
            if error.code != "VRLT-D10" or other is sample:
                raise
            return self._encoded(sample, shown, asked)

    def _prompts(
        self,
        indices: Sequence[int],
        thinks: Callable[[Sample], bool] | None = None,
        change: Change | None = None,
    ) -> list[Prompt]:
        prompts = []
        readable: dict[str, bool] = {}  # a video counts once, however many questions about it the step has
        for index in indices:
            sample = self.samples[index]
            if not readable.get(sample.video, True):
                continue
            clip: Clip | None = None
            try:
                clip = self._loader.load(resolve_video(sample, self._root))
                asked = self._config.prompt
                if thinks is not None and thinks(sample):
                    asked = asked.model_copy(update={"think": True})
                prompts.append(self._changed(index, sample, clip, asked, change))
            except DataError as error:
                if clip is None and isinstance(error, VideoError):
                    readable[sample.video] = False
                self._count(sample, error)
                continue
            if sample.video not in readable:
                readable[sample.video] = True
                self._outcomes.append(True)
        return self._read_by_all(prompts)

    def _read_by_all(self, prompts: list[Prompt]) -> list[Prompt]:
        """Those that each of the peers has, with the same tokens and grids: a deadline may have passed in one alone."""
        same = read_by_all(prompts, self._peers)
        lost = {p.sample.video: p for place, p in enumerate(prompts) if place not in same}
        for prompt in lost.values():
            self.failed += 1
            self._warn(f"{prompt.sample.line or prompt.sample.id} left out: another process couldn't read it")
        return list(same.values())

    def _count(self, sample: Sample, error: DataError) -> None:
        self.failed += 1
        self._outcomes.append(False)
        self._warn(f"{sample.line or sample.id} left out: {error}")
        lost = self._outcomes.count(False)
        share, allowed = lost / len(self._outcomes), self._config.data.max_failed_share
        if lost >= FEWEST and share > allowed:
            raise DataError(
                Problem(
                    "VRLT-D12",
                    f"{lost} of the last {len(self._outcomes)} videos failed ({share:.0%})",
                    where=self._config.data.train,
                    why=f"data.max_failed_share is {allowed:.0%}; the last one: {error.problems[0].what}",
                    fix="mend or remove the videos (vrlt data check FILE lists them), then: vrlt train ... --resume",
                )
            )

    def state(self) -> dict[str, object]:
        """For the checkpoint: what this process has counted."""
        return {"failed": self.failed, "outcomes": "".join("01"[ok] for ok in self._outcomes)}

    def load(self, *states: dict[str, object]) -> None:
        """Inverse of :meth:`state`; several add up."""
        self.failed = sum(int(str(state["failed"])) for state in states)
        outcomes = "".join(str(state["outcomes"]) for state in states)
        self._outcomes = deque((c == "1" for c in outcomes), maxlen=WINDOW)
