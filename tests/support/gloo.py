"""Real gloo ranks for tests: a group of processes that is started once and runs many functions.

`ranks(4).run(function, *args)` calls `function(*args)` on every rank of a four-process group and returns the results
in rank order. The function must be importable (module level in a test file). A failure on any rank is raised with
that rank's traceback; the group is then thrown away, because its peers may wait in a collective that never ends.
"""

import atexit
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 120
# Every run leaves gloo groups with threads that poll, and torch's caches refer to them: hundreds would take a core.
MAX_RUNS = 10


def with_torch() -> ForkServerContext:
    """Starts processes that need not import torch: forked from one that has, and has done nothing with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["titanlite.train.run", "torch._dynamo"])
    return context


def _serve(rank: int, world_size: int, store_path: str, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store_path, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    while (call := pipe.recv()) is not None:
        function, args, kwargs = call
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """A group of `world_size` gloo processes that lives until `close`."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.num_runs = 0
        context = with_torch()
        self._folder = tempfile.TemporaryDirectory(prefix="titanlite-gloo-")
        store = os.path.join(self._folder.name, "store")
        pairs = [context.Pipe() for _ in range(world_size)]
        self._pipes = [mine for mine, _ in pairs]
        self._processes = [
            context.Process(target=_serve, args=(rank, world_size, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Results of `function(*args, **kwargs)` on every rank, in rank order."""
        self.num_runs += 1
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        results: dict[int, Any] = {}
        failures: list[str] = []
        while len(results) < self.world_size and not failures:
            waiting = {self._pipes[r]: r for r in range(self.world_size) if r not in results}
            ready = wait(list(waiting), timeout=2 * TIMEOUT_SECONDS)
            if not ready:
                failures.append(f"ranks {sorted(waiting.values())} gave no answer in {2 * TIMEOUT_SECONDS} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting[pipe]
                try:
                    ok, results[rank] = pipe.recv()
                except (EOFError, OSError):
                    self._processes[rank].join(timeout=5)
                    ok, results[rank] = False, f"the process died, exit code {self._processes[rank].exitcode}"
                if not ok:
                    failures.append(f"rank {rank} of {self.world_size}:\n{results[rank]}")
        if failures:
            self.close(force=True)
            raise RuntimeError("\n".join(failures))
        return [results[rank] for rank in range(self.world_size)]

    def close(self, force: bool = False) -> None:
        _groups.pop(self.world_size, None)
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if force:
                process.kill()
            elif process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(timeout=20)
        self._folder.cleanup()


_groups: dict[int, Ranks] = {}


def ranks(world_size: int) -> Ranks:
    """The shared group of that size, started at its first use, and anew after MAX_RUNS."""
    if world_size in _groups and _groups[world_size].num_runs >= MAX_RUNS:
        _groups[world_size].close()
    if world_size not in _groups:
        _groups[world_size] = Ranks(world_size)
    return _groups[world_size]


@atexit.register
def _close_all() -> None:
    for group in list(_groups.values()):
        group.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
