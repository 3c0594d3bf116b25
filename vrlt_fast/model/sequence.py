"""Sequence parallelism: passes of the language model over one packed sequence of which each process has a share.

Each computes its tokens; attention is what needs the others'. ``gather_kv``: keys and values of the prefixes are
gathered once a layer, whatever the number of heads, and those of rows stay where they are. Saved for the backward pass
are the own ones alone, so the others' come once more there (with activation checkpoints: with the layer that is
computed again). ``ulysses``: tokens are exchanged for heads, so that each process attends over the whole sequence with
its share of the heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from vrlt_fast.errors import ConfigError, Problem
from vrlt_fast.model.attention import Pass
from vrlt_fast.model.language import Inputs, make_inputs, run_nothing, run_text, score_hidden
from vrlt_fast.model.layout import GroupLayout
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.shares import prefix_order, shares
from vrlt_fast.model.vision import VisionEmbeds
from vrlt_fast.parallel.sequence import Peers
from vrlt_kernels import group_attention
from vrlt_kernels.group_attention import group_attention_bwd, group_attention_fwd

Method = Literal["gather_kv", "ulysses"]


class SharedLayout:
    """What this process computes of a layout: its tokens, and the targets that it scores.

    A target belongs to the process that has the row it stands in, or, of ``also``, the place before it. ``targets``
    int64 [m] numbers of its targets among those of the layout and ``also`` behind them, ascending; ``rows`` of each
    group the numbers of its rows, ascending. ``first``: the rank that gets the longest row.
    """

    def __init__(self, layout: GroupLayout, peers: Peers, also: torch.Tensor | None = None, *, first: int = 0):
        self.layout, self.peers = layout, peers
        self.every = shares(layout.spans, peers.size, first)
        self.share = self.every[peers.rank]
        self.rows = self.share.rows
        device = layout.ids.device
        self.places = self.share.places.to(device)
        self._where = torch.full((layout.spans.tokens,), -1, dtype=torch.int64, device=device)
        self._where[self.places] = torch.arange(len(self.places), device=device)
        seen = self._where[layout.visual]
        self.visual, self.visual_tokens = seen[seen >= 0], (seen >= 0).nonzero()[:, 0]
        self.targets, self.source = self._scored(also)
        ids = layout.targets if also is None else torch.cat([layout.targets, layout.ids[also.to(device)]])
        self.target_ids = ids[self.targets]

    def _scored(self, also: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of the targets that this process scores, and the place of what predicts each among its own tokens,
        behind which the last tokens of all prefixes stand.
        """
        layout, spans, device = self.layout, self.layout.spans, self.layout.ids.device
        lasts = [s + n - 1 for s, n in zip(spans.starts[:-1], spans.prefix, strict=True)]
        counts = [len(group) for group in spans.rows]
        mine = [g_first + i for g_first, rows in zip(_firsts(counts), self.rows, strict=True) for i in rows]
        begins, ends = layout.target_offsets[:-1].tolist(), layout.target_offsets[1:].tolist()
        numbers = [m for row in mine for m in range(begins[row], ends[row])]
        targets = torch.tensor(numbers, dtype=torch.int64, device=device)
        where = self._where.clone()
        where[torch.tensor(lasts, dtype=torch.int64, device=device)] = torch.arange(
            len(self.places), len(self.places) + len(lasts), device=device
        )
        source = where[layout.source[targets]]
        if also is None:
            return targets, source
        before = self._where[also.to(device) - 1]
        own = (before >= 0).nonzero()[:, 0]
        return torch.cat([targets, own + len(layout.targets)]), torch.cat([source, before[own]])

    def inputs(self, lm: VideoLM, vision: VisionEmbeds) -> Inputs:
        """Its tokens; ``vision``: the visual tokens of all media of the layout, in order."""
        layout = self.layout
        embeds, *deepstack = (tensor.index_select(0, self.visual_tokens) for tensor in vision.tensors)
        seen = VisionEmbeds(embeds, tuple(deepstack))
        made = make_inputs(lm, layout.ids[self.places], layout.positions[:, self.places], self.visual, seen)
        if len(self.visual) or not deepstack:
            return made
        # the model takes no empty levels, but the others wait for this process in the backward pass of their gather
        return Inputs(made.embeds + sum(level.sum() for level in deepstack), made.positions)

    def last_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """[groups, hidden]: the hidden states of the last tokens of all prefixes, from this process's [n, hidden]."""
        spans = self.layout.spans
        lasts = [s + n - 1 for s, n in zip(spans.starts[:-1], spans.prefix, strict=True)]
        own = self._where[torch.tensor(lasts, dtype=torch.int64, device=self._where.device)]
        # index -1 is the zero behind all: where a process has none of them, the sum is in its graph all the same
        return self.peers.sum(torch.cat([hidden, hidden.new_zeros(1, hidden.shape[1])])[own], "last tokens")


def _firsts(counts: Sequence[int]) -> Iterator[int]:
    total = 0
    for n in counts:
        yield total
        total += n


class GatherKV:
    """Attention of a share with the prefixes' keys and values gathered from all processes.

    Args:
        keep: whether gathered keys and values are saved for the backward pass. Right under activation checkpoints,
            where what a layer saves lives no longer than its backward pass.
        rows_only: queries are of the rows of the only group alone; keys and values are of its prefix too.
    """

    def __init__(self, shared: SharedLayout, *, keep: bool = False, rows_only: bool = False):
        share, every = shared.share, shared.every
        self.peers, self.keep, device = shared.peers, keep, shared.places.device
        skip = sum(share.prefix_counts) if rows_only else 0
        self.counts = [sum(s.prefix_counts) for s in every]
        self.order = prefix_order(every, share).to(device)
        held: list[int] = []
        rows: list[int] = []
        self.pieces: list[tuple[int, int, int, int, tuple[int, ...], tuple[int, ...]]] = []
        at = base = 0  # of the own tokens, of keys by group
        for pair, prefix, lengths in zip(share.chunks, share.spans.prefix, share.lengths, strict=True):
            for low, high in pair:
                if high > low and not rows_only:
                    self.pieces.append((at, at + high - low, base, base + high, (low,), (high - low,)))
                held.extend(range(at, at + high - low))
                at += high - low
            if sum(lengths):
                end = base + prefix + sum(lengths)
                self.pieces.append((at - skip, at - skip + sum(lengths), base, end, (prefix,), lengths))
            rows.extend(range(at, at + sum(lengths)))
            at += sum(lengths)
            base += prefix + sum(lengths)
        self.held = torch.tensor(held, dtype=torch.int64, device=device)
        self.rows = torch.tensor(rows, dtype=torch.int64, device=device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        out: torch.Tensor = _SharedAttention.apply(query, key, value, self, scale)  # type: ignore[no-untyped-call]
        return out

    def gather(self, key: torch.Tensor, value: torch.Tensor, why: str) -> torch.Tensor:
        """Keys and values [tokens, 2, Hk, d] of each group's whole prefix and own rows, group by group."""
        both = torch.stack([key, value], dim=1)
        prefixes = both[self.held]
        if self.peers.size > 1:
            prefixes = self.peers.all_gather(prefixes, self.counts, why)
        return torch.cat([prefixes, both[self.rows]])[self.order]

    def scatter(self, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the own keys and values, from those of what :meth:`gather` gave."""
        parts = torch.empty_like(grad)
        parts[self.order] = grad
        prefixes, rows = parts.tensor_split([sum(self.counts)])
        if self.peers.size > 1:
            prefixes = self.peers.scatter_sum(prefixes, self.counts, "keys and values, backward")
        out = grad.new_empty(len(self.held) + len(self.rows), *grad.shape[1:])
        out[self.held], out[self.rows] = prefixes, rows
        return out[:, 0], out[:, 1]


class _SharedAttention(torch.autograd.Function):
    """One layer's attention of :class:`GatherKV`: every process makes the same calls, whatever tokens it has."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: GatherKV, scale: float
    ) -> torch.Tensor:
        both = plan.gather(key, value, "keys and values")
        out, lse = torch.empty_like(query, memory_format=torch.contiguous_format), []
        for start, end, low, high, prefix, lengths in plan.pieces:
            k, v = both[low:high, 0], both[low:high, 1]
            more = ([*prefix], [len(lengths)], [*lengths], scale, prefix[0])
            out[start:end], one = group_attention_fwd(query[start:end], k, v, *more)
            lse.append(one)
        ctx.about = (plan, scale)
        ctx.save_for_backward(query, key, value, out, *lse, *([both] if plan.keep else []))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        plan, scale = ctx.about
        query, key, value, out, *lse = ctx.saved_tensors
        both = lse.pop() if plan.keep else plan.gather(key, value, "keys and values, again")
        # several pieces add up here: in fp32, and rounded once
        d_query, d_both = torch.zeros_like(query), both.new_zeros(both.shape, dtype=_sums(both.dtype))
        for (start, end, low, high, prefix, lengths), one in zip(plan.pieces, lse, strict=True):
            k, v = both[low:high, 0], both[low:high, 1]
            more = ([*prefix], [len(lengths)], [*lengths], scale, prefix[0])
            part = grad[start:end].contiguous()
            d_query[start:end], dk, dv = group_attention_bwd(part, query[start:end], k, v, out[start:end], one, *more)
            d_both[low:high, 0] += dk
            d_both[low:high, 1] += dv
        return (d_query, *plan.scatter(d_both.to(both.dtype)), None, None)


def _sums(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32


class Ulysses:
    """Attention of a share by exchanging tokens for heads."""

    def __init__(self, shared: SharedLayout):
        self.peers, self.spans = shared.peers, shared.layout.spans
        self.counts = [s.tokens for s in shared.every]
        places = torch.cat([s.places for s in shared.every])
        self.order = torch.argsort(places).to(shared.places.device)
        self.places = places.to(shared.places.device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        q, k, v = (self._to_heads(x) for x in (query, key, value))
        return self._to_tokens(group_attention(q, k, v, self.spans, scale))

    def _to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[n, H, d] of the own tokens to [N, H / size, d] of all, in packed order; of fewer heads than processes each
        goes to several.
        """
        size, own = self.peers.size, len(x)
        if x.shape[1] < size:
            x = x.repeat_interleave(size // x.shape[1], dim=1)
        parts = x.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
        return self.peers.exchange(parts, [own] * size, self.counts, "tokens for heads")[self.order]

    def _to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """[N, H / size, d] of all tokens to [n, H, d] of the own."""
        size, own = self.peers.size, self.counts[self.peers.rank]
        parts = self.peers.exchange(x[self.places], self.counts, [own] * size, "heads for tokens")
        out: torch.Tensor = parts.unflatten(0, (size, own)).transpose(0, 1).flatten(1, 2)
        return out


def check_method(method: Method, size: int, query_heads: int, key_heads: int) -> None:
    """Raises ConfigError C04 where a model's heads can't be divided among ``size`` processes."""
    if method == "gather_kv" or _divides(size, query_heads, key_heads):
        return
    fits = [n for n in range(2, query_heads + 1) if _divides(n, query_heads, key_heads)]
    what = f"ulysses can't divide {query_heads} heads and {key_heads} key heads among {size} processes"
    fix = f'set parallel.sequence = "gather_kv", or parallel.sp to one of {", ".join(map(str, fits))}'
    raise ConfigError(Problem("VRLT-C04", what, "parallel.sp", fix=fix))


def _divides(size: int, query_heads: int, key_heads: int) -> bool:
    return query_heads % size == 0 and (key_heads % size == 0 or size % key_heads == 0)


def sequence_pass(shared: SharedLayout, method: Method, *, recompute: bool) -> Pass:
    """The pass of a share."""
    return Ulysses(shared) if method == "ulysses" else GatherKV(shared, keep=recompute)


def shared_logprobs(
    lm: VideoLM,
    shared: SharedLayout,
    vision: VisionEmbeds,
    temperature: float = 1.0,
    *,
    method: Method = "gather_kv",
    entropy_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`~vrlt_fast.model.language.target_logprobs`, of this process's targets alone; all call it together.

    Args:
        vision: the visual tokens of all media of the layout, in order.
    """
    hidden = run_share(lm, shared.inputs(lm, vision), sequence_pass(shared, method, recompute=is_recomputed(lm)))
    sources = torch.cat([hidden, shared.last_tokens(hidden)]).index_select(0, shared.source)
    out = score_hidden(lm, sources, shared.target_ids, temperature)
    return out.logp, out.entropy if entropy_grad else out.entropy.detach()


def run_share(lm: VideoLM, inputs: Inputs, group_pass: Pass) -> torch.Tensor:
    """Hidden states of a process's tokens, which may be none: it takes part in the others' passes all the same."""
    if len(inputs.embeds):
        return run_text(lm, inputs, group_pass)
    return run_nothing(lm, inputs, group_pass)


def is_recomputed(lm: VideoLM) -> bool:
    """Whether layers are computed again in the backward pass."""
    layers = lm.module.model.language_model.layers
    return bool(lm.module.training) and any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
