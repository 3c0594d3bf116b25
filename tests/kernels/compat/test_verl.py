"""The stand-ins for verl, EasyR1 and open-r1 against the mathematics, and in place of such functions."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from vrlt_kernels import KernelInputError
from vrlt_kernels.compat import easyr1, open_r1, verl

N, V, H = 6, 77, 8


@pytest.fixture
def logits(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(2, 3, V, generator=generator, dtype=torch.float64).mul(3).requires_grad_()


@pytest.fixture
def labels(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(V, (2, 3), generator=generator)


def check(mine: torch.Tensor, expected: torch.Tensor, *inputs: torch.Tensor) -> None:
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)
    upstream = torch.linspace(0.5, 2.0, mine.numel(), dtype=mine.dtype).view(mine.shape)
    slopes = [torch.autograd.grad(x, inputs, upstream, retain_graph=True) for x in (mine, expected)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def logprobs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]


def entropy(logits: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def test_verl_logprobs_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> None:
    check(verl.logprobs_from_logits(logits, labels, inplace_backward=False), logprobs(logits, labels), logits)
    check(verl.logprobs_from_logits(logits[0], labels[0], False), logprobs(logits[0], labels[0]), logits)


def test_verl_writes_the_gradient_over_the_logits_in_the_backward_pass_only(
    logits: torch.Tensor, labels: torch.Tensor
) -> None:
    (expected,) = torch.autograd.grad(logprobs(logits, labels).sum(), logits)
    scaled = logits / 1.0
    out = verl.logprobs_from_logits(scaled, labels)
    assert torch.equal(scaled, logits)
    out.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected)
    torch.testing.assert_close(scaled.detach(), expected)


def test_verl_entropy(logits: torch.Tensor) -> None:
    check(verl.entropy_from_logits(logits), entropy(logits), logits)
    check(verl.entropy_from_logits_with_chunking(logits[0], chunk_size=2), entropy(logits[0]), logits)
    with torch.no_grad():
        logits[..., 3] = float("-inf")
    assert verl.entropy_from_logits(logits).isfinite().all()


def test_verl_sum_of_squares(logits: torch.Tensor) -> None:
    expected = logits.softmax(-1).square().sum(-1)
    torch.testing.assert_close(verl.calculate_sum_pi_squared_from_logits(logits), expected.detach())


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_verl_linear_cross_entropy(generator: torch.Generator, labels: torch.Tensor, reduction: str) -> None:
    hidden, weight = (torch.randn(*s, H, generator=generator, dtype=torch.float64) for s in ((2, 3), (V,)))
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    rows = (hidden @ weight.T / 0.7).view(-1, V)
    expected = logprobs(rows, labels.view(-1))
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    logp, spread = verl.linear_cross_entropy(hidden, weight, labels, 0.7, reduction)
    check(logp, expected, *inputs)
    check(spread, entropy(rows), *inputs)


def test_verl_fused_linear_for_ppo(generator: torch.Generator, labels: torch.Tensor) -> None:
    hidden, weight = (torch.randn(*s, H, generator=generator).bfloat16() for s in ((2, 3), (V,)))
    logp, spread = verl.fused_linear_for_ppo(hidden, weight, labels, 0.7)
    logits = (hidden @ weight.T).double() / 0.7
    assert (logp.dtype, spread.dtype) == (torch.float32, torch.bfloat16)
    assert logp.shape == spread.shape == (2, 3)
    torch.testing.assert_close(logp.double(), logprobs(logits, labels), rtol=0, atol=1e-4)
    torch.testing.assert_close(spread.double(), entropy(logits), rtol=1e-2, atol=0)


def test_verl_refuses(logits: torch.Tensor, labels: torch.Tensor) -> None:
    hidden, weight = torch.randn(2, 3, H), torch.randn(V, H)
    with pytest.raises(NotImplementedError, match="dist_process_group"):
        verl.linear_cross_entropy(hidden, weight, labels, 1.0, "none", object())  # type: ignore[arg-type]
    with pytest.raises(KernelInputError, match="reduction"):
        verl.linear_cross_entropy(hidden, weight, labels, 1.0, "max")
    with pytest.raises(KernelInputError, match="temperature"):
        verl.linear_cross_entropy(hidden, weight, labels, None)
    with pytest.raises(KernelInputError, match="input_ids"):
        verl.fused_linear_for_ppo(hidden, weight, labels[:1])
    with pytest.raises(KernelInputError, match="labels"):
        verl.logprobs_from_logits(logits, labels[:1])


def test_easyr1_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> None:
    labels[0, 1] = -100
    expected = -torch.nn.functional.cross_entropy(logits.view(-1, V), labels.view(-1), reduction="none").view(2, 3)
    (slope,) = torch.autograd.grad(expected.sum(), logits)
    mine = easyr1.log_probs_from_logits(logits / 1.0, labels)
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(torch.autograd.grad(mine.sum(), logits)[0], slope)


def test_open_r1_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> None:
    check(open_r1.selective_log_softmax(logits, labels), logprobs(logits, labels), logits)


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states, vocab_weights, input_ids, temperature=1.0, chunk_size=512):  # type: ignore
        raise AssertionError


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):  # type: ignore
        raise AssertionError


# The functions of verl 0.9.1, EasyR1 0.3.3.dev0 and TRL 0.18.0 that are replaced, with their arguments.
VERL = {
    "verl.utils.torch_functional": {
        "logprobs_from_logits": lambda logits, labels, inplace_backward=True: None,
        "entropy_from_logits": lambda logits: None,
        "entropy_from_logits_with_chunking": lambda logits, chunk_size=2048: None,
        "calculate_sum_pi_squared_from_logits": lambda logits: None,
    },
    "verl.utils.experimental.torch_functional": {"FusedLinearForPPOFunction": Function},
    "verl.utils.kernel.linear_cross_entropy": {"LinearCrossEntropy": Linear, "linear_cross_entropy": Linear.apply},
}
EASYR1 = {
    "verl.utils.torch_functional": {"log_probs_from_logits": lambda logits, labels: None},
    "verl.trainer.core_algos": {
        "compute_policy_loss": lambda old_log_probs, log_probs, advantages, response_mask, clip_ratio_low,
        clip_ratio_high, clip_ratio_dual, tau_positive, tau_negative, loss_type, loss_avg_mode, **kwargs: None,
    },
}  # fmt: skip
TRL_018 = {"trl.trainer.utils": {"selective_log_softmax": lambda logits, index: None}}


def stand_in(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str, functions: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Modules of a package, without any that is really installed; one more, `copies`, imported all the functions."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    modules: dict[str, Any] = {name: ModuleType(name) for name in (package, f"{package}.copies", *functions)}
    modules[package].__version__ = version
    for name, held in functions.items():
        vars(modules[name]).update(held)
        vars(modules[f"{package}.copies"]).update(held)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


@pytest.mark.parametrize(
    ("adapter", "package", "version", "functions"),
    [(verl, "verl", "0.9.1", VERL), (easyr1, "verl", "0.3.3.dev0", EASYR1), (open_r1, "trl", "0.18.0", TRL_018)],
)
def test_apply(
    adapter: Any, package: str, version: str, functions: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = stand_in(monkeypatch, package, version, functions)
    copies = modules[f"{package}.copies"]
    with adapter.apply(modules[package]) as handle:
        report = {r.name: r for r in handle.report()}
        for module, held in functions.items():
            for name, function in held.items():
                assert set(report[f"{module}.{name}"].places) == {f"{module}.{name}", f"{package}.copies.{name}"}
                assert getattr(copies, name) is not function
    for held in functions.values():
        for name, function in held.items():
            assert getattr(copies, name) is function
    assert all(not r.places for r in handle.report())


def test_applied_functions_run(logits: torch.Tensor, labels: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = stand_in(monkeypatch, "verl", "0.9.1", VERL)
    handle = verl.apply(modules["verl"])
    copies = modules["verl.copies"]
    torch.testing.assert_close(copies.logprobs_from_logits(logits, labels, False), logprobs(logits, labels))
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, H, generator=generator), torch.randn(V, H, generator=generator)
    expected = logprobs(hidden @ weight.T, labels)
    torch.testing.assert_close(copies.linear_cross_entropy(hidden, weight, labels, 1.0, "none")[0], expected.view(-1))
    torch.testing.assert_close(copies.FusedLinearForPPOFunction.apply(hidden, weight, labels)[0], expected)
    calls = {r.name.rpartition(".")[2]: r.calls for r in handle.report()}
    assert calls["logprobs_from_logits"] == calls["linear_cross_entropy"] == calls["FusedLinearForPPOFunction"] == 1
    assert calls["entropy_from_logits"] == 0


def test_open_r1_is_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = stand_in(monkeypatch, "trl", "0.18.0", TRL_018)
    package = ModuleType("open_r1")
    monkeypatch.setitem(sys.modules, "open_r1", package)
    with open_r1.apply(package):
        assert modules["trl.copies"].selective_log_softmax is not TRL_018["trl.trainer.utils"]["selective_log_softmax"]
