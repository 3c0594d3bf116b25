"""The embedding cache: what it keeps, for how long, and that it never gives anything else."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.model.embed_bench import CPU, DTYPES, Model, cache, entry, key, no_warning, ops, same
from vrlt_fast.config import Config, EmbedCacheConfig
from vrlt_fast.model import embed_tiers
from vrlt_fast.model.embed_cache import COUNTERS, EmbeddingCache, embedding_key, from_config, vision_fingerprint
from vrlt_fast.model.embed_store import _NAMES, _header
from vrlt_fast.model.embed_tiers import PageTier
from vrlt_fast.model.patch_embed import fold_normalize_
from vrlt_fast.train.setup import with_absolute_paths


def nbytes(number: int) -> int:
    return sum(x.nbytes for x in entry(number))


def file_bytes(number: int) -> int:
    specs = [(_NAMES[x.dtype], tuple(x.shape)) for x in entry(number)]
    return len(_header(key(number), "tower", specs, "0" * 32)) + nbytes(number)


def in_order(made: EmbeddingCache) -> dict[str, list[str]]:
    """Keys of all tiers, the least recently used first."""
    files = [] if made._disk is None else [name.partition(".")[0] for name in made._disk._files]
    memory = {name: [] if tier is None else tier.keys() for name, tier in (("gpu", made._gpu), ("host", made._host))}
    return memory | {"disk": files}


@pytest.mark.parametrize(
    ("tiers", "paged"),
    [("host", False), ("gpu host", True), ("host disk", False), ("gpu disk", False), ("gpu host disk", True)],
)
def test_tiers_are_lru_under_their_budgets(tmp_path, seed, monkeypatch, tiers, paged):
    monkeypatch.setattr(embed_tiers, "PAGE", 256)
    draw = random.Random(seed)
    budgets = {t: draw.randrange(1500, 12000) if t in tiers.split() else 0 for t in ("gpu", "host", "disk")}
    if paged:
        budgets["host"] -= budgets["host"] % 256
    places = {"gpu": budgets["gpu"], "host": budgets["host"], "files": budgets["disk"], "folder": tmp_path}

    def sizes(number: int) -> dict[str, int]:
        plain = nbytes(number)
        return {"gpu": plain, "host": -(-plain // 256) * 256 if paged else plain, "disk": file_bytes(number)}

    model, made, before = Model(budgets, sizes), cache(**places, paged=paged), dict.fromkeys(COUNTERS, 0)
    for what, number in ops(draw, 400, 20):
        if what == "restart":
            before = {name: before[name] + made.stats()[name] for name in COUNTERS}
            made.close()
            made = cache(**places, paged=paged)
            model.restart()
        elif what == "put":
            made.put(key(number), entry(number))
            model.put(number)
        else:
            found = made.get(key(number))
            assert (found is not None) == model.get(number)
            assert found is None or same(found, entry(number))
        assert in_order(made) == {name: [key(n) for n in held] for name, held in model.tiers.items()}
        assert made.nbytes == {name: model.used(name) for name in budgets}
        assert all(made.nbytes[name] <= budgets[name] for name in budgets)
        assert sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) == made.nbytes["disk"]
    counts = {name: before[name] + made.stats()[name] for name in COUNTERS}
    assert counts == dict.fromkeys(COUNTERS, 0) | model.counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("paged", [False, True])
def test_bits_come_back_from_every_tier(tmp_path, seed, dtype, paged):
    deepstack = tuple(torch.randint(0, 256, (5, 16 * dtype.itemsize), dtype=torch.uint8).view(dtype) for _ in range(4))
    for places in ({"host": 1 << 22}, {"gpu": 1 << 22}, {"files": 1 << 22, "folder": tmp_path}):
        with cache(**places, paged=paged) as made:
            made.put(key(0), deepstack)
            found = made.get(key(0))
            assert same(found, deepstack)
            assert made.stats()["misses"] == 0


def test_pages_hold_entries_longer_than_a_page(seed):
    long = (torch.randn(1000, 1111), torch.randn(1000, 3, dtype=torch.bfloat16))
    tier = PageTier(4 * embed_tiers.PAGE, lambda key, tensors: None, CPU, pin=False, warn=no_warning)
    for number in range(3):
        assert tier.put(key(number), long)
        assert tier.keys() == [key(number)]
        assert same(tier.get(key(number)), long)
        assert tier._made == 3


def test_no_more_pages_to_lock(monkeypatch):
    warnings, empty, made = [], torch.empty, []

    def refuse(*args, **options):
        made.append(1)
        if len(made) > 2:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return empty(*args, **options)

    tier = PageTier(8 * embed_tiers.PAGE, lambda key, tensors: None, CPU, pin=False, warn=warnings.append)
    monkeypatch.setattr(torch, "empty", refuse)
    kept = [tier.put(key(n), (torch.ones(10, 3),)) for n in range(4)]
    monkeypatch.undo()
    assert kept == [True, True, False, True]
    assert tier.keys() == [key(1), key(3)]
    assert len(warnings) == 1


def test_gpu_memory_used_up(monkeypatch):
    made = cache(gpu=1 << 20, host=1 << 20)

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "to", full)
    made.put(key(0), entry(0))
    monkeypatch.undo()
    assert made.nbytes["gpu"] == 0
    made.put(key(1), entry(1))
    assert same(made.get(key(1)), entry(1))


def test_keys_tell_clips_and_towers_apart():
    keys = {embedding_key(*pair) for pair in [("a", "b"), ("ab", ""), ("", "ab"), ("a", "c"), ("b", "a")]}
    assert len(keys) == 5
    assert embedding_key("a", "b") == embedding_key("a", "b")


@pytest.mark.parametrize("other", ["", "a" * 63, "A" * 64, "../" + "a" * 61, "a" * 64 + "\n"])
def test_other_keys_are_refused(other):
    made = cache(host=1 << 20)
    with pytest.raises(ValueError, match="no embedding key"):
        made.get(other)
    with pytest.raises(ValueError, match="no embedding key"):
        made.put(other, entry(0))


def test_inexact_clips_are_never_kept(tmp_path):
    made = cache(host=1 << 20, gpu=1 << 20, files=1 << 20, folder=tmp_path)
    of = made.key("0123-inexact")
    made.put(of, entry(0))
    assert made.get(of) is None
    assert made.nbytes == {"gpu": 0, "host": 0, "disk": 0}


@pytest.mark.parametrize(
    "tensors",
    [
        (),
        (torch.ones(3, 2), torch.ones(4, 2)),
        (torch.ones(0, 2),),
        (torch.tensor(1.0),),
        (torch.ones(3, 2, dtype=torch.int64),),
        (torch.ones(3, 2, requires_grad=True),),
        (torch.ones(3, 2, requires_grad=True) * 2,),
    ],
)
def test_other_tensors_are_refused(tensors):
    with pytest.raises(ValueError, match=r"leading length|dtypes|graph"):
        cache(host=1 << 20).put(key(0), tensors)


def test_what_the_caller_does_later_does_not_reach_the_cache():
    made, mine = cache(host=1 << 20), torch.ones(4, 8)
    made.put(key(0), (mine,))
    mine.zero_()
    assert torch.equal(made.get(key(0))[0], torch.ones(4, 8))


@pytest.mark.parametrize("inference", [False, True])
def test_an_entry_that_was_written_to_is_dropped(tmp_path, inference):
    made = cache(host=1 << 20, gpu=400, files=1 << 20, folder=tmp_path)
    kept = (torch.ones(4, 8),)
    made.put(key(0), kept)
    with torch.inference_mode(inference):
        made.get(key(0))[0][1:].mul_(2)
    assert same(made.get(key(0)), kept)
    assert (made.counts["damaged"], made.counts["hits_disk"]) == (1, 1)
    made.get(key(0))[0].add_(1)
    made.put(key(1), (torch.ones(64),))  # the other one has to leave the GPU, and isn't fit for host memory
    assert made.get(key(0)) is not None
    assert made.counts["hits_host"] == 0
    assert same(made.get(key(0)), kept)


def test_a_piece_of_a_batch_does_not_keep_the_batch():
    made, batch = cache(host=1 << 20), torch.ones(1000, 8)
    made.put(key(0), (batch[:10], batch.t()[:, :10].t()))
    assert [x.untyped_storage().nbytes() for x in made.get(key(0))] == [320, 320]


def test_embeddings_of_inference_mode_can_be_trained_on():
    made, weight = cache(host=1 << 20), torch.ones(8, requires_grad=True)
    with torch.inference_mode():
        made.put(key(0), (torch.ones(4, 8),))
        found = made.get(key(0))
    (found[0] @ weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((8,), 4.0))


def test_a_frozen_tower_lasts(tmp_path):
    options = {"gpu_gb": 0, "host_gb": 0.1, "disk_gb": 0.1, "folder": tmp_path / "e", "device": CPU}
    with EmbeddingCache(**options, fingerprint="f", warn=no_warning) as made:
        made.put(made.key("clip"), entry(0))
        assert same(made.get(made.key("clip")), entry(0))
    assert made.get(made.key("clip")) is None
    made.put(made.key("clip"), entry(0))
    assert made.nbytes["host"] == 0
    with EmbeddingCache(**options, fingerprint="f", warn=no_warning) as again:
        assert same(again.get(again.key("clip")), entry(0))
        assert again.counts["hits_disk"] == 1
    with EmbeddingCache(**options, fingerprint="g", warn=no_warning) as other:
        assert other.get(other.key("clip")) is None


def tiny_tower(seed: int = 0) -> torch.nn.Module:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    torch.manual_seed(seed)
    config = Qwen2_5_VLVisionConfig(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, fullatt_block_indexes=[0]
    )
    return Qwen2_5_VisionTransformerPretrainedModel(config)


def test_fingerprint_is_of_the_content(tmp_path, monkeypatch):
    tower = tiny_tower().requires_grad_(False)
    first = vision_fingerprint(tower)
    tower.save_pretrained(tmp_path)
    loaded = type(tower).from_pretrained(tmp_path)
    assert vision_fingerprint(loaded) == first
    monkeypatch.setattr("vrlt_fast.model.embed_cache._CHUNK", 37)
    assert vision_fingerprint(loaded) == first
    monkeypatch.undo()
    assert vision_fingerprint(tiny_tower()) == first
    fold_normalize_(loaded.requires_grad_(False), (0.5,) * 3, (0.5,) * 3)
    assert vision_fingerprint(loaded) == first
    assert vision_fingerprint(loaded, mean=(0.5,) * 3) != first
    assert vision_fingerprint(tiny_tower(1)) != first
    assert vision_fingerprint(tiny_tower().to(torch.bfloat16)) != first
    changed = tiny_tower()
    changed.config.spatial_merge_size = 4
    assert vision_fingerprint(changed) != first


def test_fingerprint_changes_with_any_weight(seed):
    tower, draw = tiny_tower(), random.Random(seed)
    seen = {vision_fingerprint(tower)}
    for _, weight in (named := list(tower.named_parameters())):
        with torch.no_grad():
            at = draw.randrange(weight.numel())
            weight.view(-1).view(torch.int32)[at] ^= 1
        seen.add(vision_fingerprint(tower))
    assert len(seen) == 1 + len(named)


def test_from_config(tmp_path):
    tower = tiny_tower().requires_grad_(False)
    info = SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3)
    lm = SimpleNamespace(info=info, device=CPU, module=SimpleNamespace(model=SimpleNamespace(visual=tower)))
    config = Config(embed_cache=EmbedCacheConfig(disk_gb=0.1))
    with from_config(config, lm, tmp_path, no_warning) as made:
        assert (made._gpu, made._host.budget) == (None, 4 * 10**9)
        assert made._disk is not None
        assert (tmp_path / "embeddings").exists()
        assert made.version == vision_fingerprint(tower, mean=info.mean, std=info.std)
    with from_config(config, lm, None, no_warning) as made:
        assert made._disk is None
    with from_config(Config(), lm, tmp_path, no_warning) as made:
        assert made._disk is None
        assert set(made.stats()) == {*COUNTERS, "bytes_gpu", "bytes_host", "bytes_disk"}


def test_the_resolved_folder_is_absolute():
    found = with_absolute_paths(Config(embed_cache=EmbedCacheConfig(folder="here"))).embed_cache.folder
    assert Path(found).is_absolute()
    assert with_absolute_paths(Config()).embed_cache.folder == ""
