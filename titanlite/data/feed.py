"""The rows of one source: its documents, read ahead in the stream's order, window after window.

Owns how the reading is cut into portions, what the ledger says at each row, and what ends a source: its epochs, an
error, or that nothing is left of it.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from titanlite.data.order import DocumentOrder, HeldOut
from titanlite.data.source import RecordError
from titanlite.data.stream import Chunk, Ledger, Reader, SourceCursor, located, read_chunk
from titanlite.data.windows import Dealing, Laid, Packing, Rows, Window

CHUNK_BYTES = 256 * 1024  # text per item of work: handing an item from thread to thread costs up to 0.2 ms
_ORDER_DOCUMENTS = 8192  # documents whose order is computed at once


class EndOfData(Exception):
    """A source has dealt all the epochs that it may: the rows of the next step cannot be filled. Same on every rank."""

    ledgers: dict[str, dict[str, int]]
    """The counts of each source at the end: what no step will take is dropped."""


@dataclass(frozen=True, eq=False)
class StreamSource:
    """A source as the stream sees it."""

    name: str
    reader: Reader
    order: DocumentOrder
    held_out: HeldOut
    max_epochs: int = 0
    """0: without end."""


class Portion(NamedTuple):
    """Documents that are read at once."""

    counter: int
    """Counter of the first document."""
    documents: np.ndarray
    """Their numbers in the source, int64 [n]."""


ReadAhead = Callable[[Iterator[Portion], Callable[[Portion], Chunk], int], Iterator[Chunk]]
"""How portions become chunks, in order: (portions, what reads one, number of chunks to have ready ahead)."""


def one_by_one(portions: Iterator[Portion], read: Callable[[Portion], Chunk], num_ahead: int) -> Iterator[Chunk]:
    """Each when it is asked for."""
    return map(read, portions)


def in_threads_of(pool: ThreadPoolExecutor) -> ReadAhead:
    """For commands, which end with their threads."""

    def read_ahead(portions: Iterator[Portion], read: Callable[[Portion], Chunk], num_ahead: int) -> Iterator[Chunk]:
        ahead: deque[Future[Chunk]] = deque()
        while True:
            ahead.extend(pool.submit(read, portion) for portion in itertools.islice(portions, num_ahead - len(ahead)))
            if not ahead:
                return
            yield ahead.popleft().result()

    return read_ahead


def portions(source: StreamSource, counter: int) -> Iterator[Portion]:
    """The stream's documents from a counter on, in portions of about CHUNK_BYTES, or where their lengths alone are
    read, of thousands."""
    order = source.order
    end = source.max_epochs * order.num_documents or np.iinfo(np.int64).max
    while counter < end:
        documents = order.documents(np.arange(counter, min(counter + _ORDER_DOCUMENTS, end)))
        sizes = np.zeros(len(documents), np.int64)
        if not source.reader.on_demand:
            with contextlib.suppress(OSError, ValueError):  # reading meets the error again and reports it
                sizes = source.reader.sizes(documents)
        portion = (np.cumsum(sizes) - sizes) // CHUNK_BYTES
        for part in np.split(documents, np.flatnonzero(np.diff(portion)) + 1):
            yield Portion(counter, part)
            counter += len(part)


def read_portion(source: StreamSource, portion: Portion, skip_bad_records: bool) -> Chunk:
    """Errors of any kind travel in the chunk, so that they stop the same step whoever reads ahead."""
    counter, documents = portion
    try:
        held_out = source.held_out(*source.reader.numbering.places(documents))
        return read_chunk(source.reader, counter, documents, held_out, skip_bad_records)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        place = f"{source.reader.locate(int(documents[0]))} or one of the {len(documents) - 1} documents read with it"
        return Chunk.failed(counter, located(error, place))


class SourceRows:
    """The rows of one source from a cursor on. The ledger counts all of a window as read with its first row, and what
    waits in its later rows as carried."""

    def __init__(
        self,
        source: StreamSource,
        packing: Packing,
        dealing: Dealing,
        cursor: SourceCursor,
        eos_id: int,
        read_ahead: ReadAhead = one_by_one,
        num_ahead: int = 1,
        skip_bad_records: bool = False,
        max_bad_records: int = 0,
    ) -> None:
        """max_bad_records: of this source; 0: no limit."""
        self.source, self.cursor = source, cursor
        self._packing, self._dealing, self._eos_id, self._max_bad = packing, dealing, eos_id, max_bad_records
        self._chunks = (one_by_one if source.reader.on_demand else read_ahead)(
            portions(source, cursor.document),
            lambda portion: read_portion(source, portion, skip_bad_records),
            num_ahead,
        )
        self._windows: deque[Window] = deque()  # the one at the cursor first
        self._open: list[Chunk] = []  # the documents after them
        self._first_row, self._offset = cursor.first_row, cursor.offset  # where the next window begins
        self._without_token = 0  # the last so many documents that were read
        self._error: Exception | None = None  # to be raised by who needs what is after it

    @property
    def epochs(self) -> float:
        """Begun so far, as a fraction: documents passed, also those left out, in documents of the source; of the window
        that is being dealt, its dealt share."""
        documents = float(self.cursor.document)
        if self._windows and self.cursor.dealt:
            window = self._windows[0]
            documents += (window.next[0] - window.counter) * self.cursor.dealt / window.num_rows
        return documents / self.source.order.num_documents

    def fill(self, num_rows: int) -> None:
        """Read until the next `num_rows` rows are there. Raises what stops the stream before them: EndOfData, an error
        of reading, ValueError where no document has a token or too many are bad records."""
        while sum(window.num_rows for window in self._windows) - self.cursor.dealt < num_rows:
            self._close_window()

    def take(self, num_rows: int, first: int, last: int) -> tuple[Rows, list[RecordError]]:
        """Move on by `num_rows` rows, which `fill` has provided. Gives those from `first` to before `last` of them (a
        rank's share), and the first bad records of each window that was begun."""
        parts, begun = [], []
        while num_rows:
            window, row = self._windows[0], self.cursor.dealt
            here = min(num_rows, window.num_rows - row)
            low, high = (row + min(max(edge, 0), here) for edge in (first, last))
            parts.append(window.rows(low, high, self.source.reader, self._eos_id))
            begun += window.bad_records if row == 0 else []
            self._advance(window, here)
            num_rows, first, last = num_rows - here, first - here, last - here
        rows = Rows(
            np.concatenate([part.tokens for part in parts]),
            [row for part in parts for row in part.starts],
            [row for part in parts for row in part.counters],
            [row for part in parts for row in part.offsets],
        )
        return rows, begun

    def ended(self) -> Ledger:
        """The ledger when no row is taken any more. What was read ahead of a source that goes on does not count."""
        ledger = self.cursor.ledger
        if isinstance(self._error, EndOfData):
            ledger = sum([window.read for window in self._windows][self.cursor.dealt > 0 :], ledger)
            if self._open:
                rest = Chunk.join(self._open)
                tokens = int(rest.lengths.sum()) - self._offset - self._overlap
                ledger += Ledger(tokens_read=tokens, carried=tokens)
                ledger += rest.count(slice(self._overlap, None), self._packing.seq_len)
        return replace(ledger, carried=0, dropped=ledger.dropped + ledger.carried)

    def _advance(self, window: Window, num_rows: int) -> None:
        old = self.cursor
        ledger = old.ledger + window.dealt(old.dealt, old.dealt + num_rows)
        if old.dealt == 0:
            ledger += window.read
        assert ledger.closes(), ledger
        if old.dealt + num_rows < window.num_rows:
            self.cursor = replace(old, row=old.row + num_rows, dealt=old.dealt + num_rows, ledger=ledger)
        else:
            self.cursor = SourceCursor(old.row + num_rows, *window.next, 0, ledger)
            self._windows.popleft()

    @property
    def _overlap(self) -> int:
        """Tokens of the open documents, and so documents, that the last window's ledger has."""
        return self._packing.overlap if self._first_row else 0

    def _close_window(self) -> None:
        """Read until the documents of the next window are there, and lay them into rows."""
        first_row, ended = self._first_row, False
        while (laid := self._lay(ended)) is None:
            if ended:
                self._error = EndOfData(
                    f"the data ended: source {self.source.name!r} has no row left after max_epochs ="
                    f" {self.source.max_epochs}"
                )
                raise self._error
            ended = not self._read()
        documents = Chunk.join(self._open)
        order = self._dealing.order(first_row, len(laid.layout.edges) - 1)
        window = Window(documents, laid, order, self._packing.seq_len, self._overlap)
        if first_row == self.cursor.first_row and self.cursor.dealt:
            self._check_resumed(window)
        self._windows.append(window)
        self._offset, self._first_row = laid.next_offset, first_row + window.num_rows
        self._open = [documents.after(laid.next_document)]

    def _lay(self, ended: bool) -> Laid | None:
        """Lay the next window into rows, where its documents are open."""
        if not self._open:
            return None
        lengths = np.concatenate([chunk.lengths for chunk in self._open])
        if self._overlap and lengths[0] <= self._offset:
            raise _other_documents(self.cursor, f"its first document has {lengths[0]} tokens")
        of_epoch = self.source.order.num_documents
        epoch = of_epoch - self._open[0].counter % of_epoch, of_epoch
        return self._packing.lay(lengths, self._offset, self._first_row == 0, epoch, ended)

    def _read(self) -> bool:
        """Open the next documents; False where none follow. Raises what stops the stream before them."""
        unbegun = [window.read for window in self._windows][self.cursor.dealt > 0 :]
        num_bad = sum(unbegun, self.cursor.ledger).bad_records
        num_bad += sum(int(np.count_nonzero(chunk.bad)) for chunk in self._open)
        if num_bad > self._max_bad > 0:
            raise too_many_bad_records(self._max_bad)
        if self._error is not None:
            raise self._error
        chunk = next(self._chunks, None)
        enough = self.source.order.num_documents  # at the end of the data: just what the last epoch was
        if chunk is not None:
            self._error = chunk.error
            self._open.append(chunk)
            self._without_token = 0 if chunk.lengths.any() else self._without_token + len(chunk.lengths)
            enough *= 2  # so many in a row hold a whole epoch
        if self._without_token >= enough:
            raise ValueError(
                f"data source {self.source.name!r}: no document is left to train on, all are bad records or held"
                " out (data.held_out_fraction)"
            )
        return chunk is not None

    def _check_resumed(self, window: Window) -> None:
        """Raise ValueError where the cursor's window is not that from which rows were dealt."""
        dealt, carried = self.cursor.dealt, self.cursor.ledger.carried
        waiting = -window.dealt(min(dealt, window.num_rows), window.num_rows).carried
        if dealt >= window.num_rows or waiting != carried:
            raise _other_documents(self.cursor, f"its rows from {dealt} on hold {waiting} tokens and held {carried}")


def _other_documents(cursor: SourceCursor, what: str) -> ValueError:
    return ValueError(
        f"cannot resume in the window from token {cursor.offset} of document {cursor.document} on: {what}: the corpus"
        " or the tokenizer is not that of the checkpoint"
    )


def too_many_bad_records(limit: int) -> ValueError:
    return ValueError(
        f"more bad records than data.max_bad_records = {limit}: look at the data, or raise it (0: no limit)"
    )
