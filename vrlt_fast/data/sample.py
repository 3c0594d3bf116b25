"""The sample: one annotated question about one video, the schema of a line of JSONL (docs/data.md)."""

from __future__ import annotations

from dataclasses import dataclass

TASKS = ("videoqa", "grounding", "grounded_qa")
LETTERS = "ABCDEFGH"

Span = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """Where a pasted object is at one time. Corners in 0..1 of the frame, origin top left."""

    time: float
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Moment:
    """What is seen from ``start`` to ``end`` (seconds), in a few words."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Sample:
    """One question about one video.

    ``options`` and ``answer`` (a letter) belong to videoqa and grounded_qa, ``spans`` (seconds, sorted, disjoint) to
    grounding and grounded_qa. ``images`` are shown before the video. ``boxes``, ``object_id`` and ``progress`` (share
    of an action done, 0..1) are optional ground truth for other rewards; ``reasoning`` is what the warm-up puts between
    the think tags, ``timeline`` what it may learn as captions of the frame pairs. ``line`` says where the sample
    stands: ``train.jsonl:17``.
    """

    id: str
    video: str
    duration: float
    task: str
    question: str
    options: tuple[str, ...] = ()
    answer: str = ""
    spans: tuple[Span, ...] = ()
    images: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    object_id: int | None = None
    progress: float | None = None
    reasoning: str = ""
    timeline: tuple[Moment, ...] = ()
    line: str = ""

    @property
    def wants_answer(self) -> bool:
        return self.task in ("videoqa", "grounded_qa")

    @property
    def wants_spans(self) -> bool:
        return self.task in ("grounding", "grounded_qa")
