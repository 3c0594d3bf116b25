"""Our stand-ins against Liger-Kernel 0.8.5: values, gradients, metrics, signatures, refusals; where it is wrong."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch

theirs_logits = pytest.importorskip("liger_kernel.transformers.grpo_loss")
theirs_linear = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")

from vrlt_kernels import KernelInputError  # noqa: E402
from vrlt_kernels.compat import liger as ours  # noqa: E402

B, L, V, H = 4, 5, 61, 8
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
CASES = [*itertools.product(CLIPPED, ("token", "sequence")), ("cispo", "token"), ("sapo", "token"), ("vespo", "token")]
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
RATIOS = {"none": None, "batch": (B,), "column": (B, 1), "token": (B, L)}


class Problem:
    """Logits [B, L + 1, V] from a head, and log-probs of other policies near them."""

    def __init__(self, generator: torch.Generator) -> None:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden, self.weight, self.bias = normal(B, L, H), normal(V, H), normal(V)
        self.ids = torch.randint(V, (B, L), generator=generator)
        logits = self.hidden @ self.weight.T + self.bias
        self.logits = torch.cat([logits, normal(B, 1, V)], dim=1)
        logp = torch.log_softmax(logits / 0.9, -1).gather(-1, self.ids[..., None])[..., 0]
        self.old, self.ref = logp + 0.3 * normal(B, L), logp + 0.3 * normal(B, L)
        self.advantages = normal(B)
        self.generator = generator

    def ratio(self, shape: tuple[int, ...] | None) -> torch.Tensor | None:
        return None if shape is None else torch.rand(shape, generator=self.generator) + 0.5


@pytest.fixture
def problem(generator: torch.Generator) -> Problem:
    return Problem(generator)


def close(a: Any, b: Any) -> None:
    assert (a is None) == (b is None)
    if a is not None:
        assert a.shape == b.shape
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-4, atol=5e-6)


def on_logits(function: Any, problem: Problem, options: dict[str, Any], mask: torch.Tensor | None) -> list[Any]:
    """All results, and the gradient for a random upstream, which is not 0 at masked positions."""
    logits = problem.logits.clone().requires_grad_()
    first, *rest = function(
        logits, options.get("old", problem.old), problem.ref, problem.ids, problem.advantages, mask,
        inplace=False, **{k: v for k, v in options.items() if k != "old"},
    )  # fmt: skip
    (gradient,) = torch.autograd.grad((first * torch.linspace(0.5, 2.0, first.numel()).view(first.shape)).sum(), logits)
    rest = rest[0] if options.get("reduce") else rest
    return [first, *rest, gradient]


def same_on_logits(problem: Problem, mask: torch.Tensor | None = MASK, **options: Any) -> None:
    pairs = [on_logits(f.triton_grpo_loss, problem, options, mask) for f in (ours, theirs_logits)]
    assert len(pairs[0]) == len(pairs[1])
    for a, b in zip(*pairs, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("loss_type", "level", "reduce"),
    [(*case, reduce) for case in CASES for reduce in (False, True) if (*case, reduce) != ("luspo", "token", True)],
)
def test_logits(problem: Problem, loss_type: str, level: str, reduce: bool) -> None:
    # the rest of Liger's reduced "luspo" is wrong, see below
    mask = None if loss_type == "luspo" and reduce else MASK
    options = {"loss_type": loss_type, "importance_sampling_level": level, "reduce": reduce}
    for beta, corrected in ((0.0, False), (0.1, False), (0.1, True)):
        same_on_logits(problem, mask, beta=beta, use_bias_correction_kl=corrected, **options)


@pytest.mark.parametrize("ratio", [name for name in RATIOS if name != "none"])
@pytest.mark.parametrize(
    ("loss_type", "level"), [("dapo", "token"), ("grpo", "sequence"), ("cispo", "token"), ("vespo", "token")]
)
def test_logits_with_the_rollouts_ratio(problem: Problem, loss_type: str, level: str, ratio: str) -> None:
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "vllm_is_ratio": problem.ratio(RATIOS[ratio]),
    }
    same_on_logits(problem, **options)
    same_on_logits(problem, reduce=True, use_bias_correction_kl=level == "sequence", **options)


@pytest.mark.parametrize(("loss_type", "level"), [("dapo", "token"), ("bnpo", "sequence")])
def test_logits_with_delta(problem: Problem, loss_type: str, level: str) -> None:
    same_on_logits(problem, loss_type=loss_type, importance_sampling_level=level, delta=1.5, eps_high=0.2)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo", "vespo"])
def test_logits_on_policy(problem: Problem, loss_type: str) -> None:
    same_on_logits(problem, loss_type=loss_type, old=None, temperature=1.3, reduce=True)


def test_logits_with_other_constants(problem: Problem) -> None:
    same_on_logits(problem, loss_type="sapo", sapo_temperature_pos=0.5, sapo_temperature_neg=2.0)
    same_on_logits(problem, loss_type="dr_grpo", max_completion_length=77, reduce=True)
    for items in (33, torch.tensor(33)):
        same_on_logits(problem, loss_type="dapo", num_items_in_batch=items, reduce=True)
    constants = {"vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 0.5, "vespo_lambda_neg": 1.5}
    same_on_logits(problem, loss_type="vespo", reduce=True, **constants)
    same_on_logits(problem, loss_type="cispo", eps_high=1.1)
    same_on_logits(problem, loss_type="dapo", eps_low=0.05, eps_high=0.1)


def test_logits_in_place(problem: Problem) -> None:
    grown = problem.logits.clone().requires_grad_()
    logits = grown * 1.0
    before = logits.detach().clone()
    loss, _ = ours.triton_grpo_loss(
        logits, problem.old, problem.ref, problem.ids, problem.advantages, MASK, reduce=True
    )
    assert torch.equal(logits, before)
    loss.backward()
    expected = on_logits(ours.triton_grpo_loss, problem, {"reduce": True}, MASK)[-1] / 0.5
    close(grown.grad, expected)
    assert not torch.equal(logits, before)


def test_masked_positions_may_hold_anything(problem: Problem) -> None:
    clean = on_logits(ours.triton_grpo_loss, problem, {}, MASK)
    off = MASK == 0
    problem.logits[:, :L][off] = float("nan")
    problem.logits[:, L] = float("inf")
    problem.ids[off] = -100
    problem.old[off] = problem.ref[off] = float("nan")
    for a, b in zip(clean, on_logits(ours.triton_grpo_loss, problem, {}, MASK), strict=True):
        assert torch.equal(a, b)


def truth(problem: Problem, mask: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss by fp64 autograd, per token or with "luspo" the mean over sequences of sum_t m_t L_t; its gradient."""
    logits = problem.logits.double().requires_grad_()
    logp = torch.log_softmax(logits[:, :L] / 0.9, -1).gather(-1, problem.ids[..., None])[..., 0]
    gap = logp - problem.old
    if options.get("importance_sampling_level") == "sequence":
        gap = (gap * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    ratio, a, u = gap.exp(), problem.advantages[:, None].double(), problem.ref - logp
    loss = -torch.minimum(ratio.clamp(max=options.get("delta", 1e9)) * a, ratio.clamp(0.8, 1.4) * a)
    loss = (loss + options.get("beta", 0.04) * (u.exp() - u - 1)) * mask
    loss = loss.sum(-1).mean() if options.get("loss_type") == "luspo" else loss
    return loss, torch.autograd.grad((loss * torch.linspace(0.5, 2.0, loss.numel()).view(loss.shape)).sum(), logits)[0]


def wrong(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() > 0.02 * b.abs().max())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_luspo_with_padding_is_where_liger_is_wrong(level: str) -> None:
    problem = Problem(torch.Generator().manual_seed(5))
    options: dict[str, Any] = {"loss_type": "luspo", "importance_sampling_level": level, "beta": 1.0}
    loss, gradient = truth(problem, MASK, **options)
    mine, liger = (
        on_logits(f.triton_grpo_loss, problem, options | {"reduce": True}, MASK) for f in (ours, theirs_logits)
    )
    close(mine[0], loss)
    close(mine[-1], gradient)
    assert wrong(liger[0], loss)
    options |= {"temperature": 0.9, "epsilon_high": 0.4}
    mine, liger = (on_hidden(module, problem, dict(options), MASK) for module in (ours, theirs_linear))
    close(mine[0], loss)
    assert wrong(liger[0], loss)


def test_luspo_by_token_is_where_ligers_gradient_is_wrong() -> None:
    """Its kernel reads the upstream gradient [B, 1] as if it were [B, L]; without padding, too."""
    problem = Problem(torch.Generator().manual_seed(5))
    options = {"loss_type": "luspo", "reduce": True}
    mine, liger = (on_logits(f.triton_grpo_loss, problem, options, None) for f in (ours, theirs_logits))
    loss, gradient = truth(problem, torch.ones(B, L), **options)
    close(mine[0], loss)
    close(liger[0], loss)
    close(mine[-1], gradient)
    assert wrong(liger[-1], gradient)


def test_delta_below_the_clip_is_where_ligers_gradient_is_wrong() -> None:
    """With A < 0 and delta < r < 1 + eps_high the loss is -r A, whose gradient it leaves out."""
    problem = Problem(torch.Generator().manual_seed(5))
    mine, liger = (on_logits(f.triton_grpo_loss, problem, {"delta": 0.9}, MASK) for f in (ours, theirs_logits))
    loss, gradient = truth(problem, MASK, delta=0.9)
    close(mine[0], loss)
    close(liger[0], loss)
    close(mine[-1], gradient)
    assert wrong(liger[-1], gradient)


def on_hidden(module: Any, problem: Problem, options: dict[str, Any], mask: torch.Tensor) -> list[Any]:
    call = {k: options.pop(k) for k in ("vllm_is_ratio", "num_items_in_batch") if k in options}
    inputs = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    hidden, weight, bias = inputs
    if options.pop("reference", False):
        reference = {"ref_input": problem.hidden + 0.1, "ref_weight": problem.weight, "ref_bias": problem.bias}
    else:
        reference = {"ref_per_token_logps": problem.ref}
    old = options.pop("old", problem.old)
    loss, metrics = module.LigerFusedLinearGRPOLoss(compiled=False, **options)(
        hidden, weight, problem.ids, mask, problem.advantages, bias, old_per_token_logps=old, **reference, **call
    )
    return [loss, *metrics, *torch.autograd.grad(loss * 1.7, inputs)]


def same_on_hidden(problem: Problem, mask: torch.Tensor = MASK, **options: Any) -> None:
    pairs = [on_hidden(module, problem, dict(options), mask) for module in (ours, theirs_linear)]
    assert len(pairs[0]) == len(pairs[1])
    for a, b in zip(*pairs, strict=True):
        close(a, b)


@pytest.mark.parametrize(("loss_type", "level"), CASES)
def test_hidden(problem: Problem, loss_type: str, level: str) -> None:
    mask = torch.ones_like(MASK) if loss_type == "luspo" else MASK
    options = {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 9}
    for beta, corrected in ((0.0, False), (0.1, False), (0.1, True)):
        same_on_hidden(problem, mask, beta=beta, use_bias_correction_kl=corrected, chunk_size=2, **options)


@pytest.mark.parametrize("ratio", [name for name in RATIOS if name != "none"])
@pytest.mark.parametrize(("loss_type", "level"), [("dapo", "token"), ("grpo", "sequence"), ("vespo", "token")])
def test_hidden_with_the_rollouts_ratio(problem: Problem, loss_type: str, level: str, ratio: str) -> None:
    options = {"loss_type": loss_type, "importance_sampling_level": level}
    same_on_hidden(problem, vllm_is_ratio=problem.ratio(RATIOS[ratio]), **options)


def test_hidden_with_other_options(problem: Problem) -> None:
    same_on_hidden(problem, delta=1.1, temperature=0.7)
    same_on_hidden(problem, reference=True, temperature=0.7)
    same_on_hidden(problem, use_ref_model=False)
    same_on_hidden(problem, old=None)
    same_on_hidden(problem, num_items_in_batch=33)
    same_on_hidden(problem, loss_type="cispo", epsilon_high=1.1)


def test_hidden_with_a_frozen_head(problem: Problem) -> None:
    hidden = problem.hidden.clone().requires_grad_()
    given = (problem.weight, problem.ids, MASK, problem.advantages, None, problem.ref, problem.old)
    for module in (ours, theirs_linear):
        module.LigerFusedLinearGRPOLoss(compiled=False)(hidden, *given)[0].backward()
    assert hidden.grad is not None
    assert problem.weight.grad is None


def test_signatures() -> None:
    def of(function: Any, skip: int = 0) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()][skip:]

    assert of(ours.triton_grpo_loss) == of(theirs_logits.triton_grpo_loss)
    mine, theirs = ours.LigerFusedLinearGRPOLoss, theirs_linear.LigerFusedLinearGRPOLoss
    assert of(mine) == of(theirs)
    assert of(mine.forward) == of(theirs.forward)
    assert of(ours.liger_fused_linear_grpo) == of(theirs_linear.LigerFusedLinearGRPOFunction.forward, skip=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("loss_type", {"loss_type": "ppo"}),
        ("importance_sampling_level", {"importance_sampling_level": "batch"}),
        ("importance_sampling_level", {"importance_sampling_level": "sequence", "loss_type": "cispo"}),
        ("delta", {"delta": 2.0, "loss_type": "sapo"}),
        ("sapo_temperature_pos", {"sapo_temperature_pos": 0.0, "loss_type": "sapo"}),
        ("vllm_is_ratio", {"vllm_is_ratio": torch.ones(B, 2)}),
        ("temperature", {"temperature": -1.0}),
        ("ref_logp", {"ref_logp": None}),
        ("old_logp", {"old_logp": torch.zeros(B, L + 1)}),
        ("completion_mask", {"completion_mask": torch.ones(B, L + 1)}),
        ("advantages", {"advantages": torch.ones(B, L)}),
    ],
)
def test_refused_with_logits(problem: Problem, name: str, options: dict[str, Any]) -> None:
    given = {
        "logits": problem.logits, "old_logp": problem.old, "ref_logp": problem.ref, "completion_ids": problem.ids,
        "advantages": problem.advantages,
    }  # fmt: skip
    with pytest.raises(KernelInputError, match=name):
        ours.triton_grpo_loss(**given | options)


def test_refused_with_hidden_states(problem: Problem) -> None:
    given: list[Any] = [problem.hidden, problem.weight, problem.ids, MASK, problem.advantages]
    with pytest.raises(KernelInputError, match="max_completion_length"):
        ours.LigerFusedLinearGRPOLoss(loss_type="dr_grpo", use_ref_model=False)(*given)
    with pytest.raises(KernelInputError, match="ref_per_token_logps"):
        ours.LigerFusedLinearGRPOLoss()(*given)
    with pytest.raises(KernelInputError, match="ref_weight"):
        ours.LigerFusedLinearGRPOLoss()(*given, ref_input=problem.hidden)
    with pytest.raises(KernelInputError, match="delta"):
        ours.LigerFusedLinearGRPOLoss(delta=-1.0)
