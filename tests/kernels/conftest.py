"""Triton's interpreter where there is no GPU: set before anything imports Triton, which reads it then."""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and not os.environ.get("TRITON_INTERPRET"):
        raise pytest.UsageError("triton was imported before TRITON_INTERPRET=1 could be set")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A CPU generator with the printed seed."""
    return torch.Generator().manual_seed(seed)
