"""Peak memory of one way to roll out, in a process of its own: -m bench.rollout_peak SIZE TOKENS LENGTH GROUP ARM.

Prints the bytes that a rollout needs beyond the model, the first one left out.
"""

from __future__ import annotations

import os
import sys
from functools import partial

from bench.harness import BenchError
from bench.measure import resident_peak
from bench.providers import Arm as Step
from bench.rollout_arms import hf_arm, make_model, make_prompt, our_arm


def main(size: str, tokens: int, length: int, group: int, name: str) -> int:
    """Bytes of the arm of this name.

    Raises:
        BenchError: there is none.
    """
    import torch

    lm = make_model(size, torch.device("cpu"), tokens + length + 512)
    prompts = [make_prompt(lm, tokens, 0)]
    arms = [our_arm("group engine", lm, prompts, group, length)]
    arms += [hf_arm(lm, prompts, group, length, cache) for cache in ("dynamic", "static")]
    for arm in arms:
        if arm.name == name:
            arm.run(1.0)
            return resident_peak(Step(partial(arm.run, 1.0)))
    raise BenchError(f"no arm {name!r}; there are {', '.join(arm.name for arm in arms)}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = sys.argv[1:]
    sys.stdout.write(f"{main(words[0], int(words[1]), int(words[2]), int(words[3]), words[4])}\n")
