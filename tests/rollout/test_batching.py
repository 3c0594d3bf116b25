"""Rows come and go, prompts wait for room, prompts are prefilled in pieces: the responses stay the same."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from vrlt_fast.config import RolloutConfig
from vrlt_fast.errors import ConfigError, DataError, Stopped
from vrlt_fast.model.embed_cache import EmbeddingCache, vision_fingerprint
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.vision import shared_vision
from vrlt_fast.rollout.engine import GroupEngine
from vrlt_fast.rollout.group import RolloutRequest
from vrlt_fast.rollout.kv import KvShape, KvStore, plan_kv
from vrlt_fast.rollout.sampler import Sampling

SAMPLING = Sampling(9, 1.0)


def requests_of(prompts, n=(5, 1, 3, 4), sampling=SAMPLING):
    return [RolloutRequest(p, k, sampling, seed=31 + i) for i, (p, k) in enumerate(zip(prompts, n, strict=True))]


def same(found, expected):
    for group, right in zip(found, expected, strict=True):
        assert [c.tokens for c in group.completions] == [c.tokens for c in right.completions]
        for mine, other in zip(group.completions, right.completions, strict=True):
            torch.testing.assert_close(mine.logprobs, other.logprobs, atol=2e-5, rtol=1e-5)
            assert mine.response == other.response


@pytest.fixture(scope="module")
def token_bytes(lm):
    text = lm.info.config.text_config
    dim = text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * dim * 4


@pytest.mark.parametrize(
    ("room", "prefill_chunk"),
    [("all", 50), ("two prompts", 8192), ("one prompt, two rows", 8192), ("one prompt, two rows", 70)],
)
def test_room_and_pieces_change_nothing(lm, prompts, token_bytes, room, prefill_chunk):
    requests = requests_of(prompts)
    expected, _ = GroupEngine(lm).generate(requests)
    longest = max(map(len, prompts))
    tokens = 9 + {"all": 10**6, "two prompts": 2 * (longest + 5 * 9), "one prompt, two rows": longest + 2 * 9}[room]
    config = RolloutConfig(kv_gb=tokens * token_bytes / 1e9, prefill_chunk=prefill_chunk)
    engine = GroupEngine(lm, config)
    found, stats = engine.generate(requests)
    same(found, expected)
    held = [*engine._decoder.store.prefix_keys, *engine._decoder.store.prefix_values]
    held += [*engine._decoder.store.own_keys, *engine._decoder.store.own_values]
    assert sum(x.nbytes for x in held) <= config.kv_gb * 1e9
    fewest, most = {"all": (13, 13), "two prompts": (6, 9), "one prompt, two rows": (2, 2)}[room]
    assert fewest <= stats.most_rows <= most
    assert stats.most_resident == {"all": 4, "two prompts": 2, "one prompt, two rows": 1}[room]
    assert stats.prefills == 4
    assert stats.prefix_tokens_prefilled == sum(map(len, prompts))
    assert stats.tokens_generated == sum(len(c.tokens) for g in found for c in g.completions)


def test_fewer_rows_at_a_time_change_nothing(lm, prompts):
    requests = requests_of(prompts)
    same(GroupEngine(lm, RolloutConfig(max_rows=3)).generate(requests)[0], GroupEngine(lm).generate(requests)[0])


def test_four_groups_of_eight_cost_four_encodes_and_four_prefills(lm, prompts):
    clips = [dataclasses.replace(p.clip, key=str(i)) for i, p in enumerate(prompts)]
    own = [dataclasses.replace(p, media=(c,)) for p, c in zip(prompts, clips, strict=True)]
    clips_seen, widths = [], []
    tower, text = lm.module.model.visual, lm.module.model.language_model
    hooks = [
        tower.register_forward_pre_hook(lambda _, a, k: clips_seen.append(len(k["grid_thw"])), with_kwargs=True),
        text.register_forward_pre_hook(lambda _, a, k: widths.append(k["inputs_embeds"].shape[1]), with_kwargs=True),
    ]
    groups, stats = GroupEngine(lm).generate(requests_of(own, (8, 8, 8, 8)))
    for hook in hooks:
        hook.remove()
    assert sum(clips_seen) == stats.clips_encoded == 4
    assert widths[0] == stats.prefix_tokens_prefilled == sum(map(len, own))
    assert stats.prefills == 4
    assert max(widths[1:]) <= 32
    assert sum(widths[1:]) == sum(len(c.tokens) - 1 for g in groups for c in g.completions)
    assert len(widths) - 1 == stats.decode_steps <= 8


def test_a_warm_cache_saves_every_encode_and_changes_no_response(lm, prompts):
    clips = {p.clip.key for p in prompts}
    tower = lm.module.model.visual
    memory = {"gpu_gb": 0.0, "host_gb": 0.1, "disk_gb": 0.0, "folder": None, "device": lm.device, "warn": print}
    with EmbeddingCache(fingerprint=vision_fingerprint(tower), **memory) as cache:
        engine = GroupEngine(lm, cache=cache)
        first, cold = engine.generate(requests_of(prompts))
        again, warm = engine.generate(requests_of(prompts))
        assert (cold.clips_encoded, warm.clips_encoded, warm.frames_encoded) == (len(clips), 0, 0)
        same(again, first)
        same(first, GroupEngine(lm).generate(requests_of(prompts))[0])
        held = shared_vision(lm, prompts, cache)
        torch.testing.assert_close(held.embeds, shared_vision(lm, prompts).embeds, atol=1e-5, rtol=1e-5)


def test_requests_for_one_prompt_share_its_prefill(lm, prompts):
    greedy, sampled = Sampling(6, 0.0), Sampling(9, 1.0)
    both = [RolloutRequest(prompts[0], 1, greedy, 3), RolloutRequest(prompts[0], 3, sampled, 3)]
    found, stats = GroupEngine(lm).generate(both)
    assert stats.prefills == 1
    for request, group in zip(both, found, strict=True):
        same([group], GroupEngine(lm).generate([request])[0])


def test_one_engine_serves_changing_weights_and_work(lm, prompts):
    engine = GroupEngine(lm)
    first, _ = engine.generate(requests_of(prompts))
    engine.generate(requests_of(prompts[:1], (2,), Sampling(30, 1.0)))
    same(engine.generate(requests_of(prompts))[0], first)
    other = VideoLM(lm.info, copy.deepcopy(lm.module))
    engine = GroupEngine(other)
    engine.generate(requests_of(prompts))
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.mul_(0.9)
    same(engine.generate(requests_of(prompts))[0], GroupEngine(other).generate(requests_of(prompts))[0])


def test_groups_are_handed_on_as_they_end_and_an_interruption_keeps_them(lm, prompts):
    config = RolloutConfig(max_rows=3)
    seen = []

    def keep(group):
        seen.append(group)
        if len(seen) == 2:
            raise KeyboardInterrupt

    engine = GroupEngine(lm, config)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests_of(prompts), keep)
    whole, _ = engine.generate(requests_of(prompts))  # the interrupted call left nothing behind
    for group in seen:
        index = group.request.seed - 31
        same([group], [whole[index]])
    order = []
    engine.generate(requests_of(prompts), order.append)
    assert sorted(g.request.seed for g in order) == [31, 32, 33, 34]


def test_a_stop_string_ends_a_response(lm, prompts):
    plain, _ = GroupEngine(lm).generate(requests_of(prompts, sampling=Sampling(24, 1.0)))
    texts = [c.response.text for g in plain for c in g.completions]
    stop = next(t[3:5] for t in texts if len(t) > 8 and t[3:5].isascii())
    found, _ = GroupEngine(lm).generate(requests_of(prompts, sampling=Sampling(24, 1.0, stop=("\0\0", stop))))
    ended = 0
    for group, right in zip(found, plain, strict=True):
        for mine, other in zip(group.completions, right.completions, strict=True):
            assert mine.tokens == other.tokens[: len(mine.tokens)]
            if len(mine.tokens) < len(other.tokens):
                assert stop in mine.response.text
                assert stop not in lm.info.tokenizer.decode(mine.tokens[:-1])
                assert mine.response.finish_reason == "stop"
                ended += 1
            else:
                assert mine == other or stop in mine.response.text or mine.response == other.response
    assert ended


def test_a_budget_below_one_row_is_refused_with_the_key(lm, prompts, token_bytes):
    config = RolloutConfig(kv_gb=(max(map(len, prompts)) + 2 * 9 - 1) * token_bytes / 1e9)
    with pytest.raises(ConfigError, match=r"VRLT-C04 rollout\.kv_gb") as caught:
        GroupEngine(lm, config).generate(requests_of(prompts))
    assert "raise rollout.kv_gb" in str(caught.value)


def test_what_cannot_be_rolled_out_is_refused(lm, prompts):
    engine = GroupEngine(lm)
    empty = dataclasses.replace(prompts[0], ids=prompts[0].ids[:0])
    with pytest.raises(DataError, match="the prompt is empty"):
        engine.generate([RolloutRequest(empty, 1, SAMPLING, 0)])
    with pytest.raises(DataError, match="exceed the model's context"):
        engine.generate([RolloutRequest(prompts[0], 1, Sampling(lm.info.context), 0)])


def test_logits_that_are_no_numbers_stop_the_run(lm, prompts):
    broken = VideoLM(lm.info, copy.deepcopy(lm.module))
    with torch.no_grad():
        broken.module.model.language_model.norm.weight[0] = float("nan")
    with pytest.raises(Stopped, match=r"VRLT-S03 .*response token 1"):
        GroupEngine(broken).generate(requests_of(prompts))


def test_plans_and_places():
    shape = KvShape(2, 2, 8, torch.float32, torch.device("cpu"))
    store = KvStore(shape, plan_kv(shape, [10, 20], [2, 3], 5, budget=10**9, max_rows=4))
    assert (store.plan.tokens, store.plan.slots) == (30, 4)
    places = [store.take_prefix(n) for n in (10, 15, 5)]
    assert places == [0, 10, 25]
    assert store.take_prefix(1) is None
    store.give_prefix(25, 5)
    store.give_prefix(0, 10)
    assert store.take_prefix(12) is None
    store.give_prefix(10, 15)
    assert store.take_prefix(30) == 0
    small = plan_kv(shape, [10], [100], 5, budget=shape.token_bytes * 30, max_rows=64)
    assert small.slots == 3
    assert small.nbytes(shape) == shape.token_bytes * 30
    with pytest.raises(ConfigError, match="VRLT-C04"):  # less than the slot of padding rows
        plan_kv(shape, [10], [100], 5, budget=1, max_rows=64)
    other = plan_kv(shape, [5, 5], [1, 1], 9, budget=10**9, max_rows=64)
    both = small.joined(other)
    assert both.holds(small)
    assert both.holds(other)
    assert not small.holds(other)
