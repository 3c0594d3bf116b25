"""The processes of a run as a mesh: replicas, each of which shares its sequences among ``parallel.sp`` processes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from vrlt_fast.errors import ConfigError, Problem, SetupError
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


def join(device: torch.device | str = "cpu", replicas: int = 1, sp: int = 1) -> Mesh:
    """The processes that torchrun's environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or this one.

    Raises:
        ConfigError: C04 they aren't ``replicas`` x ``sp``.
        SetupError: E02 this machine has fewer GPUs than processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != replicas * sp:
        what = f"parallel.replicas = {replicas} and parallel.sp = {sp}, but there are {world} processes"
        fix = "set parallel.replicas to the number of processes over parallel.sp, or start as many as configured"
        raise ConfigError(Problem("VRLT-C04", what, "parallel.replicas", fix=fix))
    if world == 1:
        return Mesh()
    rank = int(os.environ["RANK"])
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        place, gpus = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
        if place >= gpus:
            what = f"process {place} of this machine has no GPU: torch sees {gpus}"
            raise SetupError(
                Problem("VRLT-E02", what, "parallel.replicas", fix="lower parallel.replicas or parallel.sp")
            )
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=rank, world_size=world, timeout=WAIT)
    everyone = Replicas(rank, world)
    if sp == 1:
        return Mesh(everyone, everyone)
    shape, names = (replicas, sp), ("replicate", "sp")
    mesh = init_device_mesh("cuda" if on_gpu else "cpu", shape, mesh_dim_names=names)
    replica, part = divmod(rank, sp)
    others = Replicas(replica, replicas, mesh.get_group("replicate"))
    return Mesh(everyone, others, Peers(part, sp, mesh.get_group("sp")))


def leave() -> None:
    """End what :func:`join` began. Where one process has failed the others may not come: then it isn't called."""
    if dist.is_initialized():
        dist.destroy_process_group()
