from __future__ import annotations

import pytest
import torch

from vrlt_fast.errors import ConfigError
from vrlt_fast.model.language import target_hidden
from vrlt_fast.model.layout import build_layout, response_row
from vrlt_fast.model.vision import shared_vision
from vrlt_fast.rollout.engine import generate
from vrlt_fast.rollout.group import RolloutRequest
from vrlt_fast.rollout.sampler import Sampling, draw, row_uniforms
from vrlt_kernels import token_logprob_ref


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_of_rollouts_equal_scoring(lm, prompts, temperature):
    sampling = Sampling(12, temperature)
    groups, stats = generate(lm, [RolloutRequest(p, 3, sampling, seed=i) for i, p in enumerate(prompts)])
    rows = [[response_row(p, c.tokens) for c in g.completions] for p, g in zip(prompts, groups, strict=True)]
    layout = build_layout(prompts, rows)
    with torch.no_grad():
        logits = lm.module.lm_head(target_hidden(lm, layout, shared_vision(lm, prompts)))
    expected = token_logprob_ref(logits, layout.targets, temperature).logp
    ours = torch.cat([c.logprobs for g in groups for c in g.completions])
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-5)
    clips = {p.clip.key: p.clip for p in prompts}
    assert stats.frames_encoded == sum(len(c.times) for c in clips.values())
    assert stats.prefix_tokens_prefilled == sum(map(len, prompts))


def test_a_row_does_not_depend_on_its_batch(lm, prompts):
    sampling = Sampling(10, 1.0)
    together, _ = generate(lm, [RolloutRequest(p, 4, sampling, seed=7 + i) for i, p in enumerate(prompts)])
    for i in (0, 3):
        alone, _ = generate(lm, [RolloutRequest(prompts[i], 2, sampling, seed=7 + i)])
        assert [c.tokens for c in alone[0].completions] == [c.tokens for c in together[i].completions[:2]]


def test_greedy_takes_the_likeliest_and_rows_agree(lm, prompts):
    groups, _ = generate(lm, [RolloutRequest(prompts[0], 3, Sampling(6, 0.0), seed=1)])
    assert len({c.tokens for c in groups[0].completions}) == 1


def test_finish_reasons_and_lengths(lm, prompts):
    groups, _ = generate(lm, [RolloutRequest(p, 4, Sampling(5, 1.0), seed=3) for p in prompts])
    for completion in (c for g in groups for c in g.completions):
        stopped = completion.tokens[-1] in lm.info.stop_tokens
        assert completion.response.finish_reason == ("stop" if stopped else "length")
        assert len(completion.tokens) == completion.response.n_tokens == len(completion.logprobs) <= 5
        assert stopped or len(completion.tokens) == 5
        assert not set(completion.tokens[:-1]) & set(lm.info.stop_tokens)


def test_visual_tokens_are_never_drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(64, 50, generator=generator)
    logits[:, [3, 9]] = 50.0
    uniforms = row_uniforms(range(64), 1)[:, 0]
    for sampling in (Sampling(1, 1.0), Sampling(1, 0.0), Sampling(1, 1.0, top_p=0.5), Sampling(1, 1.0, top_k=2)):
        tokens, _ = draw(logits, uniforms, sampling, torch.tensor([3, 9]))
        assert not set(tokens.tolist()) & {3, 9}


def test_draws_follow_the_distribution(seed):
    probabilities = torch.tensor([0.05, 0.0, 0.15, 0.5, 0.3])
    n = 20_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = probabilities.log().expand(n, -1)
    none = torch.tensor([], dtype=torch.int64)

    def share(sampling):
        tokens, logprobs = draw(logits, uniforms, sampling, none)
        torch.testing.assert_close(
            logprobs.exp(),
            (probabilities ** (1 / sampling.temperature)).div((probabilities ** (1 / sampling.temperature)).sum())[
                tokens
            ],
        )
        return torch.bincount(tokens, minlength=5) / n

    torch.testing.assert_close(share(Sampling(1, 1.0)), probabilities, atol=0.02, rtol=0)
    torch.testing.assert_close(
        share(Sampling(1, 1.0, top_k=2)), torch.tensor([0, 0, 0, 0.625, 0.375]), atol=0.02, rtol=0
    )
    torch.testing.assert_close(
        share(Sampling(1, 1.0, top_p=0.7)), torch.tensor([0, 0, 0, 0.625, 0.375]), atol=0.02, rtol=0
    )
    torch.testing.assert_close(
        share(Sampling(1, 1.0, min_p=0.5)), torch.tensor([0, 0, 0, 0.625, 0.375]), atol=0.02, rtol=0
    )
    squared = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(share(Sampling(1, 0.5)), squared, atol=0.02, rtol=0)


def test_generate_refuses_nonsense(lm, prompts):
    with pytest.raises(ConfigError, match="at least one request"):
        generate(lm, [])
    with pytest.raises(ConfigError, match="n >= 1"):
        generate(lm, [RolloutRequest(prompts[0], 0, Sampling(5), seed=0)])
