"""The processes of a run as a mesh: replicas, each of which shares its sequences among ``parallel.sp`` processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vrlt_fast.config import ParallelConfig
from vrlt_fast.errors import ConfigError, Problem, SetupError
from vrlt_fast.parallel.replicas import Replicas, waiting
from vrlt_fast.parallel.sequence import Peers


@dataclass(frozen=True)
class Mesh:
    """Where this process stands: among ``everyone``; among ``replicas``, which have different prompts; among the
    ``peers`` of its replica, which have the same prompts and share every sequence; and among ``owners``, which share
    one copy of the weights, by ``weights``, a device mesh with the dimensions replicate and shard.
    """

    everyone: Replicas = field(default_factory=Replicas)
    replicas: Replicas = field(default_factory=Replicas)
    peers: Peers = field(default_factory=Peers)
    owners: Replicas = field(default_factory=Replicas)
    weights: DeviceMesh | None = None

    @property
    def in_step(self) -> Replicas:
        """The processes that make equally many passes, as they gather weights in them, where they wouldn't anyway."""
        return self.everyone if self.weights is not None and self.replicas.world > 1 else Replicas()

    @property
    def in_passes(self) -> int:
        """How many processes make all passes together."""
        return self.peers.size if self.weights is None else self.everyone.world

    def first_alone(self, call: Callable[[], None]) -> None:
        """What the first process does for all; the others wait for it."""
        if self.first:
            call()
        self.everyone.wait()

    @property
    def first(self) -> bool:
        """Whether this process writes and logs."""
        return self.everyone.first


def join(device: torch.device | str, parallel: ParallelConfig) -> Mesh:
    """The processes that torchrun's environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or this one.

    Raises:
        ConfigError: C04 they aren't ``parallel.replicas`` x ``parallel.sp``, or can't be groups of ``parallel.shard``.
        SetupError: E02 this machine has fewer GPUs than processes.
    """
    world, replicas, sp, shard = int(os.environ.get("WORLD_SIZE", "1")), parallel.replicas, parallel.sp, parallel.shard
    if world != replicas * sp:
        what = f"parallel.replicas = {replicas} and parallel.sp = {sp}, but there are {world} processes"
        fix = "set parallel.replicas to the number of processes over parallel.sp, or start as many as configured"
        raise ConfigError(Problem("VRLT-C04", what, "parallel.replicas", fix=fix))
    check_shard(replicas, sp, shard)
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
    backend, limit = "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timedelta(minutes=parallel.wait)
    with waiting("the start of all processes"):
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=limit)
    return mesh_of(Replicas(rank, world), "cuda" if on_gpu else "cpu", sp, shard)


def mesh_of(everyone: Replicas, device: str, sp: int, shard: int) -> Mesh:
    """The mesh of processes that have joined: consecutive ones are peers, and owners."""
    rank, world = everyone.rank, everyone.world
    replicas, peers, owners, weights = everyone, Peers(), Replicas(), None
    if sp > 1:
        mesh = init_device_mesh(device, (world // sp, sp), mesh_dim_names=("replicate", "sp"))
        replicas = Replicas(rank // sp, world // sp, mesh.get_group("replicate"))
        peers = Peers(rank % sp, sp, mesh.get_group("sp"))
    if shard > 1:
        weights = init_device_mesh(device, (world // shard, shard), mesh_dim_names=("replicate", "shard"))
        owners = Replicas(rank % shard, shard, weights.get_group("shard"))
    return Mesh(everyone, replicas, peers, owners, weights)


def check_shard(replicas: int, sp: int, shard: int) -> None:
    """Raises ConfigError C04 where ``replicas`` x ``sp`` processes can't share weights in groups of ``shard``."""
    world = replicas * sp
    if shard == 1 or (world % shard == 0 and shard % sp == 0):
        return
    fits = [n for n in range(sp, world + 1, sp) if world % n == 0 and n > 1]
    what = f"{world} processes, {sp} of which share a sequence, can't share weights in groups of {shard}"
    fix = f"set parallel.shard to one of {', '.join(map(str, [1, *fits]))}"
    raise ConfigError(Problem("VRLT-C04", what, "parallel.shard", fix=fix))


def leave() -> None:
    """End what :func:`join` began. Where one process has failed the others may not come: then it isn't called."""
    if dist.is_initialized():
        dist.destroy_process_group()
