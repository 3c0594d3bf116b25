"""Rollouts by vLLM in the trainer's process: our embeddings and prompt ids in, one request a group, the trainer's
weights handed over in memory before each step.

The trainer's tower makes the embeddings, so vLLM holds the language model only. vLLM lays out the positions itself, by
the model's release rule; what it is told of time is chosen so that they are the prompt's.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import torch

from vrlt_fast.config import VllmConfig
from vrlt_fast.errors import Problem, SetupError
from vrlt_fast.model.embed_cache import EmbeddingCache
from vrlt_fast.model.load import ModelInfo, VideoLM
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.model.vision import Embeddings, StepVision, encode_media
from vrlt_fast.rewards.base import Response
from vrlt_fast.rollout.group import Completion, Group, RolloutRequest, RolloutStats
from vrlt_fast.rollout.sampler import Sampling
from vrlt_fast.video.preprocess import Clip

FAMILIES = ("qwen2_5_vl",)
_ENVIRONMENT = {
    # weights go over by reference, which needs vLLM's engine in this process
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR"}  # each sync warns of the layers that have no weights of their own


def check_vllm(family: str) -> None:
    """Raises SetupError E01 where vLLM isn't installed, M02 where the adapter doesn't know the model's family."""
    if find_spec("vllm") is None:
        why, fix = "rollout.engine is vllm", 'pip install "vllm==0.32.*", or set rollout.engine = "group"'
        raise SetupError(Problem("VRLT-E01", "the package vllm is not installed", "rollout.engine", why, fix))
    if family not in FAMILIES:
        why, fix = f"it knows {', '.join(FAMILIES)}", 'set rollout.engine = "group"'
        raise SetupError(Problem("VRLT-M02", f"the vLLM engine can't run {family!r}", "rollout.engine", why, fix))


class VllmEngine:
    """vLLM beside the trainer's model, on the same device and in the same dtype.

    :meth:`sync` comes before the first :meth:`generate` and after every change of the weights.
    """

    def __init__(self, lm: VideoLM, options: VllmConfig, cache: EmbeddingCache | None = None, **engine_args: object):
        """Start vLLM without weights.

        Args:
            lm: the trainer's model, whose weights :meth:`sync` hands over.
            cache: of a frozen tower's embeddings.
            engine_args: further arguments of ``vllm.LLM``, over those made from ``options``.

        Raises:
            SetupError: as :func:`check_vllm`; E01 where vLLM can't be imported, E04 where it doesn't start.
        """
        check_vllm(lm.info.family)
        self._lm, self._cache = lm, cache
        self._sync_seconds: float | None = None
        self._scale = 1.0
        if torch.distributed.is_initialized():  # vLLM would take it for its own, and end it when it stops
            raise _no_start("there is a process group already", "train in one process, with one vLLM at a time")
        threads = torch.get_num_threads()
        python_state = random.getstate()
        with torch.random.fork_rng():  # vLLM seeds the whole process
            self._llm = _start(lm, options, engine_args)
        random.setstate(python_state)
        if torch.get_num_threads() != threads:  # vLLM takes one thread for itself, the trainer needs its own
            torch.set_num_threads(threads)

    def sync(self, lm: VideoLM) -> None:
        """Hand over ``lm``'s weights as they are now, and forget what vLLM computed from the old ones.

        All three caches have to go: without that vLLM answers from keys and values of the old weights, and with the
        prefix cache's alone it looks for embeddings that the reload has thrown away.
        """
        start = perf_counter()
        self._lm = lm
        weights = [(name, p.detach()) for name, p in lm.module.named_parameters() if ".visual." not in name]
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._llm.apply_model(_repack_tied_head)
        self._llm.llm_engine.reset_encoder_cache()
        self._llm.reset_mm_cache()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: requests are still running")
        self._sync_seconds = perf_counter() - start

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[RolloutRequest],
        on_group: Callable[[Group], None] | None = None,
        vision: StepVision | None = None,
    ) -> tuple[list[Group], RolloutStats]:
        """Sample all requests.

        Seeds fix the tokens whatever else is in the batch, but vLLM draws its own numbers: they aren't those of
        :func:`vrlt_fast.rollout.engine.generate`. Log-probs are those of the full softmax at the temperature, visual
        tokens included, and don't depend on ``top_p``, ``top_k`` and ``min_p``.

        Args:
            on_group: called with each group, in order, once all are complete.
            vision: of a trained tower, whose embeddings the update goes on with.

        Raises:
            ValueError: no request, or n < 1.
            RuntimeError: no :meth:`sync` before, or vLLM made other prompt ids than ours.
        """
        if not requests or min(r.n for r in requests) < 1:
            raise ValueError("generate needs at least one request, and n >= 1")
        if self._sync_seconds is None:
            raise RuntimeError("sync comes before generate: vLLM has no weights yet")
        prompts = [r.prompt for r in requests]
        begin = perf_counter()
        embeds, fresh = self._encode(prompts, vision or self._cache)
        encoded = perf_counter()
        before = self._prefix_counts()
        outputs = self._sample(requests, embeds)
        groups = [self._group(r, o) for r, o in zip(requests, outputs, strict=True)]
        queries, hits = (now - then for now, then in zip(self._prefix_counts(), before, strict=True))
        stats = RolloutStats(
            clips_encoded=len(fresh),
            frames_encoded=sum(len(c.times) for c in fresh),
            prefills=len(requests),
            tokens_generated=sum(len(c.tokens) for g in groups for c in g.completions),
            prefix_tokens_prefilled=queries - hits,
            seconds={"sync": self._sync_seconds, "encode": encoded - begin},
        )
        self._sync_seconds = 0.0
        for group in groups if on_group else ():
            on_group(group)  # type: ignore[misc]
        stats.spend("generate", encoded)
        return groups, stats

    def close(self) -> None:
        """Stop vLLM and give its memory back."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def _encode(self, prompts: Sequence[Prompt], held: Embeddings | None) -> tuple[list[torch.Tensor], list[Clip]]:
        """Embeddings [visual tokens, hidden] of each prompt's clip on the host, and the clips that were encoded."""
        for prompt in prompts:
            if [clip.kind for clip in prompt.media] != ["video"]:
                what, where = "the vLLM engine takes prompts of one video", prompt.sample.line or prompt.sample.id
                why = f"this one shows {len(prompt.media)} videos and images"
                fix = 'set prompt.images = false, or rollout.engine = "group"'
                raise SetupError(Problem("VRLT-M02", what, where, why, fix))
        training = self._lm.module.training
        self._lm.module.eval()
        try:
            found, fresh = encode_media(self._lm, [p.clip for p in prompts], held)
        finally:
            self._lm.module.train(training)
        on_host = {key: tokens.embeds.detach().cpu() for key, tokens in found.items()}
        return [on_host[p.clip.key] for p in prompts], fresh

    def _sample(self, requests: Sequence[RolloutRequest], vision: Sequence[torch.Tensor]) -> list[Any]:
        """vLLM's answers to the requests, in their order; a call of vLLM for each temperature."""
        found: dict[int, Any] = {}
        for temperature in dict.fromkeys(r.sampling.temperature for r in requests):
            self._set_scale(temperature)
            some = [i for i, r in enumerate(requests) if r.sampling.temperature == temperature]
            outputs = self._llm.generate(
                [vllm_prompt(self._lm.info, requests[i].prompt, vision[i]) for i in some],
                [_sampling_params(self._lm.info, requests[i]) for i in some],
                use_tqdm=False,
            )
            found |= zip(some, outputs, strict=True)
        return [found[i] for i in range(len(requests))]

    def _set_scale(self, temperature: float) -> None:
        """Make vLLM's logits those at the temperature, which it then samples at 1: its log-probs are either raw,
        without temperature, or what is left after top-p and top-k, and neither is what training scores.
        """
        scale = 1.0 / (temperature or 1.0)
        if scale != self._scale:
            self._llm.apply_model(lambda model: setattr(model.language_model.logits_processor, "scale", scale))
            self._scale = scale

    def _prefix_counts(self) -> tuple[int, int]:
        """Prompt tokens looked up in the prefix cache so far, and those found there."""
        values = {m.name: m.value for m in self._llm.get_metrics() if m.name.startswith("vllm:prefix_cache_")}
        return int(values["vllm:prefix_cache_queries"]), int(values["vllm:prefix_cache_hits"])

    def _group(self, request: RolloutRequest, output: Any) -> Group:
        if list(output.prompt_token_ids) != request.prompt.ids.tolist():
            raise RuntimeError(f"vLLM made other prompt ids than ours for {request.prompt.sample.id}")
        made = [self._completion(c) for c in sorted(output.outputs, key=lambda c: c.index)]
        return Group(request, tuple(made * request.n if len(made) < request.n else made))  # greedy: asked for once

    def _completion(self, output: Any) -> Completion:
        info, tokens = self._lm.info, tuple(output.token_ids)
        logprobs = torch.tensor([step[t].logprob for step, t in zip(output.logprobs, tokens, strict=True)])
        body = tokens[:-1] if tokens[-1] in info.stop_tokens else tokens
        text = info.tokenizer.decode(body, skip_special_tokens=False)
        return Completion(Response(text, len(tokens), output.finish_reason), tokens, logprobs)


def vllm_prompt(info: ModelInfo, prompt: Prompt, vision: torch.Tensor) -> dict[str, Any]:
    """What vLLM takes of a prompt with embeddings ``vision`` [visual tokens, hidden]: ids with one pad token a video,
    and a video for each run of pad tokens (interleaved: one a temporal grid).
    """
    runs = [(token, len(list(run))) for token, run in itertools.groupby(prompt.ids.tolist())]
    ids = [i for token, n in runs for i in ([token] if token == info.video_token else [token] * n)]
    t, h, w = prompt.clip.grid
    videos = sum(token == info.video_token for token, _ in runs)
    grids = [(t // videos, h, w)] * videos
    return {
        "prompt_token_ids": ids,
        "multi_modal_data": {
            "video": {
                "video_embeds": vision,
                "video_grid_thw": torch.tensor(grids),
                "second_per_grid_ts": torch.full((videos,), _seconds_per_grid(info, prompt), dtype=torch.float64),
            }
        },
    }


def _seconds_per_grid(info: ModelInfo, prompt: Prompt) -> float:
    """Seconds that give vLLM the temporal positions of the prompt: the middle of those that do, so that rounding in
    another order or precision than ours can't move a grid.
    """
    t = prompt.clip.grid[0]
    if prompt.asked.video_layout == "interleaved" or t == 1:  # every video is one temporal grid
        return prompt.clip.seconds_per_grid
    places: list[int] = prompt.positions[0, prompt.visual].view(t, -1)[:, 0].tolist()
    steps = [place - places[0] for place in places]
    low = max(step / i for i, step in enumerate(steps) if i)
    high = min((step + 1) / i for i, step in enumerate(steps) if i)
    per_second: float = getattr(info.config.vision_config, "tokens_per_second", 1)
    return (low + high) / 2 / per_second


def _start(lm: VideoLM, options: VllmConfig, engine_args: dict[str, object]) -> Any:
    os.environ.update(_ENVIRONMENT)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM
    except (ImportError, OSError) as error:
        fix = 'mend the installation, or set rollout.engine = "group"'
        problem = Problem("VRLT-E01", "vllm can't be imported", "rollout.engine", str(error).splitlines()[0], fix)
        raise SetupError(problem) from error
    arguments: dict[str, object] = {
        "model": lm.info.path,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "max_model_len": options.max_model_len or lm.info.context,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enforce_eager": options.enforce_eager,
        "enable_prefix_caching": True,
        "enable_mm_embeds": True,
        "limit_mm_per_prompt": {"image": 0, "video": 0},  # embeddings only: the tower isn't loaded
        "load_format": "dummy",  # what a sync leaves out is noise, not weights that look right
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": False,  # the counters of the prefix cache
    }
    if options.max_batched_tokens:
        arguments["max_num_batched_tokens"] = options.max_batched_tokens
    try:
        return LLM(**(arguments | engine_args))
    except (RuntimeError, ValueError) as error:  # no room for the weights, or for one response of max_model_len
        fix = "change vllm.gpu_memory_utilization or vllm.max_model_len"
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and "pydantic.dev" not in line]
        raise _no_start(lines[-1] if lines else type(error).__name__, fix) from error


def _no_start(why: str, fix: str) -> SetupError:
    return SetupError(Problem("VRLT-E04", "vLLM doesn't start", "rollout.engine", why, fix))


def _repack_tied_head(model: Any) -> None:
    """On the CPU vLLM packs the head's weight once more for its matrix product, and packs it again only where it is
    loaded by its name, which a tied one never is.
    """
    head = model.language_model.lm_head
    if head.weight.device.type == "cpu":
        head.quant_method.process_weights_after_loading(head)


def _sampling_params(info: ModelInfo, request: RolloutRequest) -> Any:
    from vllm import SamplingParams

    sampling: Sampling = request.sampling
    greedy = sampling.temperature == 0.0
    return SamplingParams(
        n=1 if greedy else request.n,  # vLLM refuses equal rows
        seed=request.seed * 1_000_003 % 2**62,  # row i gets seed + i
        temperature=0.0 if greedy else 1.0,  # the logits are scaled already
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_new_tokens,
        logprobs=0,  # the sampled token's
        stop=list(sampling.stop),
        stop_token_ids=list(info.stop_tokens),
        ignore_eos=True,  # the stop tokens are ours
        logit_bias=dict.fromkeys(info.visual_tokens, float("-inf")),
        detokenize=bool(sampling.stop),
        skip_special_tokens=False,
    )
