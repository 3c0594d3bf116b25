"""Positions against vectors worked out by hand from the models' release rule."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from vrlt_fast.model.positions import mrope_positions

V, M, S, E = 9, 8, 7, 6  # video, image, vision start, vision end


def positions(ids, grids=(), seconds=(), *, family="qwen2_5_vl", **options):
    found, following = mrope_positions(ids, grids, seconds, family=family, video_token=V, **options)
    assert found.dtype == torch.int64
    return found.tolist(), following


def test_text_only():
    row = [0, 1, 2, 3]
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        assert positions([1, 2, 3, 4], family=family) == ([row, row, row], 4)
    assert positions([]) == ([[], [], []], 0)


def test_video_between_texts():
    """Two texts, 2 temporal grids of 2 x 3 tokens one second apart (2 positions), three texts."""
    found = positions([1, S] + [V] * 12 + [E, 1, 2], [(2, 4, 6)], [1.0])
    assert found == (
        [
            [0, 1, 2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 5, 6, 7],
            [0, 1, 2, 2, 2, 3, 3, 3, 2, 2, 2, 3, 3, 3, 5, 6, 7],
            [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3, 4, 5, 6, 7],
        ],
        8,
    )


def test_64_frames():
    """64 frames at 2 a second: 32 grids of 8 x 12 patches, one second or 2 positions apart; the last is at p + 62."""
    p = 5
    found, following = positions([1] * p + [V] * (32 * 24) + [1, 1], [(32, 8, 12)], [1.0])
    temporal, height, width = (row[p:-2] for row in found)
    assert temporal == [p + 2 * grid for grid in range(32) for _ in range(24)]
    assert temporal[-1] == p + 62
    assert height[:24] == [5, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 8, 8, 8, 8, 8, 8]
    assert width[:12] == [5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10]
    assert height == height[:24] * 32
    assert width == width[:6] * 128
    assert [row[-2:] for row in found] == [[p + 63, p + 64]] * 3
    assert following == p + 65


@pytest.mark.parametrize(
    ("seconds", "per_second", "temporal"),
    [
        (0.25, 2.0, [0, 0, 1, 1, 2]),  # 0, 0.5, 1, 1.5, 2
        (0.3, 2.0, [0, 0, 1, 1, 2]),  # 0, 0.6, 1.2, 1.8, 2.4
        (0.3, 4.0, [0, 1, 2, 3, 4]),  # 0, 1.2, 2.4, 3.6, 4.8
        (1.5, 2.0, [0, 3, 6, 9, 12]),
        (1 / 3, 25.0, [0, 8, 16, 25, 33]),  # 8.3, 16.7, 25, 33.3
    ],
)
def test_fractions_of_a_second_are_cut_after_multiplying(seconds, per_second, temporal):
    found, following = positions([1] + [V] * 5 + [1], [(5, 2, 2)], [seconds], tokens_per_second=per_second)
    after = 1 + temporal[-1] + 1
    assert found == ([[0, *(1 + t for t in temporal), after], [0, 1, 1, 1, 1, 1, after], [0, 1, 1, 1, 1, 1, after]])
    assert following == after + 1


def test_qwen2_counts_grids_whatever_their_distance():
    found = positions([1] + [V] * 3 + [1], [(3, 2, 2)], [7.5], family="qwen2_vl")
    assert found == ([[0, 1, 2, 3, 4], [0, 1, 1, 1, 4], [0, 1, 1, 1, 4]], 5)


def test_video_first_and_last():
    assert positions([V, V, 1], [(1, 2, 4)], [1.0]) == ([[0, 0, 2], [0, 0, 2], [0, 1, 2]], 3)
    assert positions([1, V, V], [(1, 4, 2)], [1.0]) == ([[0, 1, 1], [0, 1, 2], [0, 1, 1]], 3)
    assert positions([V] * 4, [(4, 2, 2)], [1.0]) == ([[0, 2, 4, 6], [0, 0, 0, 0], [0, 0, 0, 0]], 7)


def test_two_videos_of_different_sizes():
    """The first ends at 1 + 4 (time), the second at 6 + 2 (width)."""
    found = positions([1] + [V] * 3 + [1] + [V] * 6 + [1], [(3, 2, 2), (1, 4, 6)], [1.0, 0.5])
    assert found == (
        [
            [0, 1, 3, 5, 6, 7, 7, 7, 7, 7, 7, 10],
            [0, 1, 1, 1, 6, 7, 7, 7, 8, 8, 8, 10],
            [0, 1, 1, 1, 6, 7, 8, 9, 7, 8, 9, 10],
        ],
        11,
    )
    adjacent = positions([V] * 2 + [V] * 1, [(2, 2, 2), (1, 2, 2)], [1.0, 1.0])
    assert adjacent == ([[0, 2, 3], [0, 0, 3], [0, 0, 3]], 4)


def test_image_beside_a_video():
    found = positions([M, M, 1] + [V] * 2, [(2, 2, 2)], [1.0], image_grids=[(1, 2, 4)], image_token=M)
    assert found == ([[0, 0, 2, 3, 5], [0, 0, 2, 3, 3], [0, 1, 2, 3, 3]], 6)


def test_qwen3_has_a_block_for_each_temporal_grid():
    """Timestamp texts of 1 and 2 tokens, each before a block of 1 x 2 tokens that takes 2 positions."""
    ids = [1, V, V, 1, 2, V, V, 1]
    found = positions(ids, [(2, 2, 4)], [1.0], family="qwen3_vl")
    assert found == (
        [[0, 1, 1, 3, 4, 5, 5, 7], [0, 1, 1, 3, 4, 5, 5, 7], [0, 1, 2, 3, 4, 5, 6, 7]],
        8,
    )


def test_merge_size():
    assert positions([V] * 2, [(1, 3, 6)], [1.0], merge=3) == ([[0, 0], [0, 0], [0, 1]], 2)


def test_random_prompts_follow_the_rule_token_by_token(seed):
    rng = random.Random(seed)
    for _ in range(20):
        ids, grids, expected, start = [], [], [], 0
        for _ in range(rng.randrange(1, 4)):
            for _ in range(rng.randrange(1, 5)):
                ids.append(1)
                expected.append((start,) * 3)
                start += 1
            t, h, w = rng.randrange(1, 9), rng.randrange(1, 4), rng.randrange(1, 4)
            grids.append((t, 2 * h, 2 * w))
            block = [(start + 2 * i, start + y, start + x) for i in range(t) for y in range(h) for x in range(w)]
            ids += [V] * len(block)
            expected += block
            start = max(max(row) for row in block) + 1
        found, following = mrope_positions(
            torch.tensor(ids), grids, [1.0] * len(grids), family="qwen2_5_vl", video_token=V
        )
        assert [tuple(column) for column in found.T.tolist()] == expected
        assert following == start


@pytest.mark.parametrize(
    ("ids", "grids", "seconds", "options"),
    [
        ([1, V, 1], [(2, 2, 2)], [1.0], {}),  # run shorter than the grid
        ([1, V], [(2, 2, 2)], [1.0], {}),  # prompt ends inside
        ([1, V, V, V], [(2, 2, 2)], [1.0], {}),  # a token too many
        ([1, V], [], [], {}),  # no grid
        ([1, V], [(1, 2, 2), (1, 2, 2)], [1.0, 1.0], {}),  # no tokens for the second
        ([1, V], [(1, 2, 2)], [], {}),  # no seconds
        ([1, V], [(1, 3, 2)], [1.0], {}),  # not a multiple of the merge size
        ([1, V], [(1, 2, 2)], [1.0], {"family": "qwen9_vl"}),
        ([1, M], [], [], {"image_token": M}),
        ([V, V, 1], [(2, 2, 2)], [1.0], {"family": "qwen3_vl", "image_grids": [(1, 2, 2)], "image_token": M}),
    ],
)
def test_prompts_that_do_not_fit_their_grids(ids, grids, seconds, options):
    with pytest.raises(ValueError, match=r"grid|family|seconds|run"):
        positions(ids, grids, seconds, **options)


def transformers_positions(ids: list[int], grid: tuple[int, int, int]) -> torch.Tensor:
    """What transformers' own function says of a prompt with one video whose grids are a second apart."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 16,
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 8}
    special = {"image_token_id": M, "video_token_id": V, "vision_start_token_id": S, "vision_end_token_id": E}
    token_ids = {"bos_token_id": 0, "eos_token_id": 0, "num_key_value_heads": 1, "rope_parameters": rope}
    config = Qwen2_5_VLConfig(text_config=text | token_ids, vision_config=vision | {"tokens_per_second": 2}, **special)
    with torch.device("meta"):
        model = Qwen2_5_VLModel(config)
    inputs = torch.tensor([ids])
    found, _ = model.get_rope_index(
        input_ids=inputs,
        mm_token_type_ids=torch.where(inputs == V, 2, 0),
        video_grid_thw=torch.tensor([grid]),
        second_per_grid_ts=torch.tensor([1.0]),
        attention_mask=torch.ones_like(inputs),
    )
    return found[:, 0]


@pytest.mark.parametrize(("grid", "agrees"), [((2, 12, 12), True), ((3, 4, 12), True), ((32, 8, 12), False)])
def test_transformers_disagrees_after_a_long_video(grid, agrees):
    """transformers from 5.3 on starts the text after max(h, w) whatever t is. Should this fail: it was mended there."""
    t, h, w = grid
    count = t * h * w // 4
    ids = [1, S] + [V] * count + [E, 1]
    ours, _ = mrope_positions(ids, [grid], [1.0], family="qwen2_5_vl", video_token=V)
    theirs = transformers_positions(ids, grid)
    assert torch.equal(ours[:, : 2 + count], theirs[:, : 2 + count])
    assert torch.equal(ours, theirs) is agrees
    if not agrees:
        assert theirs[:, -2].tolist() == [2 + max(h, w) // 2] * 3
        assert ours[:, -2].tolist() == [2 + 2 * (t - 1) + 1] * 3
