"""Modules whose forward is another one: classes, copies, errors. Parity is in test_families.py."""

from __future__ import annotations

import copy

import pytest

from vrlt_fast.config import ModelConfig
from vrlt_fast.errors import SetupError
from vrlt_fast.model.layers import set_layers
from vrlt_fast.model.load import load_model


@pytest.fixture
def module(tiny_folder):
    return load_model(ModelConfig(name=str(tiny_folder), dtype="float32", device="cpu")).module


def test_classes_names_and_copies_stay(module):
    parts = {"norm": module.model.language_model.norm, "mlp": module.model.language_model.layers[0].mlp}
    fused = {name: type(part) for name, part in parts.items()}
    set_layers(module, "torch")
    for name, part in parts.items():
        assert type(part) is not fused[name]
        assert issubclass(fused[name], type(part))
        assert fused[name].__name__ == type(part).__name__
    set_layers(module, "auto")
    set_layers(module, "auto")
    assert {name: type(part) for name, part in parts.items()} == fused
    twin = copy.deepcopy(module)
    assert type(twin.model.language_model.norm) is fused["norm"]
    assert twin.state_dict().keys() == module.state_dict().keys()


def test_liger_needs_a_gpu(module):
    with pytest.raises(SetupError, match=r"VRLT-E0[12] kernels\.layers"):
        set_layers(module, "liger")
