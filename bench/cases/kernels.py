"""The kernels of vrlt_kernels beside everyone else's: errors, times, memory, share of the hardware's floor.

``python -m bench kernels`` measures the cells of `bench.cells.plan` for this device, parity first, and writes
``bench/results/kernels.DEVICE.json`` and ``.svg`` after each; docs/bench.md says how to read them. In fp32 on the CPU,
in bf16 on CUDA.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cells import CPU, EAGER, OURS, Cell, Plan, plan
from bench.harness import RESULTS, ROOT, Claim, Record, records_of

SEED = 20240607
DEVICE = "device"
NOT_RUN = "not run"
LEADING = (DEVICE, OURS, f"{OURS} deferred", *EAGER)
"""Arms that get all repetitions."""


def run(argv: Sequence[str]) -> None:
    """Measure; see --help."""
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--cell", action="append", metavar="TEXT", help="e.g. 'linear 7B N=4096 gspo skip=0.4'")
    parser.add_argument("--keep", action="store_true", help="keep what the result file has of other cells")
    parser.add_argument("--arm", action="append", metavar="PATTERN", help="only arms of this name; may hold *")
    parser.add_argument("--rounds", type=int, help="repetitions; arms beside the main ones get a third of them")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after this time")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--no-lengths", action="store_true", help="leave out compilations over random lengths")
    parser.add_argument("--small", action="store_true", help="tiny shapes: whether it works, not how fast it is")
    parser.add_argument("--list", action="store_true", help="only say which arms can run here, and why others can't")
    parser.add_argument("--out", type=Path, help="result file instead of bench/results/kernels.DEVICE.json")
    options = parser.parse_args(argv)
    from bench.kernel_run import Run

    Run(options, SEED).all_cells()


def claims(records: list[Record]) -> list[Claim]:
    """On each device those whose records are there. A ratio of times is theirs over ours: above 1 ours is faster."""
    device = next((r.shape.split()[0] for r in records if r.arm == DEVICE), "")
    found = _cpu_claims(_Values(records)) if device == "cpu" else _gpu_claims(_Values(records))
    return [
        Claim(f"loss.{device}.{name}", statement, value, target, op)
        for name, statement, value, target, op in found
        if value is not None
    ]


Row = tuple[str, str, float | None, float, str]


class _Values:
    """Medians by arm, shape and metric; None where something is missing."""

    def __init__(self, records: list[Record]) -> None:
        self.medians = {(r.arm, r.shape, r.metric): r.median for r in records}

    def best(self, arms: Sequence[str], shape: str, metric: str = "time") -> float | None:
        """The smallest of the arms; None unless all are there."""
        values = [self.medians.get((arm, shape, metric)) for arm in arms]
        return None if None in values else min(v for v in values if v is not None)

    def gain(self, arms: Sequence[str], shape: str, metric: str = "time", ours: str = OURS) -> float | None:
        """The best of the others over ours."""
        theirs, mine = self.best(arms, shape, metric), self.best([ours], shape, metric)
        return None if theirs is None or mine is None else theirs / mine


def _cpu_claims(values: _Values) -> list[Row]:
    row, linear, skip = CPU
    fewer = values.gain(EAGER, linear, "memory beyond dW")
    text = "the faster of log_softmax + gather and gather - logsumexp in eager PyTorch (fp32, forward and backward)"
    return [
        ("row_vs_eager", f"Loss and gradient in place from given logits, N=512, V=151936: times as fast as {text}",
         values.gain(EAGER, row), 3.0, ">="),
        ("linear_vs_eager", f"linear_grpo_loss, N=512, H=1024, V=151936: times as fast as {text}",
         values.gain(EAGER, linear), 1.0, ">="),
        ("linear_skip", f"The same with 40 % of the rows without gradient: times as fast as {text}",
         values.gain(EAGER, skip), 1.4, ">="),
        ("linear_memory", "linear_grpo_loss: peak memory, dW aside (frozen head), of that of the smaller of both",
         None if not fewer else 1 / fewer, 0.4, "<="),
    ]  # fmt: skip


def _gpu_claims(values: _Values) -> list[Row]:
    shapes = [f"{stage} 7B N=4096 {loss}" for stage in ("row", "linear") for loss in ("grpo", "gspo")]
    row, row_gspo, linear, linear_gspo = shapes
    deferred = f"{OURS} deferred"
    both = [
        (values.best([arm], sequence), values.best([arm], token))
        for arm, sequence, token in ((OURS, linear_gspo, linear), (deferred, row_gspo, row))
    ]
    slower = [a / b for a, b in both if a is not None and b is not None]
    at = "bf16, N=4096, H=3584, V=152064, forward and backward"
    rows = "The row stage of linear_grpo_loss (onehot - p in place, coefficients of the rows)"
    return [
        ("linear_floor", f"linear_grpo_loss: share of the time of 6 N V H FLOPs at the rate of a large product ({at})",
         values.best([OURS], linear, "floor"), 0.9, ">="),
        ("vs_trl", f"linear_grpo_loss: times as fast as TRL's fused head ({at})",
         values.gain(["TRL"], linear), 1.35, ">="),
        ("vs_verl", f"linear_grpo_loss: times as fast as verl's linear cross-entropy ({at})",
         values.gain(["verl"], linear), 2.5, ">="),
        ("vs_liger_chunked", "linear_grpo_loss: times as fast as the faster of Liger's chunked loss a sequence at a "
         f"time and over all, at default precision ({at})",
         values.gain(["Liger chunked", "Liger chunked whole"], linear), 6.0, ">="),
        ("row_floor", f"{rows}: share of the time of a copy of the logits ({at})",
         values.best([deferred], row, "floor"), 0.85, ">="),
        ("vs_liger_triton", f"{rows}: times as fast as Liger's Triton kernel from the same logits ({at})",
         values.gain(["Liger Triton"], row, ours=deferred), 1.35, ">="),
        ("gspo_vs_grpo", f"GSPO's time over GRPO's, the worse of both stages ({at})",
         max(slower) if len(slower) == 2 else None, 1.05, "<="),
    ]  # fmt: skip


def tables(result: dict[str, Any]) -> dict[str, str]:
    """A table a cell, under its name with dashes for spaces (``linear-7B-N=4096-grpo``), and ``not-run``."""
    records = records_of(result)
    shapes = dict.fromkeys(r.shape for r in records if r.metric == "time")
    found = {"".join(c if c.isalnum() or c in "._-" else "-" for c in s): _table(records, s) for s in shapes}
    rows = [f"| {r.arm} | {r.shape.replace('|', '/')} |" for r in records if r.metric == NOT_RUN]
    return found | {"not-run": "\n".join(["| arm | why it wasn't run |", "|---|---|", *rows])}


def _table(records: Sequence[Record], shape: str) -> str:
    cell = Cell.parse(shape)
    by_arm: dict[str, dict[str, Record]] = {}
    for r in records:
        if r.shape == shape:
            by_arm.setdefault(r.arm, {})[r.metric] = r
    rate = "TFLOP/s" if cell.stage == "linear" else "GB/s"
    head = f"| arm | ms | 20 % to 80 % | host, ms | {rate} | of the floor | peak memory, MB | error | recompilations |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for arm, found in sorted(by_arm.items(), key=lambda item: item[1]["time"].median if "time" in item[1] else 0.0):
        if "time" not in found or arm == DEVICE:
            continue
        time = found["time"]
        texts = [("host", 1.0, ".2g"), ("rate", 1.0, ".3g"), ("floor", 100.0, ".0f")]
        texts += [("memory", 1e-6, ".0f"), ("error", 1.0, ".1e")]
        cells = [f"{factor * found[m].median:{style}}" if m in found else "-" for m, factor, style in texts]
        cells[2] = f"{cells[2]} %" if "floor" in found else cells[2]
        count = [r.median for r in records if (r.arm, r.metric) == (arm, "recompilations") and r.shape == cell.stage]
        cells.append(f"{count[0]:.0f}" if count else "-")
        lines.append(f"| {arm} | {time.median:.3g} | {time.p20:.3g} to {time.p80:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plan_of(options: argparse.Namespace, kind: str) -> Plan:
    """The cells that the options ask for, each with patterns of its arms' names."""
    arms = tuple(options.arm or ())
    if options.cell:
        return [(Cell.parse(text), arms or ("*",)) for text in options.cell]
    return [(cell, arms or patterns) for cell, patterns in plan("small" if options.small else kind)]


def result_path(options: argparse.Namespace, device: str) -> Path:
    """Where the result file goes. Small runs are no results."""
    folder = ROOT / "runs" / "bench-kernels" if options.small else RESULTS
    return options.out or folder / f"kernels.{device}.json"
