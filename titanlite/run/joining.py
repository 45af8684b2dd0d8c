"""A process as a rank of its run: it joins the process group, and says what may take how long.

Owns the limits: how long the watchdog lets a phase take, and collectives some seconds more: its message names the rank
that hangs, and theirs does not.
"""

import math
import os
import socket
import time
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

from titanlite.checkpoint import CheckpointError
from titanlite.config import CommConfig
from titanlite.log import logger
from titanlite.run.agreement import PeerLost, RunFailed
from titanlite.run.watchdog import Watchdog

SAVING_SECONDS = 1800  # that a save or a load may take: all of it is one phase to the watchdog
MARGIN_SECONDS = 10
_LAUNCHER_SECONDS = 5.0  # without an answer from its store: it died before this rank could look who its parent is
_PREPARING_SECONDS = 30 * 24 * 3600  # a rank may wait so long for indices and caches; of one that dies it hears at once


class Membership:
    """Joins at construction, and leaves at the end of its block. Raises PeerLost where the others do not come in time,
    and, at the end, where an error of this rank comes from one that is gone."""

    def __init__(self, comm: CommConfig, watchdog: Watchdog) -> None:
        self.device_type = "cuda" if torch.cuda.is_available() else "cpu"
        self._comm, self._watchdog = comm, watchdog
        self._gone: str | None = None
        watchdog.mark("meeting the other ranks")
        try:
            self._joined = init_process_group(self.device_type, comm.init_timeout_seconds)
            store = another_connection(comm.init_timeout_seconds) if self._joined else None
        except OSError as error:
            raise PeerLost(str(error)) from error
        if store is not None:
            watchdog.connect(store, dist.get_rank(), dist.get_world_size())
        self._groups = [dist.group.WORLD]

    def __enter__(self) -> "Membership":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # What ranks agree on is the same error on each; after another one, a peer may still wait in a collective.
        if error is None or isinstance(error, RunFailed | CheckpointError):
            if self._joined:
                dist.destroy_process_group()
            self._watchdog.close()
        elif gone := self.gone(error):
            raise PeerLost(f"{gone}; the next start goes on from the last checkpoint") from error

    def start(self, groups: Iterable[dist.ProcessGroup] = ()) -> None:
        """From now on the limit of the start is in force, of these groups' collectives too."""
        self._groups += groups
        self._limit(self._comm.init_timeout_seconds, "comm.init_timeout_seconds")

    def train(self) -> None:
        """The limit of steps."""
        self._limit(self._comm.train_timeout_seconds, "comm.train_timeout_seconds")

    def prepare(self) -> None:
        """None: what comes now may take any time on one rank, while the others wait."""
        self._set_timeout(_PREPARING_SECONDS)
        self._watchdog.mark("preparing data", at_least=math.inf)

    def gone(self, error: BaseException) -> str:
        """Who of the others is gone, and so the cause of an error of this rank; empty: nobody. Takes seconds, once."""
        if self._gone is None:
            agreed_on = isinstance(error, RunFailed | CheckpointError)
            self._gone = "" if agreed_on else self._watchdog.explain(error)
        return self._gone

    def _limit(self, seconds: int, name: str) -> None:
        self._watchdog.set_timeout(seconds, name)
        self._set_timeout(seconds + MARGIN_SECONDS)

    def _set_timeout(self, seconds: int) -> None:
        """Let collectives wait that long. torch 2.13 has no public call for it; torchtitan uses this one."""
        for group in self._groups:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


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
