"""The process group and the one device mesh: which rank is which data-parallel and tensor-parallel peer.

Refuses to guess: degrees arrive resolved, and a group is joined through a store that no earlier attempt has written to.
"""

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titanlite.log import logger

_LAUNCHER_SECONDS = 5.0  # without an answer from its store: it died before this rank could look who its parent is


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


def init_process_group(device_type: str, timeout_seconds: int, tell_seconds: float = 30) -> bool:
    """Join the job's process group; without torchrun's environment, be a job of one rank.

    False where the caller has joined it already, and will leave it. Every `tell_seconds` the log names the ranks that
    are awaited. Raises TimeoutError, naming them, where they are not there in time; ConnectionError where their store
    is closed meanwhile.
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
    waiting = _Waiting(timeout_seconds, tell_seconds)
    store = _connect("ranks", timeout, waiting, serves=rank == 0 and not _agent_serves())
    _call_the_roll(store, rank, world_size, waiting)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return True


def another_connection(timeout_seconds: int) -> dist.Store | None:
    """To the store at which the ranks met, for a thread of its own; None in a job of one rank without torchrun."""
    if "RANK" not in os.environ:
        return None
    return _connect("watchdog", timedelta(seconds=timeout_seconds), _Waiting(timeout_seconds, timeout_seconds), False)


class _Waiting:
    """The time that is left to wait in, and the log lines that say for whom."""

    def __init__(self, timeout_seconds: float, tell_seconds: float) -> None:
        self._began, self._told = time.monotonic(), 0.0
        self._timeout, self._tell = timeout_seconds, tell_seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def sleep(self, awaited: str) -> None:
        """For a moment. Raises TimeoutError when the time is up."""
        waited = self.seconds
        if waited > self._timeout:
            raise TimeoutError(
                f"waited {self._timeout:g} s (comm.init_timeout_seconds) for {awaited}: look for its log and its host"
            )
        if waited > self._told + self._tell:
            self._told = waited
            logger.warning("waiting for %s (%.0f s of %g)", awaited, waited, self._timeout)
        time.sleep(0.05)


def _connect(name: str, timeout: timedelta, waiting: _Waiting, serves: bool) -> dist.Store:
    """A connection to the job's store with a key space of its own for every attempt of an elastic job.

    torchrun keeps the store of a failed attempt alive, and gloo would dial the addresses of its dead workers
    (pytorch#135712).
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    while not serves:
        try:  # quietly: the store's own constructor prints a stack for every attempt
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as error:
            refused = isinstance(error, ConnectionRefusedError) and _agent_serves()
            if refused and waiting.seconds > _LAUNCHER_SECONDS:
                raise ConnectionError(f"the launcher's store at {host}:{port} is gone, and so the launcher") from error
            waiting.sleep(f"rank 0, or its launcher, at {host}:{port}")
    store = dist.TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"titanlite_attempt_{attempt}/{name}", store)


def _agent_serves() -> bool:
    """Whether the launcher keeps the store, which then is there before any rank is."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _call_the_roll(store: dist.Store, rank: int, world_size: int, waiting: _Waiting) -> None:
    missing, awaited = list(range(world_size)), "the other ranks"
    try:
        store.set(f"here/{rank}", "")
        while missing := [other for other in missing if not store.check([f"here/{other}"])]:
            more = f" and {len(missing) - 16} more" if len(missing) > 16 else ""
            awaited = f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing[:16]))}{more}"
            waiting.sleep(awaited)
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(f"the store at {address} was closed while this rank waited for {awaited}") from error


def set_timeout(mesh: Mesh, seconds: int) -> None:
    """Let collectives wait that long from now on. torch 2.13 has no public call for it; torchtitan uses this one."""
    for group in (dist.group.WORLD, *mesh.device_mesh.get_all_groups()):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
