"""What a step on several GPUs would take, from one GPU's figures: the arithmetic of docs/scale.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Links:
    """``bandwidth``: bytes a second that a process receives from all others; ``latency``: seconds of a call."""

    bandwidth: float
    latency: float


H100 = Links(bandwidth=3.5e11, latency=3e-5)
"""NVLink of an 8 x H100 node: 450 GB/s each way, of which a ring of NCCL reaches about four fifths; a call of 30 us."""


def predicted(one: Mapping[str, float], sp: int, links: Links) -> dict[str, float]:
    """Seconds of a rollout and an update of one group on ``sp`` processes.

    Assumes: tokens and frame pairs are shared evenly; products take time in proportion to tokens, down to the share
    that a process has; nothing that is received is hidden behind what is computed; a decode step computes the same for
    all rows everywhere, but for the prefix's attention, which is ``attention`` of its time.

    Args:
        one: of one process: seconds ``encode``, ``prefill``, ``generate`` (``steps`` decode steps) and ``update``;
            ``attention`` share of a decode step; ``tokens`` of the prompt, ``rows``, ``layers``, ``kv_bytes`` a token
            and layer, ``row_bytes`` of a row's attention a layer.
    """
    gathered = (sp - 1) / sp * one["tokens"] * one["kv_bytes"] * one["layers"]
    call, layers, steps = links.latency if sp > 1 else 0.0, one["layers"], one["steps"]
    exchanged = (sp - 1) * one["rows"] * one["row_bytes"]
    step = one["generate"] / steps if steps else 0.0
    decode = step * (1 - one["attention"]) + step * one["attention"] / sp
    decode += layers * (call + exchanged / links.bandwidth)
    return {
        "encode": one["encode"] / sp + call,
        "prefill": one["prefill"] / sp + gathered / links.bandwidth + layers * call,
        "generate": steps * decode,
        # gathered forward, again where a layer is computed again, and scattered backward
        "update": one["update"] / sp + 3 * gathered / links.bandwidth + 3 * layers * call,
    }
