"""Ranks of a training run as real processes that start in a moment, for tests that kill, stop and signal them.

They are forked from a server that has imported torch; the store at which they meet outlives them, as torchrun's does.
`start` gives them what torchrun would, but no launcher: tests of that use torchrun.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.gloo import with_torch
from titanlite.train.__main__ import main

LONG = 240.0  # seconds: a test that waits so long has failed


def until(condition: Callable[[], object], what: str, seconds: float = LONG) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def forked(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process of its own that runs an importable function, with torch imported already."""
    process = with_torch().Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def num_steps(run: Path) -> int:
    cursors = run / "cursor.jsonl"
    return cursors.read_bytes().count(b"\n") if cursors.exists() else 0


def _rank(
    rank: int, environment: dict[str, str], log: str, fault: Callable[[int], None] | None, argv: list[str]
) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    if fault is not None:
        fault(rank)
    code = main(argv)
    sys.stderr.flush()
    sys.exit(code)


class Life:
    """The ranks of one start."""

    def __init__(self, folder: Path, port: int, attempt: int, world_size: int) -> None:
        self._environment = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "LOG_RANK": ",".join(map(str, range(world_size))),
        }
        self._logs = [folder / f"life-{attempt}-rank-{rank}.log" for rank in range(world_size)]
        self.processes: list[BaseProcess] = []

    def start(self, rank: int, argv: list[str], fault: Callable[[int], None] | None) -> None:
        arguments = (rank, self._environment, str(self._logs[rank]), fault, argv)
        self.processes.append(forked(_rank, *arguments))

    def log(self, rank: int) -> str:
        return self._logs[rank].read_text() if self._logs[rank].exists() else ""

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, *ranks: int) -> list[int]:
        """Exit codes of these ranks, of all when none are named."""
        chosen = [self.processes[rank] for rank in ranks or range(len(self.processes))]
        for process in chosen:
            process.join(LONG)
            assert process.exitcode is not None, "still running:\n" + "\n".join(map(self.log, range(len(self._logs))))
        return [process.exitcode for process in chosen if process.exitcode is not None]


class Lives:
    """Starts of a job, one after the other: attempts of an elastic launch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._attempt = folder, 0
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        self._started: list[Life] = []

    def start(
        self, world_size: int, config: Path, *overrides: str, fault: Callable[[int], None] | None = None, first: int = 0
    ) -> Life:
        """`fault(rank)`, importable, runs in each process before the program. first: leave out lower ranks."""
        life = Life(self.folder, self._store.port, self._attempt, world_size)
        self._attempt += 1
        self._started.append(life)
        for rank in range(first, world_size):
            life.start(rank, ["--job.config_file", str(config), *overrides], fault)
        return life

    def end(self) -> None:
        for life in self._started:
            for process in life.processes:
                process.kill()
                process.join()


@contextmanager
def lives(folder: Path) -> Iterator[Lives]:
    found = Lives(folder)
    try:
        yield found
    finally:
        found.end()
