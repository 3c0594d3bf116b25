"""Reads an annotation file of a public data set into samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vrlt_fast.data.formats import benchmarks, questions, spans, videochat
from vrlt_fast.data.formats.base import Context, Output
from vrlt_fast.errors import Problem

FORMATS: dict[str, Callable[[Path, Output], None]] = {
    "activitynet_captions": spans.activitynet_captions,
    "charades_sta": spans.charades_sta,
    "mmvu": benchmarks.mmvu,
    "mvbench": benchmarks.mvbench,
    "nextgqa": videochat.nextgqa,
    "primo_r1": questions.primo_r1,
    "rextime": spans.rextime,
    "seed_bench_r1": questions.seed_bench_r1,
    "stvg_r1": spans.stvg_r1,
    "tempcompass": benchmarks.tempcompass,
    "temporal_r1": spans.temporal_r1,
    "time_r1": spans.time_r1,
    "tw_grpo": questions.tw_grpo,
    "video_r1": questions.video_r1,
    "videochat_r1": videochat.videochat_r1,
    "videomme": benchmarks.videomme,
    "vst": benchmarks.vst,
}
"""The reader of each format, by its name on the command line."""


def read_format(name: str, path: Path | str, context: Context | None = None) -> Output:
    """The samples of a file in the format ``name`` of FORMATS, its problems with their lines, and counts.

    Every sample passes the checks of :func:`~vrlt_fast.data.readers.read_jsonl` (without those of the files
    themselves), has ``name`` at the front of its id, a source, and as ``line`` where its entry begins.
    """
    path = Path(path)
    out = Output(name, context or Context())
    FORMATS[name](path, out)
    if not out.samples and not out.problems:
        why = "; ".join(f"{reason}: {count}" for reason, count in sorted(out.skipped.items()))
        out.problems.append(Problem("VRLT-D15", "no entry can be converted", f"{path.name}:1", why))
    return out
