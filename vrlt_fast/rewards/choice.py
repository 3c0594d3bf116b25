"""What the letters of chosen options earn."""

from __future__ import annotations

from collections.abc import Set

from vrlt_fast.data.sample import LETTERS


def chosen(answer: str | None) -> frozenset[str]:
    """The letters of an answer as "B" or "A,C"; empty where none was said or one isn't a letter of options."""
    letters = frozenset((answer or "").split(","))
    return letters if letters <= frozenset(LETTERS) else frozenset()


def exact(answer: str | None, right: Set[str]) -> float:
    """1.0 where all right letters were chosen and no other, else 0.0. The order and repeats don't count."""
    return float(bool(right) and chosen(answer) == right)


def soft(answer: str | None, right: Set[str]) -> float:
    """The share of the right letters that were chosen, in 0..1; 0.0 with a wrong one among them.

    TW-GRPO (longmalongma/TW-GRPO): of a part of the right letters, the number chosen over the number right.
    """
    letters = chosen(answer)
    return len(letters) / len(right) if letters and letters <= right else 0.0
