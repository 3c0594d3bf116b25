"""Group rollouts on the trainer's own weights: every clip encoded once, every prompt prefilled once, G rows decoded."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch

from vrlt_fast.model.language import prefill, run_text
from vrlt_fast.model.layout import GroupLayout, build_layout, response_row
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.vision import shared_vision
from vrlt_fast.rewards.base import Response
from vrlt_fast.rollout.group import Completion, Group, RolloutRequest, RolloutStats
from vrlt_fast.rollout.kv import DecodeCache
from vrlt_fast.rollout.sampler import Sampling, draw, row_uniforms


@torch.no_grad()
def generate(lm: VideoLM, requests: Sequence[RolloutRequest]) -> tuple[list[Group], RolloutStats]:
    """Sample all requests; they must share one :class:`Sampling`.

    Raises:
        ValueError: no request, n < 1, or requests that differ in their sampling.
    """
    if not requests or min(r.n for r in requests) < 1 or len({r.sampling for r in requests}) != 1:
        raise ValueError("generate needs at least one request, n >= 1, and one sampling for all")
    lm.module.eval()
    prompts = [r.prompt for r in requests]
    rows = [[response_row(r.prompt, [])] * r.n for r in requests]
    layout = build_layout(prompts, rows, pad=lm.info.pad_token, device=lm.device)
    after = torch.tensor([p.next_position for p in prompts], device=lm.device)[layout.group]
    start = perf_counter()
    unique = list({clip.key: clip for p in prompts for clip in p.media}.values())
    vision = shared_vision(lm, prompts)
    encoded = perf_counter()
    last, prefix = prefill(lm, layout, vision)
    prefilled = perf_counter()
    seeds = [(r.seed * 1_000_003 + i) % 2**63 for r in requests for i in range(r.n)]
    sampling = requests[0].sampling
    cache = DecodeCache(prefix, layout.group, sampling.max_new_tokens)
    tokens, logprobs = _decode(lm, layout, cache, last.index_select(0, layout.group), after, seeds, sampling)
    lm.module.train()
    stats = RolloutStats(
        frames_encoded=sum(len(c.times) for c in unique),
        prefix_tokens_prefilled=int(layout.lengths.sum()),
        seconds={"encode": encoded - start, "prefill": prefilled - encoded, "generate": perf_counter() - prefilled},
    )
    return _collect(lm, requests, tokens, logprobs), stats


def _decode(
    lm: VideoLM,
    layout: GroupLayout,
    cache: DecodeCache,
    hidden: torch.Tensor,
    position: torch.Tensor,
    seeds: Sequence[int],
    sampling: Sampling,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 and log-probs fp32, both [rows, T]; a row that has stopped leaves the batch and is padded.

    ``hidden`` [rows, hidden] predicts the first token of each row, which gets ``position`` int64 [rows].
    """
    device, pad = lm.device, lm.info.pad_token
    banned = torch.tensor(lm.info.visual_tokens, device=device)
    stops = torch.tensor(lm.info.stop_tokens, device=device)
    uniforms = row_uniforms(seeds, sampling.max_new_tokens).to(device)
    prefix_width = layout.ids.shape[1]
    visible = torch.arange(prefix_width, device=device) < layout.lengths[layout.group][:, None]
    live = torch.arange(len(seeds), device=device)
    tokens = torch.full((len(seeds), sampling.max_new_tokens), pad, dtype=torch.int64, device=device)
    logprobs = torch.zeros(tokens.shape, device=device)
    for step in range(sampling.max_new_tokens):
        drawn, drawn_logprobs = draw(lm.module.lm_head(hidden), uniforms[live, step], sampling, banned)
        tokens[live, step], logprobs[live, step] = drawn, drawn_logprobs
        going = (~torch.isin(drawn, stops)).nonzero()[:, 0]
        if len(going) == 0 or step + 1 == sampling.max_new_tokens:
            break
        if len(going) < len(live):
            live, drawn, visible = live[going], drawn[going], visible[going]
            cache.keep(going)
        own = torch.ones(len(live), step + 1, dtype=torch.bool, device=device)
        mask = torch.cat([visible, own], dim=1)[:, None, None, :]
        embeds = lm.module.get_input_embeddings()(drawn[:, None])
        places = (position[live] + step)[None, :, None].expand(3, -1, -1)
        hidden = run_text(lm, embeds, places, cache, mask)[:, 0]
        cache.advance()
    return tokens, logprobs


def _collect(
    lm: VideoLM, requests: Sequence[RolloutRequest], tokens: torch.Tensor, logprobs: torch.Tensor
) -> list[Group]:
    rows, probs, stops = tokens.tolist(), logprobs.cpu(), set(lm.info.stop_tokens)
    groups, row = [], 0
    for request in requests:
        completions = []
        for _ in range(request.n):
            ids = rows[row]
            length = next((i + 1 for i, t in enumerate(ids) if t in stops), len(ids))
            reason = "stop" if ids[length - 1] in stops else "length"
            text = lm.info.tokenizer.decode(ids[: length - (reason == "stop")], skip_special_tokens=False)
            completions.append(
                Completion(Response(text, length, reason), tuple(ids[:length]), probs[row, :length].clone())
            )
            row += 1
        groups.append(Group(request, tuple(completions)))
    return groups
