"""The order of options: one of its own for each question, so that letters say nothing (SEED-Bench-R1 shuffles at load,
arXiv 2503.24376).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from vrlt_fast.data.sample import LETTERS, Sample


def shuffled_options(sample: Sample, seed: int) -> Sample:
    """The sample with its options in an order that ``seed`` and its id fix, the letters of the answer with them.

    A sample without options is returned as it is.
    """
    if not sample.wants_answer:
        return sample
    order = list(range(len(sample.options)))
    random.Random(f"options {seed} {sample.id}").shuffle(order)
    return reordered(sample, order)


def reordered(sample: Sample, order: Sequence[int]) -> Sample:
    """The sample with those of its options, in that order; ``order`` has their old indices. Right ones stay right."""
    right = [LETTERS[new] for new, old in enumerate(order) if LETTERS[old] in sample.letters]
    return replace(sample, options=tuple(sample.options[old] for old in order), answer=",".join(right))
