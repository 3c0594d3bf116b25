"""Drawing tokens in fp32. Each row owns its random numbers, so a row's tokens don't depend on what else is in the
batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How to draw: ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 keep the whole distribution.

    ``min_p`` drops tokens below this share of the likeliest one's probability. A response ends after the first of the
    ``stop`` strings that its text contains, or the model's own stop token.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()


def row_uniforms(seeds: Sequence[int], length: int) -> torch.Tensor:
    """Uniform numbers fp64 [rows, length] in [0, 1), a generator a row."""
    out = torch.empty(len(seeds), length, dtype=torch.float64)
    generator = torch.Generator()
    for row, seed in enumerate(seeds):
        generator.manual_seed(seed)
        out[row].uniform_(generator=generator)
    return out


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling, banned: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row.

    Args:
        logits: [rows, V], any float type.
        uniform: fp64 [rows].
        banned: int64 token ids that can't be drawn.

    Returns:
        tokens int64 [rows], and their log-probabilities fp32 [rows] under the full softmax at the temperature (at
        temperature 1 for greedy), which is what training scores.
    """
    scores = logits.float()
    logprobs = torch.log_softmax(scores / (sampling.temperature or 1.0), dim=-1)
    allowed = logprobs.index_fill(1, banned, float("-inf"))
    if sampling.temperature == 0.0:
        tokens = allowed.argmax(dim=-1)
    else:
        tokens = _inverse_cdf(_truncate(allowed, sampling), uniform)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _truncate(logprobs: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    if sampling.top_k:
        kth = logprobs.topk(min(sampling.top_k, logprobs.shape[1]), dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < kth, float("-inf"))
    if sampling.min_p > 0.0:
        floor = logprobs.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        logprobs = logprobs.masked_fill(logprobs < floor, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, order = logprobs.softmax(dim=-1).sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        logprobs = logprobs.masked_fill(outside.gather(1, order.argsort(dim=-1)), float("-inf"))
    return logprobs


def _inverse_cdf(logprobs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulated probability exceeds ``uniform`` of the whole; never one of probability 0."""
    if torch.are_deterministic_algorithms_enabled():
        logprobs = logprobs.cpu()  # CUDA has no deterministic cumsum
    cumulated = logprobs.double().exp().cumsum(dim=-1)
    target = uniform.to(cumulated.device)[:, None] * cumulated[:, -1:]
    found = torch.searchsorted(cumulated, target, right=True)[:, 0]
    return found.clamp(max=logprobs.shape[1] - 1).to(uniform.device)  # a row of NaN: the caller looks at its log-prob
