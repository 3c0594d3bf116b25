"""Peak memory of one arm of an update, in a process of its own.

-m bench.update_peak SIZE P R GROUPS G ARM ROWS RECOMPUTE prints the bytes that a step needs beyond the model, gradients
included.
"""

from __future__ import annotations

import os
import sys

from bench.measure import resident_peak
from bench.providers import Arm as Step
from bench.update_arms import Shape, arm, make_groups, make_step


def main(words: list[str]) -> int:
    """Bytes."""
    import torch

    shape, name, rows = Shape(words[0], *map(int, words[1:5])), words[5], int(words[6])
    lm, scored = make_step(shape, torch.device("cpu"), 0, recompute=bool(int(words[7])))
    arm(name, lm, make_groups(lm, Shape(shape.size, 100, 2, 1, 2), 0), 1)()  # a small step: its pages are kept
    lm.module.zero_grad(set_to_none=True)
    return resident_peak(Step(arm(name, lm, scored, rows)))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.stdout.write(f"{main(sys.argv[1:])}\n")
