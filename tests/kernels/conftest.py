"""Fixtures of the kernel tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A CPU generator with the printed seed."""
    return torch.Generator().manual_seed(seed)
