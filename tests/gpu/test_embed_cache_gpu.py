"""The embedding cache's memory tiers on a CUDA device: copies between tiers while the device computes."""

from __future__ import annotations

import random

import pytest
import torch

from tests.model.embed_bench import VISION, entry, key, no_warning, same
from vrlt_fast.model.embed_cache import EmbeddingCache
from vrlt_fast.model.embed_tiers import PAGE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def open_cache(tmp_path, gpu: int, host: int, files: int = 0) -> EmbeddingCache:
    return EmbeddingCache(
        gpu_gb=gpu / 1e9,
        host_gb=host / 1e9,
        disk_gb=files / 1e9,
        folder=tmp_path,
        device=torch.device("cuda"),
        fingerprint=VISION,
        warn=no_warning,
    )


@pytest.mark.parametrize("gpu", [0, 3 * PAGE])
def test_random_use(tmp_path, seed, gpu):
    """Embeddings are computed on a busy stream, put, and their memory reused at once."""
    draw, busy = random.Random(seed), torch.randn(2048, 2048, device="cuda")
    with open_cache(tmp_path, gpu, 8 * PAGE, 12 * PAGE) as made:
        for _ in range(300):
            number = min(draw.randrange(24), draw.randrange(24))
            busy = busy @ busy / 2048
            found = made.get(key(number))
            if found is None:
                fresh = tuple(x.to("cuda", non_blocking=True) for x in entry(number, 3000))
                made.put(key(number), fresh)
                for x in fresh:
                    x.zero_()
            else:
                assert all(x.is_cuda for x in found)
                assert same(found, entry(number, 3000))
        stats = made.stats()
        assert stats["hits_host"]
        assert stats["evicted_host"]
        assert bool(stats["hits_gpu"]) == bool(gpu)
        assert stats["bytes_gpu"] <= gpu
        assert stats["bytes_host"] <= 8 * PAGE
        assert made._host._made <= 8
        assert all(page.is_pinned() for page in made._host._free)
        assert not stats["damaged"]
