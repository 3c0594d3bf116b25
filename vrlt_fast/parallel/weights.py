"""FSDP2: a module's weights in shards over processes, and whole again in one buffer.

Gradients of the processes add up: their number is part of no mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from vrlt_fast.parallel.replicas import waiting

BUCKET = 2**27
"""Values that are gathered together."""
ALIGNED = 128
"""Where weights begin in the buffer, in values: kernels read them in wide words."""
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def shard_(
    root: nn.Module,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype,
    *,
    wide: bool,
    left: Iterable[nn.Parameter] = (),
) -> None:
    """Shard a module's parameters over the last dimension of ``mesh``; they are replicated over the one before it.

    Each of ``units`` is gathered when it runs and let go after it, forward and backward; what is in none of them is
    gathered when ``root`` runs and let go after the backward pass.

    Args:
        dtype: what the units compute in.
        wide: whether shards are fp32, as an optimizer wants them.
        left: parameters that stay as they are.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    ignored = set(left)
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight stays one
    for unit in (*units, root):
        if wide:  # one unit at a time is whole in fp32
            _widen(unit, ignored, made)
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=unit is not root, ignored_params=ignored)
    for part in root.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other, and no scaled one


def _widen(unit: nn.Module, ignored: set[nn.Parameter], made: dict[nn.Parameter, nn.Parameter]) -> None:
    for part in unit.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter in ignored or parameter.dtype.itemsize >= 4:
                continue
            if parameter not in made:
                made[parameter] = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
            setattr(part, name, made[parameter])


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard, or the tensor itself where it isn't sharded; the same memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def first_value(tensor: torch.Tensor) -> int:
    """Where this process's shard begins among all values of the tensor."""
    if not isinstance(tensor, DTensor):
        return 0
    size, rank = _over(tensor)
    return min(_per(tensor, size) * rank, len(tensor)) * tensor.shape[1:].numel()


def like(values: torch.Tensor, sharded: torch.Tensor) -> torch.Tensor:
    """Local values as the shard of a tensor that is sharded as ``sharded`` is."""
    if not isinstance(sharded, DTensor):
        return values
    mesh = sharded.device_mesh
    if values.device.type != mesh.device_type:  # else it would be copied to the mesh's device
        mesh = _elsewhere(mesh, values.device.type)
    shape, stride = sharded.shape, sharded.stride()
    return DTensor.from_local(values, mesh, sharded.placements, run_check=False, shape=shape, stride=stride)


@lru_cache
def _elsewhere(mesh: DeviceMesh, device: str) -> DeviceMesh:
    """The same processes, for tensors on another device; all make it together."""
    return DeviceMesh(device, mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


@torch.no_grad()
def take_shard(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a process's part of ``whole`` into its shard; nothing is sent."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    parts = distribute_tensor(whole.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)
    local(parameter).copy_(local(parts))


class Arena:
    """Whole weights, one behind the other in a buffer that stays where it is; :meth:`fill` takes them from shards.

    Args:
        pairs: a sharded parameter, and the whole one that gets its values, in its own dtype. All whole ones have the
            same dtype and device; the buffer becomes their memory.
    """

    def __init__(self, pairs: Sequence[tuple[DTensor, nn.Parameter]]):
        self._pairs = list(pairs)
        sizes = [-(-whole.numel() // ALIGNED) * ALIGNED for _, whole in self._pairs]
        first = self._pairs[0][1]
        self.buffer = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        for (_, whole), room in zip(self._pairs, self.buffer.split(sizes), strict=True):
            view = room[: whole.numel()].view(whole.shape)
            view.copy_(whole.detach())
            whole.data = view

    @torch.no_grad()
    def fill(self) -> None:
        """Gather all shards; all processes that share them call it together."""
        for bucket in self._buckets():
            mesh, dim = bucket[0][0].device_mesh, _dim(bucket[0][0])
            size = mesh.size(dim)
            counts = [_per(sharded, size) * sharded.shape[1:].numel() for sharded, _ in bucket]
            flat = self.buffer.new_zeros(sum(counts))
            for (sharded, _), room in zip(bucket, flat.split(counts), strict=True):
                own = local(sharded)
                room[: own.numel()].copy_(own.flatten())
            gathered = flat.new_empty(size * len(flat))
            with waiting("whole weights"):
                _all_gather(gathered, flat, group=mesh.get_group(dim))
            for (sharded, whole), rows in zip(bucket, gathered.view(size, -1).split(counts, dim=1), strict=True):
                rest = sharded.shape[1:]
                whole.copy_(rows.reshape(size * _per(sharded, size), *rest)[: len(sharded)])

    def _buckets(self) -> Iterator[list[tuple[DTensor, nn.Parameter]]]:
        bucket: list[tuple[DTensor, nn.Parameter]] = []
        values = 0
        for sharded, whole in self._pairs:
            if bucket and values + whole.numel() > BUCKET:
                yield bucket
                bucket, values = [], 0
            bucket.append((sharded, whole))
            values += whole.numel()
        if bucket:
            yield bucket


def _dim(tensor: DTensor) -> int:
    return next(dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Shard))


def _over(tensor: DTensor) -> tuple[int, int]:
    """Over how many processes it is sharded, and which one of them this is."""
    mesh: Any = tensor.device_mesh
    return mesh.size(_dim(tensor)), mesh.get_local_rank(_dim(tensor))


def _per(tensor: torch.Tensor, size: int) -> int:
    """Entries of the first dimension that a process has, the last ones fewer or none."""
    return -(-len(tensor) // size)
