"""Starts ranks on this machine for a verb that compares layouts, and collects what they return.

The store at which the ranks meet lives in this process, as it does in torchrun's. No rank outlives the call.
"""

import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from titanlite.log import init_logging
from titanlite.run.agreement import RunFailed

_GRACE_SECONDS = 2  # in which the failure that others only followed from may still be heard of


class RanksFailed(Exception):
    """A rank failed, died or hangs; its text is one line."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    environment: dict[str, str],
    timeout_seconds: float,
    progress: Callable[[int], None],
) -> list[Any]:
    """Results of `function(*arguments, report)` on every rank of a job of `world_size`, in rank order.

    The function and its arguments are pickled. It calls `report(number)` as it comes along; `progress` hears rank 0's.
    Raises RanksFailed, and ends all ranks, when one raises, dies, or none of them reports for `timeout_seconds`.
    """
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = environment | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    num_threads = max(1, torch.get_num_threads() // world_size)
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            arguments_of_rank = (rank, environment, num_threads, theirs, function, arguments)
            processes.append(context.Process(target=_serve, args=arguments_of_rank, daemon=True))
            processes[-1].start()
            theirs.close()  # the rank's own end must be the only one, or its death would not be noticed
            pipes.append(mine)
        return _collect(pipes, processes, timeout_seconds, progress)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _collect(
    pipes: list[Connection], processes: list[BaseProcess], timeout_seconds: float, progress: Callable[[int], None]
) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[bool, str]] = []  # a death comes first: what peers report may follow from it
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout_seconds
    while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError):
                processes[rank].join(timeout=5)
                kind, value = "died", f"rank {rank} died with exit code {processes[rank].exitcode}"
            if kind == "report":
                if rank == 0:
                    progress(value)
                if not failures:
                    deadline = time.monotonic() + timeout_seconds
                continue
            del waiting[pipe]
            if kind == "result":
                results[rank] = value
            else:
                failures.append((kind != "died", value))
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    if failures:
        raise RanksFailed(min(failures, key=lambda failure: failure[0])[1])
    if waiting:
        raise RanksFailed(f"hangs: no rank has come further for {timeout_seconds:g} s")
    return [results[rank] for rank in range(len(pipes))]


def _serve(
    rank: int,
    environment: dict[str, str],
    num_threads: int,
    pipe: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole foreground; the parent ends its ranks
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), LOG_RANK="")
    # tqdm's lock is then no semaphore that somebody must clean up when this process is killed.
    multiprocessing.set_start_method("fork", force=True)
    warnings.simplefilter("ignore")  # a training run shows them; here they would bury the result
    torch.set_num_threads(num_threads)
    init_logging(rank)
    try:
        pipe.send(("result", function(*arguments, lambda number: pipe.send(("report", number)))))
    except BaseException as error:
        pipe.send(("error", _one_line(rank, error)))


def _one_line(rank: int, error: BaseException) -> str:
    """What ranks agreed on, and a user's mistake, in its own words; else with its kind and the line it came from."""
    text = " ".join(str(error).split())
    if isinstance(error, RunFailed):
        return text
    if isinstance(error, ValueError):
        return f"rank {rank}: {text}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"rank {rank}: {type(error).__name__}: {text[:500]} ({place.filename}:{place.lineno})"
