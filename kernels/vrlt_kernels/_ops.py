"""The namespace of this copy's operators: derived from the package, so that two loaded copies don't collide."""

from __future__ import annotations

_NAMESPACE = (__package__ or "vrlt_kernels").replace(".", "_")


def add_op_namespace_prefix(name: str) -> str:
    """``name`` with the namespace in front, as torch.library wants it."""
    return f"{_NAMESPACE}::{name}"


__all__ = ["add_op_namespace_prefix"]
