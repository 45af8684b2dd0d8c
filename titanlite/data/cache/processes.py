"""The processes that write a token cache: what one does, what people see of it, their start and their end.

Owns what becomes of bad records, of shards that other processes and jobs have begun, and of a folder that cannot be
written. Refuses to import torch: a process has to start quickly.
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
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
from tqdm import tqdm

from titanlite.data.cache.shards import Shard, ShardPlan, Tokenised, shard_lock, write_shard
from titanlite.data.feed import too_many_bad_records
from titanlite.data.files import shown
from titanlite.data.index import cache_folder, stamp
from titanlite.data.source import RecordError, Source, SourceError
from titanlite.data.stream import DocumentEncoder, encode_or_raise, num_text_bytes
from titanlite.log import logger

_DOCUMENTS = 1024  # read at once
_PAUSE = 0.1  # seconds until a process looks again whether another has finished
_ASK_SECONDS = 0.5  # at most between two events
_PATIENCE = 10.0  # seconds that a process gets to clean up after itself
_LOG_SECONDS = 10.0

Event = tuple[str, int, int]
"""What happened, the shard's number among the missing ones, a count: see Progress.take."""


class _Busy(Exception):
    """Another process writes this shard."""


@dataclass(frozen=True)
class Job:
    """What a process has to know."""

    open_source: Callable[[], Source]
    tokenizer: DocumentEncoder
    cache_dir: str
    portions: list[ShardPlan]
    stop_on_bad_record: bool
    max_bad_records: int

    def write(self, source: Source, first: int) -> Generator[Event, None, None]:
        """Write, from shard `first` on and round, each that is missing and that nobody else writes, until all are
        there."""
        numbers = range(len(self.portions))
        pending = [*numbers[first:], *numbers[:first]]
        while pending:
            busy = []
            for number in pending:
                try:
                    with telling_the_fix(self.cache_dir):
                        for text_bytes in self._write_one(source, self.portions[number]):
                            yield "writing", number, text_bytes
                        shard = Shard.open(cache_folder(self.cache_dir), self.portions[number])
                    yield "done", number, 0 if shard is None else shard.header.num_bad
                except _Busy:
                    busy.append(number)
            if len(busy) == len(pending):
                yield "busy", busy[0], 0
                time.sleep(_PAUSE)
            pending = busy

    def _write_one(self, source: Source, portion: ShardPlan) -> Iterator[int]:
        folder = cache_folder(self.cache_dir)
        if Shard.open(folder, portion) is not None:
            return
        with shard_lock(folder, portion) as held:
            if held is False:
                raise _Busy
            if Shard.open(folder, portion) is None:  # another process may have written it meanwhile
                yield 0
                documents = _tokenise(source, self.tokenizer, portion, self.stop_on_bad_record, self.max_bad_records)
                yield from write_shard(documents, portion, folder, token_width(self.tokenizer), clean_up=bool(held))


def records(source: Source, portion: ShardPlan) -> Iterator[tuple[int, int, str | RecordError]]:
    """(file, record of the file, text) of all that a portion holds, in order. Raises SourceError for what cannot be
    read, and after the documents that were read of a file that has changed."""
    if portion.documents is None:
        for file in portion.files:
            for record, text in enumerate(source.records(file)):
                yield file, record, text
        return
    assert source.numbering is not None
    for start in portion.documents[::_DOCUMENTS]:
        documents = np.arange(start, min(start + _DOCUMENTS, portion.documents.stop))
        files, numbers = source.numbering.places(documents)
        yield from zip(files.tolist(), numbers.tolist(), source.texts(documents), strict=True)
        if changed := source.unchanged(documents)[1]:
            raise changed


def _tokenise(
    source: Source, tokenizer: DocumentEncoder, portion: ShardPlan, stop_on_bad_record: bool, max_bad_records: int
) -> Iterator[Tokenised]:
    nothing, num_bad = np.empty(0, np.int32), 0
    stamps = {source.files[f].path: stamp(source.files[f].path) for f in portion.files}
    for file, record, text in records(source, portion):
        try:
            if isinstance(text, RecordError):
                raise text
            ids = encode_or_raise(tokenizer.encode_document, text, source.locate, file, record)
        except RecordError as bad:
            if stop_on_bad_record:
                raise ValueError(f'{bad}; data.on_bad_record = "skip" would leave it out and count it') from bad
            num_bad += 1
            if num_bad > max_bad_records > 0:  # a shard may be a large compressed file: do not read all of it first
                raise too_many(bad, max_bad_records) from bad
            yield Tokenised(file, nothing, 0, bad.reason)
        else:
            yield Tokenised(file, ids, num_text_bytes(text))
    for path, before in stamps.items():  # the samples in a shard's name may not show it: the shard would pass for good
        if stamp(path) != before:
            raise SourceError(f"{shown(path)} changed while it was tokenised; start again once it is complete")


def too_many(last: RecordError, limit: int) -> ValueError:
    return ValueError(f"{last}; these are {too_many_bad_records(limit)}")


@contextlib.contextmanager
def telling_the_fix(cache_dir: str) -> Iterator[None]:
    try:
        yield
    except SourceError:
        raise
    except OSError as error:
        raise ValueError(
            f"data.cache_dir = {cache_dir!r}: cannot write the token cache to {cache_folder(cache_dir)} "
            f"({error.strerror}); name a folder that can be written and has room"
        ) from error


def token_width(tokenizer: DocumentEncoder) -> int:
    """Bytes per token."""
    return 2 if tokenizer.vocab_size <= 1 << 16 else 4


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


class Progress:
    """Adds up what the writing processes say of the shards that were missing."""

    def __init__(self, name: str, folder: str, missing: list[ShardPlan]) -> None:
        self._name, self._folder, self._missing = name, folder, missing
        self._written = [0] * len(missing)  # source bytes
        self._open = {portion.name for portion in missing}
        self._building: set[int] = set()
        self._start = time.monotonic()
        self._next_log, self._next_wait = self._start + _LOG_SECONDS, self._start
        self._bar = tqdm(
            total=sum(portion.weight for portion in missing),
            desc=f"tokenising {name}",
            unit="B",
            unit_scale=True,
            delay=1,
            leave=False,
            disable=not sys.stderr.isatty() or not logger.isEnabledFor(logging.INFO),  # one rank draws
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()
        if exception[0] is None:
            seconds = time.monotonic() - self._start
            logger.info(f"token cache of source {self._name!r}: complete after {seconds:.1f} s")

    @property
    def complete(self) -> bool:
        return not self._open

    def take(self, event: str, shard: int, count: int) -> None:
        """What happened to a shard: "writing" (so many bytes of text are done), "done" (here or elsewhere; it has so
        many bad records), "busy" (another process writes it, and there is nothing else to do)."""
        weight = self._missing[shard].weight
        if event == "writing":
            self._building.add(shard)
            self._set(shard, min(count, weight))
        elif event == "done":
            self._building.discard(shard)
            self._open.discard(self._missing[shard].name)
            self._set(shard, weight)
        elif not self._building and time.monotonic() >= self._next_wait:
            path = os.path.join(self._folder, self._missing[shard].name)
            logger.info(f"waiting for another process that writes {path} ({path}.lock is locked)")
            self._next_wait = time.monotonic() + _LOG_SECONDS
        self._log()

    def _set(self, shard: int, num_bytes: int) -> None:
        self._bar.update(num_bytes - self._written[shard])
        self._written[shard] = num_bytes

    def _log(self) -> None:
        now = time.monotonic()
        if not self._bar.disable or now < self._next_log:
            return
        self._next_log = now + _LOG_SECONDS
        done, total = sum(self._written), sum(portion.weight for portion in self._missing)
        rate = done / (now - self._start)
        left = f"{(total - done) / rate / 60:.1f} minutes left" if rate else "time left not known yet"
        logger.info(
            f"tokenising {self._name}: {done / max(1, total):.1%} of {total:,} bytes, {rate / 1e6:.1f} MB/s, {left}"
        )
