"""What a step shows of a sample: how much of the video is hidden, how many frames; and which samples are annotated in
part only.

VideoTG-R1 (arXiv 2510.23397) hides part of the video outside the annotated span where a sample is hard, less with each
step, and drops samples of which a model finds further times that fit. Neither its schedule nor its thresholds are known
to us: those here are our choice. Steps count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from vrlt_fast.data.grammars.pieces import borders
from vrlt_fast.data.sample import LETTERS, Sample, Span
from vrlt_fast.rewards.spans import iop, merge

OUTSIDE = 0.5
"""Share of a predicted span that must lie outside of the annotated ones for it to be a further time."""
SECONDS = 1.0
"""Length of that part, at least."""


def masked_share(step: int, *, difficulty: float | None, start: float, steps: int) -> float:
    """Share of the video outside the annotated span that is hidden at this step, in 0..1.

    ``start * difficulty * (1 - (step - 1) / steps)``, 0 after ``steps`` steps: at the first step the hardest samples
    have ``start`` hidden, the easiest nothing. A sample of which no difficulty is known counts as hard (1), so
    that a data file without this field has the curriculum, too. (The paper takes it from the model's zero-shot IoU.)

    Args:
        difficulty: 0 (easy) to 1 (hard), as samples have it.
        steps: until nothing is hidden; 0: nothing ever is.
    """
    left = 1.0 - (step - 1) / steps if steps > 0 else 0.0
    hard = 1.0 if difficulty is None else min(max(difficulty, 0.0), 1.0)
    return start * hard * min(max(left, 0.0), 1.0)


def frames_at(step: int, *, first: int, last: int, steps: int, by: int) -> int:
    """Most frames of a video at this step (VST, github.com/1ranGuan/VST, can go from 80 to its maximum by 20 over 200
    steps): ``first``, then ``by`` more after equal stretches, and ``last`` once ``steps`` steps are done.

    Raises ValueError unless ``2 <= first <= last`` and ``by >= 1``.
    """
    if not 2 <= first <= last or by < 1:
        raise ValueError(f"no way from {first} frames to {last} by {by}")
    stairs = -(-(last - first) // by)
    done = min(step - 1, steps)
    return last if done >= steps else min(last, first + by * (max(done, 0) * stairs // steps))


def reflection_prompt(sample: Sample) -> Sample:
    """A question of the task grounding for times outside the annotated spans that answer the sample's question as well.

    A response to it names a time in any case: where there is no further one it is to repeat an annotated one, and
    :func:`is_partial` takes that for a no. Its spans are the annotated ones.

    Raises ValueError for a task without spans.
    """
    if not sample.wants_spans or not sample.spans:
        raise ValueError(f"{sample.id}: task {sample.task} has no annotated spans")
    known = ", ".join(" to ".join(borders(start, end)) for start, end in sample.spans)
    right = ", ".join(sample.options[LETTERS.index(letter)] for letter in sorted(sample.letters))
    told = f'"{sample.question}"' + (f" (answer: {right})" if right else "")
    question = (
        f"For the question {told}, this time of the video is known, in seconds: {known}. "
        "Is the same seen at another time, outside of it? If so, when? If not, give the known time again."
    )
    return Sample(
        id=f"{sample.id}-reflect",
        video=sample.video,
        duration=sample.duration,
        task="grounding",
        question=question,
        spans=sample.spans,
        images=sample.images,
        instances=sample.instances,
        source=sample.source,
        line=sample.line,
    )


def is_partial(
    predicted: Sequence[Span],
    annotated: Sequence[Span],
    duration: float = math.inf,
    *,
    outside: float = OUTSIDE,
    seconds: float = SECONDS,
) -> bool:
    """Whether one of the predicted spans, merged and cut to the video, is a further time: at least ``outside`` of its
    length, and at least ``seconds``, lie outside of all annotated spans. Spans with start >= end say nothing.
    """
    for start, end in merge((max(s, 0.0), min(e, duration)) for s, e in predicted):
        beyond = 1.0 - iop([(start, end)], annotated)
        if beyond >= outside - 1e-9 and beyond * (end - start) >= seconds - 1e-9:
            return True
    return False


def find_partial(
    answers: Mapping[str, Sequence[Span]],
    samples: Iterable[Sample],
    *,
    outside: float = OUTSIDE,
    seconds: float = SECONDS,
) -> list[str]:
    """Ids of the samples, in their order, that are annotated in part only, as far as their answers say.

    Args:
        answers: by the id of the sample, the spans that a model gave to :func:`reflection_prompt`. Samples without an
            entry are passed over.
    """
    return [
        sample.id
        for sample in samples
        if sample.id in answers
        and is_partial(answers[sample.id], sample.spans, sample.duration, outside=outside, seconds=seconds)
    ]
