"""Liger's functions without Liger: empty batches, types, torch.compile, and what is refused under which name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vrlt_kernels import KernelInputError
from vrlt_kernels.compat import _liger, liger

B, L, V, H = 3, 4, 31, 8
Options = dict[str, Any]


class Problem:
    """Arguments of both functions by name; the reference and the old policy are near the current one."""

    def __init__(self, generator: torch.Generator, batch: int = B, length: int = L) -> None:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        ids = torch.randint(V, (batch, length), generator=generator)
        mask = torch.ones(batch, length)
        mask[1:2, 2:] = 0
        old, ref = (normal(batch, length) * 0.1 - 3.4 for _ in range(2))
        self.logits = {"logits": normal(batch, length + 1, V) * 0.1, "old_logp": old, "ref_logp": ref,
                       "completion_ids": ids, "advantages": normal(batch), "completion_mask": mask}  # fmt: skip
        self.hidden = {"_input": normal(batch, length, H) * 0.1, "weight": normal(V, H), "selected_token_ids": ids,
                       "attention_mask": mask, "advantages": self.logits["advantages"], "ref_per_token_logps": ref,
                       "old_per_token_logps": old}  # fmt: skip


@pytest.fixture
def problem(generator: torch.Generator) -> Problem:
    return Problem(generator)


def on_logits(problem: Problem, **options: Any) -> Any:
    return liger.triton_grpo_loss(**problem.logits | options)


def on_hidden(problem: Problem, **options: Any) -> Any:
    return liger.liger_fused_linear_grpo(**problem.hidden | options)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "vespo"])
@pytest.mark.parametrize(("batch", "length"), [(0, L), (2, 0)])
def test_nothing(generator: torch.Generator, batch: int, length: int, loss_type: str) -> None:
    empty = Problem(generator, batch, length)
    logits, hidden = (x.requires_grad_() for x in (empty.logits["logits"], empty.hidden["_input"]))
    loss, metrics = on_logits(empty, reduce=True, inplace=False, loss_type=loss_type)
    assert (float(loss.detach()), [float(x) for x in metrics]) == (0, [0, 0])
    assert torch.autograd.grad(loss, logits)[0].count_nonzero() == 0
    assert [x.shape for x in on_logits(empty, loss_type=loss_type)] == [(batch, length)] * 3
    loss, metrics = on_hidden(empty, loss_type=loss_type, max_completion_length=9)
    assert (float(loss.detach()), [float(x) for x in metrics]) == (0, [0, 0])
    assert torch.autograd.grad(loss, hidden)[0].count_nonzero() == 0


@pytest.mark.parametrize("wide", ["_input", "bias"])
def test_a_bias_of_another_type(problem: Problem, generator: torch.Generator, wide: str) -> None:
    bias = torch.randn(V, generator=generator).bfloat16()
    exact = {"_input": problem.hidden["_input"].bfloat16().float(), "bias": bias.float()}
    given = {k: v if k == wide else v.bfloat16() for k, v in exact.items()}
    reference = {"ref_per_token_logps": None, "ref_weight": problem.hidden["weight"]}
    found = []
    for inputs in (given, exact):
        inputs["bias"].requires_grad_()
        reference |= {"ref_input": inputs["_input"] + 0.25, "ref_bias": inputs["bias"]}
        loss, metrics = on_hidden(problem, **inputs, **reference)
        (slope,) = torch.autograd.grad(loss, inputs["bias"])
        assert slope.dtype == inputs["bias"].dtype
        found.append([loss, *metrics, slope.float()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


HIDDEN_CASES: list[Options] = [
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "vespo"},
]
LOGITS_CASES: list[Options] = [{"reduce": True, "loss_type": "dr_grpo"}, {"vllm_is_ratio": torch.ones(2)}]


def compiled_agrees(function: Callable[..., Any], problems: list[Problem], kind: str, options: Options) -> None:
    def run(given: Options) -> Any:
        return function(**given, **options)

    torch.compiler.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for problem in problems:
        given = getattr(problem, kind)
        grown = given[next(iter(given))].requires_grad_()
        found = []
        for one in (run, compiled):
            first, *rest = one(given)
            rest = list(rest[0]) if isinstance(rest[0], (list, tuple)) else [x for x in rest if x is not None]
            found.append([first.detach(), *rest, *torch.autograd.grad(first.sum(), grown)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", HIDDEN_CASES)
def test_hidden_compiles(generator: torch.Generator, options: Options) -> None:
    problems = [Problem(generator, 2, length) for length in (4, 6)]
    compiled_agrees(liger.liger_fused_linear_grpo, problems, "hidden", options)


@pytest.mark.parametrize("options", LOGITS_CASES)
def test_logits_compile(generator: torch.Generator, options: Options) -> None:
    problems = [Problem(generator, 2, length) for length in (4, 6)]
    compiled_agrees(liger.triton_grpo_loss, problems, "logits", options | {"inplace": False})


def test_a_mask_is_0_or_1(problem: Problem) -> None:
    for function, name in ((on_logits, "completion_mask"), (on_hidden, "attention_mask")):
        for value in (0.5, 2, -1, float("nan")):
            mask = problem.logits["completion_mask"].clone()
            mask[0, 1] = value
            with pytest.raises(KernelInputError, match=rf"^{name}: got {float(value)} .*, needs 0 or 1"):
                function(problem, **{name: mask})
        whole = problem.logits["completion_mask"]
        first = function(problem)[0]
        for same in (whole.bool(), whole.long(), whole.double()):
            assert torch.equal(function(problem, **{name: same})[0], first)


def test_a_ratio_is_at_least_0(problem: Problem) -> None:
    masked = torch.ones(B, L)
    masked[1, 3] = -1
    for function in (on_logits, on_hidden):
        for wrong in (-0.5, float("nan")):
            for shape in ((B,), (B, 1), (B, L)):
                for loss_type in ("dapo", "vespo"):
                    with pytest.raises(KernelInputError, match=r"^vllm_is_ratio: got .*, needs values of at least 0"):
                        function(problem, loss_type=loss_type, vllm_is_ratio=torch.full(shape, wrong))
        assert function(problem, vllm_is_ratio=masked)[0].isfinite().all()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "sapo", "vespo"])
def test_unseen_values_give_nan_on_a_device(problem: Problem, loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where looking at a mask or a ratio would wait for a GPU."""
    clean = [function(problem, loss_type=loss_type)[0] for function in (on_logits, on_hidden)]
    monkeypatch.setattr(_liger, "_unknown", lambda values: True)
    half = problem.logits["completion_mask"] * 0.5
    wrong: list[Options] = [{"vllm_is_ratio": torch.full((B, L), -1.0)}, {"vllm_is_ratio": torch.full((B,), -1.0)}]
    for function, name, expected in zip(
        (on_logits, on_hidden), ("completion_mask", "attention_mask"), clean, strict=True
    ):
        assert torch.equal(function(problem, loss_type=loss_type)[0], expected)
        for options in (*wrong, {name: half}):
            loss = function(problem, loss_type=loss_type, **options)[0]
            assert loss[0].isnan().all() if loss.dim() else loss.isnan()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("max_completion_length", {"max_completion_length": 0, "loss_type": "dr_grpo"}),
        ("max_completion_length", {"max_completion_length": -3, "loss_type": "dr_grpo"}),
        ("sapo_temperature_pos", {"sapo_temperature_pos": 0.0, "loss_type": "sapo"}),
        ("sapo_temperature_neg", {"sapo_temperature_neg": -1.0, "loss_type": "sapo"}),
        ("LOW", {"LOW": -0.1}),
        ("LOW", {"LOW": None}),
        ("HIGH", {"HIGH": -0.5}),
        ("HIGH", {"HIGH": 0.0, "loss_type": "cispo"}),
    ],
)
def test_errors_name_what_was_passed(problem: Problem, name: str, options: Options) -> None:
    for function, clip in ((on_logits, ("eps_low", "eps_high")), (on_hidden, ("epsilon_low", "epsilon_high"))):
        names = dict(zip(("LOW", "HIGH"), clip, strict=True))
        given = {names.get(key, key): value for key, value in options.items()}
        with pytest.raises(KernelInputError, match=rf"^{names.get(name, name)}: got .*, needs"):
            function(problem, **given)
