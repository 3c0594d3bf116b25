"""policy_coef and policy_loss at their edges: masks, few tokens, huge ratios, strides, compilation, wrong arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tests.kernels.policy_formula import CU, B, N, draw
from vrlt_kernels import (
    KernelInputError,
    LossSpec,
    policy_coef,
    policy_coef_ref,
    policy_loss,
    policy_loss_ref,
    use_backend,
)
from vrlt_kernels.loss_spec import KL_WEIGHTS, POLICIES
from vrlt_kernels.policy_coef import mended_offsets
from vrlt_kernels.policy_inputs import _sums

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])


@BACKENDS
@pytest.mark.parametrize("policy", POLICIES)
def test_the_current_policy_as_the_old_one(backend, policy, generator):
    """Without old log-probs the ratio is 1 and its gradient is REINFORCE's, whatever the policy (but for "reg")."""
    logp = draw(generator)["logp"].requires_grad_()
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    spec = LossSpec(policy, "sum" if policy != "luspo" else "grpo", tau_neg=1.0, reg_eps=0.5)
    with use_backend(backend):
        out = policy_loss(logp, CU, spec, advantages=advantages, groups=3)
    (gradient,) = torch.autograd.grad(out.loss, logp)
    expected = -advantages.repeat_interleave(CU.diff()) / (B if policy == "luspo" else 1)
    if policy == "reg":  # every z is 0 and so is the derivative of the deviation
        lengths = CU.diff()
        expected = torch.zeros(B, dtype=torch.float64)
        for g in (slice(0, 3), slice(3, 6)):
            live = lengths[g] > 0
            pull = -(advantages * lengths)[g][live]
            expected[g] = expected[g].masked_scatter(live, 2 / 0.5 * (pull - pull.mean()))
        expected = expected.repeat_interleave(lengths)
    torch.testing.assert_close(gradient, expected)
    assert out.metrics["ratio_min"] == out.metrics["ratio_max"] == 1
    assert not out.clipped.any()


@BACKENDS
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_leaks_from_behind_the_mask(backend, policy, dtype, generator, monkeypatch):
    """Masked places hold NaN, a whole sequence of them a NaN advantage, and memory is NaN before it is written."""
    given = draw(generator, dtype)
    given["mask"][13:] = False
    advantages = torch.randn(B, generator=generator).to(dtype)
    spec = LossSpec(policy, "bnpo", kl="k3", kl_weight="sequence", beta=0.1, correction="tis", entropy_coef=0.1,
                    gate_delta=0.3)  # fmt: skip

    def run(values, targets):
        logp, entropy = (values[k].clone().requires_grad_() for k in ("logp", "entropy"))
        rest = {k: v for k, v in values.items() if k not in ("logp", "entropy")}
        out = policy_loss(logp, CU, spec, entropy=entropy, advantages=targets, groups=3, **rest)
        return out.loss, out.per_token, out.kl, *torch.autograd.grad(out.loss, (logp, entropy)), *out.metrics.values()

    with use_backend(backend):
        clean = run(given, advantages)
    hidden = ~given["mask"]
    dirty = {k: v if k == "mask" else v.masked_fill(hidden, math.nan) for k, v in given.items()}
    targets = advantages.clone()
    if policy != "reg":
        targets[5] = math.nan
    empty = torch.empty
    poison = lambda *a, **k: empty(*a, **k).fill_(math.nan if k.get("dtype") != torch.bool else 1)  # noqa: E731
    monkeypatch.setattr(torch, "empty", poison)
    with use_backend(backend):
        got = run(dirty, targets)
    for one, other in zip(clean, got, strict=True):
        assert torch.equal(one, other)
        assert other.isfinite().all()


@BACKENDS
@pytest.mark.parametrize("policy", POLICIES)
def test_few_tokens(backend, policy):
    """One row, zero rows, no sequences, all masked: finite, and a loss of 0 that can be differentiated."""
    spec = LossSpec(policy, "bnpo", kl="k3", beta=0.1)
    for ends, mask in (([0, 1], None), ([0, 0], None), ([0], None), ([0, 0, 3], [False] * 3), ([0, 2], [True, False])):
        cu = torch.tensor(ends)
        logp = torch.full((ends[-1],), -0.5).requires_grad_()
        keywords = {
            "advantages": torch.ones(len(ends) - 1),
            "groups": max(len(ends) - 1, 1),
            "ref_logp": torch.full_like(logp, -1.0).detach(),
            "mask": None if mask is None else torch.tensor(mask),
        }
        with use_backend(backend):
            out = policy_loss(logp, cu, spec, **keywords)
        (gradient,) = torch.autograd.grad(out.loss * 3, logp)
        twin = logp.detach().requires_grad_()
        (expected,) = torch.autograd.grad(policy_loss_ref(twin, cu, spec, **keywords).loss * 3, twin)
        torch.testing.assert_close(gradient, expected)
        assert gradient.isfinite().all()
        if ends[-1] == 0 or mask == [False] * 3:
            assert out.loss == 0
            assert all(v == 0 for v in out.metrics.values())
            assert gradient.count_nonzero() == 0


@BACKENDS
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_a_hundred(backend, policy, dtype):
    """Finite everywhere, the reference's values, and 0 where the advantage is 0."""
    old = torch.tensor([100.0, -100.0, 0.0, 100.0, -100.0, 3.0, 100.0, -100.0, 1.0], dtype=dtype)
    logp, cu = torch.zeros(9, dtype=dtype), torch.tensor([0, 3, 6, 9])
    keywords = {
        "old_logp": old,
        "ref_logp": old.flip(0),
        "rollout_logp": old * 2,
        "advantages": torch.tensor([1.0, -1.0, 0.0], dtype=dtype),
        "groups": 3,
    }
    for weight in KL_WEIGHTS:
        # In autograd, r k3 and its derivative cancel to nothing at this size: k2 there.
        kl = "k2" if weight == "token" else "k3"
        spec = LossSpec(policy, kl=kl, kl_weight=weight, beta=1e-3, correction="tis")
        with use_backend(backend):
            out = policy_coef(logp, cu, spec, **keywords)
        plain = policy_coef_ref(logp, cu, spec, **keywords)
        for name in ("loss", "a", "e", "kl"):
            assert getattr(out, name).isfinite().all(), (weight, name)
            torch.testing.assert_close(getattr(out, name), getattr(plain, name), rtol=1e-5, atol=1e-5)
    if policy != "reg":
        with use_backend(backend):
            out = policy_coef(logp, cu, LossSpec(policy), **keywords)
        assert out.a[6:].count_nonzero() == 0
        assert out.loss[6:].count_nonzero() == 0


@BACKENDS
def test_strides_scale_and_repetition(backend, generator):
    wide = torch.randn(N, 3, generator=generator).requires_grad_()
    narrow = wide.detach()[:, 0].clone().requires_grad_()
    ref = torch.randn(2 * N, generator=generator)[::2]
    mask = (torch.rand(N, 2, generator=generator) > 0.3)[:, 0]
    spec = LossSpec("gspo", kl="k3", beta=0.1)
    keywords = {"advantages": torch.randn(B, 2, generator=generator)[:, 1], "mask": mask, "ref_logp": ref}
    dense = {k: v.contiguous() for k, v in keywords.items()}
    with use_backend(backend):
        for cu in (CU, CU.int(), CU.repeat_interleave(2)[::2]):
            out = policy_loss(wide[:, 0], cu, spec, **keywords)
            same = policy_loss(narrow, CU, spec, **dense)
            assert torch.equal(out.per_token, same.per_token)
        scale = torch.tensor([1e-3, 7.0])[1]
        (wide_gradient,) = torch.autograd.grad(out.loss * scale, wide, retain_graph=True)
        (gradient,) = torch.autograd.grad(same.loss, narrow)
        assert torch.equal(wide_gradient[:, 0], gradient * 7.0)
        assert wide_gradient[:, 1:].count_nonzero() == 0
        (again,) = torch.autograd.grad(out.loss * scale, wide)
        assert torch.equal(again, wide_gradient)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast(backend, dtype, generator):
    given = draw(generator, dtype)
    logp = given.pop("logp").requires_grad_()
    spec = LossSpec("sapo", kl="k2", beta=0.2, entropy_coef=0.1)
    advantages = torch.randn(B, generator=generator)
    wide = {k: v if k == "mask" else v.float() for k, v in given.items()}
    with use_backend(backend):
        out = policy_loss(logp, CU, spec, advantages=advantages, **given)
        exact = policy_loss(logp.detach().float(), CU, spec, advantages=advantages, **wide)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.per_token, exact.per_token)
    assert torch.autograd.grad(out.loss, logp)[0].dtype == dtype


def test_a_sequence_does_not_depend_on_its_neighbours(generator):
    """One program a sequence, and sums in a fixed order: alone and among others the results are equal bit by bit."""
    n = 700
    logp, old = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    cu = torch.tensor([0, 5, 605, n])
    spec, advantages = LossSpec("gspo", "sum"), torch.tensor([1.0, -2.0, 0.5])
    with use_backend("triton"):
        whole = policy_coef(logp, cu, spec, advantages=advantages, old_logp=old)
        alone = policy_coef(logp[5:605], torch.tensor([0, 600]), spec, advantages=advantages[1:2], old_logp=old[5:605])
    assert torch.equal(whole.a[5:605], alone.a)
    assert torch.equal(whole.loss[5:605], alone.loss)


def test_wrong_offsets_on_a_device_give_nan_and_stay_inside(generator):
    """What a GPU gets, where offsets aren't looked at: tokens outside of all sequences are NaN."""
    from vrlt_kernels.policy_inputs import prepare
    from vrlt_kernels.policy_triton import coef_triton

    logp, spec = torch.randn(9, generator=generator), LossSpec()
    inputs = prepare(logp, torch.tensor([0, 4, 9]), spec, advantages=torch.ones(2))
    for ends, lost in (([2, 4, 7], [0, 1, 7, 8]), ([0, 4, 99], []), ([-5, 3, 2], [3, 4, 5, 6, 7, 8])):
        loss, a, _, _, clipped, _ = coef_triton(inputs._replace(cu_seqlens=torch.tensor(ends)), spec)
        assert loss.isnan().nonzero().flatten().tolist() == lost
        assert a.isnan().nonzero().flatten().tolist() == lost
        assert not clipped.any()


def test_nothing_that_is_compiled_depends_on_a_number_or_a_length(generator):
    """Constants and specialised arguments of a launch, which key Triton's cache, for other lengths and numbers."""
    from vrlt_kernels import policy_triton
    from vrlt_kernels.policy_inputs import prepare

    def constants(n, groups, spec, normalizer):
        cu = torch.tensor([0, 1, n - 3, n])
        inputs = prepare(
            torch.zeros(n), cu, spec, rewards=torch.zeros(3), groups=groups, ref_logp=torch.zeros(n), adv_eps=n * 1e-3,
            normalizer=normalizer,
        )  # fmt: skip
        return policy_triton.switches(inputs, spec, torch.float32)

    kept = {"kl": "k3", "beta": 0.1, "reduction": "dapo"}
    first = constants(16, 3, LossSpec(**kept), 7.0)
    other = {"clip_low": 0.1, "clip_high": 0.4, "delta": 3.0, "beta": 0.0, "kl_clamp_in": 3.0, "log_ratio_clamp": 9.0,
             "entropy_coef": 0.0, "tau_pos": 2.0, "correction_high": 5.0}  # fmt: skip
    assert constants(301, 1, LossSpec(**{**kept, **other}), torch.tensor(301.0)) == first
    assert not {"tokens", "sequences", "size", "groups"} & set(first)


@BACKENDS
def test_torch_compile(backend, generator):
    """One graph, no break; none more for another length or another number, once a length has changed."""
    counter = CompileCounterWithBackend("aot_eager")

    def run(logp, ref, rewards, cu, spec, normalizer, eps):
        keywords = {"rewards": rewards, "groups": 3, "ref_logp": ref, "normalizer": normalizer, "adv_eps": eps}
        out = policy_loss(logp * 2, cu, spec, entropy=logp.exp(), **keywords)
        return out.loss, out.metrics["kl_mean"]

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    rewards = torch.randn(B, generator=generator)
    counts = []
    with use_backend(backend):
        for i, n in enumerate((20, 21, 33, 40, 41)):
            cu = torch.tensor([0, 4, 4, 9, 10, 13, n])
            logp, ref = torch.randn(2, n, generator=generator).unbind()
            spec = LossSpec("gspo", "dapo", kl="k3", beta=0.1 + i, clip_low=0.1 * i, entropy_coef=0.1 * i)
            arguments = (ref, rewards, cu, spec, 5.0 + i, 1e-3 * (i + 1))
            eager, traced = logp.clone().requires_grad_(), logp.clone().requires_grad_()
            one, other = run(eager, *arguments), compiled(traced, *arguments)
            torch.testing.assert_close(one, other)
            torch.testing.assert_close(*(torch.autograd.grad(o[0], x)[0] for o, x in ((one, eager), (other, traced))))
            counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 4, counts
    assert counts[1] <= 3


def test_autocast_and_checkpointing(generator):
    given = draw(generator, torch.float32)
    logp = given.pop("logp").requires_grad_()
    spec, advantages = LossSpec("gspo", kl="k3", beta=0.1), torch.randn(B, generator=generator)

    def loss(x):
        return policy_loss(x, CU, spec, advantages=advantages, **given).loss

    plain = loss(logp)
    with torch.autocast("cpu", torch.bfloat16):
        again = checkpoint(loss, logp, use_reentrant=False)
    assert torch.equal(plain, again)
    assert torch.equal(torch.autograd.grad(plain, logp)[0], torch.autograd.grad(again, logp)[0])


def test_a_second_derivative_is_refused():
    logp = torch.zeros(3, requires_grad=True)
    out = policy_loss(logp, torch.tensor([0, 3]), LossSpec(), advantages=torch.ones(1))
    (gradient,) = torch.autograd.grad(out.loss, logp, create_graph=True)
    with pytest.raises(RuntimeError, match="policy_loss has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"logp": [0.0]}, "logp"),
        ({"logp": torch.zeros(4, 1)}, "logp"),
        ({"logp": torch.zeros(4, dtype=torch.int64)}, "logp"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens"),
        ({"spec": "clip"}, "spec"),
        ({"advantages": None}, "advantages"),
        ({"rewards": torch.zeros(2), "groups": 2}, "advantages"),
        ({"advantages": torch.zeros(3)}, "advantages"),
        ({"advantages": torch.zeros(2, 1)}, "advantages"),
        ({"advantages": torch.zeros(4), "groups": 2, "spec": LossSpec("reg")}, "advantages"),
        ({"spec": LossSpec("reg")}, "groups"),
        ({"advantages": None, "rewards": torch.zeros(2)}, "groups"),
        ({"advantages": None, "rewards": torch.zeros(3), "groups": 2}, "rewards"),
        ({"groups": 3}, "groups"),
        ({"advantages": None, "rewards": torch.zeros(2), "groups": 2, "adv_scale": "std"}, "adv_scale"),
        ({"advantages": None, "rewards": torch.zeros(2), "groups": 2, "adv_ddof": 3}, "adv_ddof"),
        ({"old_logp": torch.zeros(3)}, "old_logp"),
        ({"token_weight": torch.zeros(4, device="meta")}, "token_weight"),
        ({"mask": torch.zeros(4)}, "mask"),
        ({"mask": torch.zeros(3, dtype=torch.bool)}, "mask"),
        ({"spec": LossSpec(kl="k3")}, "ref_logp"),
        ({"spec": LossSpec(correction="tis")}, "rollout_logp"),
        ({"spec": LossSpec(entropy_coef=0.1)}, "entropy"),
        ({"spec": LossSpec(reduction="dapo")}, "normalizer"),
        ({"normalizer": 0.0}, "normalizer"),
        ({"normalizer": torch.ones(1)}, "normalizer"),
        ({"normalizer": torch.tensor(0.0, dtype=torch.float64)}, "normalizer"),
        ({"normalizer": torch.tensor(-2.0)}, "normalizer"),
        ({"normalizer": "1"}, "normalizer"),
        ({"normalizer": 0.0, "mask": torch.ones(4, dtype=torch.bool)}, "normalizer"),
        ({"spec": LossSpec(reduction="sum"), "normalizer": 2.0}, "normalizer"),
    ],
)
@pytest.mark.parametrize("function", [policy_coef, policy_coef_ref, policy_loss, policy_loss_ref])
def test_refused_arguments(function, changes, name):
    arguments = {"logp": torch.zeros(4), "cu_seqlens": torch.tensor([0, 2, 4]), "spec": LossSpec(),
                 "advantages": torch.zeros(2), **changes}  # fmt: skip
    with pytest.raises(KernelInputError, match=rf"^{name}: got .*, needs"):
        function(**arguments)


@pytest.mark.parametrize("value", [0.0, torch.tensor(0.0), torch.tensor(0)])
def test_a_normalizer_of_nothing(value):
    """Its natural value where all is masked, or there is nothing: the loss is a differentiable 0."""
    for rows in (4, 0):
        logp = torch.zeros(rows, requires_grad=True)
        given = {"advantages": torch.ones(1), "normalizer": value, "mask": torch.zeros(rows, dtype=torch.bool)}
        loss = policy_loss(logp, torch.tensor([0, rows]), LossSpec(reduction="dapo"), **given).loss
        (gradient,) = torch.autograd.grad(loss, logp)
        assert loss == 0
        assert not gradient.any()


def test_unchecked_offsets_lead_nowhere():
    """On a GPU, and under torch.compile, nobody looks at their values: no index may depend on them unclamped."""
    mask = torch.tensor([1, 0, 1, 1])
    assert _sums(mask, torch.tensor([0, 2, 9])).tolist() == [1, 2]
    assert _sums(mask, torch.tensor([0, -5, 4])).tolist() == [0, 3]
    for wrong in ([0, 2, 9], [0, 3, 1, 4], [1, 2, 4], [-1, 2, 3]):
        mended, right = mended_offsets(torch.tensor(wrong), 4)
        assert not right
        assert mended[0] == 0
        assert mended[-1] == 4
        assert bool((mended.diff() >= 0).all())
    mended, right = mended_offsets(CU, N)
    assert right
    assert torch.equal(mended, CU)


def test_no_forward_mode():
    logp = torch.zeros(4)
    with pytest.raises(RuntimeError, match="policy_loss has no forward-mode derivative"):
        torch.func.jvp(
            lambda x: policy_loss(x, torch.tensor([0, 4]), LossSpec(), advantages=torch.ones(1)).loss, (logp,), (logp,)
        )
