"""Rollouts that processes share: of each prompt, every process holds some of the keys and values, and each decode step
is one that all of them make. For groups that are fewer than the processes, or too long for one of them.

Everything but attention is computed by all for all rows, which are few. In attention each process takes what it holds:
its chunks of the prefix, and the tokens of its rows. The parts are gathered with their log-sum-exps and merged in the
order of the processes, so that all go on with the same bits; the first one's draws count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from vrlt_fast.config import RolloutConfig
from vrlt_fast.model.embed_cache import EmbeddingCache
from vrlt_fast.model.language import Inputs, run_text
from vrlt_fast.model.layout import build_layout
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.sequence import GatherKV, SharedLayout, run_share
from vrlt_fast.model.vision import encode_media, in_order
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.rollout.decode import Decoder, Live
from vrlt_fast.rollout.engine import Call, GroupEngine
from vrlt_fast.rollout.kv import KvPlan, KvShape, KvStore, plan_kv
from vrlt_fast.rollout.rows import Resident


class SharedStore(KvStore):
    """What one of ``size`` processes holds: of each prompt as much room as its chunks may need, and the responses whose
    slot is its own: slots are numbered over all processes, and slot s is of process s modulo ``size``.
    """

    def __init__(self, shape: KvShape, plan: KvPlan, size: int):
        self.size = size
        super().__init__(shape, plan)

    def clear(self) -> None:
        super().clear()
        self._free_slots = list(range(self.plan.slots * self.size - 1, -1, -1))

    def take_prefix(self, tokens: int) -> int | None:
        return super().take_prefix(room(tokens, self.size))

    def give_prefix(self, start: int, tokens: int) -> None:
        super().give_prefix(start, room(tokens, self.size))


def room(tokens: int, size: int) -> int:
    """Most tokens of a prefix that one of ``size`` processes has: two chunks."""
    return 2 * -(-tokens // (2 * size))


@dataclass
class PrefillShare:
    """This process's chunks of a prompt, whose keys and values go to the store from ``start`` on."""

    store: KvStore
    inner: GatherKV
    start: int

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        own = slice(self.start, self.start + len(key))
        self.store.prefix_keys[layer][own], self.store.prefix_values[layer][own] = key, value
        return self.inner.attend(layer, query, key, value, scale)


@dataclass
class JointPass:
    """One new token a row, rows sorted by prompt. ``prefixes``: first row, end, and place and length of this process's
    keys of each prompt; ``own``: row, slot here and length of each of its rows, the new token counted.
    """

    store: SharedStore
    peers: Peers
    prefixes: list[tuple[int, int, int, int]]
    own: list[tuple[int, int, int]]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        store, (rows, heads, dim) = self.store, query.shape
        prefix_keys, prefix_values = store.prefix_keys[layer], store.prefix_values[layer]
        own_keys, own_values = store.own_keys[layer], store.own_values[layer]
        parts = torch.zeros(rows, heads, dim + 1, dtype=_sums(query.dtype), device=query.device)
        parts[..., dim] = -torch.inf
        for first, end, start, n in self.prefixes:
            if n:
                every = slice(start, start + n)
                parts[first:end] = _attend(query[first:end], prefix_keys[every], prefix_values[every], scale)
        for row, slot, length in self.own:
            own_keys[slot, length - 1], own_values[slot, length - 1] = key[row], value[row]
            part = _attend(query[row : row + 1], own_keys[slot, :length], own_values[slot, :length], scale)
            parts[row] = merge(torch.stack([parts[row : row + 1], part]))[0]
        every_part = self.peers.all_gather(parts, [rows] * self.peers.size, "attention of rows")
        return merge(every_part.view(self.peers.size, rows, heads, dim + 1))[..., :dim].to(query.dtype)


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def merge(parts: torch.Tensor) -> torch.Tensor:
    """[rows, Hq, d + 1]: attention over all keys, from [parts, rows, Hq, d + 1] over disjoint ones; the last column is
    the log-sum-exp of the scores, -inf where there was no key.
    """
    sums = parts[..., -1:]
    total = sums.logsumexp(0)
    weights = (sums - total).exp().nan_to_num(0.0)  # no key at all: -inf - -inf
    return torch.cat([(weights * parts[..., :-1]).sum(0), total], dim=-1)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """[rows, Hq, d + 1]: attention of query [rows, Hq, d] over all of key and value [n, Hk, d], and log-sum-exps."""
    rows, heads, dim = query.shape
    groups = key.shape[1]
    q = query.view(rows, groups, heads // groups, dim).transpose(0, 1).reshape(1, groups, -1, dim)
    k, v = (x.transpose(0, 1)[None] for x in (key, value))
    out, sums = _flash(q, k, v, scale)
    part = torch.cat([out.to(_sums(query.dtype)), sums.to(_sums(query.dtype))[..., None]], dim=-1)[0]
    return part.view(groups, rows, -1, dim + 1).transpose(0, 1).reshape(rows, heads, dim + 1)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and natural log-sum-exp, by torch's flash attention where it takes the arguments."""
    if q.device.type == "cpu":
        out: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
        return out[0], out[1]
    if q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0:
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
        return out[0], out[1]
    scores = (q @ k.transpose(-1, -2)).mul_(scale)
    sums = scores.logsumexp(-1)
    return (scores - sums[..., None]).exp() @ v, sums


class JointDecoder(Decoder):
    """Decode steps that processes make together. No graphs: a step talks to the others in every layer."""

    store: SharedStore

    def __init__(self, lm: VideoLM, store: SharedStore, peers: Peers):
        super().__init__(lm, store, graphs=False)
        self.peers = peers
        self.held: dict[int, int] = {}
        """Tokens of each resident's prefix that this process has, by the resident's order."""

    def begin(self) -> None:
        self.store.clear()
        self.held.clear()

    def step(self, live: Live) -> tuple[torch.Tensor, int]:
        """As :meth:`Decoder.step`; the prefix tokens are those that this process reads."""
        rank, size = self.peers.rank, self.peers.size
        columns = [len(row.tokens) - 1 for _, row in live]
        starts = [i for i, (resident, _) in enumerate(live) if not i or live[i - 1][0] is not resident]
        residents, ends = [live[i][0] for i in starts], [*starts[1:], len(live)]
        prefixes = [(i, e, r.start, self.held[r.order]) for i, e, r in zip(starts, ends, residents, strict=True)]
        own = [
            (i, row.slot // size, column + 1)
            for i, ((_, row), column) in enumerate(zip(live, columns, strict=True))
            if row.slot % size == rank
        ]
        device = self.lm.device
        tokens = torch.tensor([row.tokens[-1] for _, row in live], device=device)
        places = [r.prompt.next_position + column for (r, _), column in zip(live, columns, strict=True)]
        positions = torch.tensor(places, device=device).expand(3, -1)
        embeds = self.lm.module.get_input_embeddings()(tokens)
        hidden = run_text(self.lm, Inputs(embeds, positions), JointPass(self.store, self.peers, prefixes, own))
        logits: torch.Tensor = self.lm.module.lm_head(hidden)
        return logits, sum(n for *_, n in prefixes)


class JointCall(Call):
    """One call of generate, the same in all processes."""

    decoder: JointDecoder

    def _encode(self, fresh: Sequence[Resident]) -> None:
        begin = perf_counter()
        clips = [c for r in fresh for c in r.prompt.media if c.key not in self._vision]
        found, encoded = encode_media(self.lm, clips, self.held, self.decoder.peers)
        self._vision |= found
        self.stats.count(encoded)
        self._spend("encode", begin)

    def _prefill_all(self, fresh: Sequence[Resident]) -> None:
        """Each prompt in one pass, of which every process computes its chunks and keeps their keys and values."""
        peers, lm = self.decoder.peers, self.lm
        for resident in fresh:
            layout = build_layout([resident.prompt], [[]], device=lm.device)
            shared = SharedLayout(layout, peers)
            keeping = PrefillShare(self.store, GatherKV(shared), resident.start)
            hidden = run_share(lm, shared.inputs(lm, in_order(lm, self._vision, resident.prompt.media)), keeping)
            resident.last = shared.last_tokens(hidden)[0]
            self.decoder.held[resident.order] = shared.share.tokens

    def _agreed(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first process's draws: where devices differ in a bit, all go on with the same tokens."""
        drawn = self.decoder.peers.of_first(torch.stack([tokens.double(), logprobs.double()]))
        return drawn[0].long(), drawn[1].float()


class JointEngine(GroupEngine):
    """As :class:`GroupEngine`, for ``peers`` that call it together with the same requests: all get all groups."""

    def __init__(
        self, lm: VideoLM, config: RolloutConfig | None = None, cache: EmbeddingCache | None = None, *, peers: Peers
    ):
        super().__init__(lm, config, cache)
        self.peers = peers

    def _plan(self, shape: KvShape, work: Sequence[Resident], length: int, budget: int) -> KvPlan:
        size, rows = self.peers.size, self.config.max_rows
        tokens, shares = [room(len(r.prompt), size) for r in work], [-(-len(r.waiting) // size) for r in work]
        return plan_kv(shape, tokens, shares, length, budget=budget, max_rows=max(rows // size, 1))

    def _budget_of(self, shape: KvShape) -> int:
        """The least of all: they take the same prompts in, and rows."""
        return min(self.peers.objects(super()._budget_of(shape)))

    def _call(self, *given: Any) -> JointCall:
        return JointCall(self.lm, self.config, *given)

    def _decoder_of(self, shape: KvShape, plan: KvPlan) -> Decoder:
        return JointDecoder(self.lm, SharedStore(shape, plan, self.peers.size), self.peers)
