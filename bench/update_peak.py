"""Peak memory of one arm of an update, in a process of its own.

-m bench.update_peak SIZE P R GROUPS G TEXT ARM ROWS RECOMPUTE prints the bytes that a step needs beyond the model,
gradients included.
"""

from __future__ import annotations

import os
import sys

from bench.measure import resident_peak
from bench.providers import Arm as Step
from bench.update_arms import Shape, make_groups, make_step
from bench.update_peers import any_arm


def main(words: list[str]) -> int:
    """Bytes."""
    import torch

    size, (prompt, response, groups, group, text) = words[0], map(int, words[1:6])
    shape, name, rows = Shape(size, prompt, response, groups, group, bool(text)), words[6], int(words[7])
    lm, scored = make_step(shape, torch.device("cpu"), 0, recompute=bool(int(words[8])))
    small = make_groups(lm, Shape(size, 100, 2, 1, 2, shape.text), 0)
    any_arm(name, lm, small, 1)()  # a small step: its pages are kept
    lm.module.zero_grad(set_to_none=True)
    return resident_peak(Step(any_arm(name, lm, scored, rows)))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.stdout.write(f"{main(sys.argv[1:])}\n")
