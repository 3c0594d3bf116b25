"""What ``vrlt data check FILE`` tells about a file of samples, its videos and images, and the list of what to leave
out.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vrlt_fast.config import VideoConfig
from vrlt_fast.data.readers import scan_jsonl
from vrlt_fast.data.sample import Sample
from vrlt_fast.errors import DataError, Problem, VideoError
from vrlt_fast.video.images import ImageLoader
from vrlt_fast.video.index import VideoIndex, probe
from vrlt_fast.video.preprocess import Geometry
from vrlt_fast.video.source import ClipSource

_SLACK = 0.5  # seconds that a span may end after the last frame: containers round durations
_OPENERS = 4  # threads that demux: it waits for the disk more than it computes


@dataclass(frozen=True)
class Report:
    """``problems`` of the file and of its videos, and counts over the ``samples`` good lines. Durations in seconds.

    ``decoded`` counts the videos whose frames were decoded, ``substituted`` the frames that another one stood in for.
    ``rejected`` maps numbers of lines (from 1) to the codes of their problems.
    """

    problems: tuple[Problem, ...]
    samples: int
    per_task: dict[str, int]
    videos: int
    shortest: float
    mean: float
    longest: float
    decoded: int
    substituted: int
    rejected: dict[int, tuple[str, ...]]

    @property
    def ok(self) -> bool:
        return not self.problems

    def summary(self) -> str:
        """A few lines for people."""
        tasks = ", ".join(f"{task} {count}" for task, count in self.per_task.items()) or "none"
        lines = [f"{self.samples} good samples ({tasks})", f"{self.videos} videos"]
        if self.videos:
            lines[1] += f", {self.shortest:.1f} to {self.longest:.1f} s, mean {self.mean:.1f} s"
        if self.decoded:
            lines.append(f"{self.decoded} videos decoded")
            lines[-1] += f", {self.substituted} frames replaced by the nearest one" if self.substituted else ""
        lines.append(f"{len(self.problems)} problems" if self.problems else "no problems")
        return "\n".join(lines)


def check_dataset(
    path: Path | str,
    root: Path | str | None = None,
    *,
    open_videos: bool = True,
    decode: VideoConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Checks a file of samples and, unless ``open_videos`` is false, demuxes every video and image that it names.

    Nothing is raised for what is wrong with the data: see :attr:`Report.problems`, ordered by line. Videos and images
    give the V codes, and VRLT-D05 for a span that ends more than 0.5 s after the video.

    Args:
        decode: also decode the images, and the frames that this configuration samples, those in ``decode.workers``
            processes.
        progress: called with ``(done, total)`` after each video.
    """
    path = Path(path)
    samples, problems = scan_jsonl(path, root)
    by_video: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_video[sample.video].append(sample)
    rejected: dict[int, set[str]] = defaultdict(set)
    for problem in problems:
        rejected[_line(problem.where)].add(problem.code)
    substituted = 0
    if open_videos:
        check = _Videos(Path(root) if root is not None else path.parent, decode)
        for done, (users, found) in enumerate(check.run(by_video), 1):
            problems += found
            for problem in found:
                for line in [problem.where] if problem.code == "VRLT-D05" else [user.line for user in users]:
                    rejected[_line(line)].add(problem.code)
            if progress:
                progress(done, len(by_video))
        substituted = check.substituted
        for users, found in _check_images(check.folder, samples, decode):
            problems += found
            for user in users:
                rejected[_line(user.line)].update(problem.code for problem in found)
    problems.sort(key=lambda problem: _line(problem.where))
    durations = [users[0].duration for users in by_video.values()]
    return Report(
        problems=tuple(problems),
        samples=len(samples),
        per_task=dict(sorted(Counter(sample.task for sample in samples).items())),
        videos=len(by_video),
        shortest=min(durations, default=0.0),
        mean=sum(durations) / max(1, len(durations)),
        longest=max(durations, default=0.0),
        decoded=len(by_video) if decode and open_videos else 0,
        substituted=substituted,
        rejected={line: tuple(sorted(codes)) for line, codes in sorted(rejected.items()) if line},
    )


class _Videos:
    """Opens videos side by side, and decodes them where asked to."""

    def __init__(self, folder: Path, decode: VideoConfig | None):
        self.folder, self.video, self.substituted = folder, decode, 0
        self._lock = threading.Lock()

    def run(self, by_video: dict[str, list[Sample]]) -> Iterator[tuple[list[Sample], list[Problem]]]:
        """The samples of each video and what is wrong with it, as they are done."""
        if self.video is None:
            yield from self._each(by_video, lambda path: probe(path), _OPENERS)
            return
        # every video once: nothing is kept, and nothing is loaded ahead
        once = self.video.model_copy(update={"cache_gb": 0.0, "cache_dir": "", "cache_gpu_gb": 0.0, "prefetch": 0})
        with ClipSource(once, Geometry()) as clips:
            threads = max(2, clips.decoder.workers)
            yield from self._each(by_video, partial(self._decode, clips), threads)
            self.substituted = clips.decoder.counts["frames substituted"]

    @staticmethod
    def _decode(clips: ClipSource, path: Path) -> VideoIndex:
        clips.load(path)
        return probe(path)

    def _each(
        self, by_video: dict[str, list[Sample]], open_one: Callable[[Path], VideoIndex], threads: int
    ) -> Iterator[tuple[list[Sample], list[Problem]]]:
        with ThreadPoolExecutor(threads) as pool:
            futures = {
                pool.submit(self._check, self.folder / video, users, open_one): users
                for video, users in by_video.items()
            }
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    @staticmethod
    def _check(path: Path, users: Sequence[Sample], open_one: Callable[[Path], VideoIndex]) -> list[Problem]:
        try:
            index = open_one(path)
        except DataError as error:
            return _named(error, path, users)
        length = index.n_frames / index.fps
        return [
            Problem(
                "VRLT-D05",
                f"span [{start:g}, {end:g}] ends after the video",
                user.line,
                f"{path.name} lasts {length:.2f} s",
            )
            for user in users
            for start, end in user.spans
            if end > length + _SLACK
        ]


def _check_images(
    folder: Path, samples: Sequence[Sample], decode: VideoConfig | None
) -> Iterator[tuple[list[Sample], list[Problem]]]:
    """The samples of each image that can't be used and what is wrong with it."""
    by_image: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        for image in dict.fromkeys(sample.images):
            by_image[image].append(sample)
    images = ImageLoader(decode or VideoConfig(), Geometry(), kept_bytes=0)
    look: Callable[[Path], object] = images.load if decode else images.n_tokens
    for image, users in by_image.items():
        try:
            look(folder / image)
        except VideoError as error:
            yield users, _named(error, folder / image, users)


def _named(error: DataError, path: Path, users: Sequence[Sample]) -> list[Problem]:
    """A file's problems at the first line that names it."""
    also = ", ".join(str(_line(user.line)) for user in users[1:])
    more = f" (also lines {also})" if also else ""
    return [replace(p, where=users[0].line, what=f"{path.name}: {p.what}{more}") for p in error.problems]


def _line(where: str) -> int:
    tail = where.rpartition(":")[2]
    return int(tail) if tail.isdecimal() else 0
