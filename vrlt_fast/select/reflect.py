"""``vrlt select reflect``: samples that are annotated in part only, found by asking the model for further times.

One greedy answer a sample, so that nothing is kept to go on from: a run that was stopped starts anew. The list is
written at the end, whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vrlt_fast.config import Config
from vrlt_fast.data.grammars.named import grammar
from vrlt_fast.data.quarantine import write_quarantine
from vrlt_fast.data.sample import Sample
from vrlt_fast.data.splits import training_samples
from vrlt_fast.errors import ConfigError, Problem, VrltError
from vrlt_fast.evals.run import Evaluation, answer_all, raise_failed
from vrlt_fast.select.curriculum import find_partial, reflection_prompt

PARTIAL = "VRLT-L04"


@dataclass(frozen=True)
class Reflected:
    """``asked`` samples with spans, and what became of them: ``partial`` ones, ``unread`` answers that name no span,
    ``failed`` ones without an answer. ``passed`` samples have no spans. The list has ``listed`` lines.
    """

    asked: int
    passed: int
    partial: int
    unread: int
    failed: list[VrltError]
    listed: int


def reflect(config: Config, out: Path, progress: Callable[[int, int], None] | None = None) -> Reflected:
    """Ask about the samples of ``data.train`` that have spans, and write ``out``, a list for ``data.quarantine``: the
    lines of the partially annotated ones (code L04) behind those of the ``data.quarantine`` that there is.

    Args:
        progress: called with the numbers of questions done and to do.

    Raises:
        VrltError: as the readers and the loader; C04 no sample has spans; D14 the grammar has no form for a time span;
            V codes where no video can be read.
    """
    samples = training_samples(config)
    own = [sample for sample in samples if sample.wants_spans]
    if not own:
        what, fix = "no sample has spans to ask about", "name a file with samples of grounding in data.train"
        raise ConfigError(Problem("VRLT-C04", what, config.data.train, fix=fix))
    questions = [reflection_prompt(sample) for sample in own]
    for question in questions:
        grammar(config.prompt.grammar).check(question)
    result = _answers(config, questions, progress)
    if not result.rows:
        raise_failed(result)
    by_question = {question.id: sample.id for question, sample in zip(questions, own, strict=True)}
    said = {by_question[row["id"]]: one.spans for row, one in zip(result.rows, result.scored["greedy"], strict=True)}
    partial = set(find_partial({name: spans for name, spans in said.items() if spans}, own))
    rejected = {int(s.line.rpartition(":")[2]): [PARTIAL] for s in own if s.id in partial}
    before = Path(config.data.quarantine) if config.data.quarantine else None
    listed = write_quarantine(out, Path(config.data.train), rejected, kept=before)
    unread = sum(not spans for spans in said.values())
    return Reflected(len(own), len(samples) - len(own), len(partial), unread, result.failed, listed)


def _answers(
    config: Config, questions: Sequence[Sample], progress: Callable[[int, int], None] | None = None
) -> Evaluation:
    """One greedy answer to each."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    greedy = config.model_copy(update={"eval": config.eval.model_copy(update={"responses": 0})})
    return answer_all(greedy, questions, progress, split="train")
