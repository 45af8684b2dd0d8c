"""Rows by best fit: documents packed whole into rows, window by window.

Owns where a window of documents ends, which of its rows each document goes to, in which order the rows are dealt, and
the padding. Refuses to cut a document that fits into a row, and to let anything but the documents and the seed decide:
where chunks, batches and runs begin and end does not enter.
"""

from bisect import bisect_left, insort
from collections import deque
from dataclasses import replace

import numpy as np

from titanlite.data.order import splitmix64
from titanlite.data.packing import Rows
from titanlite.data.stream import Chunk, Ledger, SourceCursor

WINDOW_ROWS = 256  # padding is about 0.25 / WINDOW_ROWS and what best fit leaves; a resume reads up to a window again


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, int64 [n], rows numbered as they are opened.

    lengths: int64 [n], from 1 to `capacity`. The longest piece first, of equal ones the first, each into the row with
    the least space that still holds it, of equal ones the first (Johnson et al. 1974, "Worst-case performance bounds
    for simple one-dimensional packing algorithms"). Pieces of one length go in together: the row that is the tightest
    for the first of them stays the tightest until it is full.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    free: list[int] = []  # space << 32 | row of the rows with space, ascending
    rows: list[int] = []
    fills: list[int] = []
    num_rows = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            at = bisect_left(free, size << 32)
            if at < len(free):
                space, row = divmod(free.pop(at), 1 << 32)
            else:
                space, row = capacity, num_rows
                num_rows += 1
            fill = min(count, space // size)
            rows.append(row)
            fills.append(fill)
            count -= fill
            if space > fill * size:
                insort(free, space - fill * size << 32 | row)
    placed = np.empty(len(lengths), np.int64)
    placed[np.argsort(-lengths, kind="stable")] = np.repeat(np.array(rows, np.int64), fills)
    return placed


def _cut(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces of documents: the document of each, the index of its first token in it, and its length, int64 [n].

    A row has seq_len targets and a document of n tokens has n - 1, so that it needs as many rows; but one at least.
    """
    num_pieces = np.where(lengths > 0, np.maximum(1, -((1 - lengths) // seq_len)), 0)
    documents = np.repeat(np.arange(len(lengths)), num_pieces)
    nth = np.arange(len(documents)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    return documents, nth * seq_len, np.minimum(seq_len, lengths[documents] - 1 - nth * seq_len) + 1


class _Window:
    """A run of consecutive documents, packed: rows, in the order in which they are dealt, of pieces of documents."""

    def __init__(self, chunks: list[Chunk], seq_len: int, eos_id: int, seed: int) -> None:
        lengths = np.concatenate([chunk.lengths for chunk in chunks])
        self.counter = chunks[0].counter
        self.num_documents = len(lengths)
        self.eos_id, self.capacity = eos_id, seq_len + 1
        self.ids = np.concatenate([chunk.ids for chunk in chunks])
        self.read = Ledger(
            tokens_read=len(self.ids),
            carried=len(self.ids),
            bytes=sum(int(chunk.bytes.sum()) for chunk in chunks),
            bad_records=sum(int(np.count_nonzero(chunk.bad)) for chunk in chunks),
            held_out=sum(int(np.count_nonzero(chunk.held_out)) for chunk in chunks),
            fitting=int(np.count_nonzero((lengths > 0) & (lengths <= self.capacity))),
        )
        documents, offsets, sizes = _cut(lengths, seq_len)
        rows = best_fit_decreasing(sizes, self.capacity)
        self.num_rows = int(rows.max(initial=-1)) + 1
        # Best fit opens rows for the longest documents first: deal them in the order of their hashes.
        key = splitmix64(splitmix64(np.array([seed % (1 << 64)], np.uint64)) ^ np.uint64(self.counter))
        dealt = np.argsort(splitmix64(key ^ np.arange(self.num_rows, dtype=np.uint64)))
        rows = np.argsort(dealt)[rows]
        order = np.argsort(rows, kind="stable")  # row after row, and in a row in the order of documents
        self.counters = self.counter + documents[order]
        self.offsets, self.sizes = offsets[order], sizes[order]
        self.begins = (np.cumsum(lengths) - lengths)[documents[order]] + self.offsets  # of pieces, in `ids`
        ends = np.append(0, np.cumsum(self.sizes))
        self.edges = np.append(0, np.cumsum(np.bincount(rows, minlength=self.num_rows)))  # of rows, among the pieces
        self.used = np.diff(ends[self.edges])  # tokens in each row
        self.starts = ends[:-1] - np.repeat(ends[self.edges[:-1]], np.diff(self.edges))  # of pieces, in their rows

    def dealt(self, first: int, last: int) -> Ledger:
        """What dealing the rows from `first` to before `last` adds to the ledger."""
        pieces = slice(self.edges[first], self.edges[last])
        num_tokens = int(self.sizes[pieces].sum())
        firsts = int(np.count_nonzero(self.offsets[pieces] == 0))
        targets = num_tokens - len(self.sizes[pieces])
        padding = (last - first) * self.capacity - num_tokens
        return Ledger(targets=targets, document_first=firsts, carried=-targets - firsts, padding=padding)

    def rows(self, first: int, last: int) -> Rows:
        """The rows from `first` to before `last`."""
        pieces = slice(self.edges[first], self.edges[last])
        sizes = self.sizes[pieces]
        index = np.repeat(self.begins[pieces] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        tokens = np.full((last - first, self.capacity), self.eos_id, np.int32)
        tokens[np.arange(self.capacity) < self.used[first:last, None]] = self.ids[index]
        starts, counters, offsets = [], [], []
        for row in range(first, last):
            pieces = slice(self.edges[row], self.edges[row + 1])
            pads = np.arange(self.used[row], self.capacity)
            starts.append(np.append(self.starts[pieces], pads))
            counters.append(np.append(self.counters[pieces], np.full_like(pads, -1)))
            offsets.append(np.append(self.offsets[pieces], np.zeros_like(pads)))
        return Rows(tokens, starts, counters, offsets)


class BestFitPacker:
    """Packs chunks that come in the order of the stream, from a cursor on, into rows that do not overlap.

    A window ends with the first document with which it has tokens for half a row less than WINDOW_ROWS rows: with the
    whole of it, most windows would begin one row more than they can fill. Where epochs are limited, it ends with its
    epoch, too, or their number would change rows before the end; where they are not, a source of a few documents would
    be padded in every epoch. A row holds whole documents, and padding at its end: eos_id, each pad a document of its
    own. A document of more than seq_len + 1 tokens fills rows of its own, each of which repeats the last token of the
    one before as context, so that every token but the first is a target once; what is left of it, again with that
    token, is packed like a document. The ledger counts all of a window as read with its first row, and what waits in
    its later rows as carried.
    """

    def __init__(self, seq_len: int, cursor: SourceCursor, eos_id: int, seed: int, epoch_documents: int = 0) -> None:
        """epoch_documents: of the epochs with which windows end; 0: they do not."""
        self.cursor = cursor
        self.seq_len = seq_len
        self.eos_id = eos_id
        self.seed = seed
        self.epoch_documents = epoch_documents
        self._windows: deque[_Window] = deque()  # closed, not yet dealt
        self._open: list[Chunk] = []  # the next window's documents
        self._room = self._window_tokens
        self._next_counter = cursor.document

    @property
    def _window_tokens(self) -> int:
        return (2 * WINDOW_ROWS - 1) * (self.seq_len + 1) // 2

    def missing(self, num_rows: int) -> bool:
        return sum(window.num_rows for window in self._windows) - self.cursor.offset < num_rows

    def append(self, chunk: Chunk) -> None:
        assert chunk.counter == self._next_counter, "chunks come in the order of the stream"
        self._next_counter += len(chunk.lengths)
        ends = np.cumsum(chunk.lengths)
        first = begin = 0  # the first document that is in no window yet, and its first token
        while True:
            last = int(np.searchsorted(ends, begin + self._room)) + 1
            if self.epoch_documents:
                last = min(last, first + self.epoch_documents - (chunk.counter + first) % self.epoch_documents)
            if last > len(ends):
                break
            self._open.append(_part(chunk, first, last, begin, int(ends[last - 1])))
            first, begin = last, int(ends[last - 1])
            self._close()
        self._open.append(_part(chunk, first, len(ends), begin, len(chunk.ids)))
        self._room -= len(chunk.ids) - begin

    def end(self) -> None:
        """The end of the last epoch closed the last window."""

    def unread(self) -> int:
        tokens = [len(window.ids) for window in self._windows] + [sum(len(chunk.ids) for chunk in self._open)]
        return sum(tokens[self.cursor.offset > 0 :])  # the window at the cursor is read with its first row

    def take(self, num_rows: int, first: int, last: int) -> Rows:
        parts = []
        while num_rows:
            window, row = self._windows[0], self.cursor.offset
            here = min(num_rows, window.num_rows - row)
            parts.append(window.rows(row + min(max(first, 0), here), row + min(max(last, 0), here)))
            self._advance(window, here)
            num_rows, first, last = num_rows - here, first - here, last - here
        return Rows(
            np.concatenate([part.tokens for part in parts]),
            [row for part in parts for row in part.starts],
            [row for part in parts for row in part.counters],
            [row for part in parts for row in part.offsets],
        )

    def _advance(self, window: _Window, num_rows: int) -> None:
        old = self.cursor
        ledger = old.ledger + window.dealt(old.offset, old.offset + num_rows)
        if old.offset == 0:
            ledger += window.read
        assert ledger.closes(), ledger
        place = (window.counter, old.offset + num_rows)
        if place[1] == window.num_rows:
            place = (window.counter + window.num_documents, 0)
            self._windows.popleft()
        self.cursor = SourceCursor(old.row + num_rows, *place, ledger)

    def _close(self) -> None:
        window = _Window(self._open, self.seq_len, self.eos_id, self.seed)
        self._open, self._room = [], self._window_tokens
        place, carried = self.cursor.offset, self.cursor.ledger.carried
        if place and window.counter == self.cursor.document:
            left = -window.dealt(min(place, window.num_rows), window.num_rows).carried
            if left != carried:
                raise ValueError(
                    f"cannot resume at row {place} of the window of documents from {window.counter} on: its rows from "
                    f"there on hold {left} tokens and held {carried}: the corpus or the tokenizer is not that of the "
                    "checkpoint"
                )
        self._windows.append(window)


def _part(chunk: Chunk, first: int, last: int, begin: int, end: int) -> Chunk:
    """Documents from `first` to before `last`, which have the tokens from `begin` to before `end`."""
    documents = slice(first, last)
    return replace(
        chunk,
        counter=chunk.counter + first,
        ids=chunk.ids[begin:end],
        lengths=chunk.lengths[documents],
        bytes=chunk.bytes[documents],
        bad=chunk.bad[documents],
        held_out=chunk.held_out[documents],
    )
