"""The case ``rows``: which configuration a kernel is launched with, and what the table says."""

from __future__ import annotations

import pytest
import torch

from bench.cases import rows
from bench.harness import BenchError, summarize
from vrlt_kernels import _rows_triton, patchify_triton


def test_only_the_kernel_in_question_is_launched_otherwise() -> None:
    chosen = {name: _rows_triton.launch_config(name, torch.bfloat16) for name in ("row_stats", "row_grad")}
    with rows._launched_with(_rows_triton, "row_stats", {"num_warps": 16}):
        assert _rows_triton.launch_config("row_stats", torch.bfloat16) == chosen["row_stats"] | {"num_warps": 16}
        assert _rows_triton.launch_config("row_grad", torch.bfloat16) == chosen["row_grad"]
    assert _rows_triton.launch_config("row_stats", torch.bfloat16) == chosen["row_stats"]
    before = patchify_triton.launch_config(28, "native")
    with rows._launched_with(patchify_triton, "patchify RGB", {"most": 64}):
        assert patchify_triton.launch_config(28, "native") == before | {"most": 64}
    with rows._launched_with(patchify_triton, "patchify RGB", {}):
        assert patchify_triton.launch_config(28, "native") == before


def test_every_configuration_gives_a_thread_some_elements() -> None:
    tried = rows._grid((1024, 8192), (4, 8, 32))
    assert {"BLOCK": 1024, "num_warps": 4} in tried
    assert all(8 <= c["BLOCK"] // (32 * c["num_warps"]) <= 32 for c in tried)


def test_the_table_has_the_fastest() -> None:
    times = {"row_stats: chosen": 0.5, "row_stats: BLOCK=1024 num_warps=4": 0.4, "copy: chosen": 0.6}
    records = [summarize(arm, "N=4096 bf16", "time", "ms", [time]) for arm, time in times.items()]
    table = rows.tables({"records": [vars(r) for r in records]})["best"].splitlines()
    assert table[2] == "| row_stats | 0.500 | 0.400 | BLOCK=1024 num_warps=4 |"
    assert table[3] == "| copy | 0.600 | 0.600 | chosen |"
    assert rows.claims(records) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(BenchError, match="no CUDA device"):
        rows.run([])
