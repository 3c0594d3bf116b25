"""What every Triton kernel needs of a multiprocessor, compiled for sm_80 and sm_90 without a GPU: see ``bench.aot``.

``python -m bench aot [FOLDER]``: with the installed Triton, or the one unpacked in FOLDER. Writes
``bench/results/aot.tritonX.Y.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bench.aot import SPILL_LIMIT, in_subprocess
from bench.harness import BenchError, Claim, Record, records_of, summarize, write_result

METRICS = {"registers": "registers", "spill": "bytes", "shared": "bytes"}


def run(argv: list[str]) -> None:
    """Compile everything and write the result file."""
    found = in_subprocess(["-m", "bench.aot"], Path(argv[0]).resolve() if argv else None)
    if found["unreached"]:
        raise BenchError(f"no case of bench/aot_cases.py compiles {', '.join(found['unreached'])}")
    version = ".".join(found["triton"].split(".")[:2])
    path = write_result("aot", f"triton{version}", records(found["rows"]), claims, 0)
    sys.stdout.write(f"{path}: {len(found['rows'])} compilations with Triton {found['triton']}\n")


def records(rows: list[dict[str, Any]]) -> list[Record]:
    """A record a number. The shape is the case, the architecture, and a count where a case compiles a kernel twice."""
    out, count = [], dict[tuple[str, str], int]()
    for row in rows:
        key = (row["kernel"], f"{row['case']}, sm_{row['arch']}")
        count[key] = count.get(key, 0) + 1
        shape = key[1] if count[key] == 1 else f"{key[1]} ({count[key]})"
        out += [summarize(row["kernel"], shape, metric, unit, [row[metric]]) for metric, unit in METRICS.items()]
    return out


def claims(records: list[Record]) -> list[Claim]:
    worst = max(record.median for record in records if record.metric == "spill")
    statement = f"No kernel spills more than {SPILL_LIMIT} bytes a thread on sm_80 and sm_90"
    return [Claim("aot.spill", statement, worst, SPILL_LIMIT, "<=")]


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``kernels``: the largest number of all cases, by kernel and architecture."""
    most: dict[tuple[str, str], dict[str, float]] = {}
    for record in records_of(result):
        arch = record.shape.partition(", sm_")[2].split()[0]
        metrics = most.setdefault((record.arm, arch), {})
        metrics[record.metric] = max(metrics.get(record.metric, 0), record.median)
    lines = ["| kernel | architecture | registers | spilled bytes | shared bytes |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| `{kernel}` | sm_{arch} | {m['registers']:.0f} | {m['spill']:.0f} | {m['shared']:.0f} |"
        for (kernel, arch), m in sorted(most.items())
    ]
    return {"kernels": "\n".join(lines)}
