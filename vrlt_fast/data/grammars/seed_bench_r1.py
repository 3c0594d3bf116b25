"""SEED-Bench-R1 (github.com/TencentARC/SEED-Bench-R1): the first character of the answer decides.

As the released reward does, the letter is the first character of the first answer tag ("B. cut the onion", but also
"Because"). Its other way to be right, math-verify on the whole text, is left out. The form is that of its format
reward, which the main run doesn't use: think and answer tags at the start; what follows them doesn't matter.
"""

from __future__ import annotations

from vrlt_fast.data.grammars import pieces
from vrlt_fast.data.grammars.base import Parsed
from vrlt_fast.data.sample import LETTERS, Sample

_ASKS = {"videoqa": "Then give the final answer, which starts with the letter of the option: <answer>letter</answer>"}


class SeedBenchR1(pieces.Wording):
    """One option."""

    name = "seed_bench_r1"
    asks = _ASKS
    thinks = "Write down your thinking between <think> and </think>. "
    single = True

    def read(self, text: str, sample: Sample, *, think: bool) -> Parsed:
        """What a response says."""
        text = pieces.readable(text)
        if sample.task not in self.asks:
            return Parsed()
        first = (pieces.first(text, "answer") or "").strip()[:1]
        end = text.rfind("</answer>")
        form = end >= 0 and pieces.thought_and_answer(text[: end + 9], think=think)
        return Parsed(first if first and first in LETTERS else None, well_formed=form)
