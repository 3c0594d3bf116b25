"""The gradient of one GRPO step on scored groups, of the configured loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from time import perf_counter

import torch

from vrlt_fast.config_rl import GrpoConfig
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.vision import Embeddings, StepVision, VisionEmbeds
from vrlt_fast.train.mismatch import Mismatch
from vrlt_fast.train.passes import How, Scores, UnitPass
from vrlt_fast.train.plan import Unit
from vrlt_fast.train.scored import ScoredGroup, StepSize
from vrlt_kernels import LossSpec, policy_loss

OldLogprobs = dict[tuple[int, int], torch.Tensor]
"""Log-probs [tokens] of a response, by the id of its group and its number in it."""


@dataclass
class UpdateStats:
    """Sums over the ``tokens`` response tokens that went through the model in one step, and wall seconds."""

    loss: float = 0.0
    kl: float = 0.0
    clipped: float = 0.0
    entropy: float = 0.0
    tokens: int = 0
    tokens_trained: int = 0
    tokens_logical: int = 0
    reference_seconds: float = 0.0
    mismatch: Mismatch = field(default_factory=Mismatch)

    def add(self, other: UpdateStats) -> None:
        """Take another share's sums in."""
        for f in fields(self):
            if f.name == "mismatch":
                self.mismatch.merge(other.mismatch)
            else:
                setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


def grpo_backward(
    lm: VideoLM,
    reference: VideoLM | None,
    scored: Sequence[ScoredGroup],
    grpo: GrpoConfig,
    how: How,
    *,
    size: StepSize | None = None,
    old: OldLogprobs | None = None,
    held: Embeddings | None = None,
) -> UpdateStats:
    """Accumulate the gradient of the step's loss. The normaliser is the whole step's, so micro-batches don't change it,
    and what several processes have of it adds up.

    Args:
        size: of the step, where groups of it were left out.
        old: log-probs under the policy that rolled out; None: the current policy (mu = 1).
        held: embeddings of a frozen tower, or of the step of a trained one, which ends with this call.
    """
    stats, size = UpdateStats(), size or StepSize.of(scored)
    normalizer = size.normalizer(grpo.reduction)
    for unit, passes in how.rounds(scored):
        vision = how.vision(lm, unit, held) if unit else None
        begin = perf_counter()
        ref_logps = _reference_logprobs(reference if grpo.beta > 0 else None, unit, vision, how, passes)
        stats.reference_seconds += perf_counter() - begin
        policy = UnitPass(lm, unit, vision, how, passes)
        for chunk, ref_logp in zip(unit, ref_logps, strict=True):
            _chunk_backward(policy.scores(chunk), grpo, stats, normalizer=normalizer, old=old, ref_logp=ref_logp)
        policy.backward()
        stats.tokens_trained += policy.tokens
    if isinstance(held, StepVision):
        held.backward()
    return stats


def _chunk_backward(
    found: Scores,
    grpo: GrpoConfig,
    stats: UpdateStats,
    *,
    normalizer: int,
    old: OldLogprobs | None,
    ref_logp: torch.Tensor | None,
) -> None:
    """Backward pass of a micro-batch's share of the loss; ``stats`` take it in."""
    logp, rows = found.logp, found.rows
    if not rows:  # others wait for this process in theirs
        torch.autograd.backward(logp.sum())
        return
    stats.tokens += len(logp)
    rolled = torch.cat([s.group.completions[i].logprobs for s, i in rows])
    fresh = torch.tensor([not s.stale for s, _ in rows]).repeat_interleave(found.offsets.diff().cpu())
    stats.mismatch.add(rolled[fresh], logp.detach()[fresh.to(logp.device)])
    out = policy_loss(
        logp,
        found.offsets,
        loss_of(grpo, has_reference=ref_logp is not None),
        advantages=torch.tensor([s.advantages[i] for s, i in rows], device=logp.device),
        groups=_groups(rows, logp.device) if grpo.policy == "reg" else None,
        old_logp=None if old is None else torch.cat([old[id(s.group), i] for s, i in rows]).to(logp.device),
        ref_logp=ref_logp,
        rollout_logp=None if grpo.correction == "none" else rolled.to(logp.device),
        entropy=found.entropy if grpo.entropy else None,
        token_weight=found.weight,
        normalizer=normalizer,
    )
    torch.autograd.backward(out.loss)
    stats.loss += float(out.loss.detach())
    stats.kl += float(out.kl.sum())
    stats.clipped += float(out.clipped.sum())
    stats.entropy += float(found.entropy.detach().sum())
    stats.tokens_logical += found.logical


def logprobs_of(scored: Sequence[ScoredGroup]) -> OldLogprobs:
    """Those that the engine saw when it drew the responses: of groups that other weights than today's have drawn."""
    return {(id(s.group), i): s.group.completions[i].logprobs for s in scored for i in s.trained}


@torch.no_grad()
def score_old(lm: VideoLM, scored: Sequence[ScoredGroup], how: How, held: Embeddings | None = None) -> OldLogprobs:
    """Log-probs of the responses in the loss (of peers: of those that each has) under the current policy, for steps
    with more than one update.
    """
    out: OldLogprobs = {}
    for unit, passes in how.rounds(scored):
        policy = UnitPass(lm, unit, how.vision(lm, unit, held) if unit else None, how, passes)
        for chunk in unit:
            found = policy.scores(chunk)
            pieces = found.logp.split(found.offsets.diff().tolist())
            out |= {(id(s.group), i): piece for (s, i), piece in zip(found.rows, pieces, strict=True)}
        policy.rest()
    return out


def _reference_logprobs(
    reference: VideoLM | None, unit: Unit, vision: VisionEmbeds | None, how: How, passes: int
) -> list[torch.Tensor | None]:
    if reference is None:
        return [None] * len(unit)
    with torch.no_grad(), reference.opened() as frozen:
        seen = vision
        if vision is not None and vision.requires_grad:  # else it is the same tower
            seen = how.vision(frozen, unit)
        scorer = UnitPass(frozen, unit, seen, how, passes)
        logps: list[torch.Tensor | None] = [scorer.scores(chunk).logp for chunk in unit]
        scorer.rest()
        return logps


def _groups(rows: Sequence[tuple[ScoredGroup, int]], device: torch.device) -> torch.Tensor:
    """Where each group's responses begin, int64 [groups + 1]."""
    sizes = Counter(id(scored) for scored, _ in rows)
    return torch.tensor([0, *accumulate(sizes.values())], device=device)


def loss_of(grpo: GrpoConfig, *, has_reference: bool) -> LossSpec:
    """The configured loss. The normalizer is given with each call."""
    return LossSpec(
        policy=grpo.policy,
        reduction=_REDUCTIONS[grpo.reduction],
        clip_low=grpo.clip_low,
        clip_high=grpo.clip_high,
        delta=grpo.delta or None,
        kl=grpo.kl if has_reference else "none",
        kl_clamp_in=grpo.kl_clamp,
        beta=grpo.beta if has_reference else 0.0,
        correction=grpo.correction,
        correction_level=grpo.correction_level,
        correction_low=grpo.correction_low,
        correction_high=grpo.correction_high,
        entropy_coef=grpo.entropy,
        reg_eps=grpo.reg_eps,
    )


_REDUCTIONS = {"token": "dapo", "sequence": "grpo", "constant": "seq_sum_norm"}
