"""The sample: one annotated question about one video, the schema of a line of JSONL (docs/data.md)."""

from __future__ import annotations

from dataclasses import dataclass

TASKS = (
    "videoqa", "grounding", "grounded_qa", "number", "regression", "ocr", "open", "boxes", "instance", "progress",
)  # fmt: skip
"""What can be asked: the letters of options; spans; both; a number that is right or wrong, or nearly right; a text to
read, or to say in one's own words; where an object is at given times; which numbered object, and when; how far along.
"""
LETTER_TASKS = ("videoqa", "grounded_qa")
SPAN_TASKS = ("grounding", "grounded_qa", "instance")
TEXT_TASKS = ("number", "regression", "ocr", "open")
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
class Instance:
    """An object that has a number, and where it is when."""

    id: int
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Moment:
    """What is seen from ``start`` to ``end`` (seconds), in a few words."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Sample:
    """One question about one video.

    ``options`` belong to the LETTER_TASKS, whose ``answer`` is a letter, or several as "A,C"; that of TEXT_TASKS is
    a text (a number as text). ``spans`` (seconds, sorted, disjoint) belong to the SPAN_TASKS. ``images`` are shown
    before the video. ``boxes`` (where the object of the question is; the task of that name asks for one at each of
    their times), ``object_id`` (task instance) and ``progress`` (share of an action done, 0..1) are ground truth of the
    task so named, and extra elsewhere. ``instances`` are the objects whose numbers can be drawn on the frames.
    ``difficulty`` (0 easy .. 1 hard) and ``source`` (the data set it comes from) are for selection. ``reasoning`` is
    what the warm-up puts between the think tags, ``timeline`` what it may learn as captions of the frame pairs.
    ``line`` says where the sample stands: ``train.jsonl:17``.
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
    instances: tuple[Instance, ...] = ()
    difficulty: float | None = None
    source: str = ""
    reasoning: str = ""
    timeline: tuple[Moment, ...] = ()
    line: str = ""

    @property
    def wants_answer(self) -> bool:
        """Whether it asks for options' letters."""
        return self.task in LETTER_TASKS

    @property
    def wants_spans(self) -> bool:
        return self.task in SPAN_TASKS

    @property
    def letters(self) -> frozenset[str]:
        """The letters of the right options."""
        return frozenset(self.answer.split(",")) if self.wants_answer else frozenset()
