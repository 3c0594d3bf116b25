"""A video that processes share from its file on: each decodes, resizes, keeps and encodes its frame pairs alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.parallel import shared_clip, shared_run
from tests.video.conftest import Studio
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.video.index import probe
from vrlt_fast.video.share import decoding_cuts, even_cuts

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.usefixtures("one_torch_thread")]
GOP = 20
NO_B = {"g": str(GOP), "bf": "0", "sc_threshold": "0"}


@pytest.mark.parametrize(("size", "gop"), [(2, GOP), (3, GOP), pytest.param(4, 1000, marks=pytest.mark.slow)])
def test_from_the_file_to_the_responses(tmp_path, pool, seed, size, gop):
    film = Studio(tmp_path, seed).film("a.mp4", count=90, options=NO_B | {"g": str(gop)})
    folder = shared_run.make_model(tmp_path / "model", "qwen2_5_vl")
    alone = shared_clip.see(Peers(), folder, film, "pyav", seed)
    every = pool(size).run(shared_clip.see, folder, film, "pyav", seed)
    parts = [one.clip.patches for one in every]
    assert torch.equal(torch.cat(parts), alone.clip.patches)
    assert max(len(p) for p in parts) < len(alone.clip.patches)
    assert alone.decoded <= sum(one.decoded for one in every) <= alone.decoded + (size - 1) * min(gop, 90) / 2
    for one in every:
        assert (one.clip.key, one.clip.grid, one.clip.times) == (alone.clip.key, alone.clip.grid, alone.clip.times)
        assert one.again == 0
        assert torch.allclose(one.embeds.embeds, alone.embeds.embeds, atol=1e-5)
        assert one.tokens == alone.tokens


@pytest.mark.parametrize("gop", [7, GOP, 100])
def test_cuts_cost_half_a_gop_at_most(tmp_path, seed, gop):
    index = probe(Studio(tmp_path, seed).film("a.mp4", count=120, options=NO_B | {"g": str(gop)}))
    rng = np.random.default_rng(seed)
    for size in (2, 3, 5, 8):
        frames = np.sort(rng.integers(0, 120, 2 * int(rng.integers(1, 60)))).tolist()
        cuts = decoding_cuts(index, frames, size)
        assert len(cuts) == size + 1
        assert (cuts[0], cuts[-1]) == (0, len(frames) // 2)
        assert list(cuts) == sorted(cuts)
        for cut in cuts[1:-1]:
            if 0 < cut < cuts[-1]:
                begin = frames[2 * cut] // gop * gop
                assert 2 * (frames[2 * cut - 1] + 1 - begin) <= min(gop, 120 - begin)


def test_cuts_are_even_where_every_frame_is_a_keyframe(tmp_path, seed):
    index = probe(Studio(tmp_path, seed).film("a.mp4", count=40, options=NO_B | {"g": "1"}))
    for size in (1, 2, 3, 7):
        assert decoding_cuts(index, list(range(40)), size) == even_cuts(20, size)
    assert even_cuts(3, 4) == (0, 0, 1, 2, 3)
