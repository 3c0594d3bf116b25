"""Plans of the demo clips: which footage is shown when, and what happens at which second. Pure numbers, no pixels.

A plan is everything that drawing needs, so clips.jsonl (one plan a line) proves the ground truth.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from vrlt_fast.data.footage import WORK_HEIGHT, Footage

WIDTH, HEIGHT, FPS = 160, 120, 8
GRID = FPS  # events and durations lie on whole seconds

KINDS = {
    "object": 26,
    "tint": 24,
    "negative": 12,
    "dark": 10,
    "grey": 8,
    "zoom": 6,
    "insert": 5,
    "freeze": 5,
    "reverse": 4,
}
COLOURS = {
    "red": (225, 25, 25),
    "green": (20, 190, 40),
    "blue": (25, 50, 235),
    "yellow": (250, 225, 20),
}
SHAPES = ("square", "circle", "triangle", "cross")
TONES = {"blue": (60, 110, 255), "orange": (255, 150, 30), "green": (60, 235, 80), "purple": (200, 60, 235)}

_MIN_STEP = 1.1  # source frames per clip frame; below 1 a moving shot would stand still
_MIN_SHOT = 12  # frames
_UNCUT = {
    "insert": 0,
    "freeze": 4,
    "zoom": 4,
    "reverse": 8,
}  # no cut between shots in these, nor so many frames around them
_DELICATE = ("reverse", "zoom")  # nor a cut that the footage itself has
_TWO_EVENTS = 0.5


@dataclass(frozen=True)
class Event:
    """Something that happens in ``[start, end)`` seconds. The other fields belong to one kind each.

    ``source`` is the footage of an insert, ``tone`` and ``blend`` belong to tint, ``focus`` (0..1 of the picture) to
    zoom; an object has ``colour``, ``shape``, ``size`` (its height in 0..1 of the frame's) and ``path``, the three
    control points (pixels) of the quadratic curve on which its centre moves.
    """

    kind: str
    start: float
    end: float
    source: str = ""
    colour: str = ""
    shape: str = ""
    size: float = 0.0
    path: tuple[tuple[float, float], ...] = ()
    tone: str = ""
    blend: float = 0.0
    focus: tuple[float, float] = (0.5, 0.5)

    @property
    def frames(self) -> range:
        return range(round(self.start * FPS), round(self.end * FPS))

    @property
    def radius(self) -> float:
        """Half the height (and width) of the object in pixels."""
        return self.size * HEIGHT / 2

    def centre(self, frame: int) -> tuple[float, float]:
        """Centre (x, y) of the object in pixels at a frame of the clip."""
        u = (frame - self.frames.start) / max(1, len(self.frames) - 1)
        (ax, ay), (bx, by), (cx, cy) = self.path
        a, b, c = (1 - u) ** 2, 2 * u * (1 - u), u * u
        return a * ax + b * bx + c * cx, a * ay + b * by + c * cy


@dataclass(frozen=True)
class Shot:
    """Footage shown in frames ``start .. stop - 1`` of the clip (an insert lies above the shots).

    ``first`` and ``last`` are the lowest and highest source frame used, ``begin`` the one it begins with, ``step`` the
    source frames per clip frame (``speed`` the same in shares of real time). ``crop`` is (x, y, height) of the picture
    in pixels of the decoded footage at ``first``, ``drift`` how far (x, y) it moves per source frame. ``gain`` (per
    channel) and ``bias`` change the colours.
    """

    source: str
    start: int
    stop: int
    first: int
    last: int
    begin: float
    step: float
    speed: float
    crop: tuple[float, float, float]
    drift: tuple[float, float]
    flip: bool
    gain: tuple[float, float, float]
    bias: float


@dataclass(frozen=True)
class Clip:
    """Plan of one clip of ``frames`` frames at 8 fps. Inserts are in ``inserts``, in the order of their events."""

    id: str
    split: str
    frames: int
    events: tuple[Event, ...]
    shots: tuple[Shot, ...]
    inserts: tuple[Shot, ...]

    @property
    def duration(self) -> float:
        return self.frames / FPS

    @property
    def video(self) -> str:
        return f"videos/{self.id}.mp4"

    def image(self, frame: int) -> str:
        """Path of the image of one of its frames."""
        return f"images/{self.id}-f{frame:03d}.png"


class Deck:
    """Draws from a shuffled deck that is refilled when empty, so that all items come up equally often."""

    def __init__(self, items: list[str], rng: random.Random):
        self._items, self._rng = items, rng
        self._left: list[str] = []

    def draw(self, avoid: tuple[str, ...] = ()) -> str:
        if not any(item not in avoid for item in self._left):
            fresh = list(self._items)
            self._rng.shuffle(fresh)
            self._left = fresh + self._left
        at = max(i for i, item in enumerate(self._left) if item not in avoid)
        return self._left.pop(at)


def plan_clips(split: str, count: int, footage: Mapping[str, Footage], seed: int) -> list[Clip]:
    """Plans of ``count`` clips of a split ("train" or "heldout"), the same for the same arguments."""
    rng = random.Random(f"{seed}-{split}")
    decks = {
        "kind": Deck([kind for kind, weight in KINDS.items() for _ in range(weight)], rng),
        "object": Deck([f"{colour} {shape}" for colour in COLOURS for shape in SHAPES], rng),
        "tone": Deck(list(TONES), rng),
        "insert": Deck(list(footage), rng),
    }
    return [_plan_clip(f"{split}-{i:05d}", split, footage, decks, rng) for i in range(count)]


def _plan_clip(
    name: str, split: str, footage: Mapping[str, Footage], decks: Mapping[str, Deck], rng: random.Random
) -> Clip:
    kinds = [decks["kind"].draw()]
    if rng.random() < _TWO_EVENTS:
        kinds.append(decks["kind"].draw(avoid=(kinds[0],)))
    looks = [_draw_look(kind, decks) for kind in kinds]
    while True:  # until times, cuts and the length of the footage fit together
        frames = GRID * rng.randint(6, 10)
        times = _draw_times(len(kinds), frames, rng)
        if times is None:
            continue
        placed = [_place(look, time, rng) for look, time in zip(looks, times, strict=True)]
        events = tuple(sorted(placed, key=lambda event: event.start))
        shots = _draw_background(frames, events, footage, split, rng)
        if shots is None:
            continue
        covers = [event for event in events if event.kind == "insert"]
        drawn = [_draw_shot(footage[e.source], split, e.frames, [1] * len(e.frames), rng) for e in covers]
        inserts = tuple(shot for shot in drawn if shot is not None)
        if len(inserts) == len(covers):
            return Clip(name, split, frames, events, shots, inserts)


def _draw_look(kind: str, decks: Mapping[str, Deck]) -> Event:
    """An event without its time."""
    if kind == "object":
        colour, shape = decks["object"].draw().split()
        return Event(kind, 0, 0, colour=colour, shape=shape)
    if kind == "tint":
        return Event(kind, 0, 0, tone=decks["tone"].draw())
    if kind == "insert":
        return Event(kind, 0, 0, source=decks["insert"].draw())
    return Event(kind, 0, 0)


def _draw_times(count: int, frames: int, rng: random.Random) -> list[tuple[float, float]] | None:
    """``count`` intervals in seconds on the grid of whole seconds, at least one apart; None: they didn't fit."""
    slots = frames // GRID
    times = []
    for _ in range(count):
        length = rng.randint(2, 3)
        start = rng.randint(0, slots - length)
        times.append((float(start), float(start + length)))
    ordered = sorted(times)
    if any(b[0] - a[1] < 1.0 for a, b in pairwise(ordered)):
        return None
    return times


def _place(look: Event, time: tuple[float, float], rng: random.Random) -> Event:
    event = replace(look, start=time[0], end=time[1])
    if look.kind == "object":
        size = round(rng.uniform(0.35, 0.55), 3)
        return replace(event, size=size, path=_draw_path(size * HEIGHT / 2, rng))
    if look.kind == "tint":
        return replace(event, blend=round(rng.uniform(0.5, 0.6), 3))
    if look.kind == "zoom":
        return replace(event, focus=(round(rng.uniform(0.35, 0.65), 3), round(rng.uniform(0.35, 0.65), 3)))
    return event


def _draw_path(radius: float, rng: random.Random) -> tuple[tuple[float, float], ...]:
    margin = radius + 1
    while True:
        points = [
            (round(rng.uniform(margin, WIDTH - margin), 1), round(rng.uniform(margin, HEIGHT - margin), 1))
            for _ in range(3)
        ]
        (ax, ay), _, (cx, cy) = points
        if (ax - cx) ** 2 + (ay - cy) ** 2 > (0.4 * WIDTH) ** 2:
            return tuple(points)


def _draw_background(
    frames: int, events: Sequence[Event], footage: Mapping[str, Footage], split: str, rng: random.Random
) -> tuple[Shot, ...] | None:
    rigid: set[int] = set()
    for event in events:
        if event.kind in _UNCUT:
            around = _UNCUT[event.kind]
            rigid |= set(range(event.frames.start + 1 - around, event.frames.stop + around))
    places = [k for k in range(_MIN_SHOT, frames - _MIN_SHOT + 1) if k not in rigid]
    wanted = rng.choices((0, 1, 2), (0.2, 0.4, 0.4))[0]
    borders = [0, *sorted(rng.sample(places, min(len(places), wanted))), frames]
    if any(b - a < _MIN_SHOT for a, b in pairwise(borders)):
        return None
    inserted = [event.source for event in events if event.kind == "insert"]
    choices = [key for key in footage if key not in inserted]
    if inserted:  # one background source, so that the inserted one is the only other
        choices = [rng.choice(choices)]
    pace = _pace(frames, events)
    shots = []
    for start, stop in pairwise(borders):
        delicate = any(event.kind in _DELICATE and set(event.frames) & set(range(start, stop)) for event in events)
        shot = None
        for key in rng.sample(choices, len(choices)):
            if shot is None and not (delicate and footage[key].has_cuts):
                shot = _draw_shot(footage[key], split, range(start, stop), pace[start:stop], rng)
        if shot is None:
            return None
        shots.append(shot)
    return tuple(shots)


def _pace(frames: int, events: Sequence[Event]) -> list[int]:
    """Direction of play into each frame: 1, 0 (the picture stands, or an insert covers it) or -1."""
    pace = [1] * frames
    for event in events:
        if event.kind == "reverse":
            pace[event.frames.start : event.frames.stop] = [-1] * len(event.frames)
        elif event.kind == "freeze":  # the first frame of the event is the one that stays
            pace[event.frames.start + 1 : event.frames.stop] = [0] * (len(event.frames) - 1)
        elif event.kind == "insert":
            pace[event.frames.start : event.frames.stop] = [0] * len(event.frames)
    return pace


def _draw_shot(source: Footage, split: str, where: range, pace: list[int], rng: random.Random) -> Shot | None:
    """A shot that plays at the given pace; None if the footage of the split is too short for it."""
    low, high = source.part(split)
    at, least, most = 0, 0, 0
    for move in pace[1:]:
        at += move
        least, most = min(least, at), max(most, at)
    reach = max(1, most - least)
    fastest = min(source.fps / FPS, (high - low) / reach)
    if fastest < _MIN_STEP:
        return None
    step = round(rng.uniform(min(max(_MIN_STEP, 0.4 * source.fps / FPS), fastest), fastest), 4)
    room = high - low - reach * step
    first = low + rng.randint(0, max(0, int(room)))
    tall = rng.uniform(0.65, 0.92) * WORK_HEIGHT
    slack = (source.width - tall * WIDTH / HEIGHT, WORK_HEIGHT - tall)
    seconds = reach / FPS
    limits = (0.10, 0.03)  # of the height, per second: sideways over a pixel a frame, even where the footage rests
    travel = [
        rng.choice((-1, 1)) * min(room, rng.uniform(0.55, 1.0) * limit * WORK_HEIGHT * seconds)
        for room, limit in zip(slack, limits, strict=True)
    ]
    corner = [rng.uniform(max(0.0, -move), min(room, room - move)) for room, move in zip(slack, travel, strict=True)]
    return Shot(
        source=source.key,
        start=where.start,
        stop=where.stop,
        first=first,
        last=min(high, first + round(reach * step)),
        begin=round(first - least * step, 4),
        step=step,
        speed=round(step * FPS / source.fps, 4),
        crop=(round(corner[0], 2), round(corner[1], 2), round(tall, 2)),
        drift=(round(travel[0] / (reach * step), 4), round(travel[1] / (reach * step), 4)),
        flip=rng.random() < 0.5,
        gain=(round(rng.uniform(0.8, 1.2), 3), round(rng.uniform(0.8, 1.2), 3), round(rng.uniform(0.8, 1.2), 3)),
        bias=round(rng.uniform(-18, 18), 1),
    )


def play(clip: Clip) -> list[tuple[Shot, list[float]]]:
    """Shots in drawing order (inserts last), each with the source frame (a fraction) that each of its frames shows."""
    pace = _pace(clip.frames, clip.events)
    out = []
    for shot in clip.shots:
        position, positions = shot.begin, [shot.begin]
        for move in pace[shot.start + 1 : shot.stop]:
            position += move * shot.step
            positions.append(position)
        out.append((shot, positions))
    out += [(shot, [shot.begin + k * shot.step for k in range(shot.stop - shot.start)]) for shot in clip.inserts]
    return out
