"""Processes that share one sequence: the log-probs and gradients of one process, and what they send."""

from __future__ import annotations

import random

import pytest
import torch

from tests.parallel import shared_run
from vrlt_fast.errors import ConfigError
from vrlt_fast.model.load import MODELS
from vrlt_fast.model.sequence import check_method
from vrlt_fast.model.shares import prefix_order, shares
from vrlt_fast.parallel.sequence import Peers
from vrlt_kernels import GroupSpans

TOLERANCE = 2e-5
pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.usefixtures("one_torch_thread")]


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request, tmp_path_factory):
    return shared_run.make_model(tmp_path_factory.mktemp("sequence") / request.param, request.param)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory):
    return shared_run.make_model(tmp_path_factory.mktemp("sequence") / "one", "qwen2_5_vl")


def assert_one(parts, right):
    """Together the processes have what one has: each target once, and gradients that add up."""
    logp, entropy, gradients = right
    targets, logps, entropies = (torch.cat([part[i] for part in parts]) for i in range(3))
    assert sorted(targets.tolist()) == list(range(len(logp)))
    torch.testing.assert_close(logps, logp[targets], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(entropies, entropy[targets], rtol=0, atol=TOLERANCE)
    assert set().union(*(part[3] for part in parts)) == gradients.keys()
    for name, gradient in gradients.items():
        ours = sum(part[3][name] for part in parts if name in part[3])
        assert float((ours - gradient).norm()) <= TOLERANCE * float(gradient.norm()) + 1e-12, name


CASES = [
    (1, "gather_kv", True, False, True),
    (3, "gather_kv", False, True, False),
    (4, "gather_kv", True, True, True),
    (2, "ulysses", False, False, True),
    (2, "ulysses", True, True, False),
]


def test_two_processes_compute_what_one_does(folder, pool, seed):
    """Ragged groups, one without responses; a trained tower, deepstack levels, captions."""
    right = shared_run.alone(folder, seed, freeze=False, told=True)
    assert_one(pool(2).run(shared_run.packed, folder, seed, "gather_kv", False, False, True), right)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_computes_what_one_does(one_folder, pool, seed, case):
    size, method, freeze, recompute, told = case
    right = shared_run.alone(one_folder, seed, freeze=freeze, told=told)
    given = (one_folder, seed, method, freeze, recompute, told)
    parts = pool(size).run(shared_run.packed, *given) if size > 1 else [shared_run.packed(Peers(), *given)]
    assert_one(parts, right)


@pytest.mark.parametrize(("size", "recompute", "piece"), [(2, False, 2), (3, True, 1)])
def test_stages_compute_what_one_pass_does(one_folder, pool, seed, size, recompute, piece):
    """Pieces of one row leave all processes but one without a row."""
    right = shared_run.alone(one_folder, seed, freeze=False, told=False)
    assert_one(pool(size).run(shared_run.staged, one_folder, seed, recompute, piece), right)


def test_more_processes_than_tokens_of_a_piece(tmp_path, pool, seed):
    """A tower's frame pairs are fewer than the processes; deepstack levels without a visual token in a share."""
    folder = shared_run.make_model(tmp_path / "model", "qwen3_vl")
    right = shared_run.alone(folder, seed, freeze=False, told=False)
    assert_one(pool(4).run(shared_run.staged, folder, seed, False, 1), right)


def random_spans(rng):
    groups = rng.randint(1, 4)
    return GroupSpans.of(
        [rng.randint(1, 40) for _ in range(groups)],
        [[rng.choice([0, 1, 2, 7, 30]) for _ in range(rng.randint(0, 9))] for _ in range(groups)],
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_each_token_is_in_one_share(seed, size):
    rng = random.Random(seed)
    for _ in range(50):
        spans = random_spans(rng)
        every = shares(spans, size)
        places = torch.cat([s.places for s in every])
        assert sorted(places.tolist()) == list(range(spans.tokens))
        for share in every:
            assert share.places.tolist() == sorted(share.places.tolist())
            assert share.tokens == len(share.places)
        for g, rows in enumerate(spans.rows):
            assert sorted(i for s in every for i in s.rows[g]) == list(range(len(rows)))


def test_pieces_with_fewer_rows_than_processes_take_turns():
    spans = GroupSpans.of([8], [[3]])
    holders = [[s.rank for s in shares(spans, 3, first) if s.rows[0]] for first in range(4)]
    assert holders == [[0], [1], [2], [0]]


def test_heads_for_more_processes_than_keys_have(pool, seed):
    """Four processes, eight query heads, two key heads: each of these goes to two."""
    assert pool(4).run(shared_run.heads_differ, seed) == pytest.approx([0.0] * 4, abs=1e-5)


def test_shares_cost_the_same(seed):
    """Causal pairs of a long prefix, and tokens of rows but for the longest one."""
    rng = random.Random(seed)
    prefix, rows = 10_000, [rng.randint(1, 400) for _ in range(32)]
    every = shares(GroupSpans.of([prefix], [rows]), 4)
    pairs = [sum((low + high + 1) * (high - low) // 2 for low, high in s.chunks[0]) for s in every]
    assert max(pairs) < 1.001 * min(pairs)
    tokens = [sum(s.lengths[0]) for s in every]
    assert max(tokens) - min(tokens) <= max(rows)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gathered_prefixes_come_into_order(seed, size):
    rng = random.Random(seed)
    for _ in range(20):
        spans = random_spans(rng)
        every = shares(spans, size)
        prefix = {s + i for s, n in zip(spans.starts[:-1], spans.prefix, strict=True) for i in range(n)}
        gathered = [p for share in every for p in share.places.tolist() if p in prefix]
        for own in every:
            rows = [p for p in own.places.tolist() if p not in prefix]
            ordered = torch.tensor([*gathered, *rows])[prefix_order(every, own)].tolist()
            assert ordered == sorted(ordered)


@pytest.mark.parametrize("recompute", [False, True])
def test_bytes_received(one_folder, pool, seed, recompute):
    """(size - 1) / size of a layer's keys and values, forward, and as much backward; without activation checkpoints
    the backward pass gathers once more, with them the layer that is computed again does.
    """
    folder, size = one_folder, 2
    *_, got = pool(size).run(shared_run.packed, folder, seed, "gather_kv", True, recompute, False)[0]
    lm = shared_run.open_model(folder, freeze=True, recompute=False)
    prompts, _ = shared_run.make_batch(lm, folder, seed)
    text = lm.module.config.text_config
    heads, dim = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    once = text.num_hidden_layers * (size - 1) / size * 2 * sum(map(len, prompts)) * heads * dim * 4
    names = ("keys and values", "keys and values, again", "keys and values, backward")
    found = [got.get(name, 0) / once for name in names]
    assert found == pytest.approx([2.0, 0.0, 1.0] if recompute else [1.0, 1.0, 1.0], rel=0.05)


@pytest.mark.parametrize("size", [2, 4])
def test_what_a_process_keeps_falls_with_their_number(one_folder, pool, seed, size):
    given = (one_folder, seed, 600, 40)
    alone = shared_run.saved_bytes(Peers(), *given)
    shared = pool(size).run(shared_run.saved_bytes, *given)
    assert max(shared) < 1.1 * alone / size


def test_heads_that_cannot_be_divided_are_refused():
    check_method("gather_kv", 8, 28, 4)
    check_method("ulysses", 4, 28, 4)
    with pytest.raises(ConfigError, match="2, 4, 28"):
        check_method("ulysses", 8, 28, 4)
