"""What the events look like in the decoded H.264 files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from tests.conftest import seed_of
from vrlt_fast.data.clips import COLOURS, HEIGHT, KINDS, WIDTH, Clip, plan_clips, play
from vrlt_fast.data.draw import draw_clip, write_mp4
from vrlt_fast.data.footage import HELDOUT, TRAIN, decode, find_footage
from vrlt_fast.data.questions import ask

SEED = seed_of("test_draw")
NOISE = 6.0  # mean absolute difference that encoding may make


@pytest.fixture(scope="module")
def footage():
    return find_footage()


@pytest.fixture(scope="module")
def sources(footage):
    return {key: decode(source) for key, source in footage.items()}


@pytest.fixture(scope="module", params=[TRAIN, HELDOUT])
def clips(request: pytest.FixtureRequest, footage) -> dict[str, Clip]:
    """One clip with a single event for each kind."""
    print(f"seed {SEED}")
    single = [clip for clip in plan_clips(request.param, 600, footage, SEED) if len(clip.events) == 1]
    return {kind: next(clip for clip in single if clip.events[0].kind == kind) for kind in KINDS}


def film(clip: Clip, sources, folder: Path) -> np.ndarray:
    """The clip as it is decoded from its file, float (frames, 120, 160, 3)."""
    write_mp4(draw_clip(clip, sources), folder / "clip.mp4")
    with av.open(str(folder / "clip.mp4")) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)


def inside(clip: Clip) -> np.ndarray:
    flags = np.zeros(clip.frames, bool)
    flags[clip.events[0].frames.start : clip.events[0].frames.stop] = True
    return flags


@pytest.mark.parametrize("kind", ["object", "insert", "tint", "dark", "zoom"])
def test_the_picture_differs_from_the_plain_shot_exactly_during_the_event(kind, clips, sources, tmp_path):
    clip = clips[kind]
    plain = replace(clip, inserts=()) if kind == "insert" else replace(clip, events=())
    change = np.abs(film(clip, sources, tmp_path) - draw_clip(plain, sources))
    during = inside(clip)
    assert change.mean((1, 2, 3))[~during].max() < NOISE
    if kind == "zoom":  # it begins slowly
        during[clip.events[0].frames.start : clip.events[0].frames.start + 6] = False
    # an object covers a small part of the picture
    seen = np.percentile(change.max(3), 99, axis=(1, 2)) if kind == "object" else change.mean((1, 2, 3))
    assert seen[during].min() > 2 * NOISE


def test_a_dark_picture_has_a_quarter_of_the_light(clips, sources, tmp_path):
    clip = clips["dark"]
    light = film(clip, sources, tmp_path).mean((1, 2, 3)) / draw_clip(replace(clip, events=()), sources).mean((1, 2, 3))
    assert light[inside(clip)].max() < 0.4
    assert light[~inside(clip)].min() > 0.85


def test_a_frozen_picture_stands_and_others_move(clips, sources, tmp_path):
    clip = clips["freeze"]
    drawn = draw_clip(clip, sources).astype(float)
    where = clip.events[0].frames
    assert (drawn[where.start : where.stop] == drawn[where.start]).all()
    change = np.abs(np.diff(film(clip, sources, tmp_path), axis=0)).mean((1, 2, 3))
    still = np.zeros(clip.frames - 1, bool)
    still[where.start : where.stop - 1] = True
    assert change[still].max() < change[~still].min() / 2


def test_a_reversed_shot_shows_its_frames_again(clips, sources):
    clip = clips["reverse"]
    where = clip.events[0].frames
    shot, positions = next((s, p) for s, p in play(clip) if s.start <= where.start and where.stop <= s.stop)
    steps = np.diff(positions)
    backwards = np.arange(shot.start + 1, shot.stop)
    assert ((steps < 0) == ((backwards >= where.start) & (backwards < where.stop))).all()
    drawn = draw_clip(clip, sources).astype(float)
    turn = where.start - 1 if where.start > shot.start else where.start
    count = min(turn - shot.start, where.stop - 1 - turn)
    for k in range(1, count + 1):
        assert np.abs(drawn[turn + k] - drawn[turn - k]).mean() < np.abs(drawn[turn + k] - drawn[turn]).mean() / 2 + 0.5


def test_no_plain_shot_stands_still_or_runs_backwards(clips, sources):
    for kind, clip in clips.items():
        if kind in ("freeze", "reverse"):
            continue
        for shot, positions in play(clip):
            frames = [round(position) for position in positions]
            covered = [k in clip.events[0].frames for k in range(shot.start + 1, shot.stop)]
            moved = np.diff(frames) >= 1
            assert (moved | np.array(covered)).all() if kind == "insert" else moved.all()
            assert min(frames) >= shot.first - 1
            assert max(frames) <= shot.last + 1


def test_boxes_are_tight_around_the_object(clips, sources, footage, tmp_path):
    clip = clips["object"]
    event = clip.events[0]
    video = film(clip, sources, tmp_path)
    plain = draw_clip(replace(clip, events=()), sources).astype(float)
    boxes = next(s.boxes for seed in range(20) for s in ask([clip], footage, seed))
    assert [box.time for box in boxes] == [event.start + k / 2 for k in range(round(2 * (event.end - event.start)))]
    pasted = draw_clip(clip, sources).astype(float)
    for box in boxes:
        frame = round(box.time * 8)
        x0, y0, x1, y1 = box.x0 * WIDTH, box.y0 * HEIGHT, box.x1 * WIDTH, box.y1 * HEIGHT
        assert 0 <= x0 < x1 <= WIDTH
        assert 0 <= y0 < y1 <= HEIGHT
        middle = video[frame, round((y0 + y1) / 2) + 1, round((x0 + x1) / 2)]
        assert np.abs(middle - COLOURS[event.colour]).max() < 60
        rows, columns = np.nonzero(np.abs(pasted[frame] - plain[frame]).max(2))
        assert x0 - 1 <= columns.min() + 0.5
        assert columns.max() + 0.5 <= x1 + 1
        assert y0 - 1 <= rows.min() + 0.5
        assert rows.max() + 0.5 <= y1 + 1
