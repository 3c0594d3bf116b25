"""The check on the shared prefix: every response behind a copy of its prompt, one row at a time, through transformers'
own attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vrlt_fast.model.language import make_inputs, run_text, score_hidden, target_logprobs
from vrlt_fast.model.layout import Row, build_layout
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.staged import StagedPrompt
from vrlt_fast.model.vision import VisionEmbeds, shared_vision


def replicated_logprobs(
    lm: VideoLM,
    prompts: Sequence[Prompt],
    rows: Sequence[Sequence[Row]],
    vision: VisionEmbeds,
    temperature: float = 1.0,
    *,
    entropy_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`~vrlt_fast.model.language.target_logprobs` of the layout of these prompts and rows, at least one.

    Args:
        vision: the visual tokens of the prompts' media in order.
    """
    pieces = vision.split([sum(clip.n_tokens for clip in p.media) for p in prompts])
    scored = []
    for prompt, group, seen in zip(prompts, rows, pieces, strict=True):
        for row in group:
            layout = build_layout([prompt], [[row]], device=lm.device)
            inputs = make_inputs(lm, layout.ids, layout.positions, layout.visual, seen)
            hidden = run_text(lm, inputs, None).index_select(0, layout.source)
            scored.append(score_hidden(lm, hidden, layout.targets, temperature))
    entropy = torch.cat([s.entropy for s in scored])
    return torch.cat([s.logp for s in scored]), entropy if entropy_grad else entropy.detach()


@dataclass(frozen=True)
class PrefixCheck:
    """``logprob``: the largest difference of a log-prob, in nats. ``gradient``: the largest norm of a difference of a
    parameter's gradients over the norm of the replicated one; ``parameter``: which one it is.
    """

    logprob: float
    gradient: float
    parameter: str


def verify_shared_prefix(
    lm: VideoLM,
    prompts: Sequence[Prompt],
    rows: Sequence[Sequence[Row]],
    temperature: float = 1.0,
    *,
    piece: int = 0,
) -> PrefixCheck:
    """Compare log-probs, and the gradients of a weighted sum of them, of the shared and the replicated pass.

    Gradients that the parameters hold are dropped.

    Args:
        piece: rows of a piece, where the shared pass is to go in stages; 0: all groups are packed into one pass.
    """
    layout = build_layout(prompts, rows, device=lm.device)
    weights = torch.linspace(-1.0, 1.0, len(layout.targets), device=lm.device)
    stages: list[StagedPrompt] = []

    def shared() -> torch.Tensor:
        if not piece:
            return target_logprobs(lm, layout, shared_vision(lm, prompts), temperature)[0]
        stages.extend(StagedPrompt(lm, p, shared_vision(lm, [p])) for p in prompts)
        pairs = zip(stages, rows, strict=True)
        cut = [(stage, group[i : i + piece]) for stage, group in pairs for i in range(0, len(group), piece)]
        return torch.cat([stage.logprobs(part, temperature)[0] for stage, part in cut])

    def replicated() -> torch.Tensor:
        return replicated_logprobs(lm, prompts, rows, shared_vision(lm, prompts), temperature)[0]

    def run(logprobs: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        lm.module.zero_grad(set_to_none=True)
        logp = logprobs()
        torch.autograd.backward((logp * weights).sum())
        while stages:
            stages.pop().backward()
        found = {name: p.grad for name, p in lm.module.named_parameters() if p.grad is not None}
        lm.module.zero_grad(set_to_none=True)
        return logp.detach(), found

    ours, gradients = run(shared)
    right, expected = run(replicated)
    if gradients.keys() != expected.keys():
        raise RuntimeError(f"other parameters have gradients: {sorted(gradients.keys() ^ expected.keys())}")
    gaps = {n: float((gradients[n] - g).norm() / g.norm().clamp(min=1e-30)) for n, g in expected.items()}
    worst = max(gaps, key=lambda name: gaps[name], default="")
    return PrefixCheck(float((ours - right).abs().max()), gaps.get(worst, 0.0), worst)
