"""The processes that write a token cache: their start, what they say, and their end, also that with their parent.

Refuses to import torch: a process has to start quickly.
"""

import contextlib
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from titanlite.data.cache.progress import Event
from titanlite.data.cache.work import Job
from titanlite.data.source import SourceError
from titanlite.log import logger

_ASK_SECONDS = 0.5  # at most between two events
_PATIENCE = 10.0  # seconds that a process gets to clean up after itself


def write_in_processes(job: Job, num_processes: int) -> Generator[Event | None, None, None]:
    """Events as they come, and None now and then. The processes end with the iterator."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks, and CUDA's state
    start = random.randrange(len(job.portions))  # where no lock tells jobs apart, their places do
    running: dict[Connection, Any] = {}
    try:
        with _without_interrupts():
            for i in range(num_processes):
                ours, theirs = context.Pipe(duplex=False)
                first = (start + i * len(job.portions) // num_processes) % len(job.portions)
                process = context.Process(target=_work, args=(job, first, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = process
        while running:
            yield None
            for connection in wait(list(running), timeout=_ASK_SECONDS):
                assert isinstance(connection, Connection)
                try:
                    event = connection.recv()
                except EOFError:
                    _bury(running.pop(connection))
                else:
                    if isinstance(event, Exception):
                        raise event
                    yield event
    finally:
        for process in running.values():
            process.terminate()
        deadline = time.monotonic() + _PATIENCE
        for process in running.values():
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block SIGINT, also in processes that start meanwhile: a terminal sends it to all, and it is ours to act on."""
    resource_tracker.ensure_running()  # its start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _bury(process: Any) -> None:
    process.join()
    if process.exitcode:
        logger.warning(
            f"a process that wrote the token cache ended with {process.exitcode} (negative: the signal that killed "
            "it); the others take over what it had begun"
        )


def _work(job: Job, first: int, connection: Connection) -> None:
    """The life of a process: events, and at the end an error if there was one, go through the connection."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # removes what is half written
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logger.setLevel(logging.ERROR)  # our parent speaks
    with contextlib.suppress(BrokenPipeError):  # our parent is gone
        try:
            for event in job.write(job.open_source(), first):
                connection.send(event)
        except BrokenPipeError:
            raise
        except (ValueError, SourceError) as error:
            kind = SourceError if isinstance(error, SourceError) else ValueError
            connection.send(kind(str(error)))
        except Exception as error:
            connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)
