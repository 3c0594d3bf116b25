"""Questions about planned demo clips, balanced so that text alone doesn't answer them."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vrlt_fast.data.clips import COLOURS, FPS, HEIGHT, KINDS, SHAPES, TONES, WIDTH, Clip, Event
from vrlt_fast.data.footage import Footage
from vrlt_fast.data.sample import LETTERS, Box, Moment, Sample

_ASKED = 0.92  # share of the clips that get a question of each task
_IMAGE_EVERY = 5

WHEN = {
    "object": ("When does a {colour} {shape} move through the picture?", "When can the {colour} {shape} be seen?"),
    "insert": ("When is {words} shown?", "When is there a cut to {words}?"),
    "tint": ("When is the picture tinted {tone}?", "When does everything turn {tone}?"),
    "dark": ("When is the picture dark?", "When does the light go down?"),
    "negative": ("When are the colours inverted?", "When is the picture a negative?"),
    "grey": ("When is the picture black and white?", "When do the colours vanish?"),
    "zoom": ("When does the camera zoom in?", "When is the picture enlarged?"),
    "freeze": ("When does the picture stand still?", "When is the video frozen?"),
    "reverse": ("When does the video play backwards?", "When does time run in reverse?"),
}
HAPPENS = {
    "object": "a coloured shape moves through the picture",
    "insert": "other footage is cut in",
    "tint": "the picture turns into one colour tone",
    "dark": "the picture turns dark",
    "negative": "the colours are inverted",
    "grey": "the colours vanish",
    "zoom": "the camera zooms in",
    "freeze": "the picture stands still",
    "reverse": "the video plays backwards",
}
_LABEL = {
    "object": "{colour} {shape}",
    "insert": "{words}",
    "tint": "{tone} tone",
    "dark": "dark",
    "negative": "negative",
    "grey": "grey",
    "zoom": "zoom",
    "freeze": "still",
    "reverse": "backwards",
}
# (question of videoqa, question of grounded_qa)
_ASK = {
    "colour": ("Which colour is the moving shape?", "Which colour is the moving shape, and when is it seen?"),
    "shape": ("Which shape moves through the picture?", "Which shape moves through the picture, and when?"),
    "tone": ("Which tone does the picture turn to?", "Which tone does the picture turn to, and when?"),
    "footage": ("Which footage is cut in?", "Which footage is cut in, and when?"),
    "happens": ("What happens in this video?", "What happens in this video, and when?"),
}
_ANSWER = {"colour": "colour", "shape": "shape", "tone": "tone", "footage": "source"}  # fields of Event
_SPECIFIC = {"object": ("colour", "shape"), "tint": ("tone",), "insert": ("footage",)}


def ask(clips: Sequence[Clip], footage: Mapping[str, Footage], seed: int) -> list[Sample]:
    """Questions about the clips of one split, in the order of the clips, the same for the same arguments."""
    if not clips:
        return []
    rng = random.Random(f"{seed}-{clips[0].split}-questions")
    chosen = {
        task: {clip.id: rng.choice(clip.events) for clip in clips if rng.random() < _ASKED}
        for task in ("videoqa", "grounded_qa")
    }
    samples: dict[str, list[Sample]] = defaultdict(list)
    for clip in clips:
        for number, event in enumerate(clip.events):
            if rng.random() < _ASKED:
                samples[clip.id].append(_grounding(clip, event, "g" if number == 0 else "g2", footage, rng))
    for task in ("videoqa", "grounded_qa"):
        types = _choose_types(clips, chosen[task], rng)
        for clip in clips:
            if clip.id in types:
                event = chosen[task][clip.id]
                samples[clip.id].append(_choice(clip, event, types[clip.id], task, footage, rng))
    pictured = {clip.id for clip in clips[::_IMAGE_EVERY]}
    return [
        replace(sample, images=(f"images/{clip.id}.png",))
        if clip.id in pictured and sample.task == "videoqa"
        else sample
        for clip in clips
        for sample in samples[clip.id]
    ]


def _grounding(clip: Clip, event: Event, suffix: str, footage: Mapping[str, Footage], rng: random.Random) -> Sample:
    question = in_words(rng.choice(WHEN[event.kind]), event, footage)
    middle = clip.frames // 2 / FPS
    done = min(1.0, max(0.0, (middle - event.start) / (event.end - event.start)))
    return _sample(clip, event, suffix, "grounding", question, footage=footage, progress=round(done, 4))


def _choose_types(clips: Sequence[Clip], chosen: Mapping[str, Event], rng: random.Random) -> dict[str, str]:
    """Type of the multiple-choice question of each clip; clips whose event would unbalance "what happens" get none.

    "What happens" is asked of clips with one event, and equally often of every kind, so that no option is likelier.
    """
    single: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for clip in clips:
        if clip.id in chosen and len(clip.events) == 1:
            single[clip.events[0].kind].append(clip.id)
    quota = min(len(names) for names in single.values())
    types = {name: "happens" for names in single.values() for name in rng.sample(names, quota)}
    right: Counter[tuple[str, str]] = Counter()
    for clip in clips:
        if clip.id in chosen and clip.id not in types and chosen[clip.id].kind in _SPECIFIC:
            event = chosen[clip.id]
            answers = {kind: getattr(event, _ANSWER[kind]) for kind in _SPECIFIC[event.kind]}
            kind = min(answers, key=lambda kind: (right[kind, answers[kind]], rng.random()))
            right[kind, answers[kind]] += 1
            types[clip.id] = kind
    return types


def _choice(
    clip: Clip,
    event: Event,
    kind: str,
    task: str,
    footage: Mapping[str, Footage],
    rng: random.Random,
) -> Sample:
    """A multiple-choice question of type ``kind``.

    Options keep the order of their pool, so that a letter is a class where a question has four possible answers: a
    model of two million parameters doesn't learn in minutes to look letters up. Answers of a type are equally
    frequent, so letters are too.
    """
    pools = {
        "colour": (event.colour, list(COLOURS)),
        "shape": (event.shape, list(SHAPES)),
        "tone": (event.tone, list(TONES)),
        "footage": (footage[event.source].words if event.source else "", [source.words for source in footage.values()]),
        "happens": (HAPPENS[event.kind], list(HAPPENS.values())),
    }
    right, pool = pools[kind]
    wrong = [text for text in pool if text != right]
    options = rng.sample(wrong, min(3, len(wrong)))
    options = sorted([*options, right], key=pool.index)
    letter = LETTERS[options.index(right)]
    grounded = task == "grounded_qa"
    question = _ASK[kind][grounded]
    suffix = "b" if grounded else "q"
    return _sample(clip, event, suffix, task, question, footage=footage, options=tuple(options), answer=letter)


def _sample(
    clip: Clip,
    event: Event,
    suffix: str,
    task: str,
    question: str,
    *,
    footage: Mapping[str, Footage],
    options: tuple[str, ...] = (),
    answer: str = "",
    progress: float | None = None,
) -> Sample:
    seen = timeline(clip, footage)
    pasted = next((event for event in clip.events if event.kind == "object"), None)
    return Sample(
        id=f"{clip.id}-{suffix}",
        video=clip.video,
        duration=clip.duration,
        task=task,
        question=question,
        options=options,
        answer=answer,
        spans=() if task == "videoqa" else ((event.start, event.end),),
        boxes=boxes(pasted) if pasted else (),
        object_id=list(COLOURS).index(pasted.colour) * len(SHAPES) + SHAPES.index(pasted.shape) if pasted else None,
        progress=progress,
        reasoning=by_second(clip, seen),
        timeline=seen,
    )


def in_words(template: str, event: Event, footage: Mapping[str, Footage]) -> str:
    """``template`` with the event's {colour}, {shape}, {tone}, and {words} for the footage that is cut in."""
    words = footage[event.source].words if event.source else ""
    return template.format(colour=event.colour, shape=event.shape, tone=event.tone, words=words)


def timeline(clip: Clip, footage: Mapping[str, Footage]) -> tuple[Moment, ...]:
    """The events of a clip in a few words each."""
    return tuple(Moment(event.start, event.end, in_words(_LABEL[event.kind], event, footage)) for event in clip.events)


def by_second(clip: Clip, seen: Sequence[Moment]) -> str:
    """What is seen in each second: ``0-,1 red circle,2 red circle,3-``."""
    labels = ["-"] * (clip.frames // FPS)
    for moment in seen:
        for second in range(round(moment.start), round(moment.end)):
            labels[second] = f" {moment.text}"
    return ",".join(f"{second}{label}" for second, label in enumerate(labels))


def boxes(event: Event, every: int = FPS // 2) -> tuple[Box, ...]:
    """Where the object of an event is, at each ``every``-th of its frames."""
    found = []
    for frame in event.frames[::every]:
        (x, y), r = event.centre(frame), event.radius
        corners = ((x - r) / WIDTH, (y - r) / HEIGHT, (x + r) / WIDTH, (y + r) / HEIGHT)
        found.append(Box(frame / FPS, *(round(value, 5) for value in corners)))
    return tuple(found)
