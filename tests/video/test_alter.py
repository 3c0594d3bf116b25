"""Altered clips: frames in another order, noise, grey pairs, numbers of objects; each with a key of its own."""

from __future__ import annotations

import dataclasses
import random
from itertools import combinations

import pytest
import torch

from vrlt_fast.data.sample import Box, Instance
from vrlt_fast.video.alter import GREY, grey, masked_outside, noisy_frames, shuffled_frames, thinned, with_frames
from vrlt_fast.video.labels import with_ids
from vrlt_fast.video.preprocess import Clip, Geometry, patchify

TIMES = tuple(k / 2 for k in range(12))


def clip_of(frames: torch.Tensor, times: tuple[float, ...] = TIMES, merge: int = 2) -> Clip:
    patches, grid = patchify(frames, Geometry(14, merge))
    return Clip(patches, grid, times, 1.0, "clip", Geometry(14, merge))


@pytest.fixture
def clip(seed: int) -> Clip:
    """6 frame pairs of 84 x 112 pixels, one a second."""
    generator = torch.Generator().manual_seed(seed)
    return clip_of(torch.randint(256, (12, 3, 84, 112), dtype=torch.uint8, generator=generator))


def everything_else(clip: Clip) -> dict[str, object]:
    return {f.name: getattr(clip, f.name) for f in dataclasses.fields(clip) if f.name not in ("patches", "key")}


def one(number: int, *times: float, x: float = 0.5, y: float = 0.5) -> Instance:
    return Instance(number, tuple(Box(time, x - 0.1, y - 0.1, x + 0.1, y + 0.1) for time in times))


def test_the_tools_make_new_clips_with_keys_by_all_that_they_depend_on(clip, seed):
    before = clip.patches.clone()
    outside = [(1.0, 2.2)]
    made = [
        shuffled_frames(clip, seed),
        shuffled_frames(clip, seed + 1),
        shuffled_frames(dataclasses.replace(clip, key="other"), seed),
        noisy_frames(clip, 8.0, seed),
        noisy_frames(clip, 8.5, seed),
        noisy_frames(clip, 8.0, seed + 1),
        masked_outside(clip, outside, 0.5, seed),
        masked_outside(clip, outside, 1.0, seed),
        masked_outside(clip, [(4.0, 4.2)], 1.0, seed),
        grey(clip),
        with_ids(clip, [one(7, 1.0, 2.0)]),
        with_ids(clip, [one(8, 1.0, 2.0)]),
        with_ids(clip, [one(7, 1.0, 2.0, x=0.6)]),
        with_ids(clip, [one(7, 2.0, 3.0)]),
        with_ids(clip, [one(7, 1.0, 2.0), one(8, 1.0, 2.0)]),
        with_ids(clip, [one(8, 1.0, 2.0), one(7, 1.0, 2.0)]),
    ]
    assert len({c.key for c in made} | {clip.key}) == len(made) + 1
    assert torch.equal(clip.patches, before)
    for other in made:
        assert everything_else(other) == everything_else(clip)
        assert (other.patches.dtype, other.patches.shape) == (torch.uint8, clip.patches.shape)
        assert other.patches.is_contiguous()
        assert not torch.equal(other.patches, clip.patches)
    again = shuffled_frames(clip, seed), noisy_frames(clip, 8.0, seed), masked_outside(clip, outside, 0.5, seed)
    for first, second in zip(again, (made[0], made[3], made[6]), strict=True):
        assert first.key == second.key
        assert torch.equal(first.patches, second.patches)


def test_frames_come_back_as_they_were_laid(clip, seed):
    frames = torch.randint(256, (12, 3, 84, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed + 1))
    assert torch.equal(with_frames(clip, frames, "new").frames(), frames)


def test_shuffled_frames_are_a_permutation_of_frames_not_of_pairs(clip, seed):
    frames, orders = clip.frames(), set()
    for k in range(20):
        shown = shuffled_frames(clip, seed + k).frames()
        order = [next(i for i, frame in enumerate(frames) if torch.equal(frame, other)) for other in shown]
        assert sorted(order) == list(range(12))
        assert torch.equal(shown, frames[order])
        orders.add(tuple(order))
    assert len(orders) == 20
    assert any(a // 2 != b // 2 for order in orders for a, b in zip(order[::2], order[1::2], strict=True))
    assert len({order[0] for order in orders}) > 2


def test_noise_has_the_asked_deviation_is_rounded_and_clipped(seed):
    flat = clip_of(torch.full((12, 3, 84, 112), 100, dtype=torch.uint8))
    noise = noisy_frames(flat, 12.0, seed).frames().float() - 100
    assert abs(noise.mean()) < 0.2
    assert noise.std() == pytest.approx(12, abs=0.2)
    within = [torch.corrcoef(torch.stack([noise[0].flatten(), noise[k].flatten()]))[0, 1] for k in range(1, 12)]
    assert max(map(abs, within)) < 0.05, "frames have noise of their own"
    assert torch.equal(noisy_frames(flat, 0.05, seed).patches, flat.patches), "rounded, not cut down"
    dark = noisy_frames(clip_of(torch.zeros(12, 3, 84, 112, dtype=torch.uint8)), 12.0, seed).patches
    assert (dark == 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert dark.max() < 100, "nothing below 0 comes out as bright"
    bright = noisy_frames(clip_of(torch.full((12, 3, 84, 112), 255, dtype=torch.uint8)), 12.0, seed).patches
    assert bright.min() > 155
    assert noisy_frames(flat, 0, seed) is flat


@pytest.mark.parametrize("sigma", [-1.0, float("nan"), float("inf")])
def test_noise_of_no_sense_is_refused(clip, sigma):
    with pytest.raises(ValueError, match="sigma"):
        noisy_frames(clip, sigma, 0)


def hidden(clip: Clip, masked: Clip) -> list[int]:
    """The frame pairs that are grey; all others are bitwise the clip's."""
    old, new = (c.patches.view(c.grid[0], -1) for c in (clip, masked))
    found = [i for i in range(clip.grid[0]) if bool((new[i] == GREY).all())]
    assert all(torch.equal(old[i], new[i]) for i in range(clip.grid[0]) if i not in found)
    return found


@pytest.mark.parametrize(
    ("spans", "outside"),
    [
        ([(1.0, 2.2)], [0, 3, 4, 5]),
        ([(1.6, 1.9)], [0, 2, 3, 4, 5]),  # between the frames at 1.5 and 2: the pair before stands for it
        ([(2.0, 3.0)], [0, 1, 4, 5]),  # a border on a frame counts as inside
        ([(0.2, 0.3), (4.5, 9.0)], [1, 2, 3]),
        ([(7.0, 8.0)], [0, 1, 2, 3, 4]),  # after the last frame: the last pair stands for it
        ([], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_masked_outside_hides_whole_pairs_never_inside(clip, spans, outside, seed):
    assert hidden(clip, masked_outside(clip, spans, 1.0, seed)) == outside
    smaller: set[int] = set()
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        masked = masked_outside(clip, spans, share, seed)
        now = set(hidden(clip, masked))
        assert len(now) == round(share * len(outside))
        assert smaller <= now <= set(outside)
        assert (masked is clip) == (not now)
        smaller = now
    assert len({tuple(hidden(clip, masked_outside(clip, [], 0.5, seed + k))) for k in range(10)}) > 1


def test_masks_of_no_sense_are_refused(clip):
    with pytest.raises(ValueError, match="share"):
        masked_outside(clip, [], 1.5, 0)


@pytest.mark.parametrize(
    ("frames", "pairs"), [(2, [3]), (3, [3]), (4, [1, 4]), (6, [1, 3, 5]), (8, [0, 2, 3, 5]), (11, [0, 1, 3, 4, 5])]
)
def test_thinned_keeps_whole_pairs_evenly(clip, frames, pairs):
    """As a clip that was decoded with these frames alone."""
    chosen = [k for i in pairs for k in (2 * i, 2 * i + 1)]
    expected = clip_of(clip.frames()[chosen], tuple(TIMES[k] for k in chosen))
    fewer = thinned(clip, frames)
    assert torch.equal(fewer.patches, expected.patches)
    assert fewer.patches.is_contiguous()
    assert (fewer.grid, fewer.times) == (expected.grid, expected.times)
    assert fewer.seconds_per_grid == pytest.approx(6 / len(pairs))
    assert fewer.key == thinned(clip, 2 * len(pairs)).key != clip.key
    assert thinned(fewer, frames) is fewer


def test_thinned_spreads_evenly_over_clips_of_any_length(seed):
    rng = random.Random(seed)
    for _ in range(20):
        n, pairs = rng.randint(2, 40), rng.randint(1, 40)
        small = clip_of(torch.zeros(2 * n, 3, 14, 14, dtype=torch.uint8), tuple(map(float, range(2 * n))), merge=1)
        fewer = thinned(small, 2 * pairs)
        assert fewer.grid == (min(n, pairs), 1, 1)
        gaps = {round((b - a) / 2) for a, b in zip(fewer.times[::2], fewer.times[2::2], strict=False)}
        assert all(abs(gap - n / min(n, pairs)) < 1 for gap in gaps)
        assert len({thinned(small, frames).key for frames in (2, n, 2 * n)}) == len({1, n // 2, n})


@pytest.mark.parametrize("frames", [-2, 0, 1])
def test_thinning_to_no_pair_is_refused(clip, frames):
    with pytest.raises(ValueError, match="frames"):
        thinned(clip, frames)


def test_grey_hides_all_also_of_a_part(clip):
    assert (grey(clip).patches == GREY).all()
    part = dataclasses.replace(clip, patches=clip.patches[:48], cuts=(0, 1, 6))
    assert grey(part).patches.shape == (48, part.patches.shape[1])


def test_clips_that_processes_share_are_refused(clip):
    part = dataclasses.replace(clip, cuts=(0, 3, 6))
    for make in (
        lambda: shuffled_frames(part, 0),
        lambda: noisy_frames(part, 4.0, 0),
        lambda: masked_outside(part, [], 1.0, 0),
        lambda: thinned(part, 4),
        lambda: with_ids(part, [one(1, 1.0)]),
    ):
        with pytest.raises(ValueError, match="processes share"):
            make()


def changed(clip: Clip, other: Clip, frame: int) -> tuple[range, range]:
    """Rows and columns from the first to the last that differ."""
    differs = (clip.frames()[frame] != other.frames()[frame]).any(0).nonzero()
    if not len(differs):
        return range(0), range(0)
    (top, left), (bottom, right) = differs.min(0).values.tolist(), differs.max(0).values.tolist()
    return range(top, bottom + 1), range(left, right + 1)


@pytest.fixture
def plain() -> Clip:
    """Middle grey, so that black and white both differ."""
    return clip_of(torch.full((12, 3, 84, 112), 100, dtype=torch.uint8))


def test_a_number_is_drawn_in_the_middle_of_the_box_and_nothing_else(plain):
    drawn = with_ids(plain, [one(7, 1.0, x=0.25, y=0.5)])
    assert [k for k in range(12) if changed(plain, drawn, k)[0]] == [2]
    rows, columns = changed(plain, drawn, 2)
    assert (rows, columns) == (range(38, 47), range(24, 31)), "9 x 7 pixels around (28, 42), whatever is in them"
    label = drawn.frames()[2, :, 38:47, 24:31]
    assert torch.equal(label[0], label[1])
    assert torch.equal(label[0], label[2])
    assert ["".join("#" if x else "." for x in row) for row in label[0].tolist()] == [
        ".......",
        ".#####.",
        ".....#.",
        "....#..",
        "...#...",
        "..#....",
        "..#....",
        "..#....",
        ".......",
    ]
    assert set(label.flatten().tolist()) == {0, 255}


def test_numbers_have_all_their_digits_in_order(plain):
    seven, ten, both = (with_ids(plain, [one(n, 1.0)]).frames()[2, 0] for n in (7, 10, 1078))
    digits = [with_ids(plain, [one(n, 1.0)]).frames() for n in range(10)]
    assert not any(torch.equal(a, b) for a, b in combinations(digits, 2))
    ten_label, both_label = ten[38:47, 50:63], both[38:47, 44:69]
    assert (ten_label != 100).all()
    assert (both_label != 100).all()
    assert torch.equal(both_label[:, :13], ten_label)
    assert torch.equal(both_label[:, 12:19], seven[38:47, 52:59])


def test_digits_grow_with_the_frame(seed):
    for height, scale in ((28, 1), (56, 1), (196, 2), (448, 5)):
        frames = torch.full((2, 3, height, 2 * height), 100, dtype=torch.uint8)
        large = clip_of(frames, (0.0, 0.5))
        rows, columns = changed(large, with_ids(large, [one(4, 0.0)]), 0)
        assert (len(rows), len(columns)) == (9 * scale, 7 * scale)


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        (Box(1.0, 0.0, 0.0, 0.02, 0.02), range(5), range(5)),
        (Box(1.0, 0.98, 0.98, 1.0, 1.0), range(79, 84), range(107, 112)),
        (Box(1.0, -0.9, 0.4, -0.5, 0.6), range(0), range(0)),
        (Box(1.0, 0.4, 1.5, 0.6, 1.9), range(0), range(0)),
    ],
)
def test_what_reaches_over_the_border_is_cut_off(plain, box, rows, columns):
    drawn = with_ids(plain, [Instance(8, (box,))])
    assert changed(plain, drawn, 2) == (rows, columns)


def test_the_nearest_box_counts_within_half_their_spacing(plain):
    """Boxes each second in two stretches, none in between: frames of the pause have none."""
    moving = Instance(3, tuple(Box(float(t), t / 10, 0.4, t / 10 + 0.1, 0.6) for t in (0, 1, 2, 5)))
    drawn = with_ids(plain, [moving])
    middle = [
        (columns.start + columns.stop) / 2 / 112 if columns else None
        for columns in (changed(plain, drawn, k)[1] for k in range(12))
    ]
    expected = {0: 0.05, 1: None, 2: 0.15, 3: None, 4: 0.25, 5: 0.25, 9: 0.55, 10: 0.55, 11: 0.55}
    for k in range(12):
        if k in (6, 7, 8):
            assert middle[k] is None
        elif expected[k] is not None:
            assert middle[k] == pytest.approx(expected[k], abs=0.01)
        else:  # as far from both neighbours: either will do
            assert any(middle[k] == pytest.approx(x, abs=0.01) for x in (expected[k - 1], expected[k + 1]))


def test_boxes_in_any_order_and_an_object_with_one_box(plain, seed):
    boxes = [Box(t / 4, t / 40, 0.4, t / 40 + 0.1, 0.6) for t in range(20)]
    mixed = random.Random(seed).sample(boxes, len(boxes))
    assert with_ids(plain, [Instance(3, tuple(boxes))]).key == with_ids(plain, [Instance(3, tuple(mixed))]).key
    single = with_ids(plain, [one(3, 2.1)])
    assert [k for k in range(12) if changed(plain, single, k)[0]] == [4], "the frame nearest to its time"
    assert with_ids(plain, [Instance(3, ())]) is plain
    assert with_ids(plain, []) is plain


def test_later_objects_lie_over_earlier_ones(plain):
    drawn = with_ids(plain, [one(1, 1.0), one(2, 1.0)])
    assert torch.equal(drawn.frames(), with_ids(plain, [one(2, 1.0)]).frames())


def test_a_clip_of_one_patch_is_not_written_to():
    small = clip_of(torch.full((2, 3, 14, 14), 100, dtype=torch.uint8), (0.0, 0.5), merge=1)
    with_ids(small, [one(1, 0.0)])
    assert (small.patches == 100).all()
