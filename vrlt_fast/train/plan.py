"""Which responses go through the model together in the update, and what to do where memory isn't enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from vrlt_fast.errors import Problem, SetupError
from vrlt_fast.train.scored import ScoredGroup

T = TypeVar("T")
MicroBatch = list[ScoredGroup]
Unit = list[MicroBatch]
"""Micro-batches whose prompts are computed once: one micro-batch of whole groups, or the pieces of one group."""


def update_units(
    scored: Sequence[ScoredGroup], micro_rows: int, micro_tokens: int = 0, *, whole: bool = False
) -> list[Unit]:
    """Groups in order, packed into micro-batches of at most ``micro_rows`` responses, but at least one group.

    With ``micro_tokens`` a micro-batch has no more tokens of prompts and responses either: a group that is larger alone
    is cut between its responses, down to one response, unless groups are to stay ``whole``.
    """
    out: list[Unit] = []
    rows = tokens = 0
    for group in scored:
        pieces = list(_pieces(group, 0 if whole else micro_tokens))
        size, n = piece_tokens(group), len(group.trained)
        if len(pieces) > 1:
            out.append([[piece] for piece in pieces])
            rows = micro_rows  # nothing joins the last piece
            continue
        if not out or rows + n > micro_rows or (micro_tokens and tokens + size > micro_tokens):
            out.append([[]])
            rows = tokens = 0
        out[-1][0].append(group)
        rows, tokens = rows + n, tokens + size
    return out


def piece_tokens(group: ScoredGroup) -> int:
    """Tokens of the prompt and of the responses in the loss."""
    return len(group.group.request.prompt) + group.tokens


def largest(units: Sequence[Unit]) -> int:
    """Tokens of the largest micro-batch, with its prompts."""
    return max((sum(map(piece_tokens, batch)) for unit in units for batch in unit), default=0)


def _pieces(group: ScoredGroup, most: int) -> Iterator[ScoredGroup]:
    if not most or piece_tokens(group) <= most:
        yield group
        return
    prompt, tokens = len(group.group.request.prompt), 0
    rows: list[int] = []
    for i in group.trained:
        n = len(group.group.completions[i].tokens)
        if rows and prompt + tokens + n > most:
            yield replace(group, trained=tuple(rows))
            rows, tokens = [], 0
        rows.append(i)
        tokens += n
    yield replace(group, trained=tuple(rows))


def fitting(
    run: Callable[[int], T],
    scored: Sequence[ScoredGroup],
    micro_rows: int,
    micro_tokens: int,
    *,
    undo: Callable[[], None],
    sp: int = 1,
    together: int = 1,
    whole: bool = False,
) -> tuple[T, int, int]:
    """``run(micro_tokens)``; where memory runs out, ``undo()`` and once more with half of the largest micro-batch.

    Args:
        sp: processes that share a pass.
        together: processes that make all passes together. With several, of either kind, there is no second time: others
            wait in the middle of the first.
        whole: groups aren't cut.

    Returns:
        what it returned, the limit it ran with, and how often memory ran out.

    Raises:
        SetupError: E05 one response and its prompt don't fit.
    """
    failures = 0
    while True:
        try:
            return run(micro_tokens), micro_tokens, failures
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            why = (str(error).splitlines() or [type(error).__name__])[0]
        failures += 1
        undo()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        many = max(sp, together)
        if many > 1:
            before = largest(update_units(scored, micro_rows, micro_tokens * sp, whole=whole)) // sp
            what = f"out of memory in an update that {many} processes share, each with {before} tokens of a micro-batch"
            fix = f"set train.micro_tokens = {max(before // 2, 1)} or train.recompute = true, or raise parallel.sp"
            raise SetupError(Problem("VRLT-E05", what, "train.micro_tokens", why, fix))
        before = largest(update_units(scored, micro_rows, micro_tokens, whole=whole))
        micro_tokens = max(before // 2, 1)
        if largest(update_units(scored, micro_rows, micro_tokens, whole=whole)) >= before:
            what = f"out of memory in the update, with micro-batches of {before} tokens, which can't be cut further"
            fix = "set train.recompute = true, lower video.max_frames or video.max_pixels, or allow shorter responses"
            raise SetupError(Problem("VRLT-E05", what, "train.micro_tokens", why, fix))


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in host memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)
