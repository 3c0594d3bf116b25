"""Micro-batches under limits of rows and tokens, and steps that are done again where memory runs out."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch

from vrlt_fast.errors import SetupError
from vrlt_fast.report.console import Console
from vrlt_fast.train import stages
from vrlt_fast.train.plan import fitting, largest, out_of_memory, piece_tokens, update_units
from vrlt_fast.train.scored import ScoredGroup
from vrlt_fast.train.trainer import train


def group(prompt, lengths, trained=None):
    completions = tuple(SimpleNamespace(tokens=(0,) * n) for n in lengths)
    made = SimpleNamespace(request=SimpleNamespace(prompt=range(prompt)), completions=completions)
    rows = tuple(range(len(lengths)))
    return ScoredGroup(made, (), (), tuple(float(i) for i in rows), rows if trained is None else trained)


def test_limits_hold_and_nothing_is_lost(seed):
    rng = random.Random(seed)
    for _ in range(200):
        groups = [group(rng.randint(1, 50), [rng.randint(1, 30) for _ in range(rng.randint(1, 8))]) for _ in range(5)]
        rows, tokens = rng.randint(1, 20), rng.choice([0, 1, 40, 100, 1000])
        units = update_units(groups, rows, tokens)
        batches = [batch for unit in units for batch in unit]
        found = [(s.group, i) for batch in batches for s in batch for i in s.trained]
        assert found == [(s.group, i) for s in groups for i in s.trained]
        for unit in units:  # pieces of one group share its prompt
            assert len(unit) == 1 or len({id(s.group) for batch in unit for s in batch}) == 1
        cut = [id(unit[0][0].group) for unit in units if len(unit) > 1]
        assert not {id(s.group) for unit in units if len(unit) == 1 for s in unit[0]} & set(cut)
        for batch in batches:
            assert batch
            alone = len(batch) == 1
            assert sum(len(s.trained) for s in batch) <= rows or alone
            one_row = alone and len(batch[0].trained) == 1
            assert not tokens or sum(map(piece_tokens, batch)) <= tokens or one_row


def test_rows_that_are_not_trained_take_no_room():
    assert largest(update_units([group(10, [5, 100, 7], trained=(0, 2))], 8)) == 22
    assert largest([]) == 0


def test_halves_until_it_fits():
    groups, seen, undone = [group(10, [5] * 8), group(4, [3] * 4)], [], []

    def run(tokens):
        size = largest(update_units(groups, 64, tokens))
        seen.append(size)
        if size > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return "done"

    assert fitting(run, groups, 64, 0, undo=lambda: undone.append(1)) == ("done", 15, 2)
    assert seen == [66, 30, 15]
    assert len(undone) == 2
    assert fitting(run, groups, 64, 16, undo=lambda: undone.append(1)) == ("done", 16, 0)


def test_what_cannot_be_cut_is_an_error():
    def run(tokens):
        raise MemoryError

    with pytest.raises(SetupError, match=r"VRLT-E05 .*micro-batches of 15 tokens"):
        fitting(run, [group(10, [5, 3])], 64, 0, undo=lambda: None)


def test_what_processes_share_is_not_done_again():
    """The others wait in the middle of the first pass. The advice is in tokens of one process."""

    def run(tokens):
        calls.append(tokens)
        raise MemoryError

    calls = []
    with pytest.raises(SetupError, match=r"VRLT-E05 .*2 processes share, each with 33 tokens") as caught:
        fitting(run, [group(10, [5] * 8), group(4, [3] * 4)], 64, 0, undo=lambda: None, sp=2)
    assert calls == [0]
    assert "train.micro_tokens = 16" in caught.value.problems[0].fix


def test_other_errors_pass():
    def run(tokens):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        fitting(run, [group(10, [5])], 64, 0, undo=lambda: None)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert out_of_memory(caught.value)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("updates", [1, 2])
def test_a_run_goes_on_after_memory_ran_out(make_config, tmp_path, monkeypatch, updates):
    """The failure comes behind a part of the real backward pass, whose gradients must not stay."""
    whole, limits = stages.grpo_backward, []

    def short(lm, reference, scored, grpo, how, **kwargs):
        limits.append(how.micro_tokens)
        stats = whole(lm, reference, scored, grpo, how, **kwargs)
        if fails and len(limits) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return stats

    monkeypatch.setattr(stages, "grpo_backward", short)
    grpo = {"steps": 2, "updates": updates}
    found = []
    for fails in (False, True):
        limits.clear()
        where = {"stages": ["grpo"], "out": str(tmp_path / str(fails))}
        # an untrained model earns nothing: the decay leads away from the reference, else gradients are rounding alone
        decay = {"weight_decay": 10.0, "warmup": 1}
        config = make_config(train=where, grpo=grpo, optim=decay, eval={"samples": 1, "start": False})
        run = train(config, console=Console())
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append([r for r in records if r["kind"] == "train"])
        assert (limits[1] > 0) is fails
    fine, redone = found
    assert [r.get("out_of_memory") for r in redone] == [1, 1]
    assert all("out_of_memory" not in r for r in fine)
    for ours, right in zip(redone, fine, strict=True):
        assert ours["loss"] == pytest.approx(right["loss"], rel=1e-3, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)
