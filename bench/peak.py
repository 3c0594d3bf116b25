"""Peak memory of one arm on the CPU, in a process of its own: ``python -m bench.peak CELL ARM SEED`` prints bytes."""

from __future__ import annotations

import sys

import torch

from bench.cells import Cell
from bench.measure import resident_peak
from bench.problem import make_problem
from bench.providers import all_providers


def main(argv: list[str]) -> int:
    """A first run of the arm, small or, where it is compiled for the shape, not, leaves what stays out of the count."""
    cell, name, seed = Cell.parse(argv[0]), argv[1], int(argv[2])
    device, dtype = torch.device("cpu"), torch.float32
    provider = next(p for p in all_providers() if (p.name, p.stage) == (name, cell.stage))
    if name != "torch.compile":
        provider.prepare(make_problem(cell.small(), device, dtype, seed=seed, width=128)).step()
    arm = provider.prepare(make_problem(cell, device, dtype, seed=seed))
    if name == "torch.compile":
        arm.step()
    sys.stdout.write(f"{resident_peak(arm)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
