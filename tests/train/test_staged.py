"""Updates in stages: with adapters and their reference, after running out of memory, and what they leave behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tests.train.test_lora import randomise
from tests.train.test_step import T, gradients, same, scored_at_random
from vrlt_fast.config import LoraConfig
from vrlt_fast.config_rl import GrpoConfig
from vrlt_fast.model import staged
from vrlt_fast.model.layout import response_row
from vrlt_fast.model.load import enable_recompute
from vrlt_fast.model.lora import AdapterReference, adapter_weights, add_lora
from vrlt_fast.model.vision import StepVision, shared_vision
from vrlt_fast.rollout.engine import generate
from vrlt_fast.rollout.group import RolloutRequest
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.train.passes import How
from vrlt_fast.train.plan import fitting
from vrlt_fast.train.step import grpo_backward


@pytest.fixture
def groups(lm, prompts, seed):
    """Two groups, of 3 and 1 responses."""
    requests = [RolloutRequest(p, n, Sampling(6, T), seed=seed) for p, n in ((prompts[0], 3), (prompts[4], 1))]
    return generate(lm, requests)[0]


@pytest.mark.parametrize("targets", [("o_proj",), ("q_proj", "k_proj", "down_proj")])
def test_adapters_and_their_reference(lm, groups, targets, seed):
    """Without an adapter on it, the first layer's keys have no gradient."""
    pytest.importorskip("peft")
    lm.module.model.visual.requires_grad_(False)
    add_lora(lm, LoraConfig(rank=2, targets=targets))
    randomise(lm, seed)
    reference = AdapterReference(lm, None)
    config = GrpoConfig(beta=0.5)
    scored = scored_at_random(groups, seed, config)
    found = []
    for tokens in (0, 1):
        stats = grpo_backward(lm, reference, scored, config, How(temperature=T, micro_rows=64, micro_tokens=tokens))
        found.append((gradients(lm), stats))
    assert found[0][0].keys() == adapter_weights(lm.module).keys()
    same(found[1][0], found[0][0], 1e-6)
    assert found[1][1].kl == pytest.approx(found[0][1].kl, rel=1e-6)
    assert found[0][1].kl > 0
    assert found[1][1].tokens_trained == found[0][1].tokens_trained


def test_the_gradient_after_running_out_of_memory_in_a_piece(lm, groups, seed, monkeypatch):
    config = GrpoConfig(beta=0.0)
    scored = scored_at_random(groups[:1], seed, config)
    grpo_backward(lm, None, scored, config, How(temperature=T, micro_rows=64))
    whole, calls = gradients(lm), []
    rows = staged.StagedPrompt.logprobs

    def second_piece_fails(self, *args, **more):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return rows(self, *args, **more)

    monkeypatch.setattr(staged.StagedPrompt, "logprobs", second_piece_fails)
    prompt = len(scored[0].group.request.prompt)

    def run(tokens):
        return grpo_backward(
            lm, None, scored, config, How(temperature=T, micro_rows=64, micro_tokens=tokens), held=StepVision(lm)
        )

    _, tokens, failures = fitting(run, scored, 64, prompt + scored[0].tokens - 1, undo=lm.module.zero_grad)
    assert failures == 1
    assert tokens < prompt + scored[0].tokens - 1
    same(gradients(lm), whole, 1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_dropped_without_a_backward_pass_is_freed(lm, prompts, recompute, monkeypatch):
    """As when memory runs out: nothing may hold the prompt's activations then."""
    passes = []

    class Watched(staged.PromptPass):
        def __init__(self, *args):
            super().__init__(*args)
            passes.append(weakref.ref(self))

    monkeypatch.setattr(staged, "PromptPass", Watched)
    if recompute:
        enable_recompute(lm)
    made = staged.StagedPrompt(lm, prompts[0], shared_vision(lm, prompts[:1]))
    logp, _ = made.logprobs([response_row(prompts[0], [9, 10, 11])], T)
    assert logp.requires_grad
    del made, logp
    gc.collect()
    assert passes[0]() is None
