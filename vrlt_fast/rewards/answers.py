"""What an answer that isn't a letter earns: numbers, texts to read, texts in own words, mathematics."""

from __future__ import annotations

import importlib
import logging
import math
import re
import warnings
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

from vrlt_fast.data.sample import LETTERS
from vrlt_fast.errors import Problem, SetupError

LONGEST = 4_000
"""Characters of an answer that are read; a longer one earns 0: ROUGE-L takes time with the product of both lengths."""

TextReward = Callable[[str, str], float]
"""``reward(answer, truth)`` in 0..1."""

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?", re.ASCII)
_LONGEST_NUMBER = 64
_LONGEST_TERM = 64
_TERM = re.compile(
    r"(?:[0-9.,+\-/() {}$]|\*(?!\s*\*)|\\frac|\\sqrt|\\times|\\cdot|\\pi|\\boxed|\\?%)*"
    r"(?:\^(?:\{-?[0-9]{1,2}\}|-?[0-9]{1,2}(?![0-9])))?"
    r"(?:[0-9.,+\-/() {}$]|\*(?!\s*\*)|\\frac|\\sqrt|\\times|\\cdot|\\pi|\\boxed|\\?%)*"
)
_LETTER = re.compile(rf"(?<![A-Za-z])[{LETTERS}](?![A-Za-z])")


def number(answer: str, truth: str) -> float:
    """1.0 where two numbers are equal after rounding to two decimals, else 0.0 (tulerfeng/Video-R1).

    Commas are left out. 0.0 as well where one of the texts has a "." or "," and the other has none ("3" isn't "3.0"),
    and where either isn't a finite number of ASCII digits: a percent sign or a unit isn't part of one.
    """
    if ("." in answer or "," in answer) != ("." in truth or "," in truth):
        return 0.0
    p, g = _number(answer), _number(truth)
    return float(p is not None and g is not None and round(p, 2) == round(g, 2))


def regression(answer: str, truth: str) -> float:
    """``1 - clip((|p - g| + 1e-9) / (|g| + 1e-9), 0, 1)`` of two numbers, in 0..1 (tulerfeng/Video-R1).

    Numbers as in :func:`number`, 0.0 where either is none. Where the truth is 0 everything earns 0, as released.
    """
    p, g = _number(answer), _number(truth)
    if p is None or g is None:
        return 0.0
    return 1 - min(max((abs(p - g) + 1e-9) / (abs(g) + 1e-9), 0.0), 1.0)


def word_accuracy() -> TextReward:
    """The reward of texts to read: 1 - WER, in 0..1; WER is jiwer's: the edit distance in words, over the words of the
    truth (at least one), as tulerfeng/Video-R1 has it. Words are what blanks divide; case counts.

    Raises:
        SetupError: E01 without jiwer.
    """
    jiwer = _load("jiwer", "jiwer")

    def reward(answer: str, truth: str) -> float:
        if len(answer) > LONGEST:
            return 0.0
        words = truth.split()
        found = jiwer.process_words(" ".join(words), " ".join(answer.split()))
        edits: int = found.substitutions + found.deletions + found.insertions
        return max(0.0, 1 - edits / max(1, len(words)))

    return reward


def rouge() -> TextReward:
    """The reward of answers in own words: mean F of ROUGE-1, -2 and -L with stemming, in 0..1 (tulerfeng/Video-R1).

    rouge-score's words are of ASCII letters and digits: texts without such earn 0.

    Raises:
        SetupError: E01 without rouge-score.
    """
    scorers, tokenizers = (
        _load("rouge_score.rouge_scorer", "rouge-score"),
        _load("rouge_score.tokenizers", "rouge-score"),
    )
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = scorers.RougeScorer(kinds, tokenizer=_Remembered(tokenizers.DefaultTokenizer(use_stemmer=True)))

    def reward(answer: str, truth: str) -> float:
        if len(answer) > LONGEST:
            return 0.0
        found = scorer.score(truth, answer)
        mean: float = sum(found[kind].fmeasure for kind in kinds) / len(kinds)
        return min(1.0, max(0.0, mean))

    return reward


def mathematics() -> TextReward:
    """1.0 where two texts mean the same, else 0.0, as SEED-Bench-R1, TW-GRPO and VerIPO ask it: equal for math-verify,
    else the same first letter of options that stands alone, where the truth is a letter, else the same text.

    math-verify stops what takes too long by a signal, which works in a main thread only, so its limits are off here.
    Instead it is asked about nothing that can take long: at most 64 characters of numbers, + - * /, brackets, roots and
    fractions, and one power with an exponent of at most two digits. Other texts are compared as texts. The slowest of
    100,000 random terms took half a second.

    Raises:
        SetupError: E01 without math-verify.
    """
    library = _load("math_verify", "math-verify")
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that limits are off
    # of terms without a meaning that policies write
    warnings.filterwarnings("ignore", category=_load("sympy.utilities.exceptions", "sympy").SymPyDeprecationWarning)

    @lru_cache(1024)
    def parsed(text: str) -> list[object]:
        term = f"${text}$" if "\\" in text and "$" not in text else text
        return list(library.parse(term, fallback_mode="no_fallback", parsing_timeout=None))

    def reward(answer: str, truth: str) -> float:
        answer, truth = answer.strip(), truth.strip()
        if not answer or not truth or len(answer) > LONGEST:
            return 0.0
        if _is_term(answer) and _is_term(truth):
            same = library.verify(parsed(truth), parsed(answer), timeout_seconds=None)
            return float(same or answer == truth)
        if len(truth) == 1 and truth in LETTERS and (letter := _LETTER.search(answer)):
            return float(letter[0] == truth)
        return float(answer.casefold() == truth.casefold())

    return reward


class _Remembered:
    """A tokenizer of rouge-score that remembers texts: the truths come again for each response of a group."""

    def __init__(self, tokenizer: Any):
        self.tokenize = lru_cache(256)(tokenizer.tokenize)


def _number(text: str) -> float | None:
    text = text.strip().replace(",", "")
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def _is_term(text: str) -> bool:
    if len(text) > _LONGEST_TERM or not _TERM.fullmatch(text):
        return False
    return any(c.isdigit() for c in text) and not ("^" in text and "%" in text)  # 3%^{99} takes more than a second


def _load(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fix = "pip install 'vrlt-fast[rewards]'"
        what = f"the package {package} is not installed"
        raise SetupError(Problem("VRLT-E01", what, "reward", str(error), fix)) from error
