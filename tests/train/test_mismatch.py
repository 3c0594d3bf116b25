from __future__ import annotations

import math

import pytest
import torch

from vrlt_fast.train.mismatch import Mismatch


def test_figures_by_hand():
    found = Mismatch()
    found.add(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.5], requires_grad=True))
    found.add(torch.tensor([-3.0]), torch.tensor([-3.1]))
    record = found.record()
    assert record["mean"] == pytest.approx((0.0 + 0.5 + 0.1) / 3)
    assert record["max"] == pytest.approx(0.5)
    k3 = (math.exp(0.5) - 1 - 0.5) + (math.exp(-0.1) - 1 + 0.1)
    assert record["kl"] == pytest.approx(k3 / 3, rel=1e-5)
    assert record["outside"] == pytest.approx(1 / 3)


def test_a_gap_that_is_no_number_is_not_hidden():
    found = Mismatch()
    found.add(torch.tensor([-1.0]), torch.tensor([float("nan")]))
    found.add(torch.tensor([-1.0]), torch.tensor([-2.0]))
    assert math.isnan(found.record()["max"])


def test_nothing_is_zero():
    found = Mismatch()
    found.add(torch.tensor([]), torch.tensor([]))
    assert found.record() == {"mean": 0.0, "max": 0.0, "kl": 0.0, "outside": 0.0}
