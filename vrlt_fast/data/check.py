"""What ``vrlt data check FILE`` tells about a file of samples."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av

from vrlt_fast.data.readers import scan_jsonl
from vrlt_fast.data.sample import Sample
from vrlt_fast.errors import Problem

_SLACK = 0.5  # seconds that a span may end after the last frame: containers round durations


@dataclass(frozen=True)
class Report:
    """``problems`` of the file and of its videos, and counts over the ``samples`` good lines. Durations in seconds."""

    problems: tuple[Problem, ...]
    samples: int
    per_task: dict[str, int]
    videos: int
    shortest: float
    mean: float
    longest: float

    @property
    def ok(self) -> bool:
        return not self.problems

    def summary(self) -> str:
        """A few lines for people."""
        tasks = ", ".join(f"{task} {count}" for task, count in self.per_task.items()) or "none"
        lines = [f"{self.samples} good samples ({tasks})", f"{self.videos} videos"]
        if self.videos:
            lines[1] += f", {self.shortest:.1f} to {self.longest:.1f} s, mean {self.mean:.1f} s"
        lines.append(f"{len(self.problems)} problems" if self.problems else "no problems")
        return "\n".join(lines)


def check_dataset(
    path: Path | str,
    root: Path | str | None = None,
    *,
    open_videos: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Checks a file of samples and, unless ``open_videos`` is false, the header of every video that it names.

    Nothing is raised for what is wrong with the data: see :attr:`Report.problems`, ordered by line. Videos give
    VRLT-V02 (empty or unreadable), VRLT-V03 (no video stream), VRLT-V04 (no frames) and VRLT-D05 (a span that ends
    more than 0.5 s after the video).
    ``progress(done, total)`` is called after each video.
    """
    path = Path(path)
    samples, problems = scan_jsonl(path, root)
    by_video: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_video[sample.video].append(sample)
    folder = Path(root) if root is not None else path.parent
    if open_videos:
        for done, (video, users) in enumerate(by_video.items(), 1):
            problems += _check_video(folder / video, users)
            if progress:
                progress(done, len(by_video))
    problems.sort(key=_line_number)
    durations = [users[0].duration for users in by_video.values()]
    return Report(
        problems=tuple(problems),
        samples=len(samples),
        per_task=dict(sorted(Counter(sample.task for sample in samples).items())),
        videos=len(by_video),
        shortest=min(durations, default=0.0),
        mean=sum(durations) / max(1, len(durations)),
        longest=max(durations, default=0.0),
    )


def _check_video(path: Path, users: list[Sample]) -> list[Problem]:
    where = users[0].line
    if path.stat().st_size == 0:
        return [Problem("VRLT-V02", f"{path.name} is empty", where, fix="copy the file again")]
    try:
        with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                return [Problem("VRLT-V03", f"{path.name} has no video stream", where)]
            stream = streams[0]
            if not any(packet.size for packet in container.demux(stream)):
                return [Problem("VRLT-V04", f"{path.name} has no frames", where, fix="encode the file again")]
            length = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
    except (av.FFmpegError, OSError, ValueError) as error:
        return [Problem("VRLT-V02", f"{path.name} can't be opened", where, str(error), "copy or encode the file again")]
    if length is None:  # some containers don't tell
        return []
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


def _line_number(problem: Problem) -> int:
    tail = problem.where.rpartition(":")[2]
    return int(tail) if tail.isdecimal() else 0
