"""Reading ahead: the chunks of a source, made by threads in any order and handed out in the stream's.

Owns the threads, how the work is cut, and what ends a source: its epochs, an error, or that nothing is left of it.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from titanlite.data.order import DocumentOrder, HeldOut
from titanlite.data.packing import Packer
from titanlite.data.source import RecordError
from titanlite.data.stream import Chunk, Ledger, Reader, located, read_chunk

CHUNK_BYTES = 256 * 1024  # text per item of work: handing an item from thread to thread costs up to 0.2 ms
_ORDER_DOCUMENTS = 8192  # documents whose order is computed at once
_LOOK_SECONDS = 1.0  # after which a waiting thread looks whether those that it waits for are alive

T = TypeVar("T")


class EndOfData(Exception):
    """A source has dealt all the epochs that it may: the rows of the next step cannot be filled. Same on every rank."""

    ledgers: dict[str, dict[str, int]]
    """The counts of each source at the end: what no step will take is dropped."""


class Threads:
    """Daemon threads that call functions: concurrent.futures' own would keep a process from ending when one hangs."""

    def __init__(self, num_threads: int, set_up: Callable[[], None] = lambda: None) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=_serve, args=(self._tasks, self._closed, set_up), daemon=True)
            for _ in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[[], T]) -> "Future[T]":
        """Call it in one of the threads, in the order of submission; cancelled once the threads are closed."""
        future: Future[T] = Future()
        self._tasks.put((future, function))
        if self._closed.is_set():  # perhaps after the threads ended
            future.cancel()
        return future

    def result(self, future: "Future[T]") -> T:
        """What a submitted function returns or raises; RuntimeError where a thread died, which nobody would end."""
        while True:
            try:
                return future.result(_LOOK_SECONDS)
            except FutureTimeoutError:
                if future.done():  # by now, or the function itself raised this
                    return future.result()
                if not self._closed.is_set() and not all(thread.is_alive() for thread in self._threads):
                    told = "a thread that reads data died; what it died of stands in the log of this rank"
                    raise RuntimeError(told) from None

    def close(self) -> None:
        """Cancel what has not begun; the threads end with what they are doing."""
        self._closed.set()
        for _ in self._threads:
            self._tasks.put(None)

    def join(self, timeout: float) -> None:
        for thread in self._threads:
            thread.join(timeout)


def _serve(tasks: "queue.SimpleQueue[Any]", closed: threading.Event, set_up: Callable[[], None]) -> None:
    set_up()
    while (task := tasks.get()) is not None:
        future, function = task
        if closed.is_set():
            future.cancel()
        elif future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:  # a rank that it ended would leave the others waiting
                future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
        del task, future, function  # or the last result would live until the next task


@dataclass(frozen=True, eq=False)
class StreamSource:
    """A source as the stream sees it."""

    name: str
    reader: Reader
    order: DocumentOrder
    held_out: HeldOut
    max_epochs: int = 0
    """0: without end."""


class ChunkFeed:
    """The chunks of one source in the stream's order, read ahead by threads."""

    def __init__(
        self, source: StreamSource, counter: int, threads: Threads | None, num_ahead: int, skip_bad_records: bool
    ) -> None:
        self._source, self._threads, self._num_ahead, self._skip = source, threads, num_ahead, skip_bad_records
        self._portions = self._divide(counter)
        self._ahead: deque[Future[Chunk]] = deque()
        self._without_token = 0

    def start(self) -> None:
        """Begin to read ahead."""
        while self._threads is not None and len(self._ahead) < self._num_ahead:
            if (portion := next(self._portions, None)) is None:
                return
            self._ahead.append(self._threads.submit(lambda portion=portion: self._read(*portion)))  # type: ignore[misc]

    def next(self) -> Chunk | None:
        """The next chunk; None at the end of the data. Raises ValueError where no document has a token."""
        self.start()
        if self._threads is not None:
            chunk = self._threads.result(self._ahead.popleft()) if self._ahead else None
        else:
            portion = next(self._portions, None)
            chunk = None if portion is None else self._read(*portion)
        enough = self._source.order.num_documents  # at the end of the data: just what the last epoch was
        if chunk is not None:
            self._without_token = 0 if len(chunk.ids) else self._without_token + len(chunk.lengths)
            enough *= 2  # so many in a row hold a whole epoch
        if self._without_token >= enough:
            raise ValueError(
                f"data source {self._source.name!r}: no document is left to train on, all are bad records or held"
                " out (data.held_out_fraction)"
            )
        return chunk

    def _divide(self, counter: int) -> Iterator[tuple[int, np.ndarray]]:
        """The stream's documents in portions of about CHUNK_BYTES: (counter of the first, their numbers)."""
        order = self._source.order
        end = self._source.max_epochs * order.num_documents or np.iinfo(np.int64).max
        while counter < end:
            documents = order.documents(np.arange(counter, min(counter + _ORDER_DOCUMENTS, end)))
            try:
                sizes = self._source.reader.sizes(documents)
            except (OSError, ValueError):
                sizes = np.zeros(len(documents), np.int64)  # reading meets the error again and reports it
            portion = (np.cumsum(sizes) - sizes) // CHUNK_BYTES
            for part in np.split(documents, np.flatnonzero(np.diff(portion)) + 1):
                yield counter, part
                counter += len(part)

    def _read(self, counter: int, documents: np.ndarray) -> Chunk:
        source = self._source
        try:
            held_out = source.held_out(*source.reader.numbering.places(documents))
            return read_chunk(source.reader, counter, documents, held_out, self._skip)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            first = source.reader.locate(int(documents[0]))
            raise located(error, f"{first} or one of the {len(documents) - 1} documents read with it") from error


class SourceRows:
    """The rows of one source: its chunks, packed."""

    def __init__(self, source: StreamSource, packer: Packer, feed: ChunkFeed) -> None:
        self.source, self.packer, self.start = source, packer, feed.start
        self._feed = feed
        self._error: Exception | None = None  # to be raised by who needs what is behind it

    def ended(self) -> Ledger:
        """The ledger when no row is taken any more. What was read ahead of a source that goes on does not count."""
        unread = self.packer.unread() if isinstance(self._error, EndOfData) else 0
        ledger = self.packer.cursor.ledger
        dropped = ledger.dropped + ledger.carried + unread
        return replace(ledger, tokens_read=ledger.tokens_read + unread, carried=0, dropped=dropped)

    @property
    def epochs(self) -> float:
        """Begun so far, as a fraction: documents passed, also those left out, in documents of the source."""
        return self.packer.cursor.document / self.source.order.num_documents

    def fill(
        self, num_rows: int, tell: Callable[[RecordError], None] = lambda bad: None, max_bad_records: int = 0
    ) -> None:
        """Read until the packer holds the next `num_rows` rows. `tell` hears of each bad record left out on the way.

        Raises ValueError once more than `max_bad_records` (0: no limit) lie before what is still missing.
        """
        num_bad = 0
        while self.packer.missing(num_rows):
            if num_bad > max_bad_records > 0:  # the ledger would count them all, but only behind the last of them
                raise too_many_bad_records(max_bad_records)
            if self._error is not None:
                raise self._error
            chunk = self._feed.next()
            if chunk is None:
                self.packer.end()
                self._error = EndOfData(
                    f"the data ended: source {self.source.name!r} has no row left after max_epochs ="
                    f" {self.source.max_epochs}"
                )
            else:
                for bad in chunk.bad_records:
                    tell(bad)
                num_bad += len(chunk.bad_records)
                self.packer.append(replace(chunk, bad_records=[]))  # it is kept until a row is made of it
                self._error = chunk.error


def too_many_bad_records(limit: int) -> ValueError:
    return ValueError(
        f"more bad records than data.max_bad_records = {limit}: look at the data, or raise it (0: no limit)"
    )
