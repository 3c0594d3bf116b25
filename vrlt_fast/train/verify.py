"""``train.verify_shared_prefix``: the update's passes against replicated rows, once, on the run's model and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vrlt_fast.config import Config
from vrlt_fast.errors import Problem, SetupError
from vrlt_fast.model.layout import response_row
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.replicated import PrefixCheck, verify_shared_prefix
from vrlt_fast.parallel.replicas import Replicas
from vrlt_fast.train.plan import out_of_memory, update_units
from vrlt_fast.train.scored import ScoredGroup

TOLERANCE = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.25, 0.25)}
"""Largest difference of a log-prob in nats, and of a parameter's gradient over its norm, by dtype of the weights. A
wrong mask or position makes them hundreds of times what rounding does in fp32."""
ROWS = 2
WHERE = "train.verify_shared_prefix"


def check_prefix(
    lm: VideoLM,
    scored: Sequence[ScoredGroup],
    config: Config,
    replicas: Replicas,
    say: Callable[[str], None],
    *,
    micro_tokens: int,
) -> None:
    """Compare one group of this process, with at most two responses, packed or staged as ``micro_tokens`` has it.

    Gradients that the parameters hold are dropped; nothing else is changed.

    Raises:
        SetupError: in all processes, with what each has found: E06 the two differ, E05 out of memory.
    """
    found = [outcome for outcome in replicas.gather(_outcome(lm, scored, config, micro_tokens)) if outcome is not None]
    problems = [outcome for outcome in found if isinstance(outcome, Problem)]
    if problems:
        raise SetupError(problems)
    checks = [outcome for outcome in found if isinstance(outcome, PrefixCheck)]
    if checks:
        worst = max(checks, key=lambda check: check.gradient)
        logprob = max(check.logprob for check in checks)
        say(
            f"shared prefix verified against replicated rows: log-probs differ by {logprob:.2g} nat at most, gradients "
            f"by {worst.gradient:.2g} ({worst.parameter})"
        )


def _outcome(
    lm: VideoLM, scored: Sequence[ScoredGroup], config: Config, micro_tokens: int
) -> PrefixCheck | Problem | None:
    """None: this process has no response to compare."""
    chosen = next((s for s in scored if any(c.tokens for c in s.group.completions)), None)
    if chosen is None:
        return None
    prompt = chosen.group.request.prompt
    rows = [response_row(prompt, c.tokens) for c in chosen.group.completions if c.tokens][:ROWS]
    staged = len(update_units([chosen], config.train.micro_rows, micro_tokens)[0]) > 1
    try:
        check = verify_shared_prefix(lm, [prompt], [rows], config.rollout.temperature, piece=int(staged))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        what = f"out of memory where {len(rows)} responses with copies of their prompt are compared"
        fix = f'set {WHERE} = "off", or train.recompute = true'
        return Problem("VRLT-E05", what, WHERE, (str(error).splitlines() or [type(error).__name__])[0], fix)
    return _refused(check, lm, prompt.sample.id) or check


def _refused(check: PrefixCheck, lm: VideoLM, sample: str) -> Problem | None:
    logprob, gradient = TOLERANCE.get(lm.dtype, TOLERANCE[torch.float32])
    if check.logprob <= logprob and check.gradient <= gradient:  # not so for NaN either
        return None
    what = f"the shared prefix differs from replicated rows: log-probs by {check.logprob:.3g} nat, gradients by "
    what += f"{check.gradient:.3g}, most that of {check.parameter}"
    why = f"sample {sample}; {str(lm.dtype).removeprefix('torch.')} allows {logprob:g} nat and {gradient:g}"
    fix = f'please report it; until then train with train.prefix = "replicated" and {WHERE} = "off"'
    return Problem("VRLT-E06", what, WHERE, why, fix)
