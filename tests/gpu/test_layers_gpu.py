"""Liger's RMSNorm and SwiGLU in place of a model's own, on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from vrlt_fast.config import ModelConfig
from vrlt_fast.model.layers import set_layers
from vrlt_fast.model.load import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_parity_with_liger_on_and_off(tiny_folder, seed):
    pytest.importorskip("liger_kernel")
    model = load_model(ModelConfig(name=str(tiny_folder), dtype="float32", device="cuda")).module
    ids = torch.randint(9, 200, (1, 33), generator=torch.Generator().manual_seed(seed)).cuda()
    found = []
    for layers in ("torch", "liger"):
        set_layers(model, layers)
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        logits.square().mean().backward()
        found.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-4)
    for name, expected in found[0][1].items():
        assert (found[1][1][name] - expected).norm() < 1e-4 * expected.norm() + 1e-9, name
