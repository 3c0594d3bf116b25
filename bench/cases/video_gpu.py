"""video_gpu: decoding on the GPU. ``bench/gpu_check.sh video`` runs it; each cell is written as it finishes.

H1 decode rate over sessions, with and without elision; H2 the fused kernel beside a copy and the eager chain; H3 file
to patches beside torchcodec's NVDEC with transformers' processor; H4 NVDEC and the CPU together; H5 a step whose clips
are decoded ahead.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import ROOT, BenchError, Claim, Record, records_of, summarize, write_result

CASE = "video_gpu"
CELLS = ("h2", "h1", "h3", "h5", "h4")
NOT_RUN = "not run"
SEED = 5


def run(argv: Sequence[str]) -> None:
    """Measure; see --help.

    Raises:
        BenchError: no cell could be measured.
    """
    parser = argparse.ArgumentParser(prog="python -m bench video_gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--small", action="store_true", help="whether it works, not how fast it is")
    parser.add_argument("--cells", default=",".join(CELLS), help=f"default: {','.join(CELLS)}")
    parser.add_argument("--minutes", type=float, default=6.0, help="no cell begins later than this")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of the CPU's decoder")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench-video", help="where the videos are made")
    parser.add_argument("--out", type=Path, help="folder of the result file instead of bench/results")
    options = parser.parse_args(argv)
    from bench import measure, video_gpu_run

    device, path, records = measure.begin(CASE, options)
    options.work.mkdir(parents=True, exist_ok=True)
    scene = video_gpu_run.Scene(device, options.small, options.work, options.workers)
    began, measured = time.monotonic(), 0
    for cell in options.cells.split(","):
        if cell not in CELLS:
            raise BenchError(f"--cells {cell}: there are {', '.join(CELLS)}")
        if time.monotonic() - began > 60 * options.minutes:
            records.append(_not_run(cell, f"{options.minutes:g} minutes were over"))
            continue
        try:
            for record in getattr(video_gpu_run, cell)(scene):
                records.append(record)
                _say(f"{record.shape}: {record.arm}: {record.median:.4g} {record.unit}")
                measured += record.metric != NOT_RUN
        except Exception as error:  # of a driver or library of somebody's machine; the other cells still tell
            records.append(_not_run(cell, " ".join(f"{type(error).__name__}: {error}".split())[:300]))
            _say(f"{cell} not run: {records[-1].shape}")
        written = write_result(CASE, measure.device_name(device), records, claims, SEED, path)
        _say(f"wrote {written}")
    if not measured:
        raise BenchError("no cell could be measured")


def _not_run(cell: str, why: str) -> Record:
    return summarize(cell.upper(), f"{cell.upper()}: {why}", NOT_RUN, "", [0.0])


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def claims(records: list[Record]) -> list[Claim]:
    """Those whose records are there and are a GPU's."""
    if any(r.metric == "memory" and r.shape == "cpu" for r in records):
        return []
    h2 = _values(records, "H2", "time")
    found = [*_decoding(records), *_kernel(h2)]
    h3 = _values(records, "H3", "time")
    peer = h3.pop("torchcodec + transformers", None)
    if h3 and peer:
        text = "file to patches: times as fast as torchcodec's NVDEC with transformers' processor on the GPU"
        found.append(Claim(f"{CASE}.H3", text, peer / min(h3.values()), 2.0))
    h4 = _values(records, "H4", "rate")
    if len(h4) == 3:
        text = "NVDEC and the CPU together: rate over that of the better one alone"
        found.append(Claim(f"{CASE}.H4", text, h4["both"] / max(h4["NVDEC"], h4["CPU"]), 1.5))
    h5 = _values(records, "H5", "time")
    if {"cached", "decoded ahead"} <= h5.keys():
        text = "step whose clips are decoded ahead over the step with cached pixels"
        found.append(Claim(f"{CASE}.H5", text, h5["decoded ahead"] / h5["cached"], 1.05, "<="))
    return found


def _values(records: Sequence[Record], cell: str, metric: str) -> dict[str, float]:
    return {r.arm: r.median for r in records if r.shape.split()[0] == cell and r.metric == metric}


def _decoding(records: Sequence[Record]) -> list[Claim]:
    rates = [r for r in records if r.shape.startswith("H1 ") and r.metric == "rate"]
    found = []
    for arm in dict.fromkeys(r.arm for r in rates):
        best = {
            elided: max((r.median for r in rates if r.arm == arm and r.shape.endswith("elide") == elided), default=0.0)
            for elided in (True, False)
        }
        if all(best.values()):
            text = f"{arm}: effective decode rate with packets left out over that without, H.264 with B-frames"
            found.append(Claim(f"{CASE}.H1.{arm}", text, best[True] / best[False], 1.5))
    return found


def _kernel(times: dict[str, float]) -> list[Claim]:
    found = []
    for arm in ("patchify NV12", "patchify RGB", "patchify RGB bf16"):
        if arm in times and f"copy of {arm}" in times:
            text = f"{arm}: share of the bandwidth of a copy of as many bytes"
            found.append(Claim(f"{CASE}.H2.{arm.replace(' ', '_')}", text, times[f"copy of {arm}"] / times[arm], 0.5))
    if {"patchify RGB bf16", "eager RGB bf16"} <= times.keys():
        text = "patchify RGB to bf16: times as fast as the eager chain"
        found.append(Claim(f"{CASE}.H2.eager", text, times["eager RGB bf16"] / times["patchify RGB bf16"], 10.0))
    return found


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``cells``: everything measured; ``not-run``."""
    records = records_of(result)
    rows = [f"| {r.shape} | {r.arm} | {r.median:.4g} {r.unit} |" for r in records if r.metric in ("time", "rate")]
    left = [f"| {r.shape.replace('|', '/')} |" for r in records if r.metric == NOT_RUN]
    return {
        "cells": "\n".join(["| cell | arm | median |", "|---|---|---|", *rows]),
        "not-run": "\n".join(["| not run |", "|---|", *left]),
    }
