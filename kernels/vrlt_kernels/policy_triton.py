"""Triton kernel of policy_coef: a program a sequence.

A token behind the mask is never read: its values are 0 in all arithmetic. Sums run in ACC (fp32, fp64 for fp64
log-probs). ``hypers`` holds the numbers of the spec in the order of `_numbers`, infinity for a bound that
isn't there, then eps and ddof of the advantages. Nothing that is compiled depends on a length or on one of these.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any, Dict

import torch
import triton
import triton.language as tl

from ._checks import compute_dtype
from ._launch import hyper
from .group_advantage import SCALES
from .group_advantage_triton import BLOCK as GROUP_BLOCK
from .group_advantage_triton import advantage_of, group_bounds, group_frame
from .loss_spec import CORRECTION_LEVELS, KL_WEIGHTS, KLS, POLICIES, LossSpec
from .policy_inputs import Inputs
from .policy_ref import METRICS, Outputs
from .policy_terms import (
    GMPO,
    GSPO,
    LUSPO,
    REG,
    bounded_log_ratio,
    clamp_to,
    gmpo_is_free,
    kl_term,
    policy_term,
    ratio_of,
    regression_term,
)

BLOCK = 256
SEQUENCE = tl.constexpr(1)
_POINTERS = [
    "logp", "cu", "advantages", "rewards", "offsets", "old", "ref", "rollout", "entropy", "token_weight", "mask",
    "normalizer", "hypers", "sums", "loss", "a", "e", "kl", "clipped", "partial",
]  # fmt: skip


@triton.jit
def _group_of(sequence, offsets, size, groups):
    """The group of a sequence."""
    if offsets is None:
        found = sequence // size
    else:
        found = sequence * 0
        above = found + groups
        while found + 1 < above:
            middle = (found + above) // 2
            inside = tl.load(offsets + middle) <= sequence
            found = tl.where(inside, middle, found)
            above = tl.where(inside, above, middle)
    return found


@triton.jit
def _tokens(start, end, logp, advantages, old, rollout, mask, alone, ADV: tl.constexpr, ACC: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """Places, who counts, log-probs of policy, old policy and rollout, and advantages of a block of tokens."""
    at = start + tl.arange(0, BLOCK)
    live = at < end
    if mask is not None:
        live = live & (tl.load(mask + at, mask=live, other=0) != 0)
    now = tl.load(logp + at, mask=live, other=0.0).to(ACC)
    before = now
    if old is not None:
        before = tl.load(old + at, mask=live, other=0.0).to(ACC)
    seen = before
    if rollout is not None:
        seen = tl.load(rollout + at, mask=live, other=0.0).to(ACC)
    advantage = tl.where(live, alone, 0.0)
    if ADV == -2:
        advantage = tl.load(advantages + at, mask=live, other=0.0).to(ACC)
    return at, live, now, before, seen, advantage


@triton.jit
def _advantage(sequence, sequences, rewards, offsets, advantages, size, groups, hypers, ADV: tl.constexpr,
               ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The advantage of a sequence: given, or from the rewards of its group."""
    alone = tl.full((), 0.0, ACC)
    if ADV == -1:
        alone = tl.load(advantages + sequence).to(ACC)
    elif ADV >= 0:
        begin, end = group_bounds(_group_of(sequence, offsets, size, groups), offsets, size, sequences)
        eps = tl.load(hypers + 14)
        ddof = tl.load(hypers + 15)
        centre, divisor, best = group_frame(rewards, rewards, begin, end, eps, ddof, ADV, False, ACC, BLOCK)
        alone = advantage_of(tl.load(rewards + sequence).to(ACC), sequence, centre, divisor, best, ADV)
    return alone


@triton.jit
def _weight_of(at, live, weight, token_weight, ACC: tl.constexpr):
    """W of a block of tokens; 0 for those that don't count."""
    own = tl.where(live, weight, 0.0)
    if token_weight is not None:
        own = own * tl.load(token_weight + at, mask=live, other=0.0).to(ACC)
    return own


@triton.jit
def _constant(before, seen, gap, near, advantage, hypers, CORRECTION: tl.constexpr, LEVEL: tl.constexpr,
              GATE: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """nu: the rollout correction, and 0 behind the gate. ``gap``: of the sequence, where the level isn't the token."""
    nu = tl.zeros_like(before) + 1.0
    if CORRECTION > 0:
        low = tl.load(hypers + 9)
        high = tl.load(hypers + 10)
        rho = ratio_of(before - seen, ACC) if LEVEL == 0 else ratio_of(tl.zeros_like(before) + gap, ACC)
        inside = (rho >= low) & (rho <= high)
        if CORRECTION == 1:
            nu = tl.minimum(rho, high)
        elif CORRECTION == 4:
            nu = inside.to(ACC)
        else:
            nu = tl.where(inside, rho, 0.0)
    if GATE:
        nu = tl.where(advantage >= 0, nu, tl.where(near, nu, 0.0))
    return nu


@triton.jit(do_not_specialize=["tokens", "sequences", "size", "groups"], do_not_specialize_on_alignment=_POINTERS)
def coef_kernel(
    logp, cu, advantages, rewards, offsets, old, ref, rollout, entropy, token_weight, mask, normalizer, hypers, sums,
    loss, a, e, kl, clipped, partial, tokens, sequences, size, groups,
    POLICY: tl.constexpr, MEAN: tl.constexpr, KL: tl.constexpr, KL_WEIGHT: tl.constexpr, CORRECTION: tl.constexpr,
    LEVEL: tl.constexpr, GATE: tl.constexpr, ADV: tl.constexpr, PREPARE: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, GROUP_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a sequence: all outputs, or, to PREPARE a regression, the ``sums`` of `regression_term`.

    ADV: -2 advantages of tokens, -1 of sequences, else from rewards, by that place in SCALES. MEAN: beside the
    normalizer, weights are divided by 1 the sequence's tokens, 2 the number of sequences.
    """
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = group_bounds(sequence, cu, 0, tokens)
    alone = _advantage(sequence, sequences, rewards, offsets, advantages, size, groups, hypers, ADV, ACC, GROUP_BLOCK)
    bound = tl.load(hypers + 3)
    zero = tl.zeros([BLOCK], ACC)

    number, raw, bounded, gaps, drift = zero, zero, zero, zero, zero
    for start in range(begin, end, BLOCK):
        at, live, now, before, seen, advantage = _tokens(
            start, end, logp, advantages, old, rollout, mask, alone, ADV, ACC, BLOCK
        )
        number += live.to(ACC)
        raw += now - before
        bounded += bounded_log_ratio(now - before, advantage, hypers, POLICY)
        gaps += before - seen
        drift += seen - now
    count = tl.sum(number, 0)
    safe = tl.maximum(count, 1.0)
    mean = tl.sum(raw, 0) / safe
    of_sequence = ratio_of(clamp_to(mean, bound), ACC)
    inside = tl.abs(mean) <= bound
    for_policy = ratio_of(tl.sum(bounded, 0) / safe, ACC) if POLICY == GMPO else of_sequence
    gap = tl.sum(gaps, 0) if LEVEL == SEQUENCE else tl.sum(gaps, 0) / safe
    near = tl.sum(drift, 0) / safe <= tl.load(hypers + 13)
    weight = 1.0 / tl.load(normalizer).to(ACC)
    if MEAN > 0:
        weight = weight / (safe if MEAN == 1 else sequences)

    shared, shared_kl, mass = zero, zero, zero
    if PREPARE or KL_WEIGHT == 2 or POLICY == GSPO or POLICY == LUSPO or POLICY == GMPO:  # noqa: SIM109
        for start in range(begin, end, BLOCK):
            at, live, now, before, seen, advantage = _tokens(
                start, end, logp, advantages, old, rollout, mask, alone, ADV, ACC, BLOCK
            )
            own = _weight_of(at, live, weight, token_weight, ACC)
            nu = _constant(before, seen, gap, near, advantage, hypers, CORRECTION, LEVEL, GATE, ACC)
            value, slope, low, high, ratio = policy_term(
                now, now - before, advantage, for_policy, inside, count, hypers, POLICY, ACC
            )
            mass += own * nu
            shared += own * nu * slope
            if KL > 0 and KL_WEIGHT == 2:
                far = tl.load(ref + at, mask=live, other=0.0).to(ACC) - now
                value, k, slope = kl_term(far, now - before, of_sequence, hypers, KL, KL_WEIGHT, ACC)
                shared_kl += own * value

    if PREPARE:
        tl.store(sums + sequence * 3, tl.sum(bounded, 0))
        tl.store(sums + sequence * 3 + 1, tl.sum(mass, 0))
        tl.store(sums + sequence * 3 + 2, count)
    else:
        common = tl.sum(shared, 0) / safe
        common_kl = tl.where(inside, of_sequence * tl.sum(shared_kl, 0) / safe, 0.0)
        error = tl.full((), 0.0, ACC)
        pull = error
        if POLICY == REG:
            first, behind = group_bounds(_group_of(sequence, offsets, size, groups), offsets, size, sequences)
            error, pull = regression_term(sums, advantages, sequence, first, behind, hypers, ACC, GROUP_BLOCK)
        beta = tl.load(hypers + 6)
        entropy_coef = tl.load(hypers + 11)
        lows, highs, ratios, kls, entropies, constants = zero, zero, zero, zero, zero, zero
        least, most = zero + float("inf"), zero - float("inf")
        for start in range(begin, end, BLOCK):
            at, live, now, before, seen, advantage = _tokens(
                start, end, logp, advantages, old, rollout, mask, alone, ADV, ACC, BLOCK
            )
            own = _weight_of(at, live, weight, token_weight, ACC)
            nu = _constant(before, seen, gap, near, advantage, hypers, CORRECTION, LEVEL, GATE, ACC)
            x = now - before
            value, slope, low, high, ratio = policy_term(
                now, x, advantage, for_policy, inside, count, hypers, POLICY, ACC
            )
            out = own * nu * slope
            if POLICY == REG:
                value = zero + error
                out = tl.where(tl.abs(x) <= bound, pull, 0.0)
            elif POLICY == GSPO or POLICY == LUSPO:  # noqa: SIM109
                out = zero + common
            elif POLICY == GMPO:
                out = tl.where(gmpo_is_free(x, advantage, hypers), common, 0.0)
            total = nu * value
            divergence = zero
            if KL > 0:
                far = tl.load(ref + at, mask=live, other=0.0).to(ACC) - now
                divergence, k, slope = kl_term(far, x, of_sequence, hypers, KL, KL_WEIGHT, ACC)
                total += beta * k * divergence
                out += beta * (own * slope + common_kl)
                divergence = tl.where(live, divergence, 0.0)
                kls += divergence
            tl.store(kl + at, divergence, mask=at < end)
            if entropy is not None:
                bonus = tl.load(entropy + at, mask=live, other=0.0).to(ACC)
                total -= tl.where(entropy_coef != 0, entropy_coef * bonus, 0.0)
                entropies += bonus
            tl.store(loss + at, tl.where(live, own * total, 0.0), mask=at < end)
            tl.store(a + at, tl.where(live, out, 0.0), mask=at < end)
            tl.store(e + at, -entropy_coef * own, mask=at < end)
            tl.store(clipped + at, (live & (low | high)).to(tl.int8), mask=at < end)
            lows += (live & low).to(ACC)
            highs += (live & high).to(ACC)
            ratios += tl.where(live, ratio, 0.0)
            constants += tl.where(live, nu, 0.0)
            least = tl.minimum(least, tl.where(live, ratio, float("inf")))
            most = tl.maximum(most, tl.where(live, ratio, float("-inf")))
        _write_nan(0, tl.where(sequence == 0, begin, 0), loss, a, e, kl, clipped, BLOCK)
        _write_nan(tl.where(sequence == sequences - 1, end, tokens), tokens, loss, a, e, kl, clipped, BLOCK)
        _write_sums(partial + sequence * 9, count, lows, highs, ratios, kls, entropies, constants, least, most)


@triton.jit
def _write_nan(begin, end, loss, a, e, kl, clipped, BLOCK: tl.constexpr):
    """Tokens outside of all sequences, which only wrong offsets on a GPU can leave, must not look like results."""
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        bad = tl.full([BLOCK], float("nan"), loss.dtype.element_ty)
        tl.store(loss + at, bad, mask=at < end)
        tl.store(a + at, bad, mask=at < end)
        tl.store(e + at, bad, mask=at < end)
        tl.store(kl + at, bad, mask=at < end)
        tl.store(clipped + at, tl.zeros([BLOCK], tl.int8), mask=at < end)


@triton.jit
def _write_sums(row, count, lows, highs, ratios, kls, entropies, constants, least, most):
    """The partial sums of a sequence, in the order of policy_ref.METRICS."""
    tl.store(row, count)
    tl.store(row + 1, tl.sum(lows, 0))
    tl.store(row + 2, tl.sum(highs, 0))
    tl.store(row + 3, tl.sum(ratios, 0))
    tl.store(row + 4, tl.sum(kls, 0))
    tl.store(row + 5, tl.sum(entropies, 0))
    tl.store(row + 6, tl.sum(constants, 0))
    tl.store(row + 7, tl.min(least, 0))
    tl.store(row + 8, tl.max(most, 0))


def _normalizer(inputs: Inputs, spec: LossSpec, dtype: torch.dtype) -> torch.Tensor:
    """What every weight is divided by, 0-d, on the device, without waiting for it."""
    given, sequences, device = inputs.normalizer, inputs.cu_seqlens.shape[0] - 1, inputs.logp.device
    if given is not None:
        return given
    if spec.reduction == "bnpo" and inputs.mask is not None:
        return inputs.mask.sum().clamp(min=1)
    if spec.reduction == "seq_sum":
        tokens = inputs.cu_seqlens.diff()
        if inputs.mask is not None:
            running = torch.nn.functional.pad(inputs.mask.cumsum(0), (1, 0))
            tokens = running[inputs.cu_seqlens.long().clamp(0, inputs.logp.shape[0])].diff()
        return (tokens > 0).sum().clamp(min=1)
    count = {"grpo": sequences, "bnpo": max(inputs.logp.shape[0], 1)}.get(spec.reduction, 1)
    return torch.full((), count, dtype=dtype, device=device)


def _numbers(inputs: Inputs, spec: LossSpec, dtype: torch.dtype) -> torch.Tensor:
    none = float("inf")
    optional = (spec.delta, spec.log_ratio_clamp, spec.kl_clamp_in, spec.kl_clamp_out, spec.gate_delta)
    delta, log_ratio, kl_in, kl_out, gate = (none if value is None else value for value in optional)
    values = (
        spec.clip_low, spec.clip_high, delta, log_ratio, spec.tau_pos, spec.tau_neg, spec.beta, kl_in, kl_out,
        spec.correction_low, spec.correction_high, spec.entropy_coef, spec.reg_eps, gate,
        inputs.adv_eps.item(), inputs.adv_ddof,
    )  # fmt: skip
    return hyper(values, dtype, inputs.logp.device)


def switches(inputs: Inputs, spec: LossSpec, dtype: torch.dtype) -> Dict[str, Any]:
    """Everything that is compiled in: the spec's names, what is given, the dtype. No length, no number."""
    if inputs.advantages is None:
        adv = SCALES.index(inputs.adv_scale)
    else:
        adv = -1 if inputs.advantages.shape[0] == inputs.cu_seqlens.shape[0] - 1 else -2
    return {
        "POLICY": POLICIES.index(spec.policy),
        "MEAN": {"grpo": 1, "dr_grpo": 2}.get(spec.reduction, 0),
        "KL": KLS.index(spec.kl),
        "KL_WEIGHT": KL_WEIGHTS.index(spec.kl_weight),
        "CORRECTION": {"none": 0, "tis": 1, "mis": 2, "icepop": 2, "reject": 4}[spec.correction],
        "LEVEL": CORRECTION_LEVELS.index(spec.correction_level),
        "GATE": spec.gate_delta is not None,
        "ADV": adv,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK": BLOCK,
        "GROUP_BLOCK": GROUP_BLOCK,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }


def coef_triton(inputs: Inputs, spec: LossSpec) -> Outputs:
    """loss, a, e, kl [N] in the compute dtype, clipped bool [N], partial sums [B, 9]; NaN outside of all sequences."""
    dtype, n, sequences = compute_dtype(inputs.logp), inputs.logp.shape[0], inputs.cu_seqlens.shape[0] - 1
    device = inputs.logp.device
    new: Any = torch.empty if sequences else torch.zeros
    loss, a, e, kl = (new(n, dtype=dtype, device=device) for _ in range(4))
    clipped = new(n, dtype=torch.bool, device=device)
    partial = torch.empty(sequences, len(METRICS), dtype=dtype, device=device)
    if sequences:
        fields = inputs._asdict().items()
        contiguous: Dict[str, Any] = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in fields}
        dense = Inputs(**contiguous)
        sums = torch.empty(sequences, 3, dtype=dtype, device=device) if spec.policy == "reg" else None
        groups = 0 if inputs.offsets is None else inputs.offsets.shape[0] - 1
        arguments = (
            dense.logp, dense.cu_seqlens, dense.advantages, dense.rewards, dense.offsets, dense.old_logp,
            dense.ref_logp, dense.rollout_logp, dense.entropy, dense.token_weight,
            None if dense.mask is None else dense.mask.view(torch.uint8), _normalizer(dense, spec, dtype),
            _numbers(dense, spec, dtype), sums, loss, a, e, kl, clipped.view(torch.uint8), partial,
            n, sequences, inputs.group_size, groups,
        )  # fmt: skip
        options = switches(dense, spec, dtype)
        if sums is not None:
            coef_kernel[(sequences,)](*arguments, PREPARE=True, **options)
        coef_kernel[(sequences,)](*arguments, PREPARE=False, **options)
    return loss, a, e, kl, clipped, partial


__all__ = ["coef_kernel", "coef_triton", "switches"]
