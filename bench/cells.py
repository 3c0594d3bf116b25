"""What the case ``kernels`` measures: a cell is one shape of one stage, under a name that can be parsed back."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from bench.harness import BenchError

MODELS = {  # hidden size, vocabulary
    "tiny": (128, 1000),
    "0.6B": (1024, 151936),
    "3B": (2048, 151936),
    "7B": (3584, 152064),
    "8B": (4096, 151936),
}
STAGES = ("row", "linear")
LOSSES = ("grpo", "grpo-kl", "dapo", "gspo", "cispo")


@dataclass(frozen=True)
class Cell:
    """One shape. Its text is the shape of the records: ``linear 7B N=4096 grpo skip=0.4 frozen``.

    Args:
        stage: "row": logits given, gradient of the logits; "linear": hidden states and the head's weight given,
            gradients of both.
        tokens: rows with a loss.
        skip: share of the tokens in sequences of advantage 0, which earn no gradient.
        valid: tokens / (sequences x longest); peers that take [B, T] pay for the padding.
        frozen: no gradient of the head's weight.
    """

    stage: str
    model: str
    tokens: int
    loss: str = "grpo"
    skip: float = 0.0
    valid: float = 1.0
    frozen: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("stage", self.stage, STAGES),
            ("model", self.model, tuple(MODELS)),
            ("loss", self.loss, LOSSES),
        ):
            if value not in known:
                raise BenchError(f"{name} {value!r} is not one of {', '.join(known)}")
        if self.tokens < 8 or not 0 <= self.skip < 1 or not 0.5 < self.valid <= 1:
            raise BenchError(f"{self}: needs 8 tokens or more, 0 <= skip < 1, 0.5 < valid <= 1")

    def __str__(self) -> str:
        text = f"{self.stage} {self.model} N={self.tokens} {self.loss}"
        text += "".join(f" {name}={getattr(self, name):g}" for name in ("skip", "valid") if self.differs(name))
        return f"{text} frozen" if self.frozen else text

    def differs(self, name: str) -> bool:
        """Whether a field isn't its default."""
        default = next(f.default for f in fields(self) if f.name == name)
        return bool(getattr(self, name) != default)

    @classmethod
    def parse(cls, text: str) -> Cell:
        """The cell of this text. Raises BenchError."""
        words = text.split()
        try:
            stage, model, tokens, loss, *rest = words
            cell = cls(stage, model, int(tokens.removeprefix("N=")), loss)
            for word in rest:
                name, _, value = word.partition("=")
                changed: dict[str, Any] = {"frozen": True} if word == "frozen" else {name: float(value)}
                cell = replace(cell, **changed)
        except (ValueError, TypeError) as error:
            raise BenchError(f"cell {text!r}: {error}; it is written like 'linear 7B N=4096 grpo skip=0.4'") from error
        return cell

    @property
    def width(self) -> int:
        return MODELS[self.model][0]

    @property
    def vocab(self) -> int:
        return MODELS[self.model][1]

    @property
    def live(self) -> int:
        """Tokens that earn a gradient."""
        return self.tokens - round(self.skip * self.tokens)

    @property
    def flops(self) -> float:
        """Multiplications and additions of the head: 2 N V K for the logits, and as much for each gradient."""
        gradients = 1 if self.frozen else 2
        return 2.0 * self.vocab * self.width * (self.tokens + gradients * self.live)

    def passes(self, element: int) -> float:
        """Bytes of one read of the logits and one write of their gradient."""
        return 2.0 * self.tokens * self.vocab * element

    def small(self) -> Cell:
        """The same with few tokens, for parity."""
        return replace(self, tokens=32)


OURS = "ours"
EAGER = ("eager log_softmax", "eager logsumexp")
CPU = ("row 0.6B N=512 grpo", "linear 0.6B N=512 grpo", "linear 0.6B N=512 grpo skip=0.4")
_ALL = [f"{stage} 7B N=4096 {loss}" for loss in ("grpo", "gspo") for stage in ("linear", "row")]
_OVER_TOKENS = [f"{stage} 7B N={n} grpo" for n in (1024, 2048, 8192, 16384) for stage in ("linear", "row")]
_VARIANTS = [f"linear 7B N=4096 {rest}" for rest in ("grpo skip=0.4", "grpo frozen", "grpo-kl", "dapo", "cispo")]
_MODELS = [f"linear {model} N=4096 grpo" for model in ("3B", "8B")]
_ALONE = (OURS, f"{OURS} deferred", f"{OURS} (native)", f"{OURS} deferred (native)")

Plan = list[tuple[Cell, tuple[str, ...]]]
"""Cells, each with patterns of its arms' names."""


def plan(kind: str) -> Plan:
    """What is measured on "cpu" or "cuda", or to try it ("small"): the most important cells first."""
    if kind == "small":
        cells = ("row tiny N=40 grpo", "linear tiny N=40 grpo", "linear tiny N=40 gspo valid=0.6")
        return [(Cell.parse(text), ("*",)) for text in cells]
    if kind == "cpu":
        return [(Cell.parse(text), (OURS, *EAGER) if "skip" in text else ("*",)) for text in CPU]
    padded = [("linear 7B N=4096 grpo valid=0.6", (*_ALONE, "Liger Triton", "TRL"))]
    named = [(text, ("*",)) for text in _ALL] + [(text, _ALONE) for text in _OVER_TOKENS] + padded
    return [(Cell.parse(text), arms) for text, arms in [*named, *((text, _ALONE) for text in _VARIANTS + _MODELS)]]
