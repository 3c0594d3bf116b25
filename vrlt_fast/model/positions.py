"""Three-axis (temporal, height, width) rotary positions of Qwen-VL prompts, by the rule that the models were released
with.

transformers from 5.3 on lets the text after a Qwen2-VL or Qwen2.5-VL video start at max(h, w) + 1 instead of
max(t, h, w) + 1, so that a released checkpoint sees positions that it never saw in training. Rollout, scoring,
reference and update all take their positions from here; transformers' ``get_rope_index`` is never called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.int64]
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

Grid = tuple[int, int, int]


def mrope_positions(
    input_ids: Sequence[int] | torch.Tensor,
    video_grids: Sequence[Grid],
    seconds_per_grid: Sequence[float],
    *,
    family: str,
    video_token: int,
    merge: int = 2,
    tokens_per_second: float = 2.0,
    image_grids: Sequence[Grid] = (),
    image_token: int | None = None,
) -> tuple[torch.Tensor, int]:
    """Positions of one unpadded prompt.

    Args:
        input_ids: [L] token ids; every video (image) is a run of ``video_token`` (``image_token``), one token per
            ``merge`` x ``merge`` patches. For qwen3_vl each temporal grid is a run of its own.
        video_grids: (t, h, w) of each video in patches, in order of appearance.
        seconds_per_grid: seconds between the temporal grids of each video; fractions are kept and quantised after
            multiplying with ``tokens_per_second`` (used by qwen2_5_vl only).
        family: one of :data:`FAMILIES`.
        merge: spatial merge size of the vision tower.
        tokens_per_second: temporal positions a second (vision config of qwen2_5_vl).

    Returns:
        positions int64 [3, L] (temporal, height, width) and the position of the next text token.

    Raises:
        ValueError: unknown family, or the runs of visual tokens don't fit the grids.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not one of {FAMILIES}")
    if len(video_grids) != len(seconds_per_grid):
        raise ValueError(f"{len(video_grids)} video grids but {len(seconds_per_grid)} seconds_per_grid")
    ids = torch.as_tensor(input_ids, dtype=torch.int64)
    videos = _blocks(video_grids, seconds_per_grid, family, tokens_per_second)
    images = _blocks(image_grids, [0.0] * len(image_grids), "qwen2_vl", tokens_per_second)
    visual = {video_token: videos} if image_token is None else {video_token: videos, image_token: images}

    return _walk(ids, visual, merge)


def _walk(ids: torch.Tensor, visual: dict[int, Iterator[tuple[Grid, Array]]], merge: int) -> tuple[torch.Tensor, int]:
    """Runs of text advance by one on all axes, runs of visual tokens take the next grid of their kind."""
    tokens = ids.numpy()
    out = np.empty((3, len(tokens)), dtype=np.int64)
    places = np.flatnonzero(np.isin(tokens, list(visual)))
    start, cursor, seen = 0, 0, 0
    while cursor < len(tokens):
        if seen < len(places) and places[seen] == cursor:
            token = int(tokens[cursor])
            block = next(visual[token], None)
            if block is None:
                raise ValueError(f"more runs of visual token {token} than grids")
            piece = _grid_positions(block, merge)
            end = cursor + piece.shape[1]
            if not (tokens[cursor:end] == token).all():
                raise ValueError(f"run of visual token {token} at {cursor} is shorter than its grid {block[0]}")
            if end > len(tokens):
                raise ValueError(f"prompt ends inside the visual tokens of grid {block[0]}")
            out[:, cursor:end] = piece + start
            start += int(piece.max()) + 1
            seen += piece.shape[1]
        else:
            end = int(places[seen]) if seen < len(places) else len(tokens)
            out[:, cursor:end] = np.arange(start, start + end - cursor)
            start += end - cursor
        cursor = end
    for token, blocks in visual.items():
        if next(blocks, None) is not None:
            raise ValueError(f"more grids than runs of visual token {token}")
    return torch.from_numpy(out), start


def _blocks(
    grids: Sequence[Grid], seconds: Sequence[float], family: str, tokens_per_second: float
) -> Iterator[tuple[Grid, Array]]:
    """The runs of visual tokens: their grid and the temporal position of each temporal grid, from 0."""
    for (t, h, w), interval in zip(grids, seconds, strict=True):
        if family == "qwen3_vl":
            yield from (((1, h, w), np.zeros(1, dtype=np.int64)) for _ in range(t))
        elif family == "qwen2_5_vl":
            # in fp32, as it was released: where a product lies next to a whole number, rounding decides
            steps = np.arange(t, dtype=np.float32) * np.float32(interval) * np.float32(tokens_per_second)
            yield (t, h, w), steps.astype(np.int64)
        else:
            yield (t, h, w), np.arange(t)


def _grid_positions(block: tuple[Grid, Array], merge: int) -> Array:
    (t, h, w), temporal = block
    if h % merge or w % merge:
        raise ValueError(f"grid {(t, h, w)} is not a multiple of the merge size {merge}")
    rows, columns = h // merge, w // merge
    out = np.empty((3, t, rows, columns), dtype=np.int64)
    out[0] = temporal[:, None, None]
    out[1] = np.arange(rows)[:, None]
    out[2] = np.arange(columns)
    return out.reshape(3, -1)
