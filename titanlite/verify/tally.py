"""What the measured lengths of documents say of any place in the stream: cursor, ledger, and the pieces of its rows.

Owns a second account of the stream, to hold the first against: sums over documents in their order, and walks from one
document to the next, where windows.py lays all pieces of a window at once. In "best_fit" the assignment of a window's
documents to its rows is that of windows.py; that they are all there, whole and once, is not taken from it. Refuses to
read.
"""

import functools
import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple, Protocol

import numpy as np

from titanlite.data.feed import StreamSource
from titanlite.data.stream import Ledger, SourceCursor
from titanlite.data.windows import BestFit, Dealing
from titanlite.verify.census import Census

_BLOCK = 1 << 14  # documents
_MASK = (1 << 64) - 1

Piece = tuple[int, int, int]
"""Position in the row, counter of the document, index in it of the piece's first token; counter -1: a pad."""


class Difference(ValueError):
    """Two accounts of the same thing differ: where, and what each says."""


class Sums(NamedTuple):
    """Over documents of the stream, in the terms of the ledger."""

    tokens: int = 0
    documents: int = 0
    """With tokens."""
    bytes: int = 0
    bad_records: int = 0
    held_out: int = 0
    fitting: int = 0
    cut: int = 0
    """Where packing is "split"."""
    pieces: int = 0
    """Where packing is "best_fit"."""


class Account(Protocol):
    """What a source's lengths say of its places and rows."""

    def cursor(self, place: SourceCursor) -> SourceCursor:
        """Place and ledger as they must be at the row of a cursor."""

    def rows(self, place: SourceCursor, num_rows: int) -> tuple[list[list[Piece]], SourceCursor]:
        """The pieces of each of the next rows, and the cursor behind them."""


class _Tally:
    """Sums over the documents before any place."""

    def __init__(self, source: StreamSource, census: Census, dealing: Dealing, seq_len: int, window_rows: int) -> None:
        self.source, self.census, self.seq_len, self.window_rows = source, census, seq_len, window_rows
        self._dealing = dealing
        self.end = source.max_epochs * source.order.num_documents or np.iinfo(np.int64).max
        self._before = [np.zeros(len(Sums()), np.int64)]  # each block
        self._tokens_before = [0]
        self._block = functools.lru_cache(maxsize=4)(self._sum_up)

    def before(self, document: int) -> Sums:
        """Over all documents with lower counters."""
        block, inside = divmod(document, _BLOCK)
        while len(self._before) <= block:
            self._extend()
        within = self._block(block)[:inside].sum(axis=0) if inside else 0
        return Sums(*(self._before[block] + within).tolist())

    def find(self, token: int) -> tuple[int, int]:
        """The document (counter) that holds a token of the stream, and the token's index in it."""
        while self._tokens_before[-1] <= token:
            self._extend()
        block = bisect_right(self._tokens_before, token) - 1
        ends = self._tokens_before[block] + np.cumsum(self._block(block)[:, 0])
        inside = int(np.searchsorted(ends, token, side="right"))
        return block * _BLOCK + inside, token - int(ends[inside] - self._block(block)[inside, 0])

    def lengths(self, document: int) -> Iterator[tuple[int, int]]:
        """(counter, tokens) of the documents that train, from one on."""
        while True:
            block, inside = divmod(document, _BLOCK)
            for length in self._block(block)[inside:, 0].tolist():
                if length:
                    yield document, length
                document += 1

    def order(self, first_row: int, num_rows: int) -> list[int]:
        """In which the rows of a window are dealt, by the definition and Python's integers."""
        if not self._dealing.shuffle:
            return list(range(num_rows))
        name = hashlib.blake2b(self._dealing.source.encode(), digest_size=8).digest()
        key = self._dealing.seed
        for part in (int.from_bytes(name, "little"), first_row):
            key = splitmix64(splitmix64(key) ^ part)
        return sorted(range(num_rows), key=lambda row: splitmix64(key ^ row))

    def _extend(self) -> None:
        self._before.append(self._before[-1] + self._block(len(self._before) - 1).sum(axis=0))
        self._tokens_before.append(int(self._before[-1][0]))

    def _sum_up(self, block: int) -> np.ndarray:
        """Sums' fields of each document of a block, int64 [documents, fields]."""
        counters = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.end))
        if not len(counters):
            raise Difference(f"source {self.source.name}: a row lies behind the last document, {self.end - 1}")
        documents = self.source.order.documents(counters)
        held_out, lengths = self.census.held_out[documents], self.census.trained[documents]
        some, fitting = lengths > 0, (lengths > 0) & (lengths <= self.seq_len + 1)
        first = self._tokens_before[block] + np.cumsum(lengths) - lengths
        last_of_row = (first // self.seq_len + 1) * self.seq_len
        return np.stack(
            [
                lengths,
                some,
                np.where(held_out, 0, self.census.bytes[documents]),
                (self.census.lengths[documents] == 0) & ~held_out,
                held_out,
                fitting,
                fitting & (first + lengths - 1 > last_of_row),
                np.where(some, np.maximum(1, -((1 - lengths) // self.seq_len)), 0),
            ],
            axis=1,
        ).astype(np.int64)


def splitmix64(x: int) -> int:
    """As order.splitmix64, of one number."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class SplitAccount(_Tally):
    """packing = "split": row r in natural order is the tokens from r * seq_len to (r + 1) * seq_len of the source's
    stream, and a window is window_rows rows, or fewer at the end of an epoch."""

    def cursor(self, place: SourceCursor) -> SourceCursor:
        if not place.row:
            return SourceCursor()
        first_row = self._first_row(place)
        document, offset = self.find(first_row * self.seq_len) if first_row else (0, 0)
        window = self._window(first_row)
        rows = window[: place.row - first_row]
        read = (first_row + (len(window) if rows else 0)) * self.seq_len  # the last token in the ledger
        sums = self.before(self.find(read)[0] + 1)
        firsts = sum(self._begun((row + 1) * self.seq_len) - self._begun(row * self.seq_len) for row in rows)
        firsts += self._begun(first_row * self.seq_len) if first_row else 0 in rows
        dealt = place.row * self.seq_len + (first_row > 0 or 0 in rows)  # tokens in rows
        ledger = Ledger(
            read + 1,
            dealt - firsts,
            firsts,
            read + 1 - dealt,
            bytes=sums.bytes,
            bad_records=sums.bad_records,
            held_out=sums.held_out,
            fitting=sums.fitting,
            cut=sums.cut,
        )
        return SourceCursor(place.row, document, offset, place.row - first_row, ledger)

    def rows(self, place: SourceCursor, num_rows: int) -> tuple[list[list[Piece]], SourceCursor]:
        rows: list[list[Piece]] = []
        first_row = self._first_row(place)
        dealt = place.row - first_row
        while True:
            window = self._window(first_row)
            here = window[dealt : dealt + num_rows - len(rows)]
            rows += map(self._row, here)
            dealt += len(here)
            if dealt == len(window):
                first_row, dealt = first_row + dealt, 0
            if len(rows) == num_rows:
                return rows, self.cursor(SourceCursor(first_row + dealt))

    def _first_row(self, place: SourceCursor) -> int:
        """Of the window in which a cursor's row is the next; after its last row that is the next window's."""
        row = place.row
        epoch = (row + 1) * self.seq_len // self._epoch_tokens  # of the row's last token
        first = max(0, (epoch * self._epoch_tokens - 1) // self.seq_len)
        return row - (row - first) % self.window_rows

    def _window(self, first_row: int) -> list[int]:
        """The rows of a window in the order in which they are dealt."""
        epoch = (first_row + 1) * self.seq_len // self._epoch_tokens
        behind = ((epoch + 1) * self._epoch_tokens - 1) // self.seq_len  # the first row that is not whole in the epoch
        num_rows = min(self.window_rows, behind - first_row)
        return [first_row + row for row in self.order(first_row, num_rows)]

    @functools.cached_property
    def _epoch_tokens(self) -> int:
        return int(self.census.trained.sum())

    def _begun(self, token: int) -> int:
        """Documents whose first token is that one or before."""
        return self.before(self.find(token)[0] + 1).documents

    def _row(self, row: int) -> list[Piece]:
        pieces: list[Piece] = []
        document, offset = self.find(row * self.seq_len)
        position = 0
        for counter, length in self.lengths(document):
            pieces.append((position, counter, offset))
            position += length - offset
            offset = 0
            if position > self.seq_len:
                break
        return pieces


class BestFitAccount(_Tally):
    """packing = "best_fit": windows of whole documents, each in rows of its own."""

    def cursor(self, place: SourceCursor) -> SourceCursor:
        dealt: list[list[Piece]] = []
        later: list[list[Piece]] = []
        behind = place.document
        if place.dealt:
            behind, rows = self._window(place.document, place.first_row)
            if place.dealt >= len(rows):
                raise Difference(
                    f"source {self.source.name}: row {place.dealt} of the window of documents from {place.document}"
                    f" on, which has {len(rows)} rows"
                )
            dealt, later = rows[: place.dealt], rows[place.dealt :]
        before, sums = self.before(place.document), self.before(behind)
        parts = [part for row in dealt for part in self._parts(row)]
        document_first = before.documents + sum(offset == 0 for _, offset, _ in parts)
        carried = sum(size - (offset > 0) for row in later for _, offset, size in self._parts(row))
        targets = sums.tokens - document_first - carried
        ledger = Ledger(
            sums.tokens,
            targets,
            document_first,
            carried,
            # Of each piece all tokens but the first are targets; what else is in the rows are pads.
            padding=place.row * (self.seq_len + 1) - targets - before.pieces - len(parts),
            bytes=sums.bytes,
            bad_records=sums.bad_records,
            held_out=sums.held_out,
            fitting=sums.fitting,
        )
        return replace(place, ledger=ledger)

    def rows(self, place: SourceCursor, num_rows: int) -> tuple[list[list[Piece]], SourceCursor]:
        found: list[list[Piece]] = []
        document, first_row, dealt = place.document, place.first_row, place.dealt
        while True:
            behind, rows = self._window(document, first_row)
            here = rows[dealt : dealt + num_rows - len(found)]
            found += here
            dealt += len(here)
            if dealt == len(rows):
                document, first_row, dealt = behind, first_row + dealt, 0
            if len(found) == num_rows:
                return found, self.cursor(SourceCursor(first_row + dealt, document, 0, dealt))

    @functools.lru_cache(maxsize=2)  # noqa: B019  an account lives as long as the verb
    def _window(self, first: int, first_row: int) -> tuple[int, list[list[Piece]]]:
        """The document after a window, and the window's rows in the order in which they are dealt."""
        limited, of_epoch = self.source.max_epochs > 0, self.source.order.num_documents
        behind = self.end
        with suppress(Difference):  # the data end before the window is full
            behind = self._full(first, self.window_rows)
            least = first if limited else self._full(first, min(64, self.window_rows)) - 1
            behind = min(behind, (least // of_epoch + 1) * of_epoch)
        behind = min(behind, (first // of_epoch + 1) * of_epoch) if limited else behind
        documents = self.source.order.documents(np.arange(first, behind))
        lengths = self.census.trained[documents]
        packing = BestFit(self.seq_len, self.window_rows, limited)
        laid = packing.lay(lengths, 0, False, (of_epoch - first % of_epoch, of_epoch), True)
        assert laid is not None
        layout = laid.layout
        natural: list[list[Piece]] = []
        for begin, end in zip(layout.edges[:-1].tolist(), layout.edges[1:].tolist(), strict=True):
            row, position = [], 0
            for k in range(begin, end):
                row.append((position, first + int(layout.documents[k]), int(layout.offsets[k])))
                position += int(layout.sizes[k])
            natural.append([*row, *((pad, -1, 0) for pad in range(position, self.seq_len + 1))])
        self._check_whole(first, behind, first + laid.num_documents, lengths.tolist(), natural)
        return behind, [natural[row] for row in self.order(first_row, len(natural))]

    def _full(self, first: int, num_rows: int) -> int:
        """The document after those that hold, from one on, tokens for half a row less than so many rows."""
        return self.find(self.before(first).tokens + (2 * num_rows - 1) * (self.seq_len + 1) // 2 - 1)[0] + 1

    def _check_whole(self, first: int, behind: int, found: int, lengths: list[int], rows: list[list[Piece]]) -> None:
        """That the rows of a window hold every token of its documents, cut only where a row cannot hold one."""
        name = f"source {self.source.name}, the window of documents from {first} on"
        if found != behind:
            raise Difference(f"{name}: it ends before document {found}, by the lengths before {behind}")
        dealt = sorted(part for row in rows for part in self._parts(row))
        expected = [
            (first + k, offset, min(self.seq_len, length - 1 - offset) + 1)
            for k, length in enumerate(lengths)
            if length
            for offset in range(0, max(1, length - 1), self.seq_len)
        ]
        if unequal := first_unequal(dealt, expected):
            one, other = unequal
            raise Difference(f"{name}: its rows hold the (document, offset, tokens) {one} where {other} belongs")

    def _parts(self, row: list[Piece]) -> list[tuple[int, int, int]]:
        """(counter, offset, tokens) of each piece that is no pad."""
        ends = [position for position, _, _ in row[1:]] + [self.seq_len + 1]
        return [
            (counter, offset, end - position)
            for (position, counter, offset), end in zip(row, ends, strict=True)
            if counter >= 0
        ]


def account_of(
    source: StreamSource, census: Census, packing: str, dealing: Dealing, seq_len: int, window_rows: int
) -> Account:
    account = SplitAccount if packing == "split" else BestFitAccount
    return account(source, census, dealing, seq_len, window_rows)


def check_cursor(where: str, found: SourceCursor, expected: SourceCursor) -> None:
    """Raise Difference unless the cursor is the expected one and its ledger closes."""
    if not found.ledger.closes():
        raise Difference(f"{where}: its ledger does not close: {found.ledger}")
    if found != expected:
        parts = [
            f"{key} is {one} and {other} by the lengths of the documents"
            for state, other_state in ((found, expected), (found.ledger, expected.ledger))
            for (key, one), other in zip(vars(state).items(), vars(other_state).values(), strict=True)
            if one != other and key != "ledger"
        ]
        raise Difference(f"{where}: {'; '.join(parts)}")


def pieces_of(starts: np.ndarray, counters: np.ndarray, offsets: np.ndarray) -> list[Piece]:
    return list(zip(starts.tolist(), counters.tolist(), offsets.tolist(), strict=True))


def first_unequal(some: Sequence[Piece], others: Sequence[Piece]) -> tuple[Piece | None, Piece | None] | None:
    """The first pair that differs, None in it for the end of one."""
    pairs = zip_longest(some, others)
    return next(((one, other) for one, other in pairs if one != other), None)
