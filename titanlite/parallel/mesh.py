"""The process group and the one device mesh: which rank is which data-parallel and tensor-parallel peer.

Refuses to guess: degrees arrive resolved, and a group is joined through a store that no earlier attempt has written to.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """The axes dp_replicate x dp_shard x tp over all ranks, tp innermost (its peers are neighbours)."""

    device_mesh: DeviceMesh

    @property
    def device(self) -> torch.device:
        if self.device_mesh.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.device_mesh.device_type)

    @property
    def tp(self) -> DeviceMesh:
        return self.device_mesh["tp"]

    @property
    def fsdp(self) -> DeviceMesh:
        """What fully_shard takes: 1-D to shard, 2-D to replicate and shard (HSDP)."""
        if self.device_mesh["dp_replicate"].size() > 1:
            return self.device_mesh["dp_replicate", "dp_shard"]
        return self.device_mesh["dp_shard"]

    @property
    def dp_degree(self) -> int:
        return self.device_mesh["dp_replicate"].size() * self.device_mesh["dp_shard"].size()

    @property
    def dp_rank(self) -> int:
        replicate, shard = self.device_mesh["dp_replicate"], self.device_mesh["dp_shard"]
        return replicate.get_local_rank() * shard.size() + shard.get_local_rank()

    @property
    def describe(self) -> str:
        sizes = zip(self.device_mesh.mesh_dim_names or (), self.device_mesh.shape, strict=True)
        return " x ".join(f"{name} {size}" for name, size in sizes)


def build_mesh(device_type: str, replicate: int, shard: int, tp: int) -> Mesh:
    """The mesh over all ranks of the process group; replicate * shard * tp is their number."""
    axes = ("dp_replicate", "dp_shard", "tp")
    return Mesh(init_device_mesh(device_type, (replicate, shard, tp), mesh_dim_names=axes))


def init_process_group(device_type: str, timeout_seconds: int) -> bool:
    """Join the job's process group; without torchrun's environment, be a job of one rank.

    False where the caller has joined it already, and will leave it.

    Every attempt of an elastic job gets its own key space: torchrun keeps the store of a failed attempt alive, and
    gloo would dial the addresses of its dead workers (pytorch#135712).
    """
    if dist.is_initialized():
        return False
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return True
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    server = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not agent_serves,
        timeout=timeout,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"titanlite_attempt_{attempt}", server)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return True


def set_timeout(mesh: Mesh, seconds: int) -> None:
    """Let collectives wait that long from now on. torch 2.13 has no public call for it; torchtitan uses this one."""
    for group in (dist.group.WORLD, *mesh.device_mesh.get_all_groups()):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
