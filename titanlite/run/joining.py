"""A process as a rank of its job: it joins the process group, builds the mesh, and says what it does and for how long.

Owns the limits: how long the watchdog lets a phase take, and collectives some seconds more: its message names the rank
that hangs, and theirs does not.
"""

import math

import torch
import torch.distributed as dist

from titanlite.config import Config, resolve_degrees
from titanlite.parallel.mesh import Mesh, another_connection, build_mesh, init_process_group, set_timeout
from titanlite.run.agreement import PeerLost
from titanlite.run.watchdog import Watchdog

SAVING_SECONDS = 1800  # that a save or a load may take: all of it is one phase to the watchdog
MARGIN_SECONDS = 10
_PREPARING_SECONDS = 30 * 24 * 3600  # a rank may wait so long for indices and caches; of one that dies it hears at once


class Membership:
    """Joins at construction. Raises PeerLost where the others do not come in time."""

    mesh: Mesh

    def __init__(self, config: Config, watchdog: Watchdog) -> None:
        self._comm, self._watchdog = config.comm, watchdog
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        watchdog.mark("meeting the other ranks")
        try:
            self._joined = init_process_group(device_type, config.comm.init_timeout_seconds)
            store = another_connection(config.comm.init_timeout_seconds) if self._joined else None
        except OSError as error:
            raise PeerLost(str(error)) from error
        if store is not None:
            watchdog.connect(store, dist.get_rank(), dist.get_world_size())
        self.mesh = build_mesh(device_type, *resolve_degrees(config.parallelism, dist.get_world_size()))
        self.start()

    def start(self) -> None:
        """From now on the limit of the start is in force."""
        self._limit(self._comm.init_timeout_seconds, "comm.init_timeout_seconds")

    def train(self) -> None:
        """The limit of steps."""
        self._limit(self._comm.train_timeout_seconds, "comm.train_timeout_seconds")

    def prepare(self) -> None:
        """None: what comes now may take any time on one rank, while the others wait."""
        set_timeout(self.mesh, _PREPARING_SECONDS)
        self._watchdog.mark("preparing data", at_least=math.inf)

    def _limit(self, seconds: int, name: str) -> None:
        self._watchdog.set_timeout(seconds, name)
        set_timeout(self.mesh, seconds + MARGIN_SECONDS)

    def leave(self) -> None:
        """Together with all other ranks."""
        if self._joined:
            dist.destroy_process_group()
