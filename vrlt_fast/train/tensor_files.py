"""Named tensors in a folder of safetensors files: whole ones written by one process, shards by all that have some.

torch's distributed checkpoint reads both, into whole tensors or shards, whoever wrote them; it writes no pickle.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

FILE_BYTES = 5_000_000_000


def write_tensors(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write whole tensors, in files of at most about ``FILE_BYTES`` and with an index."""
    files, index, used = {}, 1, 0
    for name, tensor in tensors.items():
        if used and used + tensor.nbytes > FILE_BYTES:
            index, used = index + 1, 0
        files[name] = index
        used += tensor.nbytes
    ready = {name: _standalone(tensor) for name, tensor in tensors.items()}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files or None)
    _call(lambda: dcp_save(ready, storage_writer=writer, no_dist=True))


def write_shards(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write shards, a file a process; all processes of the run call it together. Whole tensors are those of one."""
    ready = {name: t.detach() if isinstance(t, DTensor) else _standalone(t) for name, t in tensors.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    _call(lambda: dcp_save(ready, storage_writer=writer))


def stored_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape, as a whole, and dtype of each tensor there."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_into(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Fill tensors, or this process's shards of them, in place. Shapes must agree."""
    if tensors:
        reader = HuggingFaceStorageReader(str(folder))
        _call(lambda: dcp_load(dict(tensors), storage_reader=reader, no_dist=True))


def read_tensors(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, those whose names are ``wanted``."""
    tensors = {
        name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored_tensors(folder).items() if wanted(name)
    }
    read_into(tensors, folder)
    return tensors


def _call(call: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        try:
            call()
        except CheckpointException as error:
            # Not an Exception in torch; the cause is what callers can handle.
            raise next(iter(error.failures.values()))[0] from None


def _standalone(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and alone in its storage, as safetensors needs."""
    tensor = tensor.detach().contiguous()
    return tensor.to("cpu", copy=True) if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
