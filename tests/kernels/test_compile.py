"""Under torch.compile another length, or another value of a hyper-parameter, compiles nothing."""

from __future__ import annotations

import pytest
import torch

from vrlt_kernels import (
    LossSpec,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    linear_token_weight,
    token_logprob,
    token_weight,
)

V, K = 11, 4
CU = torch.tensor([0, 3, 5, 6, 9])
LONGER = torch.tensor([0, 2, 7, 9, 12])
RUNS = [(CU, 0.7), (LONGER, 0.9), (CU, 1.3), (LONGER, 2.5)]
"""Lengths, and a number above 0 to make hyper-parameters of."""


def rows(cu, dtype=torch.float32):
    generator = torch.Generator().manual_seed(int(cu[-1]))
    hidden = torch.randn(int(cu[-1]), K, generator=generator, dtype=dtype)
    weight = torch.randn(V, K, generator=generator, dtype=dtype)
    return hidden, weight, torch.randint(V, (len(hidden),), generator=generator)


def spec_of(value, policy="clip"):
    options = {"clip_low": 0.1 * value, "beta": 0.05 * value, "entropy_coef": 0.02 * value}
    return LossSpec(policy=policy, reduction="bnpo", kl="k3", correction="tis", correction_high=1 + value, **options)


def batch(cu, target):
    old = torch.linspace(-3, -1, len(target))
    return {"rewards": torch.tensor([1.0, 0.0, 0.5, 2.0]), "groups": 2, "ref_logp": old, "rollout_logp": old - 0.1}


def by_spec(hidden, weight, target, cu, spec, *numbers):
    x, given, budget = numbers
    options = {**given, "adv_eps": 0.01 * x, "temperature": x, "budget_bytes": budget}
    return linear_grpo_loss(hidden, weight, target, cu, spec, **options).loss


CASES = {
    "token_logprob": lambda h, w, t, cu, spec, x, *_: token_logprob(h @ w.t(), t, x).logp,
    "linear_logprob": lambda h, w, t, cu, spec, x, _, budget: linear_logprob(h, w, t, x, budget_bytes=budget).entropy,
    "linear_logprob wide": lambda h, w, t, cu, spec, x, *_: (
        linear_logprob(h.bfloat16(), w.bfloat16(), t, x, logits_dtype=torch.float32).logp
    ),
    "grpo_loss": lambda h, w, t, cu, spec, x, given, _: (
        grpo_loss(h @ w.t(), t, cu, spec, temperature=x, normalizer=x, **given).loss
    ),
    "linear_grpo_loss": by_spec,
    "linear_grpo_loss beyond the budget": by_spec,
    "token_weight": lambda h, w, t, cu, spec, x, *_: token_weight(
        h @ w.t(), cu, 2, alpha=1 + x, temperature=x, clamp=x, released=True
    ),
    "linear_token_weight": lambda h, w, t, cu, spec, x, _, budget: linear_token_weight(
        h, w, cu, 2, alpha=1 + x, temperature=x, clamp=x, released=True, budget_bytes=budget
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_another_value_compiles_nothing(case):
    torch._dynamo.reset()
    function = CASES[case]
    step = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for i, (cu, value) in enumerate(RUNS):
        hidden, weight, target = rows(cu)
        leaves, twins = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
        budget = (4 + i) * V * 4 if case in ("linear_grpo_loss beyond the budget", "linear_token_weight") else 10**6 + i
        rest = (target, cu, spec_of(value), value, batch(cu, target), budget)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            ours = step(*leaves, *rest)
            ours.square().sum().backward()
        theirs = function(*twins, *rest)
        theirs.square().sum().backward()
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close([x.grad for x in leaves], [x.grad for x in twins], atol=1e-5, rtol=1e-4)
