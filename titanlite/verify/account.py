"""A second account of the stream, to hold the first against: a source's rows and ledger, from the first row on.

Slow, short and in Python's numbers: it goes from document to document, where data/windows.py lays all pieces of a
window at once, and takes from the stream's own code nothing but the order of documents. It knows their lengths alone.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from titanlite.data.feed import StreamSource
from titanlite.data.stream import Ledger, SourceCursor
from titanlite.data.windows import Dealing
from titanlite.verify.census import Census

_BLOCK = 1 << 14  # documents whose order is asked for at once
_MASK = (1 << 64) - 1

Piece = tuple[int, int, int]
"""Position in the row, counter of the document, index in it of the piece's first token; counter -1: a pad."""


class AccountsDiffer(ValueError):
    """Two accounts of the same thing differ: where, and what each says."""


class _Row(NamedTuple):
    pieces: list[Piece]
    targets: int
    begun: int
    """Documents whose first token is in this row and in none before."""
    padding: int = 0
    cut: int = 0
    """Documents begun here that one row could hold, and that lie in two."""


class _Window(NamedTuple):
    rows: list[_Row]
    """In the order in which they are dealt."""
    read: Ledger
    """What its first row adds, its tokens apart."""
    next: tuple[int, int]
    """Document, and index of its token, with which the next window begins."""


class Account:
    """The rows of a source, one after the other. `cursor` is where it stands."""

    def __init__(
        self, source: StreamSource, census: Census, packing: str, dealing: Dealing, seq_len: int, window_rows: int
    ) -> None:
        self._source, self._census, self._dealing = source, census, dealing
        self._seq_len, self._window_rows, self._of_epoch = seq_len, window_rows, source.order.num_documents
        self._windows = self._split() if packing == "split" else self._best_fit()
        self._window: _Window | None = None
        self._row = self._dealt = self._num_windowed = self._num_counted = 0
        self._begins = (0, 0)  # document and offset of the window
        self._read, self._targets, self._begun, self._carried, self._padding = Ledger(), 0, 0, 0, 0

    @property
    def cursor(self) -> SourceCursor:
        tokens = self._targets + self._begun + self._carried
        counted = Ledger(tokens, self._targets, self._begun, self._carried, padding=self._padding)
        return SourceCursor(self._row, *self._begins, self._dealt, counted + self._read)

    def take(self, num_rows: int) -> list[list[Piece]]:
        """The pieces of each of the next rows; fewer where the data end."""
        taken: list[list[Piece]] = []
        while len(taken) < num_rows:
            if self._window is None:
                self._window = next(self._windows, None)
            if self._window is None:
                break
            taken.append(self._deal(self._window))
        return taken

    def _deal(self, window: _Window) -> list[Piece]:
        if self._dealt == 0:
            self._read += window.read
            self._carried += sum(row.targets + row.begun for row in window.rows)
        row = window.rows[self._dealt]
        self._targets += row.targets
        self._begun += row.begun
        self._carried -= row.targets + row.begun
        self._padding += row.padding
        self._row, self._dealt = self._row + 1, self._dealt + 1
        if self._dealt == len(window.rows):
            self._window, self._dealt, self._begins = None, 0, window.next
        return row.pieces

    def _documents(self) -> Iterator[tuple[int, int]]:
        """Counter and tokens of each document, epoch after epoch."""
        end = self._source.max_epochs * self._of_epoch or np.iinfo(np.int64).max
        for first in range(0, end, _BLOCK):
            counters = np.arange(first, min(first + _BLOCK, end))
            lengths = self._census.trained[self._source.order.documents(counters)]
            yield from zip(counters.tolist(), lengths.tolist(), strict=True)

    def _split(self) -> Iterator[_Window]:
        """packing = "split": a window ends with the last row whose last token lies in its epoch."""
        natural = self._split_rows()
        following = next(natural, None)
        while following is not None:
            rows: list[_Row] = []
            epoch = following[1][0] // self._of_epoch
            while following is not None and following[1][0] // self._of_epoch == epoch:
                if len(rows) == self._window_rows:
                    break
                row, last = following
                rows.append(row)
                following = next(natural, None)
            yield self._close(rows, last[0] + 1, last)

    def _split_rows(self) -> Iterator[tuple[_Row, tuple[int, int]]]:
        """Each row with its last token's document and index in it: the next row begins with that token."""
        size, documents = self._seq_len + 1, ((c, n) for c, n in self._documents() if n)
        counter, length = next(documents, (0, 0))
        offset, at_start = 0, True
        while length:
            pieces = [(0, counter, offset)]
            position = min(size, length - offset)
            targets, begun, cut = position - 1, int(at_start), 0
            while position < size:
                counter, length = next(documents, (0, 0))
                if not length:
                    return  # what is left is no whole row
                pieces.append((position, counter, 0))
                part = min(length, size - position)
                cut += part < length <= size and part > 1  # of one token, the next row holds it whole
                targets, begun, position = targets + part - 1, begun + 1, position + part
            begin, _, index = pieces[-1]
            offset, at_start = index + self._seq_len - begin, False
            yield _Row(pieces, targets, begun, cut=cut), (counter, offset)

    def _best_fit(self) -> Iterator[_Window]:
        """packing = "best_fit": whole documents, until they fill half a row less than a window's rows; with an epoch's
        end, where epochs are limited or the window has 64 rows."""
        most = self._window_rows
        full, enough = ((2 * rows - 1) * (self._seq_len + 1) // 2 for rows in (most, min(64, most)))
        if self._source.max_epochs:
            enough = 0
        lengths: list[int] = []
        tokens = behind = 0
        for counter, length in self._documents():
            lengths.append(length)
            tokens, behind = tokens + length, counter + 1
            if tokens >= full or (behind % self._of_epoch == 0 and tokens >= enough):
                yield self._close(self._fitted(behind - len(lengths), lengths), behind, (behind, 0))
                lengths, tokens = [], 0
        if lengths:
            yield self._close(self._fitted(behind - len(lengths), lengths), behind, (behind, 0))

    def _fitted(self, first: int, lengths: list[int]) -> list[_Row]:
        """The rows of a window in natural order: best fit, the longest piece first. A document that no row can hold is
        cut; each part but the first repeats the token before it."""
        size = self._seq_len + 1
        pieces = [
            (first + k, offset, min(self._seq_len, length - 1 - offset) + 1)
            for k, length in enumerate(lengths)
            if length
            for offset in range(0, max(1, length - 1), self._seq_len)
        ]
        rows: list[list[int]] = []
        free: list[tuple[int, int]] = []  # tokens that a row can still hold, and the row
        for longest, k in sorted((-tokens, k) for k, (_, _, tokens) in enumerate(pieces)):
            at = bisect_left(free, (-longest, 0))
            if at == len(free):
                rows.append([])
                insort(free, (size, len(rows) - 1))
                at = len(free) - 1
            space, row = free.pop(at)
            rows[row].append(k)
            if space + longest:
                insort(free, (space + longest, row))
        found = []
        for members in sorted(map(sorted, rows)):
            row_pieces, position = [], 0
            for counter, offset, tokens in (pieces[k] for k in members):
                row_pieces.append((position, counter, offset))
                position += tokens
            begun = sum(pieces[k][1] == 0 for k in members)
            pads = [(pad, -1, 0) for pad in range(position, size)]
            found.append(_Row(row_pieces + pads, position - len(members), begun, len(pads)))
        return found

    def _close(self, rows: list[_Row], behind: int, following: tuple[int, int]) -> _Window:
        """The window of these rows, in natural order. behind: the document after those that its ledger counts."""
        documents = self._source.order.documents(np.arange(self._num_counted, behind))
        held_out, lengths = self._census.held_out[documents], self._census.trained[documents]
        read = Ledger(
            bytes=int(self._census.bytes[documents][~held_out].sum()),
            bad_records=int(np.count_nonzero((self._census.lengths[documents] == 0) & ~held_out)),
            held_out=int(np.count_nonzero(held_out)),
            fitting=int(np.count_nonzero((lengths > 0) & (lengths <= self._seq_len + 1))),
            cut=sum(row.cut for row in rows),
        )
        order = self._order(self._num_windowed, len(rows))
        self._num_counted, self._num_windowed = behind, self._num_windowed + len(rows)
        return _Window([rows[k] for k in order], read, following)

    def _order(self, first_row: int, num_rows: int) -> list[int]:
        """In which a window's rows are dealt."""
        if not self._dealing.shuffle:
            return list(range(num_rows))
        name = hashlib.blake2b(self._dealing.source.encode(), digest_size=8).digest()
        key = self._dealing.seed
        for part in (int.from_bytes(name, "little"), first_row):
            key = splitmix64(splitmix64(key) ^ part)
        return sorted(range(num_rows), key=lambda row: splitmix64(key ^ row))


def splitmix64(x: int) -> int:
    """As order.splitmix64, of one number."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def check_cursor(where: str, found: SourceCursor, expected: SourceCursor) -> None:
    """Raise AccountsDiffer unless the cursor is the expected one and its ledger closes."""
    if not found.ledger.closes():
        raise AccountsDiffer(f"{where}: its ledger does not close: {found.ledger}")
    if found != expected:
        parts = [
            f"{key} is {one} and {other} by the lengths of the documents"
            for state, other_state in ((found, expected), (found.ledger, expected.ledger))
            for (key, one), other in zip(vars(state).items(), vars(other_state).values(), strict=True)
            if one != other and key != "ledger"
        ]
        raise AccountsDiffer(f"{where}: {'; '.join(parts)}")


def pieces_of(starts: np.ndarray, counters: np.ndarray, offsets: np.ndarray) -> list[Piece]:
    return list(zip(starts.tolist(), counters.tolist(), offsets.tolist(), strict=True))


def first_unequal(some: Sequence[Piece], others: Sequence[Piece]) -> tuple[Piece | None, Piece | None] | None:
    """The first pair that differs, None in it for the end of one."""
    pairs = zip_longest(some, others)
    return next(((one, other) for one, other in pairs if one != other), None)
