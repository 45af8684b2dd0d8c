"""Writing the token cache: processes that tokenise the shards that are missing, together with those of other jobs.

Owns who does what, and what becomes of errors and of processes that die. A shard that is there stays, so that a killed
job goes on with the next one. Refuses to import torch: a process has to start quickly.
"""

import contextlib
import functools
import itertools
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from titanlite.data.cache_progress import Event, Progress
from titanlite.data.shard_writer import Tokenised, shard_lock, write_shard
from titanlite.data.shards import Portion, Shard, cache_folder, plan_shards
from titanlite.data.source import RecordError, Source, SourceError
from titanlite.data.stream import DocumentEncoder, encode_or_raise
from titanlite.log import logger

_SAMPLED_SHARDS, _SAMPLED_DOCUMENTS, _SAMPLED_CHARS = 8, 4, 16384
_TABLE_BYTES = 16  # of a shard, per document
_PAUSE = 0.1  # seconds until a process looks again whether another has finished
_PATIENCE = 10.0  # seconds that a process gets to clean up after itself


def write_cache(
    source: Source, tokenizer: DocumentEncoder, cache_dir: str, num_processes: int, stop_on_bad_record: bool
) -> None:
    """Write what is missing of the source's cache, and wait for what other processes and jobs write of it.

    num_processes = 0: in this process. Raises ValueError, in one line, where the folder cannot be written or has no
    room, and for a bad record when that has to stop it; SourceError for a file that has changed. Finished shards stay
    in any case.
    """
    folder = cache_folder(cache_dir)
    portions = plan_shards(source, tokenizer.fingerprint)
    missing = [portion for portion in portions if Shard.open(folder, portion) is None]
    if not missing:
        return
    with _telling_the_fix(cache_dir):
        os.makedirs(folder, exist_ok=True)
    need, free = _estimate(source, tokenizer, missing), shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(
            f"data.cache_dir = {cache_dir!r}: the token cache of source {source.name!r} takes about {need / 1e9:.2f} "
            f"GB more, and {folder} has {free / 1e9:.2f} GB free; name a folder that has room"
        )
    num_processes = min(num_processes, len(missing))
    logger.info(
        f"token cache of source {source.name!r}: writing {len(missing)} of {len(portions)} shards to {folder}, about "
        f"{need / 1e9:.2f} GB, with {num_processes or 1} processes"
    )
    open_source = functools.partial(Source, source.name, source.files, source.text_field, cache_dir)
    job = _Job(open_source, tokenizer, cache_dir, missing, stop_on_bad_record)
    with Progress(source.name, folder, missing) as progress:
        if num_processes:
            _write_in_processes(job, num_processes, progress)
        else:
            for event in job.write(source, 0):
                progress.take(*event)


def available_cores() -> int:
    """Of this process: a scheduler may give it less than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _estimate(source: Source, tokenizer: DocumentEncoder, portions: list[Portion]) -> float:
    """About how many bytes the shards will take, judged by a few documents of a few of them."""
    text_bytes = shard_bytes = 0
    for portion in portions[:: max(1, len(portions) // _SAMPLED_SHARDS)]:
        for file, record, text in itertools.islice(_records(source, portion), _SAMPLED_DOCUMENTS):
            if isinstance(text, str):
                sample = text[:_SAMPLED_CHARS]
                with contextlib.suppress(RecordError):
                    place = functools.partial(source.locate, file, record)
                    shard_bytes += len(encode_or_raise(tokenizer.encode_document, sample, place)) * _width(tokenizer)
                    shard_bytes += _TABLE_BYTES
                    text_bytes += _num_bytes(sample)
    return sum(portion.weight for portion in portions) * shard_bytes / max(1, text_bytes)


def _width(tokenizer: DocumentEncoder) -> int:
    """Bytes per token."""
    return 2 if tokenizer.vocab_size <= 1 << 16 else 4


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _records(source: Source, portion: Portion) -> Iterator[tuple[int, int, str | RecordError]]:
    """(file, record of the file, text) of all that a portion holds, in order."""
    if portion.documents is None:
        for file in portion.files:
            for record, text in enumerate(source.records(file)):
                yield file, record, text
        return
    assert source.numbering is not None
    for document in portion.documents:
        place = source.numbering.place(document)
        try:
            yield *place, source.read(document)
        except RecordError as bad:
            yield *place, bad


def _tokenise(
    source: Source, tokenizer: DocumentEncoder, portion: Portion, stop_on_bad_record: bool
) -> Iterator[Tokenised]:
    nothing = np.empty(0, np.int32)
    for file, record, text in _records(source, portion):
        try:
            if isinstance(text, RecordError):
                raise text
            ids = encode_or_raise(tokenizer.encode_document, text, functools.partial(source.locate, file, record))
        except RecordError as bad:
            if stop_on_bad_record:
                raise ValueError(f'{bad}; data.on_bad_record = "skip" would leave it out and count it') from bad
            yield Tokenised(file, nothing, 0, bad.reason)
        else:
            yield Tokenised(file, ids, _num_bytes(text))


@contextlib.contextmanager
def _telling_the_fix(cache_dir: str) -> Iterator[None]:
    try:
        yield
    except SourceError:
        raise
    except OSError as error:
        raise ValueError(
            f"data.cache_dir = {cache_dir!r}: cannot write the token cache to {cache_folder(cache_dir)} "
            f"({error.strerror}); name a folder that can be written and has room"
        ) from error


class _Busy(Exception):
    """Another process writes this shard."""


@dataclass(frozen=True)
class _Job:
    """What a process has to know."""

    open_source: Callable[[], Source]
    tokenizer: DocumentEncoder
    cache_dir: str
    portions: list[Portion]
    stop_on_bad_record: bool

    def write(self, source: Source, first: int) -> Iterator[Event]:
        """Write, from shard `first` on and round, each that is missing and that nobody else writes, until all are
        there."""
        numbers = range(len(self.portions))
        pending = [*numbers[first:], *numbers[:first]]
        while pending:
            busy = []
            for number in pending:
                try:
                    with _telling_the_fix(self.cache_dir):
                        for text_bytes in self._write_one(source, self.portions[number]):
                            yield "writing", number, text_bytes
                    yield "done", number, 0
                except _Busy:
                    busy.append(number)
            if len(busy) == len(pending):
                yield "busy", busy[0], 0
                time.sleep(_PAUSE)
            pending = busy

    def _write_one(self, source: Source, portion: Portion) -> Iterator[int]:
        folder = cache_folder(self.cache_dir)
        if Shard.open(folder, portion) is not None:
            return
        with shard_lock(folder, portion) as held:
            if held is False:
                raise _Busy
            if Shard.open(folder, portion) is None:  # another process may have written it meanwhile
                yield 0
                documents = _tokenise(source, self.tokenizer, portion, self.stop_on_bad_record)
                yield from write_shard(documents, portion, folder, _width(self.tokenizer), clean_up=bool(held))


def _write_in_processes(job: _Job, num_processes: int, progress: Progress) -> None:
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
            for connection in wait(list(running), timeout=1):
                assert isinstance(connection, Connection)
                try:
                    event = connection.recv()
                except EOFError:
                    _bury(running.pop(connection))
                else:
                    if isinstance(event, Exception):
                        raise event
                    progress.take(*event)
        if not progress.complete:
            raise ValueError(
                "the processes that write the token cache ended before it was done; was memory short? fewer processes "
                "need less (--processes)"
            )
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(_PATIENCE)
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


def _work(job: _Job, first: int, connection: Connection) -> None:
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
