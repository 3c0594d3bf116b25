"""Plans: what reaches the decoder, on made-up packets whose references are known."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from vrlt_fast.errors import VideoError
from vrlt_fast.video.index import Packets, VideoIndex
from vrlt_fast.video.plan import frame_rows, plan_decode, plan_sequential, split_plan


def made(pattern: str, flags: frozenset[str] = frozenset(), container: str = "mov,mp4,m4a") -> VideoIndex:
    """An index from letters in decode order: I key, P, B (droppable, shown before the picture ahead of it), L (leading,
    shown before the keyframe ahead of it, droppable), x (not shown).
    """
    ticks, key, drop, shown = [], [], [], []
    for place, letter in enumerate(pattern):
        behind = 0
        while letter in "IPx" and place + behind + 1 < len(pattern) and pattern[place + behind + 1] in "BL":
            behind += 1
        ticks.append((place + behind if letter in "IPx" else place - 1) * 10)
        key.append(letter == "I")
        drop.append(letter in "BL")
        shown.append(letter != "x")
    packets = Packets(np.array(ticks, dtype=np.int64), np.array(key), np.array(drop), np.array(shown))
    order = np.sort(packets.ticks[packets.shown])
    return VideoIndex(
        path=Path("made.mp4"),
        ticks=order,
        times=(order - order[0]) / 1000,
        height=10,
        width=10,
        time_base=Fraction(1, 1000),
        codec="h264",
        pixels="yuv420p",
        rotation=0,
        stream=0,
        container=container,
        packets=packets,
        flags=flags,
    )


def letters(pattern: str, plan) -> list[str]:
    return ["".join(pattern[row] for row in segment.packets) for segment in plan.segments]


def test_from_the_keyframe_to_the_last_packet_needed():
    pattern = "IPBBPBBPBB" * 3
    index = made(pattern)
    rows = frame_rows(index)
    assert [pattern[row] for row in rows[:7]] == ["I", "B", "B", "P", "B", "B", "P"]
    plan = plan_decode(index, [13])
    assert letters(pattern, plan) == ["IP"]
    assert letters(pattern, plan_decode(index, [11])) == ["IPB"]
    assert letters(pattern, plan_decode(index, [12])) == ["IPB"]
    assert letters(pattern, plan_decode(index, [12], elide=False)) == ["IPBB"]
    assert [s.dropped for s in plan_decode(index, [12]).segments] == [1]
    assert plan.cost == 200


def test_every_frame_is_the_target_of_one_segment_and_every_reference_is_there(seed):
    rng = random.Random(seed)
    for _ in range(60):
        pattern = "".join(
            "I" + "L" * rng.choice((0, 0, 2)) * (gop > 0) + "".join("P" + "B" * rng.randrange(3) for _ in range(9))
            for gop in range(rng.randrange(1, 8))
        )
        index = made(pattern)
        frames = [rng.randrange(index.n_frames) for _ in range(rng.choice((1, 3, 20, 80)))]
        rows = frame_rows(index)
        for elide in (True, False):
            plan = plan_decode(index, frames, elide=elide)
            assert plan.frames == tuple(sorted(set(frames)))
            targets = [t for segment in plan.segments for t in segment.targets]
            assert sorted(targets) == list(plan.frames)
            for segment in plan.segments:
                assert list(segment.targets) == sorted(segment.targets)
                start, stop = int(segment.packets[0]), int(segment.packets[-1]) + 1
                assert index.packets.key[start]
                assert stop == max(rows[list(segment.targets)]) + 1
                inside, wanted = set(segment.packets.tolist()), {int(rows[t]) for t in segment.targets}
                assert wanted <= inside
                for row in range(start, stop):
                    assert (row in inside) == (not elide or row in wanted or not index.packets.droppable[row])
                assert segment.dropped == stop - start - len(inside)
                # a leading picture refers to the GOP before its keyframe
                for row in wanted:
                    assert not (index.packets.ticks[row] < index.packets.ticks[start])
                    if pattern[row] == "L":
                        assert start < pattern.rfind("I", 0, row)


def test_neighbours_merge_where_a_seek_costs_more():
    pattern = "IPPPPPPPPP" * 20
    index = made(pattern)
    assert [len(s.packets) for s in plan_decode(index, range(200)).segments] == [60, 60, 60, 20]
    assert len(plan_decode(index, [9, 10]).segments) == 1
    assert [s.targets for s in plan_decode(index, [5, 15]).segments] == [(5,), (15,)]


def test_files_that_cannot_be_seeked_are_decoded_from_their_start():
    pattern = "IPBBPBB" * 4
    for index in (
        made(pattern, frozenset({"no_seek"})),
        made(pattern, container="mpegts"),
        made(pattern, container="x"),
    ):
        plan = plan_decode(index, [20, 25])
        assert len(plan.segments) == 1
        assert plan.segments[0].packets[0] == 0
        assert plan.segments[0].dropped > 0
    (segment,) = plan_decode(made(pattern, frozenset({"no_pts"})), [2]).segments
    assert segment.packets.tolist() == list(range(28))
    assert segment.dropped == 0


def test_packets_that_are_not_shown_are_fed_but_never_targets():
    pattern = "xxIPPIPP"
    index = made(pattern)
    index = replace(index, packets=replace(index.packets, key=np.array([c in "xI" for c in pattern])))
    assert frame_rows(index).tolist() == [2, 3, 4, 5, 6, 7]
    assert plan_sequential(index, [1]).segments[0].packets.tolist() == [0, 1, 2, 3]


def test_the_sequential_plan_leaves_nothing_out():
    index = made("IPBBPBB" * 4)
    plan = plan_sequential(index, [9])
    assert plan.segments[0].packets.tolist() == list(range(int(frame_rows(index)[9]) + 1))
    assert not plan.whole
    whole = plan_sequential(index, [9], whole=True)
    assert len(whole.segments[0].packets) == 28
    assert whole.whole


def test_frames_outside_and_none():
    index = made("IPP")
    for frames in ([3], [-1], [0, 99]):
        with pytest.raises(VideoError) as caught:
            plan_decode(index, frames)
        assert caught.value.code == "VRLT-V05"
        assert "the file has 3" in str(caught.value)
    with pytest.raises(ValueError, match="no frames"):
        plan_decode(index, [])


def test_split_keeps_all_segments_and_balances(seed):
    rng = random.Random(seed)
    index = made(("I" + "P" * 99) * 30)
    for parts in (1, 2, 3, 8, 100):
        plan = plan_decode(index, rng.sample(range(3000), 40))
        pieces = split_plan(plan, parts)
        assert 1 <= len(pieces) <= parts
        assert [s for piece in pieces for s in piece.segments] == list(plan.segments)
        assert all(piece.segments for piece in pieces)
        assert sorted(f for piece in pieces for f in piece.frames) == list(plan.frames)
        largest = max(s.cost for s in plan.segments)
        assert max(piece.cost for piece in pieces) <= plan.cost / parts + 2 * largest
    whole = plan_sequential(index, [5], whole=True)
    assert split_plan(whole, 4) == [whole]
