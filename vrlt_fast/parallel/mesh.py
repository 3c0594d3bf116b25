"""The processes of a run as a mesh: replicas, each of which shares its sequences among ``parallel.sp`` processes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from vrlt_fast.errors import ConfigError, Problem
from vrlt_fast.parallel.replicas import Replicas
from vrlt_fast.parallel.sequence import Peers

WAIT = timedelta(minutes=30)
"""Longest wait for another process: rank 0 may be writing a checkpoint or decoding a long video."""


@dataclass(frozen=True)
class Mesh:
    """Where this process stands: among ``everyone``; among ``replicas``, which have different prompts; and among the
    ``peers`` of its replica, which have the same prompts and share every sequence.
    """

    everyone: Replicas = field(default_factory=Replicas)
    replicas: Replicas = field(default_factory=Replicas)
    peers: Peers = field(default_factory=Peers)

    @property
    def first(self) -> bool:
        """Whether this process writes and logs."""
        return self.everyone.first


def join(device: torch.device | str = "cpu", sp: int = 1) -> Mesh:
    """The processes that torchrun's environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or this one.

    Raises:
        ConfigError: C04 ``sp`` doesn't divide their number.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % sp:
        what = f"{world} processes can't be cut into groups of {sp}"
        raise ConfigError(Problem("VRLT-C04", what, "parallel.sp", fix=f"start a multiple of {sp} processes"))
    if world == 1:
        return Mesh()
    rank = int(os.environ["RANK"])
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=rank, world_size=world, timeout=WAIT)
    everyone = Replicas(rank, world)
    if sp == 1:
        return Mesh(everyone, everyone)
    shape, names = (world // sp, sp), ("replicate", "sp")
    mesh = init_device_mesh("cuda" if on_gpu else "cpu", shape, mesh_dim_names=names)
    replica, place = divmod(rank, sp)
    replicas = Replicas(replica, world // sp, mesh.get_group("replicate"))
    return Mesh(everyone, replicas, Peers(place, sp, mesh.get_group("sp")))


def leave() -> None:
    """End what :func:`join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
