"""What the measured lengths of documents say of any place in the stream: cursor, ledger, and the pieces of its rows.

Owns a second account of the stream, to hold the first against: sums over documents in their order, and walks from one
document to the next, where packing.py and best_fit.py keep a running state. In "best_fit" the assignment of a window's
documents to its rows is the packer's; that they are all there, whole and once, is not taken from it. Refuses to read.
"""

import functools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple, Protocol

import numpy as np

from titanlite.data.best_fit import WINDOW_ROWS, BestFitPacker
from titanlite.data.feed import StreamSource
from titanlite.data.stream import Ledger, SourceCursor, read_chunk
from titanlite.inspection.census import Census, MeasuredReader

_BLOCK = 1 << 14  # documents

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

    def __init__(self, source: StreamSource, census: Census, seq_len: int) -> None:
        self.source, self.census, self.seq_len = source, census, seq_len
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


def _ledger(sums: Sums, *, targets: int, document_first: int, carried: int, padding: int, cut: int) -> Ledger:
    return Ledger(
        sums.tokens,
        targets,
        document_first,
        carried,
        padding=padding,
        bytes=sums.bytes,
        bad_records=sums.bad_records,
        held_out=sums.held_out,
        fitting=sums.fitting,
        cut=cut,
    )


class SplitAccount(_Tally):
    """packing = "split": row r is the tokens from r * seq_len to (r + 1) * seq_len of the source's stream."""

    def cursor(self, place: SourceCursor) -> SourceCursor:
        if place.row == 0:
            return SourceCursor()
        token = place.row * self.seq_len  # the last one read as a target; those before are in rows
        document, offset = self.find(token)
        sums = self.before(document + 1)
        ledger = _ledger(
            sums,
            targets=token + 1 - sums.documents,
            document_first=sums.documents,
            carried=sums.tokens - token - 1,
            padding=0,
            cut=sums.cut,
        )
        return SourceCursor(place.row, document, offset, ledger)

    def rows(self, place: SourceCursor, num_rows: int) -> tuple[list[list[Piece]], SourceCursor]:
        rows = [self._row(row) for row in range(place.row, place.row + num_rows)]
        return rows, self.cursor(replace(place, row=place.row + num_rows))

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

    def __init__(self, source: StreamSource, census: Census, seq_len: int, seed: int) -> None:
        super().__init__(source, census, seq_len)
        self._seed, self._reader = seed, MeasuredReader(source.reader, census)
        self._window = functools.lru_cache(maxsize=2)(self._pack_window)

    def cursor(self, place: SourceCursor) -> SourceCursor:
        dealt: list[list[Piece]] = []
        later: list[list[Piece]] = []
        behind = place.document
        if place.offset:
            behind, rows = self._window(place.document)
            if place.offset >= len(rows):
                raise Difference(
                    f"source {self.source.name}: row {place.offset} of the window of documents from {place.document}"
                    f" on, which has {len(rows)} rows"
                )
            dealt, later = rows[: place.offset], rows[place.offset :]
        before, sums = self.before(place.document), self.before(behind)
        parts = [part for row in dealt for part in self._parts(row)]
        document_first = before.documents + sum(offset == 0 for _, offset, _ in parts)
        carried = sum(size - (offset > 0) for row in later for _, offset, size in self._parts(row))
        targets = sums.tokens - document_first - carried
        # Of each piece all tokens but the first are targets; what else is in the rows are pads.
        padding = place.row * (self.seq_len + 1) - targets - before.pieces - len(parts)
        ledger = _ledger(sums, targets=targets, document_first=document_first, carried=carried, padding=padding, cut=0)
        return replace(place, ledger=ledger)

    def rows(self, place: SourceCursor, num_rows: int) -> tuple[list[list[Piece]], SourceCursor]:
        found: list[list[Piece]] = []
        document, offset = place.document, place.offset
        while len(found) < num_rows:
            behind, rows = self._window(document)
            here = rows[offset : offset + num_rows - len(found)]
            found += here
            offset += len(here)
            if offset == len(rows):
                document, offset = behind, 0
        return found, self.cursor(SourceCursor(place.row + num_rows, document, offset))

    def _pack_window(self, first: int) -> tuple[int, list[list[Piece]]]:
        """The document behind a window, and the window's rows."""
        wanted = self.before(first).tokens + (2 * WINDOW_ROWS - 1) * (self.seq_len + 1) // 2
        epoch_documents = self.source.order.num_documents if self.source.max_epochs else 0
        behind = (first // epoch_documents + 1) * epoch_documents if epoch_documents else self.end
        with suppress(Difference):  # the data end before the window is full
            behind = min(behind, self.find(wanted - 1)[0] + 1)
        counters = np.arange(first, behind)
        documents = self.source.order.documents(counters)
        chunk = read_chunk(self._reader, first, documents, self.census.held_out[documents], True)
        if not chunk.lengths.any():
            return behind, []
        packer = BestFitPacker(self.seq_len, SourceCursor(0, first, 0), 0, self._seed, epoch_documents)
        packer.append(chunk)
        rows: list[list[Piece]] = []
        while packer.cursor.document == first and not packer.missing(1):
            taken = packer.take(1, 0, 1)
            rows.append(pieces_of(taken.starts[0], taken.counters[0], taken.offsets[0]))
        self._check_whole(first, behind, packer.cursor.document, chunk.lengths.tolist(), rows)
        return behind, rows

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


def account_of(source: StreamSource, census: Census, packing: str, seq_len: int, seed: int) -> Account:
    if packing == "split":
        return SplitAccount(source, census, seq_len)
    return BestFitAccount(source, census, seq_len, seed)


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
