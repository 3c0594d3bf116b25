"""Memory for patches that this process and its workers share. It belongs to no file system, so /dev/shm may be tiny."""

from __future__ import annotations

import os
import tempfile

import torch


def shared_bytes(nbytes: int) -> tuple[int, torch.Tensor]:
    """Zeroed memory that other processes can map: a descriptor, which is the caller's to close, and uint8 [nbytes].

    Raises:
        OSError: no such memory can be had.
    """
    try:
        descriptor = os.memfd_create("vrlt-patches", os.MFD_CLOEXEC)
    except OSError:  # forbidden in some sandboxes
        return _file_bytes(nbytes)
    try:
        os.ftruncate(descriptor, nbytes)
        return descriptor, map_bytes(descriptor, nbytes)
    except BaseException:
        os.close(descriptor)
        raise


def map_bytes(descriptor: int, nbytes: int) -> torch.Tensor:
    """The memory behind a descriptor as uint8 [nbytes]; it doesn't keep the descriptor open."""
    return torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=nbytes, dtype=torch.uint8)


def _file_bytes(nbytes: int) -> tuple[int, torch.Tensor]:
    with tempfile.TemporaryFile(prefix="vrlt-patches-") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk is an error here, not a signal at a write
        return os.dup(file.fileno()), map_bytes(file.fileno(), nbytes)
