"""Group rollouts on the trainer's own weights: every clip encoded once, every prompt prefilled once into one contiguous
prefix, which one decode step reads once for all of its rows. Rows leave at their end, and the next prompts take their
place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from vrlt_fast.config import RolloutConfig
from vrlt_fast.errors import ConfigError, DataError, Problem, Stopped
from vrlt_fast.model.embed_cache import EmbeddingCache
from vrlt_fast.model.language import Inputs, join, make_inputs, run_text
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.vision import Embeddings, Encoded, StepVision, VisionEmbeds, encode_media, in_order
from vrlt_fast.rollout.decode import Decoder
from vrlt_fast.rollout.group import Group, RolloutRequest, RolloutStats
from vrlt_fast.rollout.kv import KvPlan, KvShape, KvStore, budget_bytes, plan_kv
from vrlt_fast.rollout.passes import PrefillPass
from vrlt_fast.rollout.rows import Collector, Ending, Resident, Row, by_prompt, row_seeds
from vrlt_fast.rollout.sampler import Sampling, draw, row_uniforms
from vrlt_kernels import GroupSpans


class GroupEngine:
    """Rollouts on the weights of ``lm``, which may change between calls. ``cache``: of a frozen tower's embeddings."""

    decoder_type = Decoder

    def __init__(self, lm: VideoLM, config: RolloutConfig | None = None, cache: EmbeddingCache | None = None):
        self.lm, self.config, self.cache = lm, config or RolloutConfig(), cache
        self._decoder: Decoder | None = None
        self._budget: int | None = None

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[RolloutRequest],
        on_group: Callable[[Group], None] | None = None,
        vision: StepVision | Encoded | None = None,
    ) -> tuple[list[Group], RolloutStats]:
        """Sample all requests; requests with the same prompt object share its prefill.

        Args:
            on_group: called with each group as soon as its last row has ended.
            vision: of a trained tower, whose embeddings the update goes on with, or embeddings of all clips.

        Raises:
            ConfigError: C04 no request or n < 1, or a KV budget (``rollout.kv_gb``) too small for one row.
            DataError: D10 an empty prompt, or prompt and response longer than the model's context.
            Stopped: S03 logits that are not a number.
        """
        self._check(requests)
        training = self.lm.module.training
        self.lm.module.eval()
        try:
            held = vision or self.cache
            return self._call(held, self._room(requests), requests, on_group).run()
        finally:
            self.lm.module.train(training)

    def sync(self, lm: VideoLM) -> None:
        """Nothing is copied: it samples from the weights that are trained."""
        if lm.whole is not self.lm:
            self.lm, self._decoder = lm.whole, None

    def close(self) -> None:
        """Give the buffers back."""
        self._decoder = None

    def _check(self, requests: Sequence[RolloutRequest]) -> None:
        if not requests or min(r.n for r in requests) < 1:
            what = "a rollout needs at least one request and n >= 1 responses each"
            raise ConfigError(Problem("VRLT-C04", what, "rollout.group_size"))
        for request in requests:
            length, reserve = len(request.prompt), request.sampling.max_new_tokens
            where = request.prompt.sample.line or request.prompt.sample.id
            if not length:
                raise DataError(Problem("VRLT-D10", "the prompt is empty", where))
            if length + reserve > self.lm.info.context:
                what = f"prompt of {length} tokens and response of {reserve} exceed the model's context"
                fix = "lower video.max_frames, video.max_pixels or rollout.max_new_tokens"
                raise DataError(Problem("VRLT-D10", what, where, f"it is {self.lm.info.context}", fix))

    def _needed(self, requests: Sequence[RolloutRequest]) -> tuple[KvShape, KvPlan, int]:
        """What buffers the requests want, and the budget. Raises ConfigError C04."""
        text, parameter = self.lm.info.config.text_config, self.lm.module.get_input_embeddings().weight
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        shape = KvShape(text.num_hidden_layers, text.num_key_value_heads, dim, parameter.dtype, parameter.device)
        if self._budget is None:  # what is free is looked at once: later the buffers themselves are in use
            self._budget = self._budget_of(shape)
        longest = max(r.sampling.max_new_tokens for r in requests)
        return shape, self._plan(shape, by_prompt(requests), longest, self._budget), self._budget

    def _budget_of(self, shape: KvShape) -> int:
        return budget_bytes(self.config.kv_gb, shape.device)

    def _room(self, requests: Sequence[RolloutRequest]) -> Decoder:
        """The buffers of the call before, where they suffice."""
        shape, plan, budget = self._needed(requests)
        kept = self._decoder.store if self._decoder is not None else None
        if self._decoder is None or kept is None or kept.shape != shape or not kept.plan.holds(plan):
            if kept is not None and kept.shape == shape:  # so that two kinds of steps don't take turns to make it anew
                both = plan.joined(kept.plan)
                plan = both if both.nbytes(shape) <= budget else plan
            self._decoder = kept = None  # the old buffers go before the new ones come
            self._decoder = self._decoder_of(shape, plan)
        self._decoder.begin()
        return self._decoder

    def fits(self, requests: Sequence[RolloutRequest]) -> bool:
        """Whether ``rollout.kv_gb`` has room for one row of each."""
        try:
            self._needed(requests)
        except ConfigError:
            return False
        return True

    def _plan(self, shape: KvShape, work: Sequence[Resident], length: int, budget: int) -> KvPlan:
        prefixes, rows = [len(r.prompt) for r in work], [len(r.waiting) for r in work]
        return plan_kv(shape, prefixes, rows, length, budget=budget, max_rows=self.config.max_rows)

    def _call(self, *given: Any) -> Call:
        return Call(self.lm, self.config, *given)

    def _decoder_of(self, shape: KvShape, plan: KvPlan) -> Decoder:
        return self.decoder_type(self.lm, KvStore(shape, plan), graphs=self.config.cuda_graphs)


@dataclass
class Call:
    """One call of generate."""

    lm: VideoLM
    config: RolloutConfig
    held: Embeddings | None
    decoder: Decoder
    requests: Sequence[RolloutRequest]
    on_group: Callable[[Group], None] | None

    def __post_init__(self) -> None:
        self.store = self.decoder.store
        self.stats = RolloutStats()
        self.pending = by_prompt(self.requests)
        self.resident: list[Resident] = []
        self.live: list[tuple[Resident, Row]] = []
        self.ending = Ending(self.lm.info, self.requests)
        self.collector = Collector(self.requests)
        longest = max(r.sampling.max_new_tokens for r in self.requests)
        self.uniforms = row_uniforms(row_seeds(self.requests), longest)
        samplings = {r.sampling for r in self.requests}
        self.one_kind = samplings.pop() if len(samplings) == 1 else None
        self.banned = torch.tensor(self.lm.info.visual_tokens, device=self.lm.device)
        self._vision: dict[str, VisionEmbeds] = {}

    def run(self) -> tuple[list[Group], RolloutStats]:
        while self.pending or self.live or any(r.waiting for r in self.resident):
            self._admit()
            begin = perf_counter()
            logits = self._decode()
            fresh = self._start_rows()
            if fresh:
                starts = self.lm.module.lm_head(torch.stack([r.last for r, _ in fresh if r.last is not None]))
                logits = starts if logits is None else torch.cat([logits, starts])
                self.live += fresh
                self.stats.most_rows = max(self.stats.most_rows, len(self.live))
            if logits is None:
                raise RuntimeError("no row runs and none can be admitted")
            self._draw(logits)
            self._spend("generate", begin)
        return [g for g in self.collector.groups if g is not None], self.stats

    def _spend(self, phase: str, since: float) -> None:
        if self.lm.device.type == "cuda":  # else the next phase would wait for this one's work
            torch.cuda.synchronize(self.lm.device)
        self.stats.spend(phase, since)

    def _admit(self) -> None:
        """Take in the next prompts while there is room for their prefix and a row."""
        free = self.store.free_slots - sum(len(r.waiting) for r in self.resident)
        fresh = []
        while self.pending and free > 0 and len(self.resident) < self.store.plan.prompts:
            start = self.store.take_prefix(len(self.pending[0].prompt))
            if start is None:
                break
            resident = self.pending.pop(0)
            resident.start = start
            free -= len(resident.waiting)
            fresh.append(resident)
        if fresh:
            self._encode(fresh)
            self._prefill(fresh)
            self.resident += fresh
            self.stats.most_resident = max(self.stats.most_resident, len(self.resident))

    def _encode(self, fresh: Sequence[Resident]) -> None:
        """Embeddings of the new prompts' clips, each clip once a call."""
        begin = perf_counter()
        clips = [c for r in fresh for c in r.prompt.media if c.key not in self._vision]
        found, encoded = encode_media(self.lm, clips, self.held)
        self._vision |= found
        self.stats.count(encoded)
        self._spend("encode", begin)

    def _prefill(self, fresh: Sequence[Resident]) -> None:
        begin = perf_counter()
        self._prefill_all(fresh)
        self.stats.prefills += len(fresh)
        self.stats.prefix_tokens_prefilled += sum(len(r.prompt) for r in fresh)
        wanted = {clip.key for r in self.pending for clip in r.prompt.media}
        self._vision = {key: value for key, value in self._vision.items() if key in wanted}
        self._spend("prefill", begin)

    def _prefill_all(self, fresh: Sequence[Resident]) -> None:
        pack: list[Resident] = []
        for resident in fresh:
            if pack and sum(len(r.prompt) for r in pack) + len(resident.prompt) > self.config.prefill_chunk:
                self._prefill_pack(pack)
                pack = []
            if len(resident.prompt) > self.config.prefill_chunk:
                self._prefill_long(resident)
            else:
                pack.append(resident)
        if pack:
            self._prefill_pack(pack)

    def _inputs(self, prompt: Prompt) -> Inputs:
        ids, positions, visual = (x.to(self.lm.device) for x in (prompt.ids, prompt.positions, prompt.visual))
        return make_inputs(self.lm, ids, positions, visual, in_order(self.lm, self._vision, prompt.media))

    def _prefill_pack(self, pack: Sequence[Resident]) -> None:
        """Whole prompts in one packed pass."""
        lengths = [len(r.prompt) for r in pack]
        spans = GroupSpans.of(lengths, [[] for _ in pack])
        places = torch.cat([torch.arange(r.start, r.start + n) for r, n in zip(pack, lengths, strict=True)])
        inputs = join([self._inputs(r.prompt) for r in pack])
        hidden = run_text(self.lm, inputs, PrefillPass(self.store, places.to(self.lm.device), spans))
        for resident, end in zip(pack, spans.starts[1:], strict=True):
            resident.last = hidden[end - 1].clone()

    def _prefill_long(self, resident: Resident) -> None:
        """One prompt, piece by piece, each behind what is in the arena already."""
        prompt, device, step = resident.prompt, self.lm.device, self.config.prefill_chunk
        inputs = self._inputs(prompt)
        for past in range(0, len(prompt), step):
            end = min(past + step, len(prompt))
            places = torch.arange(resident.start + past, resident.start + end, device=device)
            group_pass = PrefillPass(self.store, places, GroupSpans.of([end - past], [[]]), past, resident.start)
            hidden = run_text(self.lm, inputs.piece(past, end), group_pass)
        resident.last = hidden[-1].clone()

    def _start_rows(self) -> list[tuple[Resident, Row]]:
        """Rows that wait for a slot, as many as there are slots."""
        fresh = []
        for resident in self.resident:
            while resident.waiting and self.store.free_slots:
                row = resident.waiting.pop(0)
                row.slot = self.store.take_slot()
                resident.running += 1
                fresh.append((resident, row))
        return fresh

    def _decode(self) -> torch.Tensor | None:
        """Logits [rows, V] behind the rows' latest tokens; sorts the rows by prompt."""
        if not self.live:
            return None
        self.live.sort(key=lambda pair: pair[0].order)
        self.stats.decode_steps += 1
        logits, read = self.decoder.step(self.live)
        self.stats.prefix_tokens_read += read
        return logits

    def _draw(self, logits: torch.Tensor) -> None:
        """One token for every live row; rows that end leave."""
        uniforms = self.uniforms[[row.number for _, row in self.live], [len(row.tokens) for _, row in self.live]]
        tokens = torch.empty(len(self.live), dtype=torch.int64)
        logprobs = torch.empty(len(self.live))
        for sampling, mine in self._kinds():
            part, chance = (logits, uniforms) if mine is None else (logits[mine.to(logits.device)], uniforms[mine])
            drawn, sums = draw(part, chance.to(logits.device), sampling, self.banned)
            if mine is None:
                tokens, logprobs = drawn.cpu(), sums.cpu()
            else:
                tokens[mine], logprobs[mine] = drawn.cpu(), sums.cpu()
        tokens, logprobs = self._agreed(tokens, logprobs)
        still = []
        for pair, token, logprob in zip(self.live, tokens.tolist(), logprobs.tolist(), strict=True):
            if not math.isfinite(logprob):
                self._refuse(*pair)
            if self.ending.append(pair[1], token, logprob):
                self._finish(*pair)
            else:
                still.append(pair)
        self.stats.tokens_generated += len(self.live)
        self.live = still

    def _agreed(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What counts of what was drawn."""
        return tokens, logprobs

    def _kinds(self) -> list[tuple[Sampling, torch.Tensor | None]]:
        """The live rows by how they are drawn: their numbers, None for all of them."""
        if self.one_kind is not None:
            return [(self.one_kind, None)]
        kinds = [self.requests[row.request].sampling for _, row in self.live]
        return [(k, torch.tensor([i for i, kind in enumerate(kinds) if kind == k])) for k in dict.fromkeys(kinds)]

    def _refuse(self, resident: Resident, row: Row) -> None:
        sample = resident.prompt.sample
        raise Stopped(
            Problem(
                "VRLT-S03",
                f"logits of response token {len(row.tokens) + 1} are not numbers",
                where=sample.line or sample.id,
                why="weights or activations overflowed",
                fix="go on from an earlier checkpoint with a lower learning rate",
            )
        )

    def _finish(self, resident: Resident, row: Row) -> None:
        self.store.give_slot(row.slot)
        resident.running -= 1
        if resident.done:
            self.store.give_prefix(resident.start, len(resident.prompt))
            self.resident.remove(resident)
        group = self.collector.add(row, self.ending.completion(row))
        if group is not None and self.on_group:
            self.on_group(group)


def generate(lm: VideoLM, requests: Sequence[RolloutRequest]) -> tuple[list[Group], RolloutStats]:
    """One call of a :class:`GroupEngine` with default settings."""
    return GroupEngine(lm).generate(requests)
