"""rows: the row kernels and patchify alone, back to back, under every launch configuration worth trying.

``launch_config`` of the Triton modules is a table by hand; this is what it is made from. CUDA only. The logits are
those of cell ``row 7B N=4096``, the frames those of H2. Writes ``bench/results/rows.DEVICE.json``.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.harness import BenchError, Claim, Record, records_of, summarize, write_result

SEED = 20240607
CHOSEN = "chosen"
Configuration = dict[str, int]
Try = tuple[str, str, Callable[[], object], ModuleType | None, list[Configuration]]
"""Arm, shape, what is timed, whose launch_config is replaced, and by what."""


def run(argv: Sequence[str]) -> None:
    """Measure; see --help.

    Raises:
        BenchError: there is no CUDA device.
    """
    parser = argparse.ArgumentParser(prog="python -m bench rows", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no configuration after this time")
    parser.add_argument("--tokens", type=int, default=4096, help="rows of logits")
    parser.add_argument("--out", type=Path, help="result file instead of bench/results/rows.DEVICE.json")
    options = parser.parse_args(argv)
    import torch

    from bench.measure import device_name

    if not torch.cuda.is_available():
        raise BenchError("rows: torch sees no CUDA device")
    device, began = torch.device("cuda"), time.monotonic()
    records: list[Record] = []
    for make in (_rows, _patches):
        for arm, shape, step, module, configurations in make(device, options.tokens):
            for configuration in [{}, *configurations]:
                if time.monotonic() - began > 60 * options.minutes:
                    sys.stdout.write(f"{arm}: the rest is left out, {options.minutes:g} minutes are over\n")
                    break
                text = " ".join(f"{k}={v}" for k, v in configuration.items()) or CHOSEN
                with _launched_with(module, arm, configuration):
                    record = summarize(f"{arm}: {text}", shape, "time", "ms", _times(step))
                records.append(record)
                sys.stdout.write(f"{shape}: {record.arm}: {record.median:.4g} ms\n")
        torch.cuda.empty_cache()
    write_result("rows", device_name(device), records, claims, SEED, options.out)


@contextmanager
def _launched_with(module: ModuleType | None, kernel: str, configuration: Configuration) -> Iterator[None]:
    """Changes entries of the module's launch_config for one kernel."""
    if module is None or not configuration:
        yield
        return
    chosen = module.launch_config

    def changed(*arguments: Any) -> Configuration:
        ours = kernel == arguments[0] or not isinstance(arguments[0], str)
        return {**chosen(*arguments), **(configuration if ours else {})}

    module.launch_config = changed  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.launch_config = chosen  # type: ignore[attr-defined]


def _times(step: Callable[[], object], rounds: int = 10) -> list[float]:
    """Milliseconds of launches that the device finds waiting."""
    import torch

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def _rows(device: Any, tokens: int) -> Iterator[Try]:
    import torch

    from vrlt_kernels import _native, _rows_triton, use_backend
    from vrlt_kernels._rows import inverse_of, row_fused_, row_grad_, row_stats

    generator = torch.Generator(device).manual_seed(SEED)
    logits = torch.randn(tokens, 152064, device=device, generator=generator).mul_(3).bfloat16()
    target = torch.randint(152064, (tokens,), device=device, generator=generator)
    inverse, out, scratch = inverse_of(1.0, None, logits), torch.empty_like(logits), logits.clone()
    _, entropy, lse, _ = row_stats(logits, target, inverse, False)
    yield "copy", f"N={tokens} bf16", lambda: out.copy_(logits), None, []

    def gradient() -> None:
        row_grad_(out, logits, target, inverse, lse, entropy, a=lse, e=None)

    steps: dict[str, tuple[Callable[[], object], list[Configuration]]] = {
        "row_stats": (lambda: row_stats(logits, target, inverse, False), _grid((1024, 2048, 4096), (4, 8, 16))),
        "row_grad": (gradient, _grid((2048, 4096, 8192), (4, 8))),
        "row_fused": (lambda: row_fused_(scratch, target, inverse), _grid((1024, 2048, 4096, 8192), (4, 8, 16, 32))),
    }
    for name, (step, configurations) in steps.items():
        with use_backend("triton"):
            yield name, f"N={tokens} bf16", step, _rows_triton, configurations
        if not _native.obstacle(device):
            with use_backend("native"):
                yield f"{name} (native)", f"N={tokens} bf16", step, None, []


def _grid(blocks: Sequence[int], warps: Sequence[int]) -> list[Configuration]:
    """Those that give every thread 8 to 32 elements."""
    return [{"BLOCK": b, "num_warps": w} for b in blocks for w in warps if 8 <= b // (32 * w) <= 32]


def _patches(device: Any, tokens: int) -> Iterator[Try]:
    import torch

    from vrlt_kernels import NV12, patchify, patchify_triton

    generator = torch.Generator(device).manual_seed(SEED)
    options: dict[str, Any] = {"dtype": torch.uint8, "device": device, "generator": generator}
    rgb = torch.randint(0, 256, (32, 1080, 1920, 3), **options)
    planes = NV12(rgb[..., 0].contiguous(), torch.randint(0, 256, (32, 540, 960, 2), **options))
    normal: dict[str, Any] = {"normalize": ((0.5,) * 3, (0.5,) * 3), "dtype": torch.bfloat16, "resample": "float"}
    steps: dict[str, Callable[[], object]] = {
        "patchify RGB": lambda: patchify(rgb, (560, 1008)),
        "patchify NV12": lambda: patchify(planes, (560, 1008)),
        "patchify RGB bf16": lambda: patchify(rgb, (560, 1008), **normal),
    }
    tried = [{"most": m, "num_warps": w} for m in (32, 64) for w in (1, 2, 4)]
    for name, step in steps.items():
        yield name, "32 frames 1080p", step, patchify_triton, [*tried, {"num_warps": 2, "maxnreg": 128}]


def claims(records: list[Record]) -> list[Claim]:
    """None: this is for whoever sets launch configurations."""
    return []


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``best``: of each kernel the chosen configuration and the fastest one."""
    lines = ["| kernel | chosen, ms | fastest, ms | with |", "|---|---:|---:|---|"]
    arms: dict[str, dict[str, float]] = {}
    for record in records_of(result):
        kernel, _, text = record.arm.partition(": ")
        arms.setdefault(kernel, {})[text] = record.median
    for kernel, found in arms.items():
        text = min(found, key=lambda key: found[key])
        lines.append(f"| {kernel} | {found[CHOSEN]:.3f} | {found[text]:.3f} | {text} |")
    return {"best": "\n".join(lines)}
