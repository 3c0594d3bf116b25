"""The case ``step``: claims from records; both arms do the same work on a small step, or an error says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import step_run
from bench.cases.step import CPU, claims, tables
from bench.harness import BenchError, summarize
from bench.rollout_arms import hf_generate
from bench.step_arms import PHASES, OurStage, Practice, Setting, Shape, TimedAdamW, make_setting
from vrlt_fast.train.optim import named_trainable

pytestmark = pytest.mark.usefixtures("one_torch_thread")
SMALL = Shape("demo", 2, 2, 4, 4704)


@pytest.fixture
def setting(demo: Path, tmp_path: Path):
    made = make_setting(SMALL, torch.device("cpu"), demo, tmp_path)
    with made.source:
        yield made


def test_claims_are_of_the_one_shape() -> None:
    seconds = {"ours": 2.0, "practice": 3.0}
    records = [summarize(arm, CPU, "step", "s", [spent]) for arm, spent in seconds.items()]
    records += [summarize(arm, CPU, "rate", "tokens/s", [1024 / spent]) for arm, spent in seconds.items()]
    found = {claim.id: (claim.value, claim.holds) for claim in claims(records)}
    assert found == {"step.cpu.vs_practice": (1.5, False), "step.cpu.tokens_s": (512.0, True)}
    assert claims([]) == []
    assert f"| {CPU} | step | 3 | 2 | 1.50 |" in tables({"records": [vars(r) for r in records]})["phases"]


@pytest.mark.timeout(400)
def test_the_arms_agree_or_an_error_says_which(setting: Setting, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {r.metric for r in step_run.agree(setting, seed)} >= {"prompt tokens", "largest difference of a gradient"}
    right = Practice._logprobs
    monkeypatch.setattr(Practice, "_logprobs", lambda arm, lm, row: right(arm, lm, row) * 1.001)
    with pytest.raises(BenchError, match="ours differs from practice: gradient"):
        step_run.agree(setting, seed)


def test_wrong_rewards_are_not_timed(setting: Setting, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Practice.rows
    monkeypatch.setattr(Practice, "rows", lambda arm, prompts, tokens: right(arm, prompts, [t[::-1] for t in tokens]))
    with pytest.raises(BenchError, match="advantages differ"):
        step_run.agree(setting, seed)


@pytest.mark.timeout(400)
def test_both_steps_train_on_as_many_tokens_and_decode_what_they_say(setting: Setting, tmp_path: Path) -> None:
    ours, practice = OurStage(setting, tmp_path), Practice(setting, 2)
    for arm, decoded in ((ours, SMALL.prompts), (practice, SMALL.prompts * SMALL.group)):
        before = [p.detach().clone() for _, p in named_trainable(setting.lm)]
        spent = arm.timed(1)
        assert spent["clips decoded"] == decoded
        assert all(spent[name] >= 0 for name in PHASES)
        assert sum(spent[name] for name in PHASES) <= spent["step"]
        assert any(not torch.equal(p, old) for (_, p), old in zip(named_trainable(setting.lm), before, strict=True))
    ours.close()


def test_padded_prompts_give_the_tokens_of_single_ones(setting: Setting) -> None:
    prompts = sorted(setting.feed().next(setting.stream()), key=len)
    setting.lm.module.eval()
    together = hf_generate(setting.lm, prompts, 1, 6, 0.0)
    assert together == [hf_generate(setting.lm, [p], 1, 6, 0.0)[0] for p in prompts]


def test_moments_in_place_take_the_dtype_of_the_parameters(setting: Setting) -> None:
    setting.lm.module.bfloat16()
    optimizer = TimedAdamW(setting.lm, setting.config, in_place=True)
    for _, parameter in named_trainable(setting.lm):
        parameter.grad = torch.ones_like(parameter)
    before = setting.lm.module.lm_head.weight.detach().clone()
    optimizer.update()
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}
    assert len(optimizer.state) == len(named_trainable(setting.lm))
    assert not torch.equal(setting.lm.module.lm_head.weight, before)
