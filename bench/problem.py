"""The inputs of a cell of the case ``kernels``, the loss in plain PyTorch, and the truth in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch

from bench.cells import Cell

SPECS: dict[str, dict[str, Any]] = {
    "grpo": {"policy": "clip", "reduction": "grpo"},
    "grpo-kl": {"policy": "clip", "reduction": "grpo", "kl": "k3", "beta": 0.04},
    "dapo": {"policy": "clip", "reduction": "dapo", "clip_high": 0.28},
    "gspo": {"policy": "gspo", "reduction": "grpo"},
    "cispo": {"policy": "cispo", "reduction": "dapo", "clip_low": 1.0},
}
"""Arguments of vrlt_kernels.LossSpec; bounds of the ratio are 1 - 0.2 and 1 + 0.2 unless given."""
FAR = (-0.5, -0.05, 0.05, 0.5)
"""Old log-probs minus the policy's, a sequence each: on either side of the bounds, and far from them."""
_DEVIATION = 2.0  # of the logits


class Terms(NamedTuple):
    """What a loss needs beside log-probs, a row each where it isn't said otherwise."""

    old_logp: torch.Tensor
    ref_logp: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor  # of the reduction
    sequence: torch.Tensor  # index, int64
    share: torch.Tensor  # 1 / length of the row's sequence
    zeros: torch.Tensor  # [B]


def flat_loss(logp: torch.Tensor, terms: Terms, loss: str) -> torch.Tensor:
    """The loss [] from log-probs [N], in a minimum of PyTorch calls."""
    ratio = (logp - terms.old_logp) * (terms.share if loss == "gspo" else 1.0)
    if loss == "gspo":
        ratio = terms.zeros.index_add(0, terms.sequence, ratio)[terms.sequence]
    ratio = ratio.exp()
    high = 1.0 + SPECS[loss].get("clip_high", 0.2)
    if loss == "cispo":
        each = -ratio.clamp(max=high).detach() * terms.advantage * logp
    else:
        each = -torch.minimum(ratio * terms.advantage, ratio.clamp(0.8, high) * terms.advantage)
    if loss == "grpo-kl":
        gap = terms.ref_logp - logp
        each = each + 0.04 * (gap.exp() - gap - 1)
    return (each * terms.weight).sum()


@dataclass(frozen=True)
class Problem:
    """Inputs on one device. N rows, B sequences, longest T.

    ``logits`` [N, V] in the row stage, ``hidden`` [N, K] and ``weight`` [V, K] in the linear one; ``target`` [N];
    ``place`` [N] the row's index in [B, T] flattened. ``cu_seqlens`` [B + 1] and ``advantages`` [B] are on the CPU.
    """

    cell: Cell
    target: torch.Tensor
    terms: Terms
    cu_seqlens: torch.Tensor
    advantages: torch.Tensor
    place: torch.Tensor
    longest: int
    hidden: torch.Tensor
    weight: torch.Tensor
    logits: torch.Tensor

    @property
    def sequences(self) -> int:
        return len(self.advantages)

    @property
    def full(self) -> bool:
        """Whether there is no padding."""
        return len(self.place) == self.sequences * self.longest

    def padded(self, rows: torch.Tensor, spare: int = 0) -> torch.Tensor:
        """[B, T + spare, ...] with the rows in their places and zeros elsewhere."""
        length = self.longest + spare
        out = rows.new_zeros(self.sequences * length, *rows.shape[1:])
        out[self.spaced(spare)] = rows
        return out.view(self.sequences, length, *rows.shape[1:])

    def spaced(self, spare: int) -> torch.Tensor:
        """``place`` where a sequence has T + ``spare`` positions."""
        return self.place + self.terms.sequence * spare


def sequence_lengths(cell: Cell) -> tuple[list[int], list[bool]]:
    """Lengths of the sequences, and which of them have advantage 0: N tokens, and the share ``skip`` of N."""
    count = max(4, min(8, cell.tokens // 8))
    if cell.skip:
        dead = min(count - 1, max(1, round(cell.skip * count)))
        idle = cell.tokens - cell.live
        return _spread(idle, dead, 1.0) + _spread(cell.live, count - dead, cell.valid), [i < dead for i in range(count)]
    return _spread(cell.tokens, count, cell.valid), [False] * count


def _spread(tokens: int, count: int, valid: float) -> list[int]:
    """Lengths rising evenly to mean / valid, which is tokens / (count x longest)."""
    mean = tokens / count
    slope = (mean / valid - mean) / max(1, (count - 1) / 2)
    ends = [round(mean * (i + 1) + slope * (i + 1) * (i + 1 - count) / 2) for i in range(count)]
    return [stop - start for start, stop in zip([0, *ends], ends, strict=False)]


def make_problem(
    cell: Cell,
    device: torch.device,
    dtype: torch.dtype,
    *,
    seed: int,
    gaps: tuple[float, ...] = (0.01,),
    lengths: list[int] | None = None,
    width: int = 0,
) -> Problem:
    """Random inputs.

    Args:
        gaps: old log-prob minus the policy's, for one sequence after the other.
        lengths: of the sequences, instead of the cell's.
        width: hidden size instead of the model's.
    """
    generator = torch.Generator(device).manual_seed(seed)
    sizes, dead = (lengths, [False] * len(lengths)) if lengths else sequence_lengths(cell)
    cu = torch.tensor([0, *sizes]).cumsum(0)
    rows, width, vocab = int(cu[-1]), width or cell.width, cell.vocab
    advantages = torch.tensor([0.0 if off else (1.5, -0.5, 0.7)[i % 3] for i, off in enumerate(dead)])
    sequence = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(scale)

    linear = cell.stage == "linear"
    hidden = normal(rows if linear else 0, width)
    weight = normal(vocab if linear else 0, width, scale=_DEVIATION / width**0.5)
    logits = normal(0 if linear else rows, vocab, scale=_DEVIATION)
    target = torch.randint(vocab, (rows,), generator=generator, device=device)
    logp = _logp(hidden if linear else logits, weight, target, linear=linear)
    gap = torch.tensor(list(islice(cycle(gaps), len(sizes))))[sequence].to(device, logp.dtype)
    share = (1.0 / torch.tensor(sizes, dtype=torch.float64))[sequence].to(device, logp.dtype)
    per_token = SPECS[cell.loss]["reduction"] == "dapo"
    terms = Terms(
        old_logp=logp + gap,
        ref_logp=logp - 0.3 * gap,
        advantage=advantages[sequence].to(device, logp.dtype),
        weight=torch.full_like(share, 1 / rows) if per_token else share / len(sizes),
        sequence=sequence.to(device),
        share=share,
        zeros=torch.zeros(len(sizes), device=device, dtype=logp.dtype),
    )
    longest = max(sizes)
    place = sequence * longest + torch.arange(rows) - cu[:-1][sequence]
    tensors = {"hidden": hidden, "weight": weight, "logits": logits, "place": place.to(device), "target": target}
    return Problem(cell, terms=terms, cu_seqlens=cu.int(), advantages=advantages, longest=longest, **tensors)


def _logp(rows: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *, linear: bool) -> torch.Tensor:
    """Log-probs [N] in fp32, a few rows at a time."""
    step, out = 64, []
    with torch.no_grad():
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            logits = (part @ weight.t() if linear else part).float()
            goal = target[start : start + step, None]
            out.append(logits.gather(1, goal)[:, 0] - logits.logsumexp(1))
    return torch.cat(out)


def truth(problem: Problem, *, cross_entropy: bool = False) -> list[torch.Tensor]:
    """Loss and gradients in fp64: of the logits [N, V], or of hidden states [N, K] and the weight [V, K]."""
    cell = problem.cell
    given = [problem.logits] if cell.stage == "row" else [problem.hidden, problem.weight]
    leaves = [x.detach().double().requires_grad_() for x in given]
    logits = leaves[0] if cell.stage == "row" else leaves[0] @ leaves[1].t()
    logp = logits.log_softmax(1).gather(1, problem.target[:, None])[:, 0]
    terms = Terms(*(x if x.dtype == torch.int64 else x.double() for x in problem.terms))
    loss = -logp.sum() if cross_entropy else flat_loss(logp, terms, cell.loss)
    wanted = leaves[:1] if cell.frozen else leaves
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor], scale: float) -> float:
    """Largest of the gradients' errors, each as ‖x - y‖ / ‖y‖, and of the loss's as its share of ``scale``."""
    if len(found) != len(expected):
        raise ValueError(f"{len(found)} results, expected {len(expected)}")
    errors = [abs(float(found[0]) - float(expected[0])) / scale]
    for x, y in zip(found[1:], expected[1:], strict=True):
        if x.shape != y.shape:
            raise ValueError(f"a gradient is {list(x.shape)}, expected {list(y.shape)}")
        errors.append(float((x.double() - y).norm() / y.norm()))
    # A NaN must not get lost in max().
    return max(errors) if all(e == e for e in errors) else float("nan")
