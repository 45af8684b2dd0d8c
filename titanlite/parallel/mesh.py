"""The one device mesh: which rank is which data-parallel and tensor-parallel peer.

Refuses to guess: degrees arrive resolved.
"""

from dataclasses import dataclass

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
    def groups(self) -> list[dist.ProcessGroup]:
        return self.device_mesh.get_all_groups()

    @property
    def describe(self) -> str:
        sizes = zip(self.device_mesh.mesh_dim_names or (), self.device_mesh.shape, strict=True)
        return " x ".join(f"{name} {size}" for name, size in sizes)


def build_mesh(device_type: str, replicate: int, shard: int, tp: int) -> Mesh:
    """The mesh over all ranks of the process group; replicate * shard * tp is their number."""
    axes = ("dp_replicate", "dp_shard", "tp")
    return Mesh(init_device_mesh(device_type, (replicate, shard, tp), mesh_dim_names=axes))
