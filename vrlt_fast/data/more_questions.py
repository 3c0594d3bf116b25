"""Questions of the further tasks about planned demo clips. All answers are exact, by the plan, and are balanced so that
text alone doesn't give them.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from vrlt_fast.data.clips import GRID, HEIGHT, KINDS, WIDTH, Clip, Deck, Event
from vrlt_fast.data.footage import Footage
from vrlt_fast.data.questions import HAPPENS, WHEN, boxes, by_second, in_words, timeline
from vrlt_fast.data.sample import LETTERS, Instance, Sample

_BOXES = 4  # times at which a box is asked for
_STILL = 2  # numbered objects beside the one that moves
_APART = 24  # pixels between the centres of numbered objects, so that their numbers can be told apart
_TRIES = 50
_OPTIONS = 4
_PICTURED_EVERY = 3  # clips
_SLACK = 2  # so much more often than the rarest kind may one be described

_STATED = {
    "object": "a {colour} {shape} moves through the picture",
    "insert": "{words} is shown",
    "tint": "the picture is tinted {tone}",
    "dark": "the picture is dark",
    "negative": "the colours are inverted",
    "grey": "the picture is black and white",
    "zoom": "the picture is enlarged",
    "freeze": "the picture stands still",
    "reverse": "the video plays backwards",
}
_LASTING = {"object": 1, "zoom": 1}  # the wording of WHEN that is true for all of the event; of others the first one is

Ask = Callable[[Sequence[Clip], Mapping[str, Footage], random.Random], Iterator[Sample]]


def ask_more(clips: Sequence[Clip], footage: Mapping[str, Footage], seed: int) -> list[Sample]:
    """Samples of the tasks boxes, instance, progress, number, regression and open, and of videoqa with several right
    options or with an image, about the clips of one split, in their order; the same for the same arguments.

    Their images are frames of the clips (:meth:`vrlt_fast.data.clips.Clip.image`).
    """
    found: dict[str, list[Sample]] = defaultdict(list)
    for name, asked in _ASKED.items():
        rng = random.Random(f"{seed}-{clips[0].split if clips else ''}-{name}")
        for sample in asked(clips, footage, rng):
            found[sample.video].append(sample)
    return [sample for clip in clips for sample in found[clip.video]]


def _about(clip: Clip, footage: Mapping[str, Footage], name: str) -> Sample:
    """What all samples about a clip have; ``name`` is the end of the id."""
    seen = timeline(clip, footage)
    return Sample(
        f"{clip.id}-{name}", clip.video, clip.duration, "", "", reasoning=by_second(clip, seen), timeline=seen
    )


def _pasted(clips: Sequence[Clip]) -> Iterator[tuple[Clip, Event]]:
    return ((clip, event) for clip in clips for event in clip.events if event.kind == "object")


def _boxes(clips: Sequence[Clip], footage: Mapping[str, Footage], rng: random.Random) -> Iterator[Sample]:
    """Where the object is, at four half seconds at which it is seen."""
    for clip, event in _pasted(clips):
        question = rng.choice(("Where is the {colour} {shape}?", "Where in the picture is the {colour} {shape}?"))
        known = boxes(event)
        asked = sorted(rng.sample(range(len(known)), _BOXES))
        yield replace(
            _about(clip, footage, "boxes"),
            task="boxes",
            question=in_words(question, event, footage),
            boxes=tuple(known[i] for i in asked),
        )


def _instance(clips: Sequence[Clip], footage: Mapping[str, Footage], rng: random.Random) -> Iterator[Sample]:
    """Which of three numbered objects is the one that moves, and when; the others are places of the background, for
    some seconds each. Their boxes are those of every frame.
    """
    for clip, event in _pasted(clips):
        marked = [event]
        for _ in range(_STILL):
            marked.append(_still(clip, marked, rng))
        numbers = rng.sample(range(1, 10), len(marked))
        instances = [Instance(number, boxes(one, every=1)) for number, one in zip(numbers, marked, strict=True)]
        rng.shuffle(instances)
        yield replace(
            _about(clip, footage, "instance"),
            task="instance",
            question=in_words("Which number has the {colour} {shape}, and when is it seen?", event, footage),
            spans=((event.start, event.end),),
            object_id=numbers[0],
            instances=tuple(instances),
        )


def _still(clip: Clip, marked: Sequence[Event], rng: random.Random) -> Event:
    """A place that is marked like an object, away from what is marked already."""
    length = rng.randint(2, 3)
    start = rng.randint(0, clip.frames // GRID - length)
    size = round(rng.uniform(0.2, 0.35), 3)
    margin = size * HEIGHT / 2 + 1
    taken = [event.centre(frame) for event in marked for frame in event.frames]
    best, place = -1.0, (0.0, 0.0)
    for _ in range(_TRIES):
        x, y = round(rng.uniform(margin, WIDTH - margin), 1), round(rng.uniform(margin, HEIGHT - margin), 1)
        distance = min((x - a) ** 2 + (y - b) ** 2 for a, b in taken)
        if distance > best:
            best, place = distance, (x, y)
        if distance >= _APART**2:
            break
    return Event("object", float(start), float(start + length), size=size, path=(place,) * 3)


def _progress(clips: Sequence[Clip], footage: Mapping[str, Footage], rng: random.Random) -> Iterator[Sample]:
    """How much of an event's time is over: at a second that is named (0, 10 .. 100 %), or on an image of the moment,
    beside one of the event's first frame (25, 50, 75 %; every second object). All are equally often right.
    """
    told = Deck([str(percent) for percent in range(0, 101, 10)], rng)
    shown = Deck(["25", "50", "75"], rng)
    pictured = {clip.id: event for clip, event in list(_pasted(clips))[::2]}
    for index, clip in enumerate(clips):
        sample = replace(_about(clip, footage, "progress"), task="progress")
        if clip.id in pictured:
            event, percent = pictured[clip.id], int(shown.draw())
            frames = event.frames
            question = (
                "The first image is of the moment at which the {colour} {shape} appears, the second one of a later one."
                " How much of the time in which it is seen is over then?"
            )
            images = clip.image(frames[0]), clip.image(frames[len(frames) * percent // 100])
            sample = replace(sample, question=in_words(question, event, footage), images=images)
        elif index % 2:
            event, percent = rng.choice(clip.events), int(told.draw())
            second = event.start + (event.end - event.start) * percent / 100
            question = f"How much of the time in which {_STATED[event.kind]} is over at {second:g} seconds?"
            sample = replace(sample, question=in_words(question, event, footage))
        else:
            continue
        yield replace(sample, progress=percent / 100)


def _number(clips: Sequence[Clip], footage: Mapping[str, Footage], rng: random.Random) -> Iterator[Sample]:
    """How many things happen, for how many seconds, or in which second one begins."""
    right: Counter[tuple[int, float]] = Counter()
    for clip in clips[::2]:
        event = rng.choice(clip.events)
        choices = [
            ("How many things happen in this video?", len(clip.events)),
            ("For how many seconds does something happen in this video, all in all?", _busy(clip)),
            (_asked(event, footage, "From which second on"), event.start),
        ]
        yield _amount(replace(_about(clip, footage, "number"), task="number"), choices, right, rng)


def _regression(clips: Sequence[Clip], footage: Mapping[str, Footage], rng: random.Random) -> Iterator[Sample]:
    """For how many seconds, until when, at which second on average, and for how long nothing happens; never 0."""
    right: Counter[tuple[int, float]] = Counter()
    for clip in clips[1::2]:
        event = rng.choice(clip.events)
        middle = (event.start + event.end) / 2
        choices = [
            (_asked(event, footage, "For how many seconds"), event.end - event.start),
            (_asked(event, footage, "Until which second"), event.end),
            (
                in_words(f"At which second is the middle of the time in which {_STATED[event.kind]}?", event, footage),
                middle,
            ),
            ("For how many seconds does nothing happen in this video, all in all?", clip.duration - _busy(clip)),
        ]
        yield _amount(replace(_about(clip, footage, "regression"), task="regression"), choices, right, rng)


def _busy(clip: Clip) -> float:
    return sum(event.end - event.start for event in clip.events)


def _asked(event: Event, footage: Mapping[str, Footage], words: str) -> str:
    """The question of when it happens, as one that begins with ``words``."""
    question = WHEN[event.kind][_LASTING.get(event.kind, 0)]
    return in_words(question.replace("When", words, 1), event, footage)


def _amount(
    sample: Sample, choices: Sequence[tuple[str, float]], right: Counter[tuple[int, float]], rng: random.Random
) -> Sample:
    """The choice (question, answer) whose answer was right least often among those of its place. Regression's reward is
    relative to the truth, so that 0 can't be asked for there.
    """
    able = [place for place, (_, answer) in enumerate(choices) if answer > 0 or sample.task == "number"]
    place = min(able, key=lambda place: (right[place, choices[place][1]], rng.random()))
    question, answer = choices[place]
    right[place, answer] += 1
    return replace(sample, question=question, answer=f"{answer:g}")


def _open(clips: Sequence[Clip], footage: Mapping[str, Footage], rng: random.Random) -> Iterator[Sample]:
    """What happens at a second that is named; frequent kinds are left out until rare ones catch up."""
    told: Counter[str] = Counter()
    for clip in clips:
        event = min(clip.events, key=lambda event: (told[event.kind], rng.random()))
        if told[event.kind] > min(told[kind] for kind in KINDS) + _SLACK:
            continue
        told[event.kind] += 1
        second = event.start + rng.randrange(1, round(2 * (event.end - event.start))) / 2
        yield replace(
            _about(clip, footage, "open"),
            task="open",
            question=f"What happens in this video at {second:g} seconds?",
            answer=in_words(_STATED[event.kind], event, footage),
        )


def _several(clips: Sequence[Clip], footage: Mapping[str, Footage], rng: random.Random) -> Iterator[Sample]:
    """Which of four things happen: one or two. The others are those that were right most often where they were shown,
    so that none is likelier than another.
    """
    right: Counter[str] = Counter()
    shown: Counter[str] = Counter()
    for clip in clips[::2]:
        happened = {event.kind for event in clip.events}
        order = sorted(KINDS, key=lambda kind: (kind not in happened, -right[kind] / (shown[kind] + 1), rng.random()))
        kinds = sorted(order[:_OPTIONS], key=list(HAPPENS).index)
        right.update(happened)
        shown.update(kinds)
        yield replace(
            _about(clip, footage, "several"),
            task="videoqa",
            question="Which of these happen in this video? There may be several.",
            options=tuple(HAPPENS[kind] for kind in kinds),
            answer=",".join(LETTERS[place] for place, kind in enumerate(kinds) if kind in happened),
        )


def _picture(clips: Sequence[Clip], footage: Mapping[str, Footage], rng: random.Random) -> Iterator[Sample]:
    """Whether an image is a frame of the video, in turn with when in the video it is from."""
    answers = Deck(["yes", "no"], rng)
    right: Counter[str] = Counter()
    for index, clip in enumerate(clips[::_PICTURED_EVERY]):
        sample = replace(_about(clip, footage, "picture"), task="videoqa")
        if index % 2:
            others = [other for other in clips if not _sources(other) & _sources(clip)]
            if others:
                answer = answers.draw()
                of = clip if answer == "yes" else rng.choice(others)
                question = "Is the image a frame of this video?"
                image = of.image(rng.randrange(of.frames))
                yield replace(_option(sample, question, ("yes", "no"), answer), images=(image,))
        elif all(event.kind != "reverse" for event in clip.events):  # which shows what was seen before once more
            event = rng.choice(clip.events)
            start, stop = event.frames.start, event.frames.stop
            parts = {"before": range(start), "during": range(start, stop), "after": range(stop, clip.frames)}
            answer = min((part for part in parts if parts[part]), key=lambda part: (right[part], rng.random()))
            right[answer] += 1
            question = f"Is the image from before, during or after the time in which {_STATED[event.kind]}?"
            asked = _option(sample, in_words(question, event, footage), tuple(parts), answer)
            yield replace(asked, images=(clip.image(rng.choice(parts[answer])),))


def _sources(clip: Clip) -> set[str]:
    return {shot.source for shot in (*clip.shots, *clip.inserts)}


def _option(sample: Sample, question: str, options: tuple[str, ...], right: str) -> Sample:
    return replace(sample, question=question, options=options, answer=LETTERS[options.index(right)])


_ASKED: dict[str, Ask] = {
    "boxes": _boxes,
    "instance": _instance,
    "progress": _progress,
    "number": _number,
    "regression": _regression,
    "open": _open,
    "several": _several,
    "picture": _picture,
}
