"""Question-answer inversion (TW-GRPO, arXiv 2505.24718): a negated question makes several options right."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import replace

from vrlt_fast.data.options import reordered, shuffled_options
from vrlt_fast.data.sample import LETTERS, Sample

NEGATED = {
    "did": "didn't", "does": "doesn't", "do": "don't", "is": "isn't", "are": "aren't", "was": "wasn't",
    "were": "weren't", "can": "can't", "could": "couldn't", "will": "won't", "would": "wouldn't", "should": "shouldn't",
}  # fmt: skip
"""How an auxiliary verb is negated. The first seven are the official table."""
_WORD = re.compile(r"[A-Za-z]+(?:['\u2019][A-Za-z]+)*")
_ASKS = ("what", "who", "where", "why", "how", "which", "when")


def negated(question: str) -> str | None:
    """The question with its first auxiliary verb negated ("Why did he sit?": "Why didn't he sit?"), "What's" as "What
    isn't"; None when there is none, or a negation already.

    The official script looks at the second word alone, in lower case.
    """
    words = list(_WORD.finditer(question))
    plain = [word[0].lower().replace("\u2019", "'") for word in words]
    if any(text.endswith("n't") or text in ("not", "never") for text in plain):
        return None
    for word, text in zip(words, plain, strict=True):
        if text.removesuffix("'s") in _ASKS and text.endswith("'s"):
            return f"{question[: word.start()]}{word[0][:-2]} isn't{question[word.end() :]}"
        if text in NEGATED:
            found = NEGATED[text]
            found = found.capitalize() if word[0][0].isupper() else found
            return question[: word.start()] + found + question[word.end() :]
    return None


def inverted(sample: Sample, seed: int) -> Sample | None:
    """The sample with its question negated: what was wrong is right, and the other way round.

    The right options stay, now wrong, with a random non-empty part of the wrong ones, now right, in random order; the
    answer has the letters of those, as "B,C". The id gets "-not" at its end. ``seed`` and the id fix all choices. None
    when the sample asks for no options or for spans too, has no wrong option, or a question that can't be negated.
    """
    question = negated(sample.question) if sample.task == "videoqa" else None
    right = [index for index in range(len(sample.options)) if LETTERS[index] in sample.letters]
    wrong = [index for index in range(len(sample.options)) if index not in right]
    if question is None or not right or not wrong:
        return None
    chance = random.Random(f"invert {seed} {sample.id}")
    kept = chance.sample(wrong, chance.randint(1, len(wrong)))
    order = [*right, *kept]
    chance.shuffle(order)
    answer = ",".join(LETTERS[new] for new, old in enumerate(order) if old in kept)
    made = reordered(sample, order)
    return replace(made, id=f"{sample.id}-not", question=question, answer=answer, reasoning="")


def prepared(samples: Iterable[Sample], *, shuffle_options: bool, invert: float, seed: int) -> list[Sample]:
    """The samples as a run trains on them: a share ``invert`` (0..1) of those whose question can be inverted is, and
    the others' options are shuffled if wanted. ``seed`` and the id of a sample fix what becomes of it.
    """
    found = []
    for sample in samples:
        chosen = invert > 0 and random.Random(f"chosen {seed} {sample.id}").random() < invert
        other = inverted(sample, seed) if chosen else None
        found.append(other or (shuffled_options(sample, seed) if shuffle_options else sample))
    return found
